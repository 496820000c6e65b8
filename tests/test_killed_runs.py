"""Real commands killed with SIGKILL at random moments end in the same bits as undisturbed ones.

    python -m pytest -m slow tests/test_killed_runs.py

All processes of a run are killed at once while it trains, while it saves a checkpoint or while it
saves the model; then the same command is started again. Left out: kills while a run starts and of
single ranks (test_resume.py), signals and full disks (test_faults.py).
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import ROOT, command, torchrun, wait_until
from small_run import MODEL_FILES, REDI, SFT, assert_same_bits, records, saved, steps

from redi.checkpoint.resume import damage

EPOCHS, SAVE_EVERY = 40, 5
STEPS = EPOCHS * 3
LONG = ("--epochs", EPOCHS, "--save-every", SAVE_EVERY, "--keep", 2, "--eval-every", SAVE_EVERY)

TRAINING, SAVE, LAST_SAVE = "training", "a save", "the last save"
MOMENTS = [(TRAINING, SAVE), (SAVE, SAVE), (SAVE, TRAINING), (SAVE, LAST_SAVE)]
RUNS = [  # program, flags, number of ranks, moments of each run
    ("train_sft.py", SFT, 1, MOMENTS),
    ("train_redi.py", REDI, 1, MOMENTS[:3]),
    ("train_sft.py", SFT, 2, MOMENTS[1:]),
]


def start(program: str, flags: list[str], num_ranks: int, out: str) -> subprocess.Popen:
    [held_out] = [flag.replace("--data", "--eval-data") for flag in flags if "--data=" in flag]
    arguments = (ROOT / program, *flags, *LONG, held_out, "--out", out)
    return command(*arguments) if num_ranks == 1 else torchrun(num_ranks, *arguments)


def finish(process: subprocess.Popen) -> str:
    """Wait until it ends well. Returns what it printed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def steps_done() -> int:
    return max((record["step"] for record in steps(records())), default=0)


def wait_for(moment: str, process: subprocess.Popen, done: int, rng: random.Random) -> None:
    """Return at a random moment of this kind, after more than `done` steps."""
    step = rng.randrange(done + 1, done + (STEPS - done) // 2)
    wait_until(lambda: Path("run/metrics.jsonl").exists() and steps_done() >= step, process)
    if moment == TRAINING:
        time.sleep(rng.uniform(0.0, 0.05))
    else:
        wait_until(lambda: inside(moment), process, poll=0.0)
        time.sleep(rng.uniform(0.0, 0.01))


def inside(moment: str) -> bool:
    """Whether a checkpoint or the model is being written."""
    return any(Path("run").glob({SAVE: "checkpoints/.writing-*", LAST_SAVE: ".saving-*"}[moment]))


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


def assert_nothing_is_half_written() -> None:
    for step in saved()[-2:]:  # an older one may be half removed
        assert not damage(Path(f"run/checkpoints/step-{step:06d}"))
    if Path("run/config.json").exists():  # a model that would load
        assert_same_model()


def assert_same_model() -> None:
    for name in MODEL_FILES - {"README.md"}:  # which names its folder
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


def assert_few_steps_are_done_again(done: int, printed: str) -> None:
    resumed = re.search(r"resumes after step (\d+)", printed)
    assert done - int(resumed[1] if resumed else 0) <= SAVE_EVERY


@pytest.mark.slow
def test_twenty_kills_of_real_commands_at_random_moments_change_no_bit(here):
    rng, kills, inside_saves = random.Random(0), 0, 0
    for *run, all_moments in RUNS:
        shutil.rmtree("whole", ignore_errors=True)
        finish(start(*run, "whole"))
        for moments in all_moments:
            shutil.rmtree("run", ignore_errors=True)
            done = 0
            for moment in moments:
                process = start(*run, "run")
                wait_for(moment, process, done, rng)
                assert_few_steps_are_done_again(done, kill_all(process))
                assert_nothing_is_half_written()
                done, kills = steps_done(), kills + 1
                inside_saves += inside(SAVE) or inside(LAST_SAVE)
            assert_few_steps_are_done_again(done, finish(start(*run, "run")))
            assert_same_model()
            assert_same_bits("run", "whole")
    assert kills == 20
    assert inside_saves >= 6
