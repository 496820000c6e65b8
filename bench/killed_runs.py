"""train_sft.py on the toy as a command that is started, watched, killed and started again; for
faults.py.

    with Run(toy, "some name", ranks=2) as run:
        run.start()
        run.wait_until(lambda: run.trained() >= 20)
        run.kill()                  # SIGKILL, every process at once
        run.start()                 # resumes
        run.end()

What a run has done is read from what it wrote, as its user would. Linux.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROWS, ROWS_PER_STEP, HELD_OUT = 40, 2, 8
EPOCHS, EPOCH_STEPS = 3, ROWS // ROWS_PER_STEP
STEPS = EPOCHS * EPOCH_STEPS
SAVE_EVERY, KEEP = 5, 2
LEFT_OUT = ("seconds", "memory_gib")  # of the metrics: they differ from run to run
PATIENCE = 300.0  # seconds without what is waited for


def make_toy(folder: Path) -> None:
    """The student, its rows and a few of them as held-out data."""
    for command in (
        ["redi.toy", folder, "--problems", ROWS, "--benchmark", 1],
        ["redi.prepare", folder / "raw.parquet", "--out", folder],
    ):
        made = [sys.executable, "-m", *map(str, command)]
        subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = (folder / "positives.jsonl").read_text().splitlines(keepends=True)
    if len(rows) != ROWS:
        raise RuntimeError(f"the toy has {len(rows)} rows, not {ROWS}")
    (folder / "held_out.jsonl").write_text("".join(rows[:HELD_OUT]))


class Failed(Exception):
    """A run crashed or hangs."""


@dataclass
class Run:
    """A run in a folder of its own, started as often as it takes. A context manager: whatever
    happens to the bench, no process of the run stays."""

    toy: Path
    name: str
    ranks: int
    starts: int = 0
    process: subprocess.Popen | None = None

    @property
    def out(self) -> Path:
        return self.toy / self.name

    @property
    def log(self) -> Path:
        return self.toy / f"{self.name}-{self.starts}.log"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self._kill_all()

    # ------------------------------------------------------------ done to it

    def command(self) -> list[str]:
        """Held-out passes come right before checkpoints, and before the last save."""
        toy = self.toy
        command = [
            ROOT / "train_sft.py",
            "--model", toy / "student", "--data", toy / "positives.jsonl", "--out", self.out,
            "--cache", toy / "tokens", "--rope-theta", "keep", "--max-position-embeddings", "keep",
            "--max-length", 256, "--lr", 4e-3, "--rows-per-step", ROWS_PER_STEP,
            "--epochs", EPOCHS, "--save-every", SAVE_EVERY, "--keep", KEEP,
            "--eval-data", toy / "held_out.jsonl", "--eval-every", SAVE_EVERY,
        ]  # fmt: skip
        return [str(part) for part in command]

    def start(self) -> None:
        self.starts += 1
        command = self.command()
        if self.ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            command = [*torchrun, "--nproc_per_node", str(self.ranks), *command]
        # Unbuffered, or a kill takes with it what the run said.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, it_is_so: Callable[[], bool]) -> None:
        """Return when it is so, or when the run ended without. Raises Failed."""
        last = time.monotonic() + PATIENCE
        while not it_is_so() and not self._ended():
            if time.monotonic() > last:
                raise Failed(f"hangs; see {self.log}")
            time.sleep(0.001)

    def end(self) -> None:
        """Wait until it ended. Raises Failed."""
        self.wait_until(self._ended)

    def kill(self) -> None:
        """SIGKILL for all its processes, if it has not ended. Raises Failed if it did not end
        well."""
        if not self._ended():
            self._kill_all()

    def _ended(self) -> bool:
        if status := self.process.poll():
            raise Failed(f"exit status {status}; see {self.log}")
        return status == 0

    def _kill_all(self) -> None:
        self.process.send_signal(signal.SIGSTOP)  # torchrun would clean up after its processes
        while state(self.process.pid) in "RSD":
            time.sleep(0.001)
        processes = [*started_by(self.process.pid), self.process.pid]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(map(lives, processes)):
            time.sleep(0.001)

    # ------------------------------------------------------------ seen of it

    def records(self) -> list[dict[str, Any]]:
        """Its metrics, without a line cut short and without fields that differ anyway."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
        return [{k: v for k, v in record.items() if k not in LEFT_OUT} for record in records]

    def trained(self) -> int:
        """The last step that is recorded."""
        return max((r["step"] for r in self.records() if r["kind"] == "train"), default=0)

    def finished(self) -> bool:
        return any(record["kind"] == "finished" for record in self.records())

    def resumed_after(self) -> int:
        """The step after which its last start resumed, as it said; 0 if it began anew."""
        said = re.search(r"resumes after step (\d+)", self.log.read_text())
        return int(said[1]) if said else 0

    def checkpoint(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step-{step:06d}"

    def newest(self) -> list[Path]:
        """The checkpoints that it keeps, oldest first; one that is older may be half removed."""
        return sorted(self.out.glob("checkpoints/step-*"))[-KEEP:]

    def reached_save(self, step: int) -> bool:
        """Whether the checkpoint of `step` is being written, or is there."""
        aside = self.out / "checkpoints" / f".writing-{step:06d}"
        return aside.exists() or self.checkpoint(step).exists()

    def inside(self) -> str:
        """The save that the run is in, by the folder that stands while one is written: of a
        "checkpoint", of the "model", or of neither, ""."""
        marks = {"checkpoint": "checkpoints/.writing-*", "model": ".saving-*"}
        return next((what for what, mark in marks.items() if any(self.out.glob(mark))), "")


# ---------------------------------------------------------------- processes


def started_by(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (*started_by(child), child)]


def state(pid: int) -> str:
    """A letter, as in proc(5): of one that ended Z, or X once nothing is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def lives(pid: int) -> bool:
    return state(pid) not in "ZX"
