"""Real commands killed with SIGKILL at random moments end in the same bits as undisturbed ones.

    python -m pytest -m slow tests/test_killed_runs.py

All processes of a run are killed at once; then the same command is started again. Kills before any
change of the file system, and of single ranks, are in test_resume.py.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import ROOT, command, torchrun, wait_until
from small_run import MODEL_FILES, REDI, SFT, assert_same_bits, records, saved, steps

from redi.checkpoint.resume import damage

LONG = ("--epochs", 40, "--save-every", 3, "--keep", 2, "--eval-every", 5)  # 120 steps
RUNS = [("train_sft.py", SFT, 1), ("train_redi.py", REDI, 1), ("train_sft.py", SFT, 2)]


def start(program: str, flags: list[str], num_ranks: int, out: str) -> subprocess.Popen:
    [held_out] = [flag.replace("--data", "--eval-data") for flag in flags if "--data=" in flag]
    arguments = (ROOT / program, *flags, *LONG, held_out, "--out", out)
    return command(*arguments) if num_ranks == 1 else torchrun(num_ranks, *arguments)


def finish(process: subprocess.Popen) -> str:
    """Wait until it ends well. Returns what it printed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def kill_all(process: subprocess.Popen) -> str:
    """SIGKILL for the command and every process it started. Returns what it printed."""
    process.send_signal(signal.SIGSTOP)  # torchrun would otherwise clean up after its ranks
    for pid in [*started_by(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)  # ends when all of them have closed their pipes
    return printed


def started_by(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (*started_by(child), child)]


def steps_done() -> int:
    done = steps(records()) if Path("run/metrics.jsonl").exists() else []
    return max((record["step"] for record in done), default=0)


def assert_nothing_is_half_written() -> None:
    for step in saved()[-2:]:  # an older one may be half removed
        assert not damage(Path(f"run/checkpoints/step-{step:06d}"))
    if Path("run/config.json").exists():  # a model that would load
        for name in MODEL_FILES - {"README.md"}:  # which names its folder
            assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


def assert_few_steps_are_done_again(done: int, printed: str) -> None:
    resumed = re.search(r"resumes after step (\d+)", printed)
    assert done - int(resumed[1] if resumed else 0) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_kills_of_real_commands_at_random_moments_change_no_bit(run, here):
    rng, done = random.Random(0), 0
    finish(start(*run, "whole"))
    for _ in range(7):
        process = start(*run, "run")
        wait_until(lambda before=done: steps_done() > before, process)
        time.sleep(rng.uniform(0.0, 0.2))
        assert_few_steps_are_done_again(done, kill_all(process))
        assert_nothing_is_half_written()
        done = steps_done()
    assert_few_steps_are_done_again(done, finish(start(*run, "run")))
    assert_nothing_is_half_written()
    assert_same_bits("run", "whole")
