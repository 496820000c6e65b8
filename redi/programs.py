"""The mains of the three programs, flags -> a run, and the one that exports a run's checkpoint.

They sit above the core and the tools, and join the two: training itself knows no evaluation, so
`--eval-benchmark` is turned into a function here that training calls between its steps. A program
imports only what it needs: without that flag, no module of redi/eval is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from redi import distributed
from redi.checkpoint.folder import Source, open_model, save_model
from redi.checkpoint.resume import load_weights, read_state
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, check_table, load_toml, parse, program, types_of
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
    run(config, sft(), prepare_score)


@program
def train_redi() -> None:
    config = parse(REDIConfig, "Stage 2 of REDI: learning from right and wrong traces.")
    run(config, config.make_objective(), prepare_score)


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


@dataclass(kw_only=True)
class ExportConfig:
    checkpoint: Annotated[str, "RUN/checkpoints/step-NNNNNN"]
    out: Annotated[str, "folder for the model"] = "out/exported"


@program
def export() -> None:
    config = parse(ExportConfig, "Export a checkpoint of a run as a Hugging Face folder.")
    folder, out = Path(config.checkpoint), Path(config.out)
    if not folder.is_dir() or folder.absolute().parent.name != "checkpoints":
        raise UserError(f"{folder}: no checkpoint; expected RUN/checkpoints/step-NNNNNN")
    recorded = folder.absolute().parent.parent / "config.toml"
    run = load_toml(recorded, str(recorded))
    used = {name: run.get(name) for name in ("model", "rope_theta", "max_position_embeddings")}
    run = check_table(used, types_of(TrainConfig), str(recorded))
    # A killed export leaves a folder that the next one deletes.
    if out.is_dir() and any(not path.name.startswith(".saving-") for path in out.iterdir()):
        raise UserError(f"--out {out}: is not empty; choose another folder")
    model, source = open_model(run["model"], run["rope_theta"], run["max_position_embeddings"])
    model.to_empty(device="cpu")
    load_weights(folder, model)
    parent = read_state(folder)["facts"].get("parent's weights sha256")
    if parent != weights_hash(source.folder):
        raise UserError(f"{run['model']}: has changed since {recorded.parent} was trained from it")
    save_model(model, out, source)
    print(f"saved {out}: a Hugging Face folder, {folder.name} of {recorded.parent}")
