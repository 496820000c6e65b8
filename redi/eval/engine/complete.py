"""Prompted samples -> completions: sampled by all ranks, decoded.

All benchmarks share a queue, so slots are idle only at the very end. When a rank has free slots, it
takes the next problem from a counter that all ranks share, so no rank is idle while problems
remain. The samples of a problem stay together, because they share a prefill.
"""

import itertools
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from redi.checkpoint.folder import Source
from redi.distributed import World
from redi.eval.completions import Completion
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling
from redi.eval.grading.repetition import repeats
from redi.eval.protocol import EvalConfig, PromptedSample
from redi.model import Transformer
from redi.runlog import Progress

_calls = itertools.count()  # of `complete` in this process; each has counters of its own


def complete(
    model: Transformer,
    source: Source,
    prompted: Sequence[PromptedSample],
    config: EvalConfig,
    world: World,
    name: str,
) -> Iterator[tuple[str, Completion]]:
    """Sample this rank's part of `prompted`; yields (benchmark, completion) as one is finished. All
    ranks must call it, with the same arguments. Rank 0 shows the progress of all ranks.
    Raises UserError as `generate` does."""
    counters = shared_counters(world)
    by_key = {one.request.key: one for one in prompted}
    # With more slots than this, the first rank would take all problems of a short list.
    fair_share = -(-len(prompted) // world.world_size)
    usage, began, shown = Usage(), time.monotonic(), 0
    results = generate(
        model,
        [one.request for one in prompted],
        source.stop_ids,
        Sampling(config.temperature, config.top_p, config.seed),
        slots=min(config.slots, fair_share),
        cache_bytes=None if config.cache_gib is None else int(config.cache_gib * 2**30),
        usage=usage,
        groups=take_problems(prompted, counters),
    )
    with Progress(len(prompted), name, unit="response", shown=world.rank == 0) as progress:
        for result in results:
            one = by_key[result.key]
            completion = Completion(
                id=one.problem.id,
                sample=one.sample,
                text=config.prefix + source.chat.decode(result.token_ids),
                num_tokens=result.num_tokens,
                finish_reason=result.finish_reason,
            )
            yield one.benchmark, completion
            tokens = counters.add("tokens", result.num_tokens)
            loops = counters.add("loops", int(repeats(completion.text)))
            done = counters.add("completions", 1)
            speed = f"{tokens / (time.monotonic() - began):,.0f}"
            for _ in range(done - shown):  # those of all ranks
                progress.update({"tok/s": speed, "loops": str(loops)})
            shown = done
    if usage.evictions:
        print(f"{name}: evicted {usage.evictions} times for lack of memory; see --cache-gib")


def shared_counters(world: World) -> dist.Store:
    """`store.add(name, n)` adds to a counter of all ranks and returns its new value."""
    if world.world_size == 1:
        return dist.HashStore()
    return dist.PrefixStore(f"complete {next(_calls)}", dist.group.WORLD.get_group_store())


def take_problems(
    prompted: Sequence[PromptedSample], counters: dist.Store
) -> Iterator[list[Request]]:
    """The requests of one problem after another, of those that no other rank has taken."""
    by_problem = itertools.groupby(prompted, key=lambda one: (one.benchmark, one.problem.id))
    problems = [[one.request for one in group] for _, group in by_problem]
    while (number := counters.add("problems", 1) - 1) < len(problems):
        yield problems[number]
