"""What can go wrong around a run ends as promised: full disks, signals, lost ranks, bad numbers.

    python -m pytest tests/test_faults.py

Runs, and ways to start them, are those of py: the programs' `main` in forked children,
here with something broken in them. A full disk is a limit on the size of files (root writes through
chmod). Left out: NCCL, which needs several GPUs.
"""

import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import Fault, after_step, child, die, ranks
from safetensors.torch import load_file, save_file
from small_run import (
    MODEL_FILES,
    SFT,
    as_positive,
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
from redi.checkpoint.folder import open_model
from redi.checkpoint.resume import damage
from redi.config import UserError
from redi.distributed import World
from redi.objectives import sft
from redi.run import load_data
from redi.runlog import read_metrics
from redi.toy import student as toy

ROOT = Path(__file__).parent.parent


@pytest.fixture
def alone(whole, monkeypatch) -> Path:
    """A folder with whole/, an undisturbed run, and no run/."""
    return without_run(whole, monkeypatch)


@pytest.fixture
def together(on_two_ranks, monkeypatch) -> Path:
    """The same, on two ranks."""
    return without_run(on_two_ranks, monkeypatch)


def without_run(folder: Path, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    if Path("run").exists():
        Path("run").rename(f"run-{len(os.listdir())}")
    return folder


def all_of(*faults: Fault) -> Fault:
    return partial(_all_of, faults)


def _all_of(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        fault()


# ---------------------------------------------------------------- disks


def disk_full(free: int = 0) -> None:
    """No file can be longer than `free` bytes from now on. Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))


DISK_FULL_FOR_TENSORS = partial(disk_full, 20_000)  # records still fit
DISK_FREE = partial(disk_full, resource.RLIM_INFINITY)


def test_a_full_disk_in_a_save_leaves_the_checkpoint_before_and_the_run_alive(alone):
    full = all_of(after_step(3, DISK_FULL_FOR_TENSORS), after_step(5, die))
    killed = child(alone, SFT, full)
    killed.ends(-signal.SIGKILL)
    [line] = killed.errors.splitlines()
    assert line == (
        "warning: the checkpoint of step 4 could not be saved (rank 0: run/checkpoints/"
        ".writing-000004/rank-0.safetensors: cannot be written (File too large)); newest "
        "checkpoint: step 2; training continues"
    )
    assert os.listdir("run/checkpoints") == ["step-000002"]
    assert not damage(Path("run/checkpoints/step-000002"))
    again = child(alone, SFT)
    again.ends(0)
    assert "resumes after step 2" in again.shown
    assert_same_bits("run", "whole")


def test_once_there_is_room_again_the_next_save_succeeds(alone):
    full = all_of(after_step(1, DISK_FULL_FOR_TENSORS), after_step(3, DISK_FREE))
    ran = child(alone, SFT, full)
    ran.ends(0)
    [line] = ran.errors.splitlines()
    assert "step 2 could not be saved" in line
    assert line.endswith("newest checkpoint: none; training continues")
    assert os.listdir("run/checkpoints") == ["step-000004"]
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_ranks_disk_is_full_no_rank_saves_and_all_continue(rank, together):
    faults = [None, None]
    faults[rank] = all_of(after_step(3, DISK_FULL_FOR_TENSORS), after_step(5, DISK_FREE))
    both = ranks(together, SFT, *faults)
    for one in both:
        one.ends(0)
    [line] = [line for one in both for line in one.errors.splitlines()]
    assert f"step 4 could not be saved (rank {rank}: run/checkpoints/.writing-000004/rank-" in line
    assert "(File too large)" in line
    assert os.listdir("run/checkpoints") == ["step-000002"]
    assert_same_bits("run", "whole")


def test_a_second_failed_save_in_a_row_ends_the_run_on_all_ranks(together):
    # The tensors fit; what rank 0 writes last does not.
    both = ranks(together, SFT, state_does_not_fit, None)
    for rank in both:
        rank.ends(2)
    warning, error = both[0].errors.splitlines()
    cause = "(rank 0: OSError: [Errno 28] No space left on device: 'run/checkpoints/.writing-00000"
    assert warning.startswith(f"warning: the checkpoint of step 2 could not be saved {cause}2")
    assert error.startswith(
        f"error: run/checkpoints: two checkpoints in a row could not be saved {cause}4"
    )
    assert error.endswith("; newest checkpoint: none; once that is fixed, the same command resumes")
    assert both[1].errors == ""
    assert os.listdir("run/checkpoints") == []
    for rank in ranks(together, SFT, None, None):
        rank.ends(0)
    assert_same_bits("run", "whole")


def test_nodes_that_do_not_share_out_cannot_save(together):
    both = ranks(together, SFT, None, node_of_its_own, local_world_size=1)
    for rank in both:
        rank.ends(2)
    cause = "FileNotFoundError: expected the files listed in state.json; all nodes must share --out"
    warning, error = both[0].errors.splitlines()
    assert warning.startswith(
        f"warning: the checkpoint of step 2 could not be saved (rank 0: {cause}"
    )
    assert error.startswith("error: run/checkpoints: two checkpoints in a row could not be saved (")
    assert os.listdir("run/checkpoints") == os.listdir("node/run/checkpoints") == []
    child(together, SFT, after_step(3, die)).ends(-signal.SIGKILL)  # one node has checkpoints now
    for rank in ranks(together, SFT, None, node_of_its_own, local_world_size=1):
        rank.ends(2)
    assert saved() == [2]


def node_of_its_own() -> None:
    """Change to another folder, which has the same model and data, but no run/."""
    shutil.rmtree("node", ignore_errors=True)
    os.mkdir("node")
    os.chdir("node")
    for name in ("student", "positives.jsonl", "tokens"):
        os.symlink(f"../{name}", name)


def state_does_not_fit() -> None:
    from redi.checkpoint import resume

    write = resume.write_aside

    def full(path: Path):
        if path.name == resume.STATE:
            raise OSError(28, "No space left on device", str(path))
        return write(path)

    resume.write_aside = full


def test_a_bug_in_a_save_is_a_warning_and_the_second_time_a_traceback(alone):
    ran = child(alone, SFT, a_bug_in_saves)
    ran.ends(1)
    assert "step 2 could not be saved (rank 0: KeyError: 'exp_avg')" in ran.errors.splitlines()[0]
    assert "redi/checkpoint/resume.py" in ran.errors
    assert ran.errors.endswith("KeyError: 'exp_avg'\n")


def a_bug_in_saves() -> None:
    from redi.checkpoint import resume

    def fail(*_: object) -> None:
        raise KeyError("exp_avg")

    resume.tensors_of = fail


def test_a_full_disk_in_the_last_save_leaves_no_model_and_the_same_command_makes_it(alone):
    failed = child(alone, SFT, after_step(6, DISK_FULL_FOR_TENSORS))
    failed.ends(2)
    [line] = failed.errors.splitlines()
    assert line.startswith("error: run: the model could not be saved (")
    assert set(os.listdir("run")) == {"checkpoints", "config.toml", "metrics.jsonl"}
    again = child(alone, SFT)
    again.ends(0)
    assert "resumes after step 4" in again.shown
    assert_same_bits("run", "whole")


def test_a_run_that_found_no_room_to_begin_begins_later(alone):
    failed = child(alone, SFT, partial(disk_full, 100))
    failed.ends(2)
    assert len(failed.errors.splitlines()) == 1
    child(alone, SFT).ends(0)
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


SIGTERM, SIGINT = partial(send, signal.SIGTERM), partial(send, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_at_hand_with_a_checkpoint(number, alone):
    stopped = child(alone, SFT, after_step(2, partial(send, number)))
    stopped.ends(75)
    assert stopped.errors == (
        "stopped: after step 3 of 6; run/checkpoints/step-000003; the same command resumes\n"
    )
    assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": 3}
    assert saved() == [3]
    child(alone, SFT).ends(0)
    assert_same_bits("run", "whole")


def test_a_signal_to_one_rank_stops_all(together):
    first, second = ranks(together, SFT, None, after_step(2, SIGTERM))
    first.ends(75)
    second.ends(75)
    assert first.errors.startswith("stopped: after step 3 of 6; run/checkpoints/step-000003; ")
    assert second.errors == ""
    for rank in ranks(together, SFT, None, None):
        rank.ends(0)
    assert_same_bits("run", "whole")


def test_a_stop_whose_checkpoint_cannot_be_saved_says_so(alone):
    full = all_of(after_step(4, SIGTERM), after_step(5, DISK_FULL_FOR_TENSORS))
    stopped = child(alone, SFT, full)
    stopped.ends(75)
    assert stopped.errors.splitlines()[-1] == (
        "stopped: after step 5 of 6; no checkpoint (it could not be saved); "
        "the same command resumes"
    )
    child(alone, SFT).ends(0)
    assert_same_bits("run", "whole")


def interrupt_again_after(seconds: float) -> None:
    SIGINT()
    time.sleep(seconds)
    SIGINT()


def test_a_second_ctrl_c_stops_at_once(alone):
    stopped = child(alone, SFT, after_step(3, partial(interrupt_again_after, 1.1)))
    stopped.ends(130)
    assert stopped.errors.strip() == "stopped: immediately; the newest checkpoint is kept"
    assert saved() == [2]
    child(alone, SFT).ends(0)
    assert_same_bits("run", "whole")


def test_a_ctrl_c_that_arrives_twice_is_one(alone):
    # From a terminal that sends it to all processes, and from torchrun, which passes it on.
    child(alone, SFT, after_step(3, partial(interrupt_again_after, 0.0))).ends(75)
    assert saved() == [4]


def terminated_while_saving() -> None:
    save = safetensors.torch.save_file

    def slowly(*arguments, **settings) -> None:
        SIGTERM()
        save(*arguments, **settings)

    safetensors.torch.save_file = slowly


def test_a_signal_while_the_model_is_saved_is_too_late(alone):
    child(alone, SFT, terminated_while_saving).ends(0)
    assert records()[-1] == {"kind": "finished"}
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- ranks


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_stalls_ends_the_others_at_the_timeout(together):
    arguments = [*SFT, "--timeout", "0.1"]
    began = time.monotonic()
    cases = [
        ranks(together, [*arguments, "--out", "run"], None, after_step(3, stall)),
        ranks(together, [*arguments, "--out", "run0"], after_step(3, stall), None),
    ]
    for stalled, both in zip((1, 0), cases):
        both[1 - stalled].ends(2, seconds=30)
        assert time.monotonic() - began > 6
        [line] = both[1 - stalled].errors.splitlines()
        assert line.startswith(
            f"error: rank {1 - stalled} lost another process, which ended (see its own "
            "message) or did not answer within --timeout 0.1 minutes: "
        )
        assert both[stalled].process.is_alive()
        both[stalled].process.kill()
        both[stalled].ends(-signal.SIGKILL)
    for rank in ranks(together, SFT, None, None):
        rank.ends(0)
    assert_same_bits("run", "whole")


def break_down() -> None:
    raise MemoryError("no memory on this rank")


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_breaks_says_why_first_and_the_others_end_with_it(broken, together):
    faults = [None, None]
    faults[broken] = after_step(3, break_down)
    both = ranks(together, SFT, *faults)
    began = time.monotonic()
    both[broken].ends(1)
    both[1 - broken].ends(2)
    assert time.monotonic() - began < 30  # --timeout is 30 minutes
    assert both[broken].errors.splitlines()[-1] == "MemoryError: no memory on this rank"
    [line] = both[1 - broken].errors.splitlines()
    assert line.startswith(f"error: rank {1 - broken} lost another process")
    times = [one.output.with_suffix(".err").stat().st_mtime_ns for one in both]
    assert times[broken] < times[1 - broken]


def torchrun(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A long run on two ranks as real commands: torchrun, and the ranks once they train."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", port, ROOT / "train_sft.py", *SFT, "--epochs", "1000",
        "--save-every", "1000",
    ]  # fmt: skip
    agent = subprocess.Popen(
        [str(part) for part in command],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not Path("run/metrics.jsonl").exists() or not records():
        assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    started = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return agent, sorted(map(int, started), key=rank_of)


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(dict(e.split(b"=", 1) for e in environment if e)[b"RANK"])


def test_torchrun_that_is_stopped_leaves_a_checkpoint(together):
    agent, _ = torchrun(together)
    agent.terminate()
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 1
    last = list(read_metrics(Path("run")))[-1]
    assert last["kind"] == "stopped"
    assert f"stopped: after step {last['step']} of " in errors
    assert saved() == [last["step"]]


def test_a_rank_killed_alone_takes_the_job_down_at_once(together):
    agent, pids = torchrun(together)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    _, errors = agent.communicate(timeout=60)
    assert time.monotonic() - began < 20  # --timeout is 30 minutes
    assert agent.returncode == 1
    root_cause = errors[errors.index("Root Cause") :]
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", root_cause)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ---------------------------------------------------------------- numbers


MARKED = 3  # a row that two ranks come to in step 2, on the second


def nan_in_one_row(folder: Path) -> tuple[int, int, int]:
    """Write a student whose embedding of @ is broken, and rows of which one has it: where the plan
    puts that one, as step, rank and row number."""
    rows = [as_positive(conversation(number)) for number in range(10)]
    rows[MARKED]["prompt"][0]["content"] += " @"
    write_jsonl(folder / "positives.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        # Untied: the head's @ is a word like others, and the loss of other rows stays sound.
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
    tokens = [dataset.sequence(row).tokens.tolist() for row in range(10)]
    assert [row for row in range(10) if broken in tokens[row]] == [MARKED]
    plan = TrainData(dataset, sft(), World(0, 2, torch.device("cpu")), 32768).plan(4, 42, 0)
    [world] = [
        (step, rank, MARKED + 1)
        for step, packs_of in enumerate(plan, start=1)
        for rank, packs in enumerate(packs_of)
        if MARKED in [int(i) for ids in packs for i in ids]
    ]
    return world


def test_a_row_that_is_not_finite_is_named_with_step_and_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step, rank, row = nan_in_one_row(tmp_path)
    assert (step, rank) == (2, 1)
    arguments = [*SFT, "--save-every", "1"]
    for _ in range(2):  # started again, it comes to the same
        first, second = ranks(tmp_path, arguments, None, None)
        first.ends(2)
        second.ends(2)
        assert first.errors == (
            f"error: positives.jsonl: step {step} has loss nan and gradient norm nan; the update "
            f"was not applied; rank {rank}, rows {row}; last good checkpoint: "
            f"run/checkpoints/step-{step - 1:06d}\n"
        )
        assert second.errors == ""
        assert [record["step"] for record in steps(records())] == list(range(1, step))
        assert saved() == [step - 1]
    assert not MODEL_FILES & set(os.listdir("run"))


def test_a_gradient_that_is_not_finite_names_the_steps_rows(here, monkeypatch):
    clip, called = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments) -> torch.Tensor:
        called.append(arguments)
        return clip(*arguments) if len(called) < 3 else torch.tensor(math.inf)

    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(UserError) as refused:
        run(sft_config(save_every=2))
    said = re.fullmatch(
        r"positives.jsonl: step 3 has loss (.*) and gradient norm inf; the update was not applied; "
        r"rank 0, rows (\d+), (\d+); last good checkpoint: run/checkpoints/step-000002",
        str(refused.value),
    )
    assert math.isfinite(float(said[1]))
