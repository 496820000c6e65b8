"""Invariant 7: killed at any moment, a run resumes to the same bits as one never killed.

    python -m pytest tests/test_resume.py

Runs that are only stopped run in this process. Those that are killed are the programs' own `main`
in children, forked from a server that has already imported torch, so a start costs little. Kills
come before every change of the file system and after every step; test_killed_runs.py kills real
commands at random moments.
"""

import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import child, die, die_after, main_in_this_process, ranks, run_ranks
from small_run import (
    MODEL_FILES,
    REDI,
    RUN_FILES,
    SFT,
    as_positive,
    assert_resumes_to_the_same_bits,
    assert_same_bits,
    conversation,
    files_in,
    records,
    redi_config,
    run,
    saved,
    sft_config,
    steps,
    weights,
    write_jsonl,
)

from redi import programs, train
from redi.checkpoint.resume import damage, read_state
from redi.config import parse
from redi.data.files import hash_files
from redi.recipe import SFTConfig
from redi.runlog import RunLog, read_metrics

KILLED = -signal.SIGKILL

# ---------------------------------------------------------------- runs that are stopped

STAGE_2 = partial(redi_config, eval_data="pairs.jsonl")
CONFIGS = {
    "sft": partial(sft_config, eval_data="positives.jsonl"),
    "redi": STAGE_2,
    # With this beta DPO's loss is far from ln 2: another reference would show in every digit.
    "dpo": partial(STAGE_2, objective="dpo", beta=0.5, lr=3e-3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_run_resumes_to_the_same_bits(name, here, stop_at, capsys):
    make = partial(CONFIGS[name], epochs=3, eval_every=2, pack_tokens=100)
    run(make(out="whole"))
    for step in (3, 5, 8):  # 3 ends an epoch; of 9 steps, 8 is the last at which a run can stop
        stop_at(make(), step)
        assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": step}
    run(make())
    assert "run: resumes after step 8" in capsys.readouterr().out
    assert_same_bits("run", "whole")
    if name == "dpo":
        assert abs(steps(records())[5]["loss"] - 0.6931) > 0.05


def test_settings_that_compute_nothing_may_change_when_a_run_resumes(here, stop_at):
    run(sft_config(epochs=3, out="whole"))
    stop_at(sft_config(epochs=3, save_every=3, keep=1), 5)
    run(sft_config(epochs=3, save_every=1, keep="all", timeout=7.0, checkpoint_blocks="all"))
    assert records() == records("whole")
    assert saved() == [5, 6, 7, 8]  # with keep 1 it stopped at 5; step 9 is the model


# ---------------------------------------------------------------- damage

STOPPED = [*SFT, "--keep", "2", "--eval-data", "held_out.jsonl"]
OLDER, NEWER = (Path(f"run/checkpoints/step-{step:06d}") for step in (2, 4))
METRICS, WEIGHTS = Path("run/metrics.jsonl"), Path("student/model.safetensors")


@pytest.fixture(scope="module")
def two_checkpoints(made, tmp_path_factory) -> Path:
    """run/, killed after step 5, with checkpoints of steps 2 and 4; and whole/, undisturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    shutil.copy(folder / "positives.jsonl", folder / "held_out.jsonl")
    child(folder, [*STOPPED, "--out", "whole"]).ends(0)
    child(folder, STOPPED, die_after(5)).ends(KILLED)
    assert saved(folder / "run") == [2, 4]
    return folder


@pytest.fixture
def stopped_run(two_checkpoints, tmp_path, monkeypatch) -> None:
    """A copy of that folder as the working folder."""
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def train_again(*flags: str) -> int:
    return main_in_this_process(programs.train_sft, *STOPPED, *flags)


def assert_ends_in_the_same_bits(*flags: str) -> None:
    assert train_again(*flags) == 0
    assert_same_bits("run", "whole")


def flip(file: Path, position: int | None = None) -> None:
    """Flip the lowest bit of a byte, by default of the one in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    file.write_bytes(content)


def edited(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))

    return edit


older_format = edited(lambda state: state.update(format=2))
TENSORS = "rank-0.safetensors"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / TENSORS),
    "cut short": lambda folder: os.truncate(folder / TENSORS, 1000),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half the state": lambda folder: os.truncate(folder / "state.json", 20),
    "a deep state": lambda folder: (folder / "state.json").write_text("[" * 200_000),
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "no facts": edited(lambda state: state.pop("facts")),
    "no files": edited(lambda state: state.update(sha256={})),
    "another file": edited(lambda state: state["sha256"].update({"../secret": ""})),
    "another step": edited(lambda state: state.update(step=2)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind, stopped_run, capsys):
    DAMAGE[kind](NEWER)
    assert damage(NEWER)
    assert_ends_in_the_same_bits()
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith(f"warning: {NEWER} is damaged and skipped: ")
    assert "run: resumes after step 2" in shown.out
    assert not damage(NEWER)  # it was replaced


