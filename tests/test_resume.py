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
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Fault, child, die, die_after, main_in_this_process, ranks, undisturbed
from safetensors.torch import load_file
from small_run import (
    HERE,
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
    write_jsonl,
)

from redi import programs, train
from redi import run as run_module
from redi.checkpoint.resume import Checkpoints, damage, read_state
from redi.config import UserError
from redi.data.files import hash_files
from redi.runlog import RunLog, read_metrics

# ---------------------------------------------------------------- runs that are stopped

OBJECTIVES = {
    "sft": sft_config,
    "redi": redi_config,
    # With this beta DPO's loss is far from ln 2: another reference would show in every digit.
    "dpo": partial(redi_config, objective="dpo", beta=0.5, lr=3e-3),
    "simpo": partial(redi_config, objective="simpo", beta=2.0, gamma=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_run_resumes_to_the_same_bits(name, here, stop_at, capsys):
    data = "positives.jsonl" if name == "sft" else "pairs.jsonl"
    make = partial(OBJECTIVES[name], epochs=3, eval_data=data, eval_every=2, pack_tokens=100)
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


def test_the_newest_checkpoints_are_kept_and_a_pinned_one(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, HERE, {}, keep=2)
    assert all(checkpoints.save(step, model, optimizer) for step in (10, 20, 30))
    assert saved(tmp_path) == [20, 30]
    checkpoints.pinned = 20
    assert all(checkpoints.save(step, model, optimizer) for step in (40, 50, 60))
    assert saved(tmp_path) == [20, 50, 60]


# ---------------------------------------------------------------- a run that stopped at step 5


@pytest.fixture(scope="module")
def two_checkpoints(made, tmp_path_factory) -> Path:
    """run/, killed after step 5, with checkpoints of steps 2 and 4; and whole/, undisturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    shutil.copy(folder / "positives.jsonl", folder / "held_out.jsonl")
    child(folder, [*STOPPED, "--out", "whole"]).ends(0)
    child(folder, STOPPED, die_after(5)).ends(-signal.SIGKILL)
    assert saved(folder / "run") == [2, 4]
    return folder


STOPPED = [*SFT, "--keep", "2", "--eval-data", "held_out.jsonl"]
OLDER, NEWER = (Path(f"run/checkpoints/step-{step:06d}") for step in (2, 4))


@pytest.fixture
def stopped_run(two_checkpoints, tmp_path, monkeypatch) -> None:
    """A copy of it as the working folder."""
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def train_again(*flags: str) -> int:
    return main_in_this_process(programs.train_sft, *STOPPED, *flags)


def assert_ends_in_the_same_bits(*flags: str) -> None:
    assert train_again(*flags) == 0
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)  # reading it would wait for a writer


def edit_state(folder: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / "rank-0.safetensors"),
    "cut short": lambda folder: os.truncate(folder / "rank-0.safetensors", 1000),
    "empty": lambda folder: os.truncate(folder / "rank-0.safetensors", 0),
    "no tensors": lambda folder: (folder / "rank-0.safetensors").unlink(),
    "a pipe of tensors": lambda folder: pipe(folder / "rank-0.safetensors"),
    "a file too many": lambda folder: (folder / "rank-1.safetensors").touch(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half the state": lambda folder: os.truncate(folder / "state.json", 20),
    "a pipe for the state": lambda folder: pipe(folder / "state.json"),
    "a deep state": lambda folder: (folder / "state.json").write_text("[" * 200_000),
    "another step under its name": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(OLDER, folder),
    ),
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "nothing in it": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}
WRONG_STATES: dict[str, Callable[[dict], object]] = {
    "no facts": lambda state: state.pop("facts"),
    "facts of another kind": lambda state: state.update(facts=[]),
    "no hashes": lambda state: state.pop("sha256"),
    "hashes of another kind": lambda state: state.update(sha256=[]),
    "no files": lambda state: state.update(sha256={}),
    "another file is listed": lambda state: state["sha256"].update({"../secret": ""}),
    "a rank too many is listed": lambda state: state["sha256"].update({"rank-1.safetensors": ""}),
    "another step": lambda state: state.update(step=2),
    "no step": lambda state: state.pop("step"),
}
DAMAGE |= {name: partial(edit_state, change=change) for name, change in WRONG_STATES.items()}


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


def test_with_all_checkpoints_damaged_a_run_begins_again(stopped_run, capsys):
    for folder in (OLDER, NEWER):
        flip(folder / "rank-0.safetensors")
    assert_ends_in_the_same_bits()
    shown = capsys.readouterr()
    assert "resumes" not in shown.out
    assert len(shown.err.splitlines()) == 2


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_valid_one(stopped_run):
    # The damaged one, of step 4, is newer than the first that a run with --save-every 1 saves.
    flip(NEWER / "rank-0.safetensors")
    again = child(Path.cwd(), [*STOPPED, "--save-every", "1", "--keep", "1"], die_after(4))
    again.ends(-signal.SIGKILL)
    assert saved() == [3]
    assert_ends_in_the_same_bits()


def test_files_are_read_in_the_order_of_ranks_in_any_order_of_the_state(tmp_path):
    files = [tmp_path / f"rank-{rank}.safetensors" for rank in range(11)]
    for file in files:
        file.touch()
    for shuffled in (sorted(files), sorted(files, reverse=True)):
        hashes = {path.name: hash_files([path]) for path in shuffled}
        state = {"format": 3, "step": 30, "sha256": hashes, "facts": {}}
        (tmp_path / "state.json").write_text(json.dumps(state))
        assert list(read_state(tmp_path)["sha256"]) == files
        assert not damage(tmp_path)


@pytest.mark.parametrize("found", [None, 2, 4])
def test_a_checkpoint_of_another_format_is_one_line_and_never_read(found, stopped_run, capsys):
    edit_state(NEWER, lambda state: state.update(format=found))
    before = files_in("run")
    assert train_again() == 2
    assert capsys.readouterr().err == (
        "error: run/checkpoints/step-000004: written by another version of redi; finish or export "
        "the run with that version, or begin it again with --resume never\n"
    )
    assert files_in("run") == before
    assert_ends_in_the_same_bits("--resume", "never")
    assert not damage(NEWER)


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


def test_records_after_the_checkpoint_are_written_again_once(stopped_run):
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')  # cut by the kill
    assert_ends_in_the_same_bits()
    assert [record["step"] for record in steps(records())] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines()[:4] == lines[:4]


@pytest.mark.parametrize("left", [0, 3])
def test_a_checkpoint_without_its_records_is_neither_resumed_from_nor_removed(
    left, stopped_run, capsys
):
    path = Path("run/metrics.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    before = files_in("run")
    assert train_again() == 2
    assert capsys.readouterr().err == (
        f"error: run/metrics.jsonl: has {left} steps, fewer than run/checkpoints/step-000004; "
        "restore that file, or begin again with --resume never\n"
    )
    assert files_in("run") == before
    assert_ends_in_the_same_bits("--resume", "never")
    assert f"removed checkpoints: {NEWER}, {OLDER}\n" in capsys.readouterr().out


def test_records_reach_the_disk_before_their_checkpoint_gets_its_name(here, monkeypatch):
    fsync, replace_file, done = os.fsync, os.replace, []
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), done.append(os.readlink(f"/proc/self/fd/{file}")))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (replace_file(a, b), done.append(str(b))))
    run(sft_config(save_every=2))
    named = done.index("run/checkpoints/step-000002")
    assert str(Path("run/metrics.jsonl").resolve()) in done[:named]


# ---------------------------------------------------------------- refusals


def change_data(name: str = "positives.jsonl") -> None:
    write_jsonl(Path(name), [as_positive(conversation(number)) for number in range(1, 11)])


def change_tokenizer() -> None:
    with open("student/chat_template.jinja", "a") as template:
        template.write("{# other #}")


def change_weights() -> None:
    path = Path("student/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the exponent's low bit of the last number
    path.write_bytes(content)


REFUSALS: dict[str, tuple[Callable[[], None] | None, list[str], str]] = {
    "data": (change_data, [], "data sha256 was"),
    "held-out data": (partial(change_data, "held_out.jsonl"), [], "held-out data sha256 was"),
    "data of a finished run": (change_data, ["--out", "whole"], "data sha256 was"),
    "tokenizer": (change_tokenizer, [], "tokenizer was"),
    "weights": (change_weights, [], "parent's weights sha256 was"),
    "batch size": (None, ["--rows-per-step", "5"], "rows_per_step was 4, now 5"),
    "learning rate": (None, ["--lr", "0.5"], "lr was 0.001, now 0.5"),
    "epochs": (None, ["--epochs", "4"], "epochs was 2, now 4"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_resuming_with_something_else_is_refused_by_name(case, stopped_run, capsys):
    change, flags, named = REFUSALS[case]
    if change:
        change()
    before = files_in("run") | files_in("whole")
    assert train_again(*flags) == 2
    [error] = capsys.readouterr().err.splitlines()
    out = "whole" if "whole" in flags else "run"
    assert error.startswith(f"error: --out {out}: holds a")
    assert named in error
    assert files_in("run") | files_in("whole") == before


def test_another_stage_and_another_objective_are_refused_by_name(here, stop_at):
    stop_at(redi_config(), 2)
    with pytest.raises(UserError, match=r"--out run: .*objective was 'redi', now 'symmetric'"):
        run(redi_config(objective="symmetric"))
    with pytest.raises(UserError, match=r"data was 'pairs.jsonl', now 'positives.jsonl'"):
        run(sft_config())


def test_the_same_folder_by_another_name_is_the_same_run(stopped_run, capsys):
    assert_ends_in_the_same_bits("--out", str(Path("run").resolve()))
    assert "resumes after step 4" in capsys.readouterr().out


def test_resume_never_begins_again_and_takes_other_data(here, stop_at, capsys):
    stop_at(sft_config(epochs=3, save_every=2), 5)
    change_data("other.jsonl")
    os.replace("other.jsonl", "positives.jsonl")
    run(sft_config(epochs=3, out="whole"))
    capsys.readouterr()
    stop_at(sft_config(epochs=3, resume="never"), 3)
    assert "resumes" not in capsys.readouterr().out
    assert [record["step"] for record in steps(records())] == [1, 2, 3]
    assert saved() == [3]  # none of the earlier run's
    run(sft_config(epochs=3))
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- two at a time


def test_a_second_run_ends_before_it_chooses_a_checkpoint(here, stop_at, monkeypatch):
    stop_at(sft_config(epochs=3), 5)
    first = RunLog("run", sft_config(epochs=3))
    before = files_in("run")
    monkeypatch.setattr(Checkpoints, "newest_valid", lambda *_: pytest.fail("has chosen"))
    with pytest.raises(UserError, match="--out run: another process is running there"):
        run(sft_config(epochs=3))
    assert files_in("run") == before
    del first


def test_a_finished_run_is_left_alone_even_if_another_process_finished_it_meanwhile(
    here, capsys, monkeypatch
):
    facts_of, before = run_module.facts_of, {}

    def meanwhile(*given: Any) -> dict[str, str]:  # the first call does the whole run
        monkeypatch.setattr(run_module, "facts_of", facts_of)
        run(sft_config())
        before.update(files_in("run"))
        return facts_of(*given)

    monkeypatch.setattr(run_module, "facts_of", meanwhile)
    for _ in range(2):  # then once more, from the beginning
        run(sft_config())
        assert "run is finished: nothing to do" in capsys.readouterr().out
        assert files_in("run") == before


# ---------------------------------------------------------------- killed

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at_change(number: int) -> Fault:
    """SIGKILL right before the run's change of the file system with this number."""
    return partial(_die_at_change, number)


def _die_at_change(number: int) -> None:
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            changes = path.startswith("run/") and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
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
        killed = child(alone, SFT, die_at_change(number))
        killed.process.join(60)
        over = killed.process.exitcode == 0  # it has no more changes to make
        assert over or killed.process.exitcode == -signal.SIGKILL, killed.errors
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


KILLS_ON_TWO_RANKS = {  # the rank, and when; then whether that is inside a save
    "after step 1": (0, die_after(1), False),
    "after step 3": (0, die_after(3), False),
    "after step 5": (0, die_after(5), False),
    "rank 0 before change 4": (0, die_at_change(4), True),
    "rank 0 before change 8": (0, die_at_change(8), True),
    "rank 1 before change 1": (1, die_at_change(1), True),
    "rank 1 before change 2": (1, die_at_change(2), True),
}


@pytest.mark.parametrize("kill", KILLS_ON_TWO_RANKS)
def test_two_ranks_of_which_one_is_killed_resume_to_the_same_bits(kill, together):
    rank, fault, inside_a_save = KILLS_ON_TWO_RANKS[kill]
    both = ranks(together, SFT, *((fault, None) if rank == 0 else (None, fault)))
    both[rank].ends(-signal.SIGKILL)
    both[1 - rank].ends(2)
    assert f"error: rank {1 - rank} lost another process" in both[1 - rank].errors
    if inside_a_save:
        assert os.listdir("run/checkpoints") == [".writing-000002"]
    assert_resumes_to_the_same_bits(together, num_ranks=2)


def test_two_ranks_resume_from_a_save_right_after_a_held_out_loss(together):
    # A pass without gradients leaves the weights whole on every rank: the save must find shards.
    arguments = [*SFT, "--eval-data", "positives.jsonl", "--eval-every", "2"]
    undisturbed(together, [*arguments, "--out", "evaluated"])
    killed, lost = ranks(together, arguments, die_after(5), None)
    killed.ends(-signal.SIGKILL)
    lost.ends(2)
    undisturbed(together, arguments)
    assert_same_bits("run", "evaluated")
    assert largest_difference("evaluated", "whole") == 0


# ---------------------------------------------------------------- other numbers of ranks


def largest_difference(out: str, from_out: str) -> float:
    """Of two models' weights, over the largest weight."""
    one, other = (load_file(f"{folder}/model.safetensors") for folder in (out, from_out))
    differences = [(one[name] - tensor).abs().max() for name, tensor in other.items()]
    return (max(differences) / max(tensor.abs().max() for tensor in other.values())).item()


def test_two_nodes_of_two_ranks_resume_as_one_rank_and_one_as_four(together):
    # Each node holds all weights, and saves half of the tensors.
    for rank in ranks(together, SFT, *[die_after(5)] * 4, local_world_size=2):
        rank.process.join(60)
    sizes = [path.stat().st_size for path in NEWER.glob("rank-*")]
    assert len(sizes) == 4
    assert max(sizes) < 2 * min(sizes)
    child(together, SFT).ends(0)
    assert largest_difference("run", "whole") < 1e-6
    shutil.rmtree("run")
    child(together, SFT, die_after(5)).ends(-signal.SIGKILL)
    undisturbed(together, SFT, 4, local_world_size=2)
    assert largest_difference("run", "whole") < 1e-6


def test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16(here):
    # Its reference is a pass without gradients before the optimizer is made.
    dpo = [*REDI, "--eval-data", "pairs.jsonl", "--objective", "dpo", "--beta", "0.5"]
    undisturbed(here, [*dpo, "--out", "one"], 1, programs.train_redi)
    # With a cache of their own the two ranks score the reference, each some of the rows.
    undisturbed(here, [*dpo, "--out", "two", "--cache", "others"], 2, programs.train_redi)
    undisturbed(here, [*dpo, "--out", "rounded", "--dtype", "bfloat16"], 1, programs.train_redi)
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


def test_two_nodes_log_the_update_norm_and_flops_of_one_process(here):
    # Both nodes hold all weights, whose update counts once; each does half of the FLOPs.
    for out, faults in {"one": [known_peak], "two": [known_peak] * 2}.items():
        for rank in ranks(here, [*SFT, "--out", out], *faults, local_world_size=1):
            rank.ends(0)
    one, two = (steps(list(read_metrics(Path(out)))) for out in ("one", "two"))
    norms = [[record["update_norm"] for record in run] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    alone, each = ([record["mfu"] * record["seconds"] for record in run] for run in (one, two))
    assert [2 * flops for flops in each] == pytest.approx(alone)
