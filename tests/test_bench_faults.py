"""The bench of killed runs: what it watches, what it finds, and what it reports.

One undisturbed run of an epoch of the toy, made in this process; copies of it are damaged. One more
is really killed, and resumes.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import faults, killed_runs, measure
from bench.faults import (
    LAST_STEPS,
    RUNS,
    Killed,
    Undisturbed,
    differences,
    distance,
    half_written,
    kill_and_go_on,
    report,
)
from bench.killed_runs import EPOCH_STEPS, SAVE_EVERY, Failed, Run, lives, started_by
from redi import programs
from redi.prepare import __main__ as prepare
from redi.toy import student as toy

STEPS = EPOCH_STEPS


@pytest.fixture(scope="module", autouse=True)
def one_epoch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(killed_runs, "EPOCHS", 1)
        patch.setattr(faults, "STEPS", STEPS)
        yield


@pytest.fixture(scope="module")
def whole(one_epoch, tmp_path_factory) -> Run:
    """A run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("toy"), "whole", ranks=1)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:

        def in_this_process(command: list[str], **_: object) -> None:
            patch.setattr(sys, "argv", command[2:])
            {"redi.toy": toy.main, "redi.prepare": prepare.main}[command[2]]()

        patch.setattr(killed_runs.subprocess, "run", in_this_process)
        killed_runs.make_toy(run.toy)
        patch.setattr(sys, "argv", run.command())
        torch.set_num_threads(1)
        programs.train_sft()
        torch.set_num_threads(threads)
    return run


@pytest.fixture
def copy(whole) -> Run:
    """Its copy, to be damaged."""
    run = Run(whole.toy, "copy", ranks=1)
    shutil.rmtree(run.out, ignore_errors=True)
    shutil.copytree(whole.out, run.out)
    return run


@pytest.fixture
def started(tmp_path, monkeypatch) -> Callable:
    """started(program) -> a run that is this Python program instead of train_sft.py."""
    runs = []

    def start(program: str) -> Run:
        monkeypatch.setattr(Run, "command", lambda self: ["-c", program])
        runs.append(Run(tmp_path, "other", ranks=1))
        runs[-1].start()
        return runs[-1]

    yield start
    for run in runs:
        run.__exit__()


# ---------------------------------------------------------------- a run


def test_a_killed_run_leaves_no_process_behind(started):
    child = "import subprocess; subprocess.run(['sleep', '100'])"
    run = started(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    run.wait_until(lambda: len(started_by(run.process.pid)) == 2)
    processes = [run.process.pid, *started_by(run.process.pid)]
    run.kill()
    assert [lives(pid) for pid in processes] == [False, False, False]


def test_a_run_that_crashes_has_failed(started):
    run = started("import sys; sys.exit('no such thing')")
    with pytest.raises(Failed, match=r"exit status 1; see .*other-1\.log"):
        run.end()
    with pytest.raises(Failed, match="exit status 1"):
        run.kill()
    assert run.log.read_text() == "no such thing\n"


def test_a_run_that_hangs_has_failed(started, monkeypatch):
    monkeypatch.setattr(killed_runs, "PATIENCE", 0.05)
    with pytest.raises(Failed, match="hangs"):
        started("import time; time.sleep(100)").end()


def test_what_a_run_has_done_is_read_from_its_files(copy):
    assert (copy.trained(), copy.finished()) == (STEPS, True)
    assert all({"seconds", "memory_gib"}.isdisjoint(record) for record in copy.records())
    assert [r["step"] for r in copy.records() if r["kind"] == "eval"] == [*range(5, 21, 5)]
    assert [folder.name for folder in copy.newest()] == ["step-000010", "step-000015"]
    metrics = copy.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:8]) + lines[8][:20])  # five steps, a held-out loss, two steps
    assert (copy.trained(), copy.finished()) == (7, False)


def test_the_step_after_which_it_resumed_is_that_of_the_last_start(copy):
    copy.starts = 2
    copy.log.with_name("copy-1.log").write_text("copy: resumes after step 5\n")
    copy.log.write_text("began\n")
    assert copy.resumed_after() == 0
    copy.log.write_text("x\nsomewhere/copy: resumes after step 35\ny\n")
    assert copy.resumed_after() == 35


@pytest.mark.parametrize(
    ("folder", "save"),
    [
        ("checkpoints/.writing-000020", "checkpoint"),
        (".saving-123", "model"),
        ("checkpoints/step-000020", ""),
    ],
)
def test_a_folder_marks_the_save_that_a_kill_was_in(folder, save, copy):
    assert copy.inside() == ""
    assert not copy.reached_save(20)
    (copy.out / folder).mkdir()
    assert copy.inside() == save
    assert copy.reached_save(20) == (save != "model")


# ---------------------------------------------------------------- what it finds