def test_with_no_valid_checkpoint_a_run_begins_again_and_a_cut_record_is_written_again(
    stopped_run, capsys
):
    for folder in (OLDER, NEWER):
        flip(folder / TENSORS)
    METRICS.write_text(METRICS.read_text() + '{"kind": "train", "st')
    assert_ends_in_the_same_bits()
    shown = capsys.readouterr()
    assert "resumes" not in shown.out
    assert len(shown.err.splitlines()) == 2


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_valid_one(stopped_run):
    # The damaged one, of step 4, is newer than the first that a run with --save-every 1 saves.
    flip(NEWER / TENSORS)
    again = child(Path.cwd(), [*STOPPED, "--save-every", "1", "--keep", "1"], die_after(4))
    again.ends(KILLED)
    assert saved() == [3]
    assert_ends_in_the_same_bits()


def test_files_are_read_in_the_order_of_ranks(tmp_path):
    files = [tmp_path / f"rank-{rank}.safetensors" for rank in range(11)]
    for file in files:
        file.touch()
    hashes = {path.name: hash_files([path]) for path in sorted(files)}  # rank-10 before rank-2
    state = {"format": 3, "step": 30, "sha256": hashes, "facts": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert list(read_state(tmp_path)["sha256"]) == files


# ---------------------------------------------------------------- other files in the folder


def test_half_a_checkpoint_of_a_killed_save_is_replaced_and_a_users_copy_is_left(stopped_run):
    shutil.copytree(OLDER, f"{OLDER}-good")
    shutil.rmtree(NEWER)
    half = Path("run/checkpoints/.writing-000004")
    half.mkdir()
    for name in ("rank-0.safetensors", "rank-1.safetensors", "state.json"):  # two ranks
        (half / name).write_text("half")
    half.with_name(".writing-000003").mkdir()  # of a save after a signal
    assert_ends_in_the_same_bits()
    assert sorted(os.listdir("run/checkpoints")) == [OLDER.name, f"{OLDER.name}-good", NEWER.name]
    assert sorted(os.listdir(NEWER)) == ["rank-0.safetensors", "state.json"]


def test_whoever_reads_the_folder_of_a_checkpoint_may_read_its_files(stopped_run):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in NEWER.iterdir()}
    assert modes["rank-0.safetensors"] == modes["state.json"]


def test_records_reach_the_disk_before_their_checkpoint_gets_its_name(here, monkeypatch):
    fsync, replace_file, done = os.fsync, os.replace, []
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), done.append(os.readlink(f"/proc/self/fd/{file}")))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (replace_file(a, b), done.append(str(b))))
    run(sft_config(save_every=2))
    named = done.index("run/checkpoints/step-000002")
    assert str(METRICS.resolve()) in done[:named]


# ---------------------------------------------------------------- refusals


def change_data(name: str = "positives.jsonl") -> None:
    write_jsonl(Path(name), [as_positive(conversation(number)) for number in range(1, 11)])


def change_tokenizer() -> None:
    with open("student/chat_template.jinja", "a") as template:
        template.write("{# other #}")


def keep_records() -> None:
    """Those of three steps and, between them, a held-out loss."""
    METRICS.write_text("".join(METRICS.read_text().splitlines(keepends=True)[:4]))


