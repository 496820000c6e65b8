"""What can go wrong around a run ends as promised: full disks, signals, lost ranks, bad numbers.

    python -m pytest tests/test_faults.py

Runs are the programs' `main` in forked children, with something broken in them; torchrun is tested
with real commands. A full disk is a limit on the size of files, because root writes through chmod.
Left out: NCCL, which needs several GPUs.
"""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import Child, Fault, after_step, child, die, ranks, torchrun, wait_until
from safetensors.torch import load_file, save_file
from small_run import (
    MODEL_FILES,
    RUN_FILES,
    SFT,
    as_positive,
    assert_resumes_to_the_same_bits,
    assert_same_bits,
    conversation,
    records,
    run,
    saved,
    sft_config,
    steps,
    write_jsonl,
)
from tokenizers import Tokenizer

from redi import train
from redi.batches import TrainData
from redi.checkpoint import resume
from redi.checkpoint.folder import open_model
from redi.checkpoint.resume import damage
from redi.config import UserError
from redi.distributed import World
from redi.objectives import sft
from redi.run import load_data
from redi.runlog import read_metrics
from redi.toy import student as toy

ROOT = Path(__file__).parent.parent


def all_of(*faults: Fault) -> Fault:
    return partial(_all_of, faults)


def _all_of(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        fault()


def two_ranks(folder: Path, broken: int, fault: Fault, *flags: str, **settings) -> list[Child]:
    """Start SFT on two ranks, one of them with a fault. Returns the broken one first."""
    faults = (fault, None) if broken == 0 else (None, fault)
    both = ranks(folder, [*SFT, *flags], *faults, **settings)
    return [both[broken], both[1 - broken]]


def end(children: list[Child], status: int) -> list[str]:
    """Wait for all of them. Returns the lines of their stderr."""
    for one in children:
        one.ends(status)
    return [line for one in children for line in one.errors.strip().splitlines()]


# ---------------------------------------------------------------- disks


def disk_full(free: int = 0) -> None:
    """No file can be longer than `free` bytes from now on. Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))


DISK_FULL_FOR_TENSORS = partial(disk_full, 20_000)  # records still fit
DISK_FREE = partial(disk_full, resource.RLIM_INFINITY)


def test_a_full_disk_in_a_save_leaves_the_checkpoint_before_and_the_run_alive(alone):
    full = all_of(after_step(3, DISK_FULL_FOR_TENSORS), after_step(5, die))
    assert end([child(alone, SFT, full)], -signal.SIGKILL) == [
        "warning: the checkpoint of step 4 could not be saved (rank 0: run/checkpoints/"
        ".writing-000004/rank-0.safetensors: cannot be written (File too large)); newest "
        "checkpoint: step 2; training continues"
    ]
    assert os.listdir("run/checkpoints") == ["step-000002"]
    assert not damage(Path("run/checkpoints/step-000002"))
    assert "resumes after step 2" in assert_resumes_to_the_same_bits(alone)


def test_once_there_is_room_again_the_next_save_succeeds(alone):
    full = all_of(after_step(1, DISK_FULL_FOR_TENSORS), after_step(3, DISK_FREE))
    [line] = end([child(alone, SFT, full)], 0)
    assert "step 2 could not be saved" in line
    assert line.endswith("newest checkpoint: none; training continues")
    assert os.listdir("run/checkpoints") == ["step-000004"]
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_ranks_disk_is_full_no_rank_saves_and_all_continue(rank, together):
    full = all_of(after_step(3, DISK_FULL_FOR_TENSORS), after_step(5, DISK_FREE))
    [line] = end(two_ranks(together, rank, full), 0)
    assert f"step 4 could not be saved (rank {rank}: run/checkpoints/.writing-000004/rank-" in line
    assert "(File too large)" in line
    assert os.listdir("run/checkpoints") == ["step-000002"]
    assert_same_bits("run", "whole")


def test_a_second_failed_save_in_a_row_ends_the_run_on_all_ranks(together):
    # The tensors fit; what rank 0 writes last does not.
    warning, error = end(two_ranks(together, 0, state_does_not_fit), 2)
    cause = "(rank 0: OSError: [Errno 28] No space left on device: 'run/checkpoints/.writing-00000"
    assert warning.startswith(f"warning: the checkpoint of step 2 could not be saved {cause}2")
    assert error.startswith(
        f"error: run/checkpoints: two checkpoints in a row could not be saved {cause}4"
    )
    assert error.endswith("; newest checkpoint: none; once that is fixed, the same command resumes")
    assert os.listdir("run/checkpoints") == []
    assert_resumes_to_the_same_bits(together, num_ranks=2)


def state_does_not_fit() -> None:
    write = resume.write_aside

    def full(path: Path):
        if path.name == resume.STATE:
            raise OSError(28, "No space left on device", str(path))
        return write(path)

    resume.write_aside = full


def test_nodes_that_do_not_share_out_cannot_save_or_resume(together):
    nodes = partial(two_ranks, together, 1, node_of_its_own, local_world_size=1)
    far, near = nodes()
    end([far, near], 2)
    warning, error = near.errors.splitlines()
    cause = "FileNotFoundError: expected the files listed in state.json; all nodes must share --out"
    assert warning.startswith(
        f"warning: the checkpoint of step 2 could not be saved (rank 0: {cause}"
    )
    assert error.startswith("error: run/checkpoints: two checkpoints in a row could not be saved (")
    assert os.listdir("run/checkpoints") == os.listdir("node/run/checkpoints") == []
    end([child(together, SFT, after_step(3, die))], -signal.SIGKILL)  # only one has checkpoints now
    end(nodes(), 2)
    assert saved() == [2]


def node_of_its_own() -> None:
    """Change to another folder, which has the same model and data, but no run/."""
    shutil.rmtree("node", ignore_errors=True)
    os.mkdir("node")
    os.chdir("node")
    for name in ("student", "positives.jsonl", "tokens"):
        os.symlink(f"../{name}", name)


def test_a_bug_in_a_save_is_a_warning_and_the_second_time_a_traceback(alone):
    lines = end([child(alone, SFT, a_bug_in_saves)], 1)
    assert "step 2 could not be saved (rank 0: KeyError: 'exp_avg')" in lines[0]
    assert any("redi/checkpoint/resume.py" in line for line in lines)
    assert lines[-1] == "KeyError: 'exp_avg'"


def a_bug_in_saves() -> None:
    def fail(*_: object) -> None:
        raise KeyError("exp_avg")

    resume.tensors_of = fail


def test_a_full_disk_in_the_last_save_leaves_no_model_and_the_same_command_makes_it(alone):
    [line] = end([child(alone, SFT, after_step(6, DISK_FULL_FOR_TENSORS))], 2)
    assert line.startswith("error: run: the model could not be saved (")
    assert set(os.listdir("run")) == RUN_FILES
    assert "resumes after step 4" in assert_resumes_to_the_same_bits(alone)


def test_a_run_that_found_no_room_to_begin_begins_later(alone):
    assert len(end([child(alone, SFT, partial(disk_full, 100))], 2)) == 1
    assert_resumes_to_the_same_bits(alone)


# ---------------------------------------------------------------- signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


SIGTERM, SIGINT = partial(send, signal.SIGTERM), partial(send, signal.SIGINT)


def interrupt_twice(seconds: float) -> None:
    SIGINT()
    time.sleep(seconds)
    SIGINT()


# How it is stopped; the exit status; the last line of stderr; the checkpoint it leaves.
AT_STEP_3 = "stopped: after step 3 of 6; run/checkpoints/step-000003; the same command resumes"
STOPS: dict[str, tuple[Fault, int, str, int]] = {
    "SIGTERM": (after_step(2, SIGTERM), 75, AT_STEP_3, 3),
    "Ctrl-C": (after_step(2, SIGINT), 75, AT_STEP_3, 3),
    # A terminal sends it to all processes, and torchrun passes it on as well.
    "Ctrl-C that arrives twice": (after_step(2, partial(interrupt_twice, 0.0)), 75, AT_STEP_3, 3),
    "a second Ctrl-C": (
        after_step(3, partial(interrupt_twice, 1.1)),
        130,
        "stopped: immediately; the newest checkpoint is kept",
        2,
    ),
    "SIGTERM on a full disk": (
        all_of(after_step(4, SIGTERM), after_step(5, DISK_FULL_FOR_TENSORS)),
        75,
        "stopped: after step 5 of 6; no checkpoint (it could not be saved); "
        "the same command resumes",
        4,
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_signal_ends_the_run_after_this_step_with_a_checkpoint_or_at_once(stop, alone):
    fault, status, line, checkpoint = STOPS[stop]
    *warnings, last = end([child(alone, SFT, fault)], status)
    assert (len(warnings), last) == ("full disk" in stop, line)
    if line == AT_STEP_3:
        assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": 3}
    assert saved() == [checkpoint]
    assert set(os.listdir("run")) == RUN_FILES
    assert_resumes_to_the_same_bits(alone)


def test_a_signal_to_one_rank_stops_all(together):
    assert end(two_ranks(together, 1, after_step(2, SIGTERM)), 75) == [AT_STEP_3]
    assert_resumes_to_the_same_bits(together, num_ranks=2)


def terminated_while_saving() -> None:
    save = safetensors.torch.save_file

    def slowly(*arguments, **settings) -> None:
        SIGTERM()
        save(*arguments, **settings)

    safetensors.torch.save_file = slowly


def test_a_signal_while_the_model_is_saved_is_too_late(alone):
    end([child(alone, SFT, terminated_while_saving)], 0)
    assert records()[-1] == {"kind": "finished"}
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- ranks


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_stalls_ends_the_others_at_the_timeout(together):
    began = time.monotonic()
    cases = {
        rank: two_ranks(together, rank, after_step(3, stall), "--timeout", "0.1", "--out", out)
        for rank, out in ((1, "run"), (0, "run0"))
    }
    for rank, (stalled, other) in cases.items():
        other.ends(2, seconds=30)
        assert time.monotonic() - began > 6
        [line] = other.errors.splitlines()
        assert line.startswith(
            f"error: rank {1 - rank} lost another process, which ended (see its own "
            "message) or did not answer within --timeout 0.1 minutes: "
        )
        assert stalled.process.is_alive()
        stalled.process.kill()
        stalled.ends(-signal.SIGKILL)
    assert_resumes_to_the_same_bits(together, num_ranks=2)


def break_down() -> None:
    raise MemoryError("no memory on this rank")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_breaks_says_why_first_and_the_others_end_with_it(rank, together):
    broken, other = two_ranks(together, rank, after_step(3, break_down))
    began = time.monotonic()
    assert end([broken], 1)[-1] == "MemoryError: no memory on this rank"
    [line] = end([other], 2)
    assert time.monotonic() - began < 30  # --timeout is 30 minutes
    assert line.startswith(f"error: rank {1 - rank} lost another process")
    first, second = (one.output.with_suffix(".err").stat().st_mtime_ns for one in (broken, other))
    assert first < second


def long_run() -> subprocess.Popen:
    """torchrun with a long run on two ranks, once it trains."""
    agent = torchrun(2, ROOT / "train_sft.py", *SFT, "--epochs", 1000, "--save-every", 1000)
    wait_until(lambda: Path("run/metrics.jsonl").exists() and records(), agent)
    return agent


@pytest.mark.slow
def test_torchrun_that_is_stopped_leaves_a_checkpoint(together):
    agent = long_run()
    agent.terminate()
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 1
    last = list(read_metrics(Path("run")))[-1]
    assert last["kind"] == "stopped"
    assert f"stopped: after step {last['step']} of " in errors
    assert saved() == [last["step"]]


@pytest.mark.slow
def test_a_rank_killed_alone_takes_the_job_down_at_once(together):
    agent = long_run()
    pids = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(int(pids[1]), signal.SIGKILL)
    _, errors = agent.communicate(timeout=60)
    assert time.monotonic() - began < 20  # --timeout is 30 minutes
    assert agent.returncode == 1
    root_cause = errors[errors.index("Root Cause") :]
    assert re.search(rf"exitcode +: -9 \(pid: {pids[1]}\)", root_cause)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ---------------------------------------------------------------- numbers

MARKED = 3  # a row that the second of two ranks meets in step 2


def nan_in_one_row(folder: Path) -> None:
    """Write a student whose embedding of @ is NaN, and rows of which one has it."""
    rows = [as_positive(conversation(number)) for number in range(10)]
    rows[MARKED]["prompt"][0]["content"] += " @"
    write_jsonl(folder / "positives.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        # Untied: otherwise the head's @ would break the loss of all rows.
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        patch.setattr(toy, "STUDENT", {**toy.STUDENT, **sizes, "tie_word_embeddings": False})
        texts = [row["prompt"][0]["content"] for row in rows if row is not rows[MARKED]]
        toy.make_student(folder / "student", texts, seed=0)

    broken = Tokenizer.from_file("student/tokenizer.json").token_to_id("@")
    weights = load_file("student/model.safetensors")
    weights["model.embed_tokens.weight"][broken] = math.nan
    save_file(weights, "student/model.safetensors", metadata={"format": "pt"})

    _, source = open_model("student")
    dataset = load_data("positives.jsonl", sft_config(), source, paired=False)
    plan = TrainData(dataset, sft(), World(0, 2, torch.device("cpu")), 32768).plan(4, 42, 0)
    assert MARKED in [int(i) for ids in plan[1][1] for i in ids]


def test_a_row_that_is_not_finite_is_named_with_step_and_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nan_in_one_row(tmp_path)
    for _ in range(2):  # started again, it meets the same row
        assert end(ranks(tmp_path, [*SFT, "--save-every", "1"], None, None), 2) == [
            "error: positives.jsonl: step 2 has loss nan and gradient norm nan; the update was not "
            f"applied; rank 1, rows {MARKED + 1}; last good checkpoint: run/checkpoints/step-000001"
        ]
        assert [record["step"] for record in steps(records())] == [1]
        assert saved() == [1]
    assert not MODEL_FILES & set(os.listdir("run"))


@pytest.mark.parametrize(
    ("save_every", "kept"), [(2, "run/checkpoints/step-000002"), (3, "none yet")]
)
def test_a_gradient_that_is_not_finite_names_the_steps_rows(save_every, kept, here, monkeypatch):
    clip, called = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments) -> torch.Tensor:
        called.append(arguments)
        return clip(*arguments) if len(called) < 3 else torch.tensor(math.inf)

    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(
        UserError,
        match=r"^positives.jsonl: step 3 has loss \d+\.\d+ and gradient norm inf; the update was "
        rf"not applied; rank 0, rows \d+, \d+; last good checkpoint: {kept}$",
    ):
        run(sft_config(save_every=save_every))
    assert not Path("run/model.safetensors").exists()