def test_a_copy_of_the_undisturbed_run_is_the_same(copy, whole):
    assert half_written(copy, whole) == differences(copy, whole) == []
    assert distance(copy, whole) == 0.0


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *product(["rank-0.safetensors", "state.json"], [os.unlink, cut_short]),
        ("rank-0.safetensors", flip),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_seen(name, harm, copy, whole):
    harm(copy.checkpoint(10) / name)
    [found] = half_written(copy, whole)
    assert found.startswith("step-000010: ")


def test_the_half_removed_one_before_those_that_are_kept_is_none(copy, whole):
    copy.checkpoint(5).mkdir()
    assert half_written(copy, whole) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("harm", [os.unlink, cut_short, flip])
def test_half_a_model_is_seen_where_it_would_load(harm, name, copy, whole):
    harm(copy.out / name)
    would_load = (copy.out / "config.json").exists()
    assert half_written(copy, whole) == ["half a model loads"] * would_load
    assert differences(copy, whole) == ["another model"]


def test_other_weights_are_found_and_how_far_they_are(copy, whole):
    file = copy.out / "model.safetensors"
    weights = load_file(file)
    largest = max(tensor.abs().max().item() for tensor in weights.values())
    name = next(iter(weights))
    weights[name].view(-1)[3] += largest / 4
    save_file(weights, file, metadata={"format": "pt"})
    assert differences(copy, whole) == ["another model"]
    assert distance(copy, whole) == pytest.approx(0.25, rel=1e-5)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert not distance(copy, whole) <= 1e-6


@pytest.mark.parametrize(
    ("field", "found"), [("seconds", []), ("memory_gib", []), ("loss", ["another metrics"])]
)
def test_other_metrics_are_found_but_for_the_fields_left_out(field, found, copy, whole):
    metrics = copy.out / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[10][field] += 1e-9
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert differences(copy, whole) == found


def test_metrics_of_a_step_done_twice_are_found(copy, whole):
    metrics = copy.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:9], *lines[8:]]))
    assert differences(copy, whole) == ["another metrics"]


# ---------------------------------------------------------------- a kill


@pytest.mark.slow
def test_a_run_killed_inside_a_save_goes_on_to_the_same_bits(whole):
    run = Run(whole.toy, "killed", ranks=1)
    at_once = Undisturbed(whole, training=0.0, save=0.0)  # as soon as the save begins
    outcome = kill_and_go_on("a save", 1, run, at_once, random.Random(0))
    assert outcome.problems == []
    assert len(outcome.redone) == 1
    assert 0 <= outcome.redone[0] <= SAVE_EVERY
    assert (outcome.inside == ["checkpoint"]) == (outcome.redone == [SAVE_EVERY])
    assert not run.out.exists()


# ---------------------------------------------------------------- the report


DISTANCES = dict.fromkeys(LAST_STEPS, 0.0)


def outcomes(inside: int = 10) -> list[Killed]:
    return [Killed("a save", 1, ["checkpoint" if i < inside else ""], [i % 6]) for i in range(30)]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    return tmp_path / "results/faults.json"


def test_there_are_at_least_30_kills_planned_and_more_than_10_in_saves():
    assert sum(map(sum, RUNS.values())) >= 30
    assert sum(RUNS["a save"]) > 10


def test_all_is_well(results):
    assert report(outcomes(), DISTANCES) == 0
    written = json.loads(results.read_text())["results"]
    assert written["survived"]["median"] == 1.0
    assert written["survived"]["peer"] == "the undisturbed run; 30 kills of 30 runs"
    assert written["inside_a_save"]["median"] == written["inside_a_save"]["goal"] == 10
    assert written["redone_steps"]["max"] == written["redone_steps"]["goal"] == 5
    assert written["two_to_one"]["goal"] == 1e-6
    assert "the last 5 of 20 steps" in written["two_to_one"]["peer"]
    assert written["two_to_one_epoch"]["goal"] is None


def test_one_run_that_does_not_survive_is_told_and_shows_in_the_exit_status(results):
    killed = outcomes()
    killed[7].problems = ["another model"]
    assert "another model" in str(killed[7])
    assert report(killed, DISTANCES) == 1
    assert json.loads(results.read_text())["results"]["survived"]["median"] == 29 / 30


def test_too_few_kills_inside_saves_show_in_the_exit_status():
    assert report(outcomes(inside=9), DISTANCES) == 1


@pytest.mark.parametrize(("name", "status"), [("two_to_one", 1), ("two_to_one_epoch", 0)])
@pytest.mark.parametrize("far", [2e-6, float("nan")])
def test_weights_too_far_after_a_change_of_ranks_show_in_the_exit_status(far, name, status):
    assert report(outcomes(), {**DISTANCES, name: far}) == status