def held_by_another_process() -> RunLog:
    return RunLog("run", parse(SFTConfig, "train_sft", STOPPED))


REFUSALS: list[tuple[Callable[[], Any], str, str]] = [  # what changes, --out, the error
    (change_data, "run", "--out run: holds a run whose data sha256 was "),
    (partial(change_data, "held_out.jsonl"), "run", "--out run: holds a run whose held-out data "),
    (change_data, "whole", "--out whole: holds a run whose data sha256 was "),
    (change_tokenizer, "run", "--out run: holds a run whose tokenizer was "),
    (
        partial(flip, WEIGHTS, -1),
        "run",
        "--out run: holds a run whose parent's weights ",
    ),
    (lambda: None, "run --lr 0.5", "--out run: holds another run (lr was 0.001, now 0.5); "),
    (held_by_another_process, "run", "--out run: another process is running there"),
    (partial(older_format, NEWER), "run", f"{NEWER}: written by another version of redi; "),
    (keep_records, "run", f"{METRICS}: has 3 steps, fewer than {NEWER}; restore that file, or "),
]


@pytest.mark.parametrize(("change", "out", "message"), REFUSALS)
def test_resuming_with_something_else_is_one_line_that_names_it(
    change, out, message, stopped_run, capsys
):
    kept = change()  # until the end of the test
    before = files_in("run") | files_in("whole")
    assert train_again("--out", *out.split()) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert files_in("run") | files_in("whole") == before
    del kept


def test_resume_never_begins_again_even_with_other_data(stopped_run, capsys):
    older_format(NEWER)
    keep_records()
    change_data()
    assert train_again("--out", "other") == 0
    capsys.readouterr()
    assert train_again("--resume", "never") == 0
    shown = capsys.readouterr().out
    assert f"removed checkpoints: {NEWER}, {OLDER}\n" in shown
    assert "resumes" not in shown
    assert_same_bits("run", "other")
    assert not damage(NEWER)


def test_the_same_folder_by_another_name_is_the_same_run_and_a_finished_one_is_left_alone(
    stopped_run, capsys
):
    assert_ends_in_the_same_bits("--out", str(Path("run").resolve()))
    assert "resumes after step 4" in capsys.readouterr().out
    before = files_in("run")
    assert train_again() == 0
    assert "run is finished: nothing to do" in capsys.readouterr().out
    assert files_in("run") == before


# ---------------------------------------------------------------- killed

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at_change(number: int) -> None:
    """SIGKILL right before the run's change of the file system with this number. What safetensors
    writes is not seen, but the reading of it is."""
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            changes = path.startswith("run/") and (writes or "/.writing-" in path)
        else:
            there = os.path.exists(path) or "/" not in path  # rmtree names files without folder
            of_run = "__pycache__" not in path  # where Python keeps compiled modules
            changes = event in CHANGES and of_run and there != (event == "os.mkdir")
        if changes:
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(look)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_killed_before_any_change_of_the_file_system_it_resumes_to_the_same_bits(every, alone):
    number, inside_a_save, over = 1, 0, False
    while not over:
        shutil.rmtree("run", ignore_errors=True)
        killed = child(alone, SFT, partial(die_at_change, number))
        killed.process.join(60)
        over = killed.process.exitcode == 0  # it has no more changes to make
        assert over or killed.process.exitcode == KILLED, killed.errors
        inside_a_save += bool(list(Path("run").glob("checkpoints/.writing-*")))
        # A model that loads is complete.
        assert not Path("run/config.json").exists() or set(os.listdir("run")) >= MODEL_FILES
        assert_resumes_to_the_same_bits(alone)
        assert set(os.listdir("run")) == MODEL_FILES | RUN_FILES
        # Killed before it removed the older checkpoint, it still has that one.
        assert saved() in ([4], [2, 4])
        number += every
    assert number > 30
    assert inside_a_save >= 10 // every


KILLS = [  # of a rank, when, and whether that is inside a save
    (0, die_after(1), False),
    (0, die_after(5), False),
    (0, partial(die_at_change, 8), True),
    (1, partial(die_at_change, 1), True),
    (1, partial(die_at_change, 2), True),
]


