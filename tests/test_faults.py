"""What can go wrong around a run ends as promised: full disks, signals, lost ranks, bad numbers.

    python -m pytest tests/test_faults.py

Runs are the programs' `main` in forked children, with something broken in them; torchrun is tested
with real commands. A full disk is a limit on the size of files, because root writes through chmod.
Left out: NCCL, which needs several GPUs.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import ROOT, Child, Fault, after_step, child, die, ranks, torchrun, wait_until
from safetensors.torch import save_file
from small_run import (
    HERE,
    MODEL_FILES,
    RUN_FILES,
    SFT,
    assert_resumes_to_the_same_bits,
    flags,
    loaded,
    read_jsonl,
    records,
    refusal,
    run,
    saved,
    sft_config,
    steps,
    weights,
    write_jsonl,
)
from tokenizers import Tokenizer

from redi import train
from redi.checkpoint.resume import damage
from redi.distributed import World
from redi.runlog import read_metrics


def end(children: list[Child], status: int) -> list[str]:
    """Wait for all of them. Returns the lines of their stderr."""
    for one in children:
        one.ends(status)
    return [line for one in children for line in one.errors.strip().splitlines()]


# ---------------------------------------------------------------- faults


def all_of(*faults: Fault) -> None:
    for fault in faults:
        fault()


def disk_full(free: int) -> None:
    """No file can be longer than `free` bytes from now on. Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))


FULL_FOR_TENSORS = partial(disk_full, 20_000)  # records still fit
FREE = partial(disk_full, resource.RLIM_INFINITY)
FULL_FOR_A_WHILE = partial(all_of, after_step(3, FULL_FOR_TENSORS), after_step(5, FREE))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


SIGTERM, STALL = partial(send, signal.SIGTERM), partial(send, signal.SIGSTOP)


def interrupt_twice(seconds: float) -> None:
    send(signal.SIGINT)
    time.sleep(seconds)
    send(signal.SIGINT)


def terminated_while_saving() -> None:
    save = safetensors.torch.save_file

    def slowly(*arguments, **settings) -> None:
        SIGTERM()
        save(*arguments, **settings)

    safetensors.torch.save_file = slowly


# ---------------------------------------------------------------- disks and signals

