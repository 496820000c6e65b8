"""What benchmarks share: rounds of CPU time, a peak of memory, worker processes, the results file.

rounds = interleave({"ours": f, "peer": g}, 5)      f g  g f  f g ...: drift meets both alike
found = ratios(rounds["ours"], rounds["peer"])
write("loss", {"C2": result(found, goal=0.75, peer="plain logits")})
"""

import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from redi.data.files import make_folder, write_aside
from redi.tables import text_table

Time = TypeVar("Time")  # what a clock returns
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "triton", "transformers", "trl", "liger-kernel", "math-verify")


@dataclass(frozen=True)
class CPUSeconds:
    """CPU time of this process: its own code, and the kernel's on its behalf (page faults)."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system

    def since(self, earlier: "CPUSeconds") -> "CPUSeconds":
        return CPUSeconds(self.user - earlier.user, self.system - earlier.system)


def cpu_now() -> CPUSeconds:
    """What this process, all its threads together, has spent so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return CPUSeconds(usage.ru_utime, usage.ru_stime)


def cpu_seconds(run: Callable[[], Any]) -> CPUSeconds:
    gc.collect()
    before = cpu_now()
    run()
    return cpu_now().since(before)


def interleave(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[Callable[[], Any]], Time] = cpu_seconds,
) -> dict[str, list[Time]]:
    """Time every variant once per round, in an order that is reversed after each round."""
    seconds: dict[str, list[Time]] = {name: [] for name in variants}
    names = list(variants)
    for _ in range(rounds):
        for name in names:
            seconds[name].append(clock(variants[name]))
        names.reverse()
    return seconds


def ratios(above: list[CPUSeconds], below: list[CPUSeconds]) -> list[float]:
    """Of two variants' rounds, user and system time together."""
    return [a.total / b.total for a, b in zip(above, below)]


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the memory of this process rises over where it stands, while `run` runs. Linux."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------- on a CPU or a GPU


def clock(device: torch.device, calls: int = 1) -> Callable[[Callable[[], Any]], float]:
    """run -> seconds of one call of it. calls: that many in a row, so that the host runs ahead."""

    def timed(run: Callable[[], Any]) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    return timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes held while `run` runs, over those held before."""
    free(device)
    if device.type != "cuda":
        return peak_bytes(run)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---------------------------------------------------------------- processes


class Worker:
    """A process of one thread without a GPU: it runs target(*arguments, pipe) and is a context
    manager. `ask` sends what target receives from its pipe, and returns what target sends; target
    ends when it receives None."""

    def __init__(
        self, name: str, folder: Path, target: Callable, *arguments: Any, **environment: str
    ):
        context = multiprocessing.get_context("spawn")
        self.name, self.log = name, folder / f"{name}.log"
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(
            target=_work, args=(self.log, target, arguments, other_end), daemon=True
        )
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with patch.dict(os.environ, settings | environment):  # glibc and OpenMP read it at a start
            self.process.start()
        other_end.close()

    def ask(self, question: Any) -> Any:
        """Raises RuntimeError with the worker's last output if it has ended."""
        self.send(question)
        return self.receive()

    def send(self, question: Any) -> None:
        self.pipe.send(question)

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}:\n{self.log.read_text()[-4000:]}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.send(None)
            self.process.join(timeout=60)
        self.process.kill()


def _work(log: Path, target: Callable, arguments: tuple, pipe: Connection) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    target(*arguments, pipe)


# ---------------------------------------------------------------- results


def result(values: list[float], goal: float | None, peer: str) -> dict[str, Any]:
    """The entry of one measure. goal: None for one that is shown beside the others. peer: what it
    is a ratio to, or an agreement with."""
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**spread, "n": len(values), "goal": goal, "peer": peer}


def save(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Replace bench/results/NAME.json: a process killed meanwhile leaves the old file whole."""
    content = {"machine": machine(), "versions": versions(), "results": results}
    make_folder(RESULTS)
    with write_aside(RESULTS / f"{name}.json") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def write(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Print the results and write them to bench/results/NAME.json."""
    rows = [("", "median", "min", "max", "goal", "over")]
    for key, entry in results.items():
        goal = "-" if entry["goal"] is None else f"{entry['goal']:g}"
        numbers = (f"{entry[column]:.3g}" for column in ("median", "min", "max"))
        rows.append((key, *numbers, goal, entry["peer"]))
    print(f"\n{text_table(rows)}")
    save(name, results)
    print(f"wrote {RESULTS / name}.json")


def machine() -> dict[str, Any]:
    found = {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