@pytest.mark.parametrize(("rank", "fault", "inside_a_save"), KILLS)
def test_two_ranks_of_which_one_is_killed_resume_to_the_same_bits(
    rank, fault, inside_a_save, together
):
    both = ranks(together, SFT, *((fault, None) if rank == 0 else (None, fault)))
    both[rank].ends(KILLED)
    both[1 - rank].ends(2)
    assert f"error: rank {1 - rank} lost another process" in both[1 - rank].errors
    if inside_a_save:
        assert os.listdir("run/checkpoints") == [".writing-000002"]
    assert_resumes_to_the_same_bits(together, num_ranks=2)


# ---------------------------------------------------------------- offload

OFFLOAD = [*SFT, "--offload", "true"]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("begun", "ended"), [(OFFLOAD, SFT), (SFT, OFFLOAD)], ids=["off", "on"])
def test_offload_may_change_when_a_run_resumes_and_changes_no_bit(
    begun, ended, num_ranks, whole, monkeypatch
):
    folder = whole(num_ranks)
    shutil.rmtree(folder / "run", ignore_errors=True)
    monkeypatch.chdir(folder)
    for rank in ranks(folder, begun, *[die_after(5)] * num_ranks):
        rank.process.join(60)
    assert saved() == [4]
    run_ranks(folder, ended, num_ranks)
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- other numbers of ranks


def largest_difference(out: str, from_out: str) -> float:
    """Of two models' weights, over the largest weight."""
    one, other = weights(out), weights(from_out)
    differences = [(one[name] - tensor).abs().max() for name, tensor in other.items()]
    return (max(differences) / max(tensor.abs().max() for tensor in other.values())).item()


def test_two_nodes_of_two_ranks_resume_as_one_rank_and_one_as_four(together):
    for rank in ranks(together, SFT, *[die_after(5)] * 4, local_world_size=2):
        rank.process.join(60)
    sizes = [path.stat().st_size for path in NEWER.glob("rank-*")]
    assert len(sizes) == 4
    assert max(sizes) < 2 * min(sizes)
    child(together, SFT).ends(0)
    assert largest_difference("run", "whole") < 1e-6
    shutil.rmtree("run")
    child(together, SFT, die_after(5)).ends(KILLED)
    run_ranks(together, SFT, 4, local_world_size=2)
    assert largest_difference("run", "whole") < 1e-6


def test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16(here):
    # Its reference is a pass without gradients before the optimizer is made.
    stage_2 = {"main": programs.train_redi}
    dpo = [*REDI, "--eval-data", "pairs.jsonl", "--objective", "dpo", "--beta", "0.5"]
    run_ranks(here, [*dpo, "--out", "one"], 1, **stage_2)
    # With a cache of their own the two ranks score the reference, each some of the rows.
    run_ranks(here, [*dpo, "--out", "two", "--cache", "others"], 2, **stage_2)
    run_ranks(here, [*dpo, "--out", "rounded", "--dtype", "bfloat16"], 1, **stage_2)
    one, two, rounded = (
        [record["loss"] for record in steps(records(out))] for out in ("one", "two", "rounded")
    )
    assert one[-1] < 0.5 < one[0]  # ln 2 at first
    assert two == pytest.approx(one, rel=1e-5)
    assert rounded == pytest.approx(one, rel=0.1)
    assert largest_difference("two", "one") < 1e-5


def known_peak() -> None:
    """In the child, give the CPU a peak in FLOP/s, so that MFU is logged."""
    train.monitor.peak_flops = lambda device: 1e9


def test_two_ranks_log_the_update_norm_and_flops_of_one_process(here):
    for out, faults in {"one": [known_peak], "two": [known_peak] * 2}.items():
        for rank in ranks(here, [*SFT, "--out", out], *faults):
            rank.ends(0)
    one, two = (steps(list(read_metrics(Path(out)))) for out in ("one", "two"))
    norms = [[record["update_norm"] for record in run] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    alone, each = ([record["mfu"] * record["seconds"] for record in run] for run in (one, two))
    assert [2 * flops for flops in each] == pytest.approx(alone)
