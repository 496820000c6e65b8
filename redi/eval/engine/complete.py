"""Prompted samples -> completions: dealt to the ranks, sampled in one queue, decoded.

All benchmarks share a queue, so slots run empty only once, at the very end. Every rank has its own
queue and its share of every benchmark, by expected length: a rank that finishes early cannot help
the others. Expected length grows with the square root of the prompt's length (in 50 problems x 8
traces, the logarithms of question and answer lengths had a correlation of 0.5).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from redi.checkpoint.folder import Source
from redi.distributed import World
from redi.eval.completions import Completion
from redi.eval.engine.generate import Usage, generate
from redi.eval.engine.sampling import Sampling
from redi.eval.grading.repetition import period
from redi.eval.protocol import Asked, EvalConfig
from redi.model import Transformer
from redi.runlog import Progress


def deal(asked: Sequence[Asked], world: World) -> list[Asked]:
    """This rank's share. Samples of a problem stay together, for they share a prefill; the longest
    come first, so that no long one is begun at the end."""
    problems = [list(group) for _, group in groupby(asked, key=lambda a: (a.benchmark, a.id))]
    problems.sort(key=_expected, reverse=True)
    loads: list[Counter[str]] = [Counter() for _ in range(world.world_size)]
    share = []
    for samples in problems:
        name = samples[0].benchmark
        least = min(loads, key=lambda load: (load[name], load.total()))
        least[name] += _expected(samples)
        if least is loads[world.rank]:
            share += samples
    return share


def _expected(samples: list[Asked]) -> float:
    return len(samples) * math.sqrt(len(samples[0].request.prompt_ids))


def complete(
    model: Transformer,
    source: Source,
    asked: Sequence[Asked],
    config: EvalConfig,
    world: World,
    name: str,
) -> Iterator[tuple[Asked, Completion]]:
    """Sample this rank's share of `asked`; completions come as they are finished, behind a progress
    bar on the first rank. Raises UserError as `generate` does."""
    share = deal(asked, world)
    by_key = {one.request.key: one for one in share}
    sampling = Sampling(config.temperature, config.top_p, config.seed)
    cache_bytes = None if config.cache_gib is None else int(config.cache_gib * 2**30)
    tokens, loops, usage, began = 0, 0, Usage(), time.monotonic()
    written = generate(
        model,
        [one.request for one in share],
        source.stop_ids,
        sampling,
        config.slots,
        cache_bytes,
        usage,
    )
    with Progress(len(share), name, unit="response", shown=world.rank == 0) as progress:
        for result in written:
            one = by_key[result.key]
            text = config.prefix + source.chat.decode(result.token_ids)
            yield (
                one,
                Completion(
                    id=one.id,
                    sample=one.sample,
                    text=text,
                    num_tokens=result.num_tokens,
                    finish_reason=result.finish_reason,
                ),
            )
            tokens += result.num_tokens
            loops += period(text) > 0
            speed = f"{tokens / (time.monotonic() - began):,.0f}"
            progress.update({"tok/s": speed, "loops": str(loops)})
    if usage.evictions:
        print(f"{name}: set aside {usage.evictions} times for want of memory; see --cache-gib")
