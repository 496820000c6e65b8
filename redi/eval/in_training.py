"""Evaluate the model on a benchmark between two training steps.

The engine samples from the weights in training. Sharded weights are gathered meanwhile, every rank
samples and grades part of the completions, and the counts are summed. The random numbers are the
same every time, so two scores of a run differ by the model alone.

The prompt is the problem as in training, without the paper's evaluation prompt. An answer may be as
long as a training response, and Math-Verify's rules grade it. Left out: keeping the completions;
evaluate a checkpoint for that.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from redi.checkpoint.folder import Source
from redi.distributed import World, gathered, sum_over_ranks
from redi.eval.benchmarks import load
from redi.eval.engine.complete import complete
from redi.eval.grading.grader import Grader, report_unreadable
from redi.eval.grading.workers import Pool
from redi.eval.protocol import EvalConfig, prompt_samples
from redi.model import Transformer
from redi.recipe import TrainConfig
from redi.train import Scorer


def prepare(config: TrainConfig, source: Source, world: World) -> Scorer:
    """The function that evaluates a model on --eval-benchmark; all ranks must call it. Raises
    UserError: no such benchmark, a broken row, a prompt that fills the context."""
    settings = EvalConfig(
        benchmark=[config.eval_benchmark],
        samples=config.eval_samples,
        temperature=config.eval_temperature,
        user_prompt="plain",
        max_new_tokens=config.max_response,
        seed=config.seed,
    )
    benchmark = load(config.eval_benchmark)
    if world.rank == 0:
        with Pool(settings.graders, settings.grade_seconds) as pool:
            report_unreadable(pool, [benchmark])
    prompted = prompt_samples([benchmark], source, settings)

    def score(model: Transformer, step: int) -> dict[str, float]:
        """pass@1 and failures as fractions, tokens per completion, seconds."""
        began = time.perf_counter()
        name = f"{benchmark.name} after step {step}"
        with allocator_emptied(world.device), gathered(model, config.reshard_after_forward):
            completions = [c for _, c in complete(model, source, prompted, settings, world, name)]
        with Pool(settings.graders, settings.grade_seconds) as pool:
            marks = Grader(pool).marks(benchmark, completions)
        verdicts = Counter(mark.verdict for mark in marks)
        counts = [verdicts[name] for name in ("correct", "truncated", "no_answer")]
        totals = torch.tensor([*counts, sum(m.num_tokens for m in marks)], dtype=torch.float64)
        sum_over_ranks(totals, world)
        correct, truncated, no_answer, tokens = (totals / len(prompted)).tolist()
        return {
            "pass_at_1": correct,
            "mean_tokens": tokens,
            "truncated": truncated,
            "no_answer": no_answer,
            "seconds": time.perf_counter() - began,
        }

    return score


@contextmanager
def allocator_emptied(device: torch.device) -> Iterator[None]:
    """Free what torch's allocator caches between steps, so that the body has room for keys and
    values. Afterwards free these too, and leave them out of the peak that training logs."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
