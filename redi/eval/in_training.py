"""How good is the model by now? A benchmark asked between two training steps.

The engine samples from the weights that are being trained: unfused, so there is no second copy of
them. Sharded weights are gathered for the time being, every rank makes its share of the completions
and grades it, and the counts are added up. The random numbers are the same every time, so two
scores of a run differ by the model alone.

The question is the problem as training has it, without the paper's evaluation prompt, and an answer
may be as long as a training response: the curve says where training goes. Scores to report are
evaluate.py's. Left out: keeping the completions; saving a checkpoint and evaluating that does.
"""

import time
from dataclasses import dataclass

import torch

from redi.checkpoint.folder import Source
from redi.distributed import World, gathered, sum_over_ranks
from redi.eval.benchmarks import Benchmark, load
from redi.eval.complete import complete
from redi.eval.grade import Grader, report_unreadable
from redi.eval.protocol import Asked, EvalConfig, ask
from redi.model import Transformer


@dataclass(frozen=True)
class Exam:
    """A benchmark, ready to be asked."""

    test: Benchmark
    asked: list[Asked]
    config: EvalConfig
    source: Source
    world: World


def prepare(config: EvalConfig, source: Source, world: World) -> Exam:
    """config: with one benchmark. Raises UserError: no such benchmark, a broken row, a prompt that
    fills the context."""
    test = load(config.benchmark[0])
    if world.rank == 0:
        with make_grader(config) as grader:
            report_unreadable(grader, [test])
    return Exam(test, ask(test, source, config), config, source, world)


def measure(model: Transformer, exam: Exam, step: int, reshard_after_forward: bool) -> dict:
    """The scores of `model`, as the ranks of a run hold it: fractions of 1, tokens per completion,
    seconds that it took. All ranks must ask."""
    began = time.perf_counter()
    if exam.world.device.type == "cuda":
        torch.cuda.empty_cache()  # what the steps hold back is room for keys and values
    with gathered(model, reshard_after_forward):
        name = f"{exam.test.name} after step {step}"
        made = complete(model, exam.source, exam.asked, exam.config, exam.world, name, fused=False)
        completions = [completion for _, completion in made]
    with make_grader(exam.config) as grader:
        marks = grader.marks(exam.test, completions)
    counts = torch.tensor(
        [
            sum(mark.verdict == "correct" for mark in marks),
            sum(mark.num_tokens for mark in marks),
            sum(mark.verdict == "truncated" for mark in marks),
            sum(mark.verdict == "no_answer" for mark in marks),
        ],
        dtype=torch.float64,
    )
    sum_over_ranks(counts, exam.world)
    names = ("pass_at_1", "mean_tokens", "truncated", "no_answer")
    shares = dict(zip(names, (counts / len(exam.asked)).tolist()))
    return shares | {"seconds": time.perf_counter() - began}


def make_grader(config: EvalConfig) -> Grader:
    return Grader(config.graders, config.grade_seconds, config.grader)
