"""Invariant 7: killed at any moment, a run resumes to the same bits as one never killed.

    python -m pytest tests/py

Runs that are only stopped go through `redi.run` in this process. Those that are killed are the
programs' own `main` in children, forked from a server that has imported torch already: a start
costs nothing then. Kills are placed, not timed: at every file operation of a run, and after every
step. `python -m bench.faults` places them by the clock, with real commands.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # AdamW imports it: better once, in the server of the children
import torch.distributed.fsdp
from processes import Fault, child, die, die_after, ranks
from safetensors.torch import load_file
from small_run import (
    HERE,
    MODEL_FILES,
    SFT,
    as_positive,
    assert_same_bits,
    conversation,
    files_in,
    loaded,
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
from redi.checkpoint.resume import Checkpoints, damage, read_state, tensors_of
from redi.config import UserError
from redi.data.files import hash_files
from redi.runlog import RunLog, read_metrics
from redi.train import make_optimizer

RUN_FILES = {"checkpoints", "config.toml", "metrics.jsonl"}
CHECKPOINTS = {"step-000002", "step-000004"}


# ---------------------------------------------------------------- runs that are stopped


OBJECTIVES = {
    "sft": sft_config,
    "redi": redi_config,
    # A beta at which DPO's loss lies far from ln 2: another reference would show in every digit.
    "dpo": partial(redi_config, objective="dpo", beta=0.5, lr=3e-3),
    "simpo": partial(redi_config, objective="simpo", beta=2.0, gamma=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_run_resumes_to_the_same_bits(name, here, stop_at, capsys):
    data = "positives.jsonl" if name == "sft" else "pairs.jsonl"
    make = partial(OBJECTIVES[name], epochs=3, eval_data=data, eval_every=2, pack_tokens=100)
    run(make(out="whole"))
    config = make(out="run")
    for step in (3, 5, 8):  # 3 ends an epoch; of 9 steps, 8 is the last at which one can stop
        stop_at(config, step)
        assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": step}
    run(config)
    assert "run: resumes after step 8" in capsys.readouterr().out
    assert_same_bits("run", "whole")


def test_the_reference_of_dpo_is_the_model_at_step_0_in_a_resumed_run_too(here, stop_at):
    # Learning nothing more, a run whose reference is its own start has a loss of ln 2 again.
    config = redi_config(objective="dpo", beta=0.5, lr=3e-3, epochs=3)
    stop_at(config, 5)
    run(config)
    sixth = steps(records())[5]
    run(redi_config(objective="dpo", beta=0.5, lr=3e-3, epochs=3, out="whole"))
    assert sixth == steps(records("whole"))[5]
    assert abs(sixth["loss"] - 0.6931) > 0.05


def test_settings_that_compute_nothing_may_change_under_a_run(here, stop_at):
    run(sft_config(epochs=3, out="whole"))
    stop_at(sft_config(epochs=3, save_every=3, keep=1), 5)
    run(sft_config(epochs=3, save_every=1, keep="all", timeout=7.0, checkpoint_blocks="all"))
    assert records() == records("whole")
    # Of 9 steps; with keep 1 it stopped at 5, and then it keeps all. The last one is the model.
    assert saved() == [5, 6, 7, 8]


# ---------------------------------------------------------------- what a checkpoint holds


def trained(config, number: int):
    """A model and its optimizer after some steps on the first rows."""
    model, data = loaded(config)
    optimizer = make_optimizer(model, config)
    for step in data.plan(config.rows_per_step, config.seed, 0)[:number]:
        totals = data.totals(step)
        for batch in data.batches(step, totals):
            data.loss(model, batch, totals).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_weights_and_moments_come_back_bit_by_bit(here):
    config = redi_config()
    model, optimizer = trained(config, 2)
    checkpoints = Checkpoints(Path("run"), HERE, {}, keep=1)
    assert checkpoints.save(2, model, optimizer)
    wanted = {name: tensor.clone() for name, tensor in tensors_of(model, optimizer).items()}
    parameters = dict(model.named_parameters())
    kinds = ("model", "exp_avg", "exp_avg_sq")
    assert set(wanted) == {f"{kind}.{name}" for kind in kinds for name in parameters}

    fresh, fresh_optimizer = trained(config, 0)
    checkpoints.load(2, fresh, fresh_optimizer)
    found = tensors_of(fresh, fresh_optimizer)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {float(state["step"]) for state in fresh_optimizer.state.values()} == {2.0}
    assert all(wanted[f"{kind}.model.norm.weight"].count_nonzero() for kind in kinds)


def test_the_newest_are_kept_and_a_pinned_one(here):
    model, optimizer = trained(redi_config(), 0)
    checkpoints = Checkpoints(Path("run"), HERE, {}, keep=2)
    for step in (10, 20, 30):
        assert checkpoints.save(step, model, optimizer)
    assert saved() == [20, 30]
    checkpoints.pinned = 20
    for step in (40, 50, 60):
        assert checkpoints.save(step, model, optimizer)
    assert saved() == [20, 50, 60]


def test_the_checkpoint_before_a_collapse_stays_in_a_resumed_run_too(here, stop_at, capsys):
    # At such a rate the rejected traces drag the chosen ones down with them, after a few steps.
    config = redi_config(
        objective="symmetric", lr=0.2, epochs=4, collapse_steps=2, save_every=1, keep=3
    )
    run(replace(config, out="whole"))
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "collapse" in line]
    warned = int(warning.removeprefix("warning: step ").partition(":")[0])
    before = warned - config.collapse_steps - 1  # a record is of the model before its update
    assert saved("whole") == [before, 9, 10, 11]
    stop_at(config, warned + 3)
    run(config)
    assert saved() == [before, 9, 10, 11]
    assert_same_bits("run", "whole")


# ---------------------------------------------------------------- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def sft(monkeypatch, *flags: str) -> None:
    """train_sft.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *SFT, *flags])
    programs.train_sft()


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "rank-0.safetensors"),
    "cut short": lambda folder: os.truncate(folder / "rank-0.safetensors", 1000),
    "empty": lambda folder: os.truncate(folder / "rank-0.safetensors", 0),
    "no tensors": lambda folder: (folder / "rank-0.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half the state": lambda folder: os.truncate(folder / "state.json", 20),
    "another step under its name": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("step-000002"), folder),
    ),
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "nothing in it": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.fixture(scope="module")
def two_checkpoints(made, tmp_path_factory) -> Path:
    """run/ with whole checkpoints of steps 2 and 4, and whole/, which was never stopped."""
    folder = tmp_path_factory.mktemp("damage")
    for name in ("student", "positives.jsonl"):
        (folder / name).symlink_to(made / name)
    child(folder, [*SFT, "--keep", "2", "--out", "whole"]).ends(0)
    child(folder, [*SFT, "--keep", "2"], die_after(5)).ends(-signal.SIGKILL)
    assert saved(folder / "run") == [2, 4]
    return folder