NO_SPACE = r"\(rank 0: SafetensorError: .* File too large .*\)"
AT_STEP_3 = "stopped: after step 3 of 6; run/checkpoints/step-000003; the same command resumes"
# The faults of the ranks; the exit status; stderr; the checkpoints that are left.
ENDS: dict[str, tuple[tuple[Fault | None, ...], int, str, list[int]]] = {
    "a full disk in a save": (
        (partial(all_of, after_step(3, FULL_FOR_TENSORS), after_step(5, die)),), -signal.SIGKILL,
        f"warning: the checkpoint of step 4 could not be saved {NO_SPACE}; newest checkpoint: "
        "step 2; training continues",
        [2],
    ),
    "a full disk of the second rank that has room again": (
        (None, FULL_FOR_A_WHILE), 0,
        r".*step 4 could not be saved \(rank 1: SafetensorError: .* File too large.*", [2],
    ),
    "a full disk in the last save": (
        (after_step(6, FULL_FOR_TENSORS),), 2,
        r"error: run: the model could not be saved \(.*", [4],
    ),
    "no room to begin": ((partial(disk_full, 100),), 2, "error: .*", []),
    "two failed saves in a row": (
        (after_step(1, FULL_FOR_TENSORS), None), 2,
        f"warning: the checkpoint of step 2 could not be saved {NO_SPACE}.*\n"
        f"error: run/checkpoints: two checkpoints in a row could not be saved {NO_SPACE}; "
        "newest checkpoint: none; once that is fixed, the same command resumes",
        [],
    ),
    "SIGTERM": ((after_step(2, SIGTERM),), 75, AT_STEP_3, [3]),
    "SIGTERM to one of two ranks": ((None, after_step(2, SIGTERM)), 75, AT_STEP_3, [3]),
    # A terminal sends it to all processes, and torchrun passes it on as well.
    "Ctrl-C, which may arrive twice": (
        (after_step(2, partial(interrupt_twice, 0.0)),), 75, AT_STEP_3, [3],
    ),
    "a second Ctrl-C": (
        (after_step(3, partial(interrupt_twice, 1.1)),), 130,
        "stopped: immediately; the newest checkpoint is kept", [2],
    ),
    "SIGTERM on a full disk": (
        (partial(all_of, after_step(4, SIGTERM), after_step(5, FULL_FOR_TENSORS)),), 75,
        r"warning: .*\nstopped: after step 5 of 6; no checkpoint \(it could not be saved\); "
        "the same command resumes",
        [4],
    ),
    "SIGTERM while the model is saved, too late": ((terminated_while_saving,), 0, "", [4]),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_run_ends_in_these_lines_on_all_ranks_and_resumes_to_the_same_bits(case, request):
    faults, status, errors, checkpoints = ENDS[case]
    folder = request.getfixturevalue("alone" if len(faults) == 1 else "together")
    lines = end(ranks(folder, SFT, *faults), status)
    assert re.fullmatch(errors, "\n".join(lines)), lines
    folders = [Path(f"run/checkpoints/step-{step:06d}") for step in checkpoints]
    assert sorted(Path("run").glob("checkpoints/*")) == folders
    assert not any(map(damage, folders))
    if errors == AT_STEP_3:
        assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": 3}
    if status != 0:
        assert {path.name for path in Path("run").glob("*")} <= RUN_FILES
    again = assert_resumes_to_the_same_bits(folder, len(faults))
    if checkpoints and status != 0:
        assert f"resumes after step {checkpoints[0]}" in again


# ---------------------------------------------------------------- ranks and nodes


def node_of_its_own() -> None:
    """Change to another folder, which has the same model and data, but no run/."""
    shutil.rmtree("node", ignore_errors=True)
    os.mkdir("node")
    os.chdir("node")
    for name in ("student", "positives.jsonl", "tokens"):
        os.symlink(f"../{name}", name)


def test_nodes_that_do_not_share_out_cannot_save_or_resume(together):
    nodes = partial(ranks, together, SFT, None, node_of_its_own, local_world_size=1)
    near, far = nodes()
    end([near, far], 2)
    cause = "FileNotFoundError: expected the files listed in state.json; all nodes must share --out"
    warning, error = near.errors.splitlines()
    assert warning.startswith(
        f"warning: the checkpoint of step 2 could not be saved (rank 0: {cause}"
    )
    assert error.startswith("error: run/checkpoints: two checkpoints in a row could not be saved (")
    assert os.listdir("run/checkpoints") == os.listdir("node/run/checkpoints") == []
    end([child(together, SFT, after_step(3, die))], -signal.SIGKILL)  # only one has checkpoints now
    end(nodes(), 2)
    assert saved() == [2]


def other_rate() -> None:
    sys.argv.append("--lr=0.1")


def other_data() -> None:
    node_of_its_own()
    rows = read_jsonl("positives.jsonl")[1:]
    os.unlink("positives.jsonl")
    write_jsonl(Path("positives.jsonl"), rows)


@pytest.mark.parametrize(
    ("fault", "named"),
    [(other_rate, "lr is 0.1 on rank 1, but 0.001 on rank 0"), (other_data, "data sha256 is ")],
)
def test_a_rank_of_other_settings_or_data_ends_all_before_they_train(fault, named, together):
    lines = end(ranks(together, SFT, None, fault, local_world_size=1), 2)
    assert len(lines) == 2  # one of each node
    assert all(line.startswith(f"error: {named}") for line in lines)
    assert not Path("run").exists()


def test_a_rank_that_stalls_ends_the_others_at_the_timeout(together):
    began, stalls = time.monotonic(), after_step(3, STALL)
    more = ["--timeout", "0.1", "--out"]
    cases = [
        ranks(together, [*SFT, *more, f"run{rank}"], *faults)
        for rank, faults in enumerate([(stalls, None), (None, stalls)])
    ]
    for rank, both in enumerate(cases):
        stalled, other = both[rank], both[1 - rank]
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


def break_down() -> None:
    raise MemoryError("no memory on this rank")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_breaks_says_why_first_and_the_others_end_with_it(rank, together):
    faults = [None, None]
    faults[rank] = after_step(3, break_down)
    both = ranks(together, SFT, *faults)
    broken, other = both[rank], both[1 - rank]
    began = time.monotonic()
    assert end([broken], 1)[-1] == "MemoryError: no memory on this rank"
    [line] = end([other], 2)
    assert time.monotonic() - began < 30  # --timeout is 30 minutes
    assert line.startswith(f"error: rank {1 - rank} lost another process")
    first, second = (one.output.with_suffix(".err").stat().st_mtime_ns for one in (broken, other))
    assert first < second


@pytest.mark.slow
def test_torchrun_that_is_stopped_leaves_a_checkpoint(together):
    agent = torchrun(2, ROOT / "train_sft.py", *SFT, "--epochs", 1000, "--save-every", 1000)
    wait_until(lambda: Path("run/metrics.jsonl").exists() and records(), agent)
    agent.terminate()
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 1
    last = list(read_metrics(Path("run")))[-1]
    assert last["kind"] == "stopped"
    assert f"stopped: after step {last['step']} of " in errors
    assert saved() == [last["step"]]


# ---------------------------------------------------------------- numbers

MARKED = 3  # a row that the second of two ranks meets in step 2


def test_a_row_that_is_not_finite_is_named_with_step_and_rank(here):
    rows = read_jsonl("positives.jsonl")
    rows[MARKED]["prompt"][0]["content"] += " @"
    write_jsonl(here / "marked.jsonl", rows)
    shutil.copytree("student", "broken")
    marked = Tokenizer.from_file("broken/tokenizer.json").token_to_id("@")
    tensors, settings = weights("student"), json.loads(Path("broken/config.json").read_text())
    # Untied: otherwise the head's @ would break the loss of all rows.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][marked] = math.nan
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    Path("broken/config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))

    changes = {"model": "broken", "data": "marked.jsonl", "save_every": 1}
    _, data = loaded(sft_config(**changes))
    plan = replace(data, world=World(0, 2, HERE.device)).plan(4, 42, epoch=0)
    assert MARKED in [int(i) for ids in plan[1][1] for i in ids]
    for _ in range(2):  # started again, it meets the same row
        assert end(ranks(here, [*SFT, *flags(changes)], None, None), 2) == [
            "error: marked.jsonl: step 2 has loss nan and gradient norm nan; the update was not "
            f"applied; rank 1, rows {MARKED + 1}; last good checkpoint: run/checkpoints/step-000001"
        ]
        assert [record["step"] for record in steps(records())] == [1]
        assert saved() == [1]
    assert not MODEL_FILES & set(os.listdir("run"))


def test_a_gradient_that_is_not_finite_names_the_steps_rows(here, monkeypatch):
    norms = iter([1.0, 1.0, math.inf])
    monkeypatch.setattr(
        train.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms), dtype=torch.float32)
    )
    assert re.fullmatch(
        r"positives.jsonl: step 3 has loss \d+\.\d+ and gradient norm inf; the update was "
        r"not applied; rank 0, rows \d+, \d+; last good checkpoint: none yet",
        refusal(run, sft_config()),
    )
    assert not Path("run/model.safetensors").exists()
