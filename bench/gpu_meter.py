"""Seconds and bytes on a device, for the parts of bench.gpu.

On a GPU: CUDA events around the work, and the allocator's own count of bytes. On a CPU, where the
parts are tested at tiny sizes: wall-clock time, and the resident memory of the process.
"""

import gc
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.measure import peak_bytes

Outcome = TypeVar("Outcome")
Entries = dict[str, dict[str, Any]]  # id of a measure -> bench.measure.result


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Of one call. calls: so many in a row, so that the host is ahead as it is in training."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls  # it counts milliseconds


def interleave(
    variants: dict[str, Callable[[], Any]], device: torch.device, rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant, timed once a round, in an order that turns round each time."""
    for run in variants.values():
        seconds(run, device, calls=2)  # compiled, chosen, allocated: not measured
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for _ in range(rounds):
        for name in names:
            found[name].append(seconds(variants[name], device, calls))
        names.reverse()
    return found


def peak(run: Callable[[], Outcome], device: torch.device) -> tuple[int, Outcome]:
    """The most bytes that stand while `run` runs, over what stood before, and what it returns,
    which is counted."""
    free(device)
    if device.type != "cuda":
        outcome: list[Outcome] = []
        taken = peak_bytes(lambda: outcome.append(run()))
        return taken, outcome[0]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, returned


def free(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def has(package: str, part: str) -> bool:
    """Whether a peer is installed; a line says so if it is not."""
    if find_spec(package):
        return True
    print(f"{part}: {package} is not installed: nothing of its beside ours")
    return False


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """By the norms of the whole tensors."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()