@pytest.fixture
def stopped_run(two_checkpoints, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(two_checkpoints, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind, stopped_run, capsys, monkeypatch):
    newest = stopped_run / "run/checkpoints/step-000004"
    DAMAGE[kind](newest)
    assert damage(newest)
    sft(monkeypatch, "--keep", "2")
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith("warning: run/checkpoints/step-000004 is damaged and skipped: ")
    assert "run: resumes after step 2" in said.out
    assert not damage(newest)  # it was replaced
    assert_same_bits("run", "whole")


STATES: dict[str, Callable[[dict], object]] = {
    "no facts": lambda state: state.pop("facts"),
    "facts of another kind": lambda state: state.update(facts=[]),
    "no hashes": lambda state: state.pop("sha256"),
    "hashes of another kind": lambda state: state.update(sha256=[]),
    "no files": lambda state: state.update(sha256={}),
    "a rank is not listed": lambda state: state["sha256"].pop("rank-1.safetensors"),
    "the first rank is not listed": lambda state: state["sha256"].pop("rank-0.safetensors"),
    "another file is listed": lambda state: state["sha256"].update({"../secret": ""}),
    "another step": lambda state: state.update(step=10),
    "no step": lambda state: state.pop("step"),
}


@pytest.fixture
def of_eleven_ranks(tmp_path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder, and its state.json."""
    folder = tmp_path / "step-000030"
    folder.mkdir()
    for rank in range(11):
        (folder / f"rank-{rank}.safetensors").write_text(f"{rank}")
    hashes = {path.name: hash_files([path]) for path in folder.iterdir()}
    state = {"format": 3, "step": 30, "sha256": hashes, "facts": {}}
    (folder / "state.json").write_text(json.dumps(state))
    assert not damage(folder)
    return folder, state


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_does_not_describe_its_files_is_damage(kind, of_eleven_ranks):
    folder, state = of_eleven_ranks
    STATES[kind](state)
    (folder / "state.json").write_text(json.dumps(state))
    assert damage(folder)


def test_files_are_read_in_the_order_of_ranks_whatever_their_order_in_the_state(of_eleven_ranks):
    folder, state = of_eleven_ranks
    for names in (sorted(state["sha256"]), sorted(state["sha256"], reverse=True)):
        hashes = {name: state["sha256"][name] for name in names}
        (folder / "state.json").write_text(json.dumps({**state, "sha256": hashes}))
        files = list(read_state(folder)["sha256"])
        assert files == [folder / f"rank-{rank}.safetensors" for rank in range(11)]


def test_a_pipe_and_a_deeply_nested_state_are_damage(of_eleven_ranks):
    folder, _ = of_eleven_ranks
    (folder / "state.json").write_text("[" * 200_000)
    assert damage(folder)
    for name in ("rank-1.safetensors", "state.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert damage(folder)  # and does not wait for a writer


def test_with_all_checkpoints_damaged_a_run_begins_again(stopped_run, capsys, monkeypatch):
    for step in (2, 4):
        DAMAGE["a flipped bit"](stopped_run / f"run/checkpoints/step-{step:06d}")
    sft(monkeypatch, "--keep", "2")
    said = capsys.readouterr()
    assert "resumes" not in said.out
    assert len(said.err.splitlines()) == 2
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("found", [None, 2, 4])
def test_a_checkpoint_of_another_format_is_one_line_and_never_read(found, stopped_run, monkeypatch):
    folder = stopped_run / "run/checkpoints/step-000004"
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("format") == 3
    if found:
        state["format"] = found
    (folder / "state.json").write_text(json.dumps(state))
    before = records()
    refused = child(stopped_run, SFT)
    refused.ends(2)
    assert refused.errors == (
        "error: run/checkpoints/step-000004: written by another version of redi; finish or export "
        "the run with that version, or begin it again with --resume never\n"
    )
    assert records() == before
    sft(monkeypatch, "--keep", "2", "--resume", "never")
    assert not damage(folder)
    assert_same_bits("run", "whole")


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_whole_one(stopped_run, monkeypatch):
    # The damaged one of step 4 is newer than what a run with --save-every 1 saves first.
    DAMAGE["a flipped bit"](stopped_run / "run/checkpoints/step-000004")
    child(stopped_run, [*SFT, "--save-every", "1"], die_after(4)).ends(-signal.SIGKILL)
    assert saved() == [3]
    sft(monkeypatch)
    assert_same_bits("run", "whole")


def test_a_copy_of_a_checkpoint_is_left_alone(stopped_run, monkeypatch):
    shutil.copytree("run/checkpoints/step-000002", "run/checkpoints/step-000002-good")
    sft(monkeypatch)
    assert Path("run/checkpoints/step-000002-good").is_dir()


def test_half_a_checkpoint_of_a_killed_save_is_replaced(stopped_run, monkeypatch):
    shutil.rmtree("run/checkpoints/step-000004")
    Path("run/checkpoints/.writing-000004").mkdir()
    for name in ("rank-0.safetensors", "rank-1.safetensors", "state.json"):  # two ranks
        Path("run/checkpoints/.writing-000004", name).write_text("half")
    Path("run/checkpoints/.writing-000003").mkdir()  # of a save that a signal asked for
    sft(monkeypatch, "--keep", "2")
    assert sorted(os.listdir("run/checkpoints")) == ["step-000002", "step-000004"]
    assert "rank-1.safetensors" not in os.listdir("run/checkpoints/step-000004")
    assert_same_bits("run", "whole")


def test_records_after_the_checkpoint_are_written_again_once(stopped_run, monkeypatch):
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')  # cut by the kill
    sft(monkeypatch, "--keep", "2")
    assert [record["step"] for record in steps(records())] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines()[:4] == lines[:4]
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("left", [0, 3])
def test_a_checkpoint_without_its_records_is_neither_resumed_from_nor_removed(
    left, stopped_run, capsys, monkeypatch
):
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:left]))
    before = files_in("run")
    with pytest.raises(SystemExit):
        sft(monkeypatch, "--keep", "2")
    assert capsys.readouterr().err == (
        f"error: run/metrics.jsonl: has {left} steps, fewer than run/checkpoints/step-000004; "
        "restore that file, or begin again with --resume never\n"
    )
    assert files_in("run") == before
    sft(monkeypatch, "--keep", "2", "--resume", "never")
    removed = "removed checkpoints: run/checkpoints/step-000004, run/checkpoints/step-000002\n"
    assert removed in capsys.readouterr().out
    assert_same_bits("run", "whole")


def test_records_reach_the_disk_before_their_checkpoint_gets_its_name(here, monkeypatch):
    fsync, replace_file, done = os.fsync, os.replace, []
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), done.append(os.readlink(f"/proc/self/fd/{file}")))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (replace_file(a, b), done.append(str(b))))
    run(sft_config(epochs=1, save_every=2))
    named = done.index("run/checkpoints/step-000002")
    assert str(Path("run/metrics.jsonl").resolve()) in done[:named]


# ---------------------------------------------------------------- refusals


def other_data() -> None:
    rows = [as_positive(conversation(number)) for number in range(1, 11)]
    Path("positives.jsonl").unlink()
    write_jsonl(Path("positives.jsonl"), rows)


def own_student() -> Path:
    target = Path("student").resolve()
    Path("student").unlink()
    shutil.copytree(target, "student")
    return Path("student")


def other_tokenizer() -> None:
    path = own_student() / "chat_template.jinja"
    path.write_text(path.read_text() + "{# other #}")


def other_weights() -> None:
    path = own_student() / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the exponent's low bit of the last number
    path.write_bytes(content)


NOTHING: Callable = lambda: None  # noqa: E731
REFUSALS = {
    "data": (other_data, {}, "data sha256 was"),
    "tokenizer": (other_tokenizer, {}, "tokenizer was"),
    "weights": (other_weights, {}, "parent's weights sha256 was"),
    "batch size": (NOTHING, {"rows_per_step": 5}, "rows_per_step was 4, now 5"),
    "learning rate": (NOTHING, {"lr": 0.5}, "lr was 0.001, now 0.5"),
    "epochs": (NOTHING, {"epochs": 4}, "epochs was 3, now 4"),
    "another stage's run": (NOTHING, None, "data was 'positives.jsonl', now 'pairs.jsonl'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_resuming_with_something_else_is_refused_by_name(case, here, stop_at):
    change, settings, named = REFUSALS[case]
    stop_at(sft_config(epochs=3), 5)
    before = files_in("run")
    change()
    config = redi_config() if settings is None else sft_config(**{"epochs": 3, **settings})
    with pytest.raises(UserError, match=f"--out run: holds .*{named}"):
        run(config)
    assert files_in("run") == before


def test_other_held_out_data_is_refused_by_name(here, stop_at):
    shutil.copy("positives.jsonl", "held.jsonl")
    config = sft_config(epochs=3, eval_data="held.jsonl", eval_every=9)
    stop_at(config, 2)
    write_jsonl(Path("held.jsonl"), [as_positive(conversation(1))])
    with pytest.raises(UserError, match="--out run: holds a run whose held-out data sha256 was"):
        run(config)


def test_another_objective_is_refused_by_name(here, stop_at):
    stop_at(redi_config(epochs=3), 5)
    with pytest.raises(UserError, match="objective was 'redi', now 'symmetric'"):
        run(redi_config(epochs=3, objective="symmetric"))


def test_the_same_folder_by_another_name_is_the_same_run(here, stop_at):
    stop_at(sft_config(epochs=3), 5)
    run(sft_config(epochs=3, out=str(here / "run")))
    run(sft_config(epochs=3, out="whole"))
    assert_same_bits("run", "whole")


def test_a_finished_run_of_other_data_is_refused_by_name(here):
    run(sft_config())
    other_data()
    with pytest.raises(UserError, match=r"a run whose data sha256 was \w+; it is \w+ now"):
        run(sft_config())


def test_resume_never_begins_again(here, stop_at, capsys):
    run(sft_config(epochs=3, out="whole"))
    stop_at(sft_config(epochs=3, save_every=2), 5)
    capsys.readouterr()
    stop_at(sft_config(epochs=3, resume="never"), 3)
    assert "resumes" not in capsys.readouterr().out
    assert [record["step"] for record in steps(records())] == [1, 2, 3]
    assert saved() == [3]  # none of the earlier run's
    run(sft_config(epochs=3))
    assert_same_bits("run", "whole")


def test_resume_never_takes_other_data(here, stop_at):
    stop_at(sft_config(epochs=3), 5)
    other_data()
    assert len(steps(run(sft_config(epochs=3, resume="never")))) == 9


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


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(here, capsys, monkeypatch):
    facts_of = run_module.facts_of

    def meanwhile(*given: Any) -> dict[str, str]:  # the first call makes the whole run
        monkeypatch.setattr(run_module, "facts_of", facts_of)
        run(sft_config())
        before.update(files_in("run"))
        return facts_of(*given)

    before: dict[Path, bytes] = {}
    monkeypatch.setattr(run_module, "facts_of", meanwhile)
    run(sft_config())
    assert "run is finished: nothing to do" in capsys.readouterr().out
    assert files_in("run") == before


# ---------------------------------------------------------------- children, to be killed


def die_at_operation(number: int) -> Fault:
    """SIGKILL right before the run's so-manieth change of the file system."""
    return partial(_die_at_operation, number)


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def _die_at_operation(number: int) -> None:
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            changes = path.startswith("run/") and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        else:
            there = os.path.exists(path) or "/" not in path  # rmtree names files by folder
            of_run = "__pycache__" not in path  # where Python keeps compiled modules
            changes = event in CHANGES and of_run and there != (event == "os.mkdir")
        if changes:
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(look)


# ---------------------------------------------------------------- killed


def test_killed_before_any_change_of_the_file_system_it_resumes_to_the_same_bits(
    whole, monkeypatch
):
    monkeypatch.chdir(whole)
    number, inside_a_save, over = 0, 0, False
    while not over:
        number += 1
        shutil.rmtree("run", ignore_errors=True)
        killed = child(whole, SFT, die_at_operation(number))
        killed.process.join(60)
        over = killed.process.exitcode == 0  # it has no more operations
        assert over or killed.process.exitcode == -signal.SIGKILL, killed.errors
        inside_a_save += bool(list(Path("run").glob("checkpoints/.writing-*")))
        # A model that loads is a whole one.
        assert not Path("run/config.json").exists() or set(os.listdir("run")) >= MODEL_FILES
        child(whole, SFT).ends(0)
        assert_same_bits("run", "whole")
        assert set(os.listdir("run")) == MODEL_FILES | RUN_FILES
        # Killed before it removed the older one, it has that still.
        assert set(os.listdir("run/checkpoints")) | {"step-000002"} == CHECKPOINTS
    assert number > 30
    assert inside_a_save >= 10


def killed_on_two_ranks(folder: Path, fault: Fault, rank: int = 0) -> None:
    """Start run/ anew and have one rank die; the other says that it is alone."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    faults: list[Fault | None] = [None, None]
    faults[rank] = fault
    both = ranks(folder, SFT, *faults)
    both[rank].ends(-signal.SIGKILL)
    both[1 - rank].ends(2)
    assert f"error: rank {1 - rank} lost another process" in both[1 - rank].errors


@pytest.mark.parametrize("step", [1, 3, 5])
def test_two_ranks_killed_resume_to_the_same_bits(step, on_two_ranks, monkeypatch):
    monkeypatch.chdir(on_two_ranks)
    killed_on_two_ranks(on_two_ranks, die_after(step))
    for rank in ranks(on_two_ranks, SFT, None, None):
        rank.ends(0)
    assert_same_bits("run", "whole")


@pytest.mark.parametrize(("rank", "operation"), [(0, 4), (0, 8), (1, 1), (1, 2)])
def test_two_ranks_of_which_one_is_killed_inside_a_save_resume(
    rank, operation, on_two_ranks, monkeypatch
):
    monkeypatch.chdir(on_two_ranks)
    killed_on_two_ranks(on_two_ranks, die_at_operation(operation), rank)
    assert os.listdir("run/checkpoints") == [".writing-000002"]
    for one in ranks(on_two_ranks, SFT, None, None):
        one.ends(0)
    assert_same_bits("run", "whole")


def test_two_nodes_of_two_ranks_resume_as_one_rank_and_one_as_four(on_two_ranks, monkeypatch):
    # Each node holds all weights, and saves half of the tensors.
    monkeypatch.chdir(on_two_ranks)
    shutil.rmtree("run", ignore_errors=True)
    four = ranks(on_two_ranks, SFT, *[die_after(5)] * 4, local_world_size=2)
    for rank in four:
        rank.process.join(60)
    sizes = [path.stat().st_size for path in Path("run").glob("checkpoints/step-000004/rank-*")]
    assert len(sizes) == 4
    assert max(sizes) < 2 * min(sizes)
    child(on_two_ranks, SFT).ends(0)
    assert largest_difference("run", "whole") < 1e-6
    shutil.rmtree("run")
    child(on_two_ranks, SFT, die_after(5)).ends(-signal.SIGKILL)
    for rank in ranks(on_two_ranks, SFT, *[None] * 4, local_world_size=2):
        rank.ends(0)
    assert largest_difference("run", "whole") < 1e-6


def test_two_ranks_resume_from_a_save_right_after_a_held_out_loss(on_two_ranks, monkeypatch):
    # A pass without gradients leaves the weights whole on every rank: the save must find shards.
    monkeypatch.chdir(on_two_ranks)
    arguments = [*SFT, "--eval-data", "positives.jsonl", "--eval-every", "2"]
    for rank in ranks(on_two_ranks, [*arguments, "--out", "evaluated"], None, None):
        rank.ends(0)
    shutil.rmtree("run", ignore_errors=True)
    killed, lost = ranks(on_two_ranks, arguments, die_after(5), None)
    killed.ends(-signal.SIGKILL)
    lost.ends(2)
    for rank in ranks(on_two_ranks, arguments, None, None):
        rank.ends(0)
    assert_same_bits("run", "evaluated")
    assert largest_difference("evaluated", "whole") == 0


DPO = [
    "--model", "student", "--data", "pairs.jsonl", "--cache", "tokens", "--eval-data",
    "pairs.jsonl", "--objective", "dpo", "--beta", "0.5", "--lr", "1e-3", "--epochs", "2",
    "--rows-per-step", "4", "--max-prompt", "100", "--max-response", "100", "--max-length", "200",
]  # fmt: skip


def test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16(here):
    # Its reference is a pass without gradients before the optimizer is made.
    child(here, [*DPO, "--out", "one"], main=programs.train_redi).ends(0)
    # With a cache of their own the two ranks score the reference, each a part of its rows.
    two_ranks = [*DPO, "--out", "two", "--cache", "tokens-of-two"]
    for rank in ranks(here, two_ranks, None, None, main=programs.train_redi):
        rank.ends(0)
    rounded = [*DPO, "--out", "rounded", "--dtype", "bfloat16"]
    child(here, rounded, main=programs.train_redi).ends(0)
    one, two, rounded = (
        [record["loss"] for record in steps(records(out))] for out in ("one", "two", "rounded")
    )
    assert one[-1] < 0.5 < one[0]  # ln 2 at first
    assert two == pytest.approx(one, rel=1e-5)
    assert rounded == pytest.approx(one, rel=0.1)
    assert largest_difference("two", "one") < 1e-5


PEAK = 1e9  # FLOP/s


def known_peak() -> None:
    """In the child, give the CPU a peak, so that MFU is logged."""
    train.peak_flops = lambda device: PEAK


def test_two_nodes_log_the_update_norm_and_flops_of_one_process(here):
    # Both nodes hold all weights, whose update counts once; each does half of the FLOPs.
    child(here, [*SFT, "--out", "one"], known_peak).ends(0)
    nodes = [*SFT, "--out", "two"]
    for rank in ranks(here, nodes, known_peak, known_peak, local_world_size=1):
        rank.ends(0)
    one, two = (steps(list(read_metrics(Path(out)))) for out in ("one", "two"))
    norms = [[record["update_norm"] for record in run] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    alone, each = ([record["mfu"] * record["seconds"] for record in run] for run in (one, two))
    assert [2 * flops for flops in each] == pytest.approx(alone)


def largest_difference(out: str, from_out: str) -> float:
    """Of two models' weights, over the largest weight."""
    one, other = (load_file(f"{folder}/model.safetensors") for folder in (out, from_out))
    differences = [(one[name] - tensor).abs().max() for name, tensor in other.items()]
    return (max(differences) / max(tensor.abs().max() for tensor in other.values())).item()
