"""Sample a model on benchmarks and grade what it says (Section 4 of arXiv 2505.24850).

    python evaluate.py                                        the published protocol
    torchrun --nproc_per_node 8 evaluate.py --benchmark aime24 --samples 64
    python evaluate.py --config recipes/toy_eval.toml --model out/demo/sft --out out/demo/eval/sft
    python evaluate.py --completions made.jsonl               made by vLLM, SGLang, an API

Every problem is asked `--samples` times at temperature 0.6, top-p 0.95. Completions are on disk as
they are finished: a killed evaluation, started again, makes the rest. Writes completions/ and
verdicts/, a line a completion, and report.json, .md and .html: pass@1 with its SEM and interval,
pass@k, majority vote, lengths and failures, and a page to read completions in.
`python -m redi.eval.grade regrade OUT --grader paper` grades the same completions by other rules.
"""

from pathlib import Path

from redi import distributed
from redi.config import parse, program
from redi.distributed import World, local_rank_zero_first, report_lost_ranks
from redi.eval import benchmarks, elsewhere
from redi.eval.evaluation import evaluate, export
from redi.eval.protocol import EvalConfig
from redi.hub import is_hub_id

# Ranks end hours apart, and one that dies takes the others down at once: torchrun sees to it.
WEEK = 60.0 * 24 * 7  # minutes


@program
def main() -> None:
    config = parse(EvalConfig, "Sample a model on benchmarks, and grade its answers.")
    world = distributed.start(timeout_minutes=WEEK)
    with report_lost_ranks(world, "a week"):
        run(config, world)


def run(config: EvalConfig, world: World) -> None:
    made_by, given = "python train_redi.py" if config.model == EvalConfig.model else None, None
    with local_rank_zero_first(world):  # what is on the hub is downloaded once a node
        tests = benchmarks.load_all(config.benchmark)
    if config.export_prompts:
        return export(config, tests, made_by)
    if config.completions:
        config.samples, given = elsewhere.read_completions(config.completions, tests)
        config.out = config.out or f"out/eval/{Path(config.completions).stem}"
        if config.model == EvalConfig.model:  # some model made them, and nobody said which
            config.model = config.completions
    elif config.out is None:
        config.out = ("out/eval/{}" if is_hub_id(config.model) else "{}/eval").format(config.model)
    evaluate(config, world, tests, given, made_by)


if __name__ == "__main__":
    main()
