"""The mains of the three programs: flags -> a run.

They sit above the core and the tools, and join the two: training itself knows no evaluation, so
`--eval-benchmark` is turned into a function here that training calls between its steps. A program
imports only what it needs: without that flag, no module of redi/eval is loaded.
"""

from redi import distributed
from redi.checkpoint.folder import Source
from redi.config import parse, program
from redi.distributed import World
from redi.objectives import sft
from redi.recipe import REDIConfig, SFTConfig, TrainConfig
from redi.run import run
from redi.train import Scorer

# Ranks of an evaluation end hours apart. torchrun stops the others when one dies.
WEEK = 60.0 * 24 * 7  # minutes


@program
def train_sft() -> None:
    config = parse(SFTConfig, "Stage 1 of REDI: supervised fine-tuning on correct traces.")
    run(config, sft(), paired=False, prepare_score=prepare_score)


@program
def train_redi() -> None:
    config = parse(REDIConfig, "Stage 2 of REDI: learning from pairs of right and wrong traces.")
    run(config, config.make_objective(), paired=True, prepare_score=prepare_score)


def prepare_score(config: TrainConfig, source: Source, world: World) -> Scorer | None:
    """What scores the model between training steps, if --eval-benchmark asks for it."""
    if not config.eval_benchmark:
        return None
    from redi.eval import in_training

    return in_training.prepare(config, source, world)


@program
def evaluate() -> None:
    from redi.eval import evaluation
    from redi.eval.protocol import EvalConfig

    config = parse(EvalConfig, "Sample a model on benchmarks, and grade its answers.")
    world = distributed.start(timeout_minutes=WEEK)
    with distributed.report_lost_ranks(world, "a week"):
        evaluation.run(config, world)
