"""Programs in processes of their own: forked children that can be killed, ranks, real commands."""

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, partialmethod
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # AdamW imports it: better once, in the server of the children
import torch.distributed.fsdp

from redi import programs
from redi.runlog import NoLog, RunLog

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------- real commands


def command(*arguments: object, **environment: object) -> subprocess.Popen:
    """Start `python ARGUMENTS` without a GPU; stdout and stderr are pipes."""
    given = {
        "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1, **environment,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **{name: str(value) for name, value in given.items()}},
    )


def run_command(
    *arguments: object, seconds: float = 120, **environment: object
) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of such a command."""
    process = command(*arguments, **environment)
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def torchrun(processes: int, *arguments: object, **environment: object) -> subprocess.Popen:
    """Start `torchrun --nproc_per_node PROCESSES ARGUMENTS`."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", processes)
    return command(*launcher, "--master_port", free_port(), *arguments, **environment)


def rank_environments(ranks: int, local_world_size: int | None = None) -> list[dict[str, object]]:
    """What torchrun sets for each rank. local_world_size: ranks per node."""
    port, per_node = free_port(), local_world_size or ranks
    return [
        {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node,
            "LOCAL_WORLD_SIZE": per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": "",  # a machine may have fewer GPUs than a test has ranks
        }
        for rank in range(ranks)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(
    happened: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 60
) -> None:
    """Wait for a fact. It fails when the process ends first, or when the time is over."""
    end = time.monotonic() + seconds
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def main_in_this_process(main: Callable[[], None], *arguments: object) -> int:
    """The exit status of a program's main, called with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
    return 0


# ---------------------------------------------------------------- children, to be killed


@dataclass
class Child:
    """A program's `main` in a process of its own."""

    process: multiprocessing.Process
    output: Path

    def ends(self, status: int, seconds: float = 60) -> None:
        """Wait for it, and insist on its exit status; of a signal, that is minus its number."""
        self.process.join(seconds)
        code = self.process.exitcode  # None: it is still running
        self.process.kill()
        assert code == status, f"after {seconds} s: {self.shown} {self.errors}"

    @property
    def shown(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        return self.output.with_suffix(".err").read_text()


@cache
def server() -> multiprocessing.context.ForkServerContext:
    """What children are forked from: it has imported this module, and with it torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    with pytest.MonkeyPatch.context() as patch:  # older Pythons do not tell it where modules are
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return context


Fault = Callable[[], None]  # called in the child before its program


def child(
    folder: Path,
    arguments: list[str],
    fault: Fault | None = None,
    main: Callable[[], None] = programs.train_sft,
    **environment: str,
) -> Child:
    """Start a program in `folder`, with something broken in it."""
    output = folder / f"child-{len(list(folder.glob('child-*.err')))}"
    output.with_suffix(".err").touch()
    settings = (str(folder), arguments, fault, main, output, environment)
    process = server().Process(target=in_child, args=settings, daemon=True)
    process.start()
    return Child(process, output)


def in_child(
    folder: str,
    arguments: list[str],
    fault: Fault | None,
    main: Callable[[], None],
    output: Path,
    environment: dict[str, str],
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # or tqdm's lock is left behind by a kill
    sys.argv = ["program", *arguments]
    atexit._clear()  # of what the server of the children registered
    if fault:
        fault()
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing would skip what the program registered


def ranks(
    folder: Path,
    arguments: list[str],
    *faults: Fault | None,
    main: Callable[[], None] = programs.train_sft,
    local_world_size: int | None = None,
) -> list[Child]:
    """Start a child per rank, with torchrun's environment. local_world_size: ranks per node."""
    started = []
    for fault, environment in zip(faults, rank_environments(len(faults), local_world_size)):
        as_text = {name: str(value) for name, value in environment.items()}
        started.append(child(folder, arguments, fault, main, **as_text))
    return started


def run_ranks(
    folder: Path, arguments: list[str], num_ranks: int = 2, **settings: Any
) -> list[Child]:
    """Run a program on so many ranks, and insist that all of them end well."""
    started = ranks(folder, arguments, *[None] * num_ranks, **settings)
    for rank in started:
        rank.ends(0)
    return started


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(step: int, do: Callable[[], None]) -> Fault:
    """In the child, do something once a step is done and recorded."""
    return partial(_after_step, step, do)


def _after_step(step: int, do: Callable[[], None]) -> None:
    def recorded(log: RunLog | NoLog, record: Callable, kind: str, number: int, **values) -> None:
        record(log, kind, number, **values)
        if (kind, number) == ("train", step):
            do()

    for log in (RunLog, NoLog):  # the first rank's, the others'
        log.record = partialmethod(recorded, log.record)


def die_after(step: int) -> Fault:
    return after_step(step, die)
