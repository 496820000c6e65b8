"""What a run writes beside its model: which run a folder holds, its records, its curves."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import pytest
from processes import main_in_this_process
from small_run import refusal

from redi import curves, runlog
from redi.config import may_change, to_toml
from redi.runlog import Progress, RunLog, is_finished, read_facts, read_metrics


@dataclass(kw_only=True)
class Settings:
    lr: Annotated[float, "number"] = 0.5
    name: Annotated[str, "text"] = "a"
    limit: Annotated[int | None, "number or none"] = None
    tracker: Annotated[str, "not compared", may_change] = "none"
    dry_run: Annotated[bool, "not compared", may_change] = False


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, not yet there."""
    return tmp_path / "run"


def start(folder: Path, settings: Settings | None = None, **facts: str) -> RunLog:
    log = RunLog(str(folder), settings or Settings())
    log.start(facts)
    return log


def start_and_end(folder: Path) -> None:
    start(folder)  # its lock ends with it


def finish(folder: Path, settings: Settings | None = None) -> None:
    log = start(folder, settings)
    log.record("train", 1, loss=1.0)
    log.finish()


def lose_metrics(folder: Path) -> None:
    start(folder)
    (folder / "metrics.jsonl").unlink()


def config_of(content: bytes) -> Callable[[Path], None]:
    """A finished run whose config.toml is this."""

    def make(folder: Path) -> None:
        finish(folder)
        (folder / "config.toml").write_bytes(content)

    return make


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").touch()


# ---------------------------------------------------------------- which run a folder holds


@pytest.mark.parametrize(
    ("make", "now", "complete"),
    [
        (lambda folder: None, Settings(), False),
        (Path.mkdir, Settings(), False),
        (start_and_end, Settings(), False),
        (lose_metrics, Settings(), False),
        (finish, Settings(), True),
        (finish, Settings(tracker="wandb", dry_run=True), True),  # they do not change the result
    ],
)
def test_a_run_is_finished_or_may_be_started(run, make, now, complete):
    make(run)
    before = sorted(run.glob("*"))
    assert is_finished(str(run), now) == complete
    assert sorted(run.glob("*")) == before  # the check writes nothing
    assert len(list(read_metrics(run))) == 2 * complete


@pytest.mark.parametrize(
    ("make", "now", "message"),
    [
        (foreign, Settings(), "holds files but no run"),
        (Path.touch, Settings(), "is a file"),
        (config_of(b'title = "else"\n'), Settings(), "title was 'else', now None"),
        (config_of(b"lr = \xff"), Settings(), "run/config.toml: not a readable TOML file"),
        (start_and_end, Settings(lr=0.25), "(lr was 0.5, now 0.25); choose another folder"),
        (finish, Settings(lr=0.25), "(lr was 0.5, now 0.25); choose another folder"),
        (finish, Settings(name="b"), "(name was 'a', now 'b'); choose another folder"),
        (finish, Settings(limit=3), "(limit was None, now 3); choose another folder"),
    ],
)
def test_anything_else_is_refused_and_names_what_differs(run, make, now, message):
    make(run)
    assert message in refusal(is_finished, str(run), now)


def test_an_unfinished_run_is_started_again_from_its_first_step(run):
    log = start(run)
    log.record("train", 1, loss=1.0)
    del log  # as if its process had ended
    start(run)
    assert list(read_metrics(run)) == []


def test_only_one_process_at_a_time_writes_to_a_folder(run):
    log = start(run)
    log.record("train", 1, loss=1.0)
    assert "another process is running there" in refusal(start, run)
    assert [record["step"] for record in read_metrics(run)] == [1]


# ---------------------------------------------------------------- records


def test_config_toml_holds_facts_as_comments_above_the_settings(run):
    facts = {"redi": "0.1", "parent": "C: # a\n path", "parent's weights": "af01"}
    settings = Settings(name="# no: fact")
    start(run, settings, **facts)
    comments = "# redi: 0.1\n# parent: C: # a path\n# parent's weights: af01\n"
    assert (run / "config.toml").read_text() == comments + to_toml(settings)
    assert read_facts(run) == facts | {"parent": "C: # a path"}  # on one line


def test_records_are_on_disk_as_soon_as_they_are_written(run):
    log = start(run)
    log.record("train", 1, loss=0.5, lr=1e-3)
    log.record("eval", 1, loss=float("nan"))
    written = [
        {"kind": "train", "step": 1, "loss": 0.5, "lr": 1e-3},
        {"kind": "eval", "step": 1, "loss": float("nan")},
    ]
    assert repr(list(read_metrics(run))) == repr(written)  # NaN differs from itself
    log.finish()
    assert repr(list(read_metrics(run))) == repr([*written, {"kind": "finished"}])


def test_a_full_disk_is_one_line_that_names_the_file(run):
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    message = refusal(RunLog(str(run), Settings()).record, "train", 1, loss=0.5)
    assert message.startswith(f"{run}/metrics.jsonl: cannot be written (No space left")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_short_is_left_out(run, cut):
    finish(run)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    assert list(read_metrics(run)) == [{"kind": "train", "step": 1, "loss": 1.0}]
    assert not is_finished(str(run), Settings())


def test_any_other_damaged_line_is_an_error_that_names_it(run):
    finish(run)
    path = run / "metrics.jsonl"
    for damaged in ("{" + path.read_text(), "[" * 200_000 + "\n"):
        path.write_text(damaged)
        message = refusal(lambda: list(read_metrics(run)))
        assert message == f"{path}:1: not a record of a run"


def test_progress_without_a_terminal_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with Progress(100, "out/run", unit="step") as progress:
        for _ in range(100):
            now[0] += 1.0
            progress.update({"loss": "0.5"})
    lines = capsys.readouterr().out.splitlines()
    # A line is due after more than 10 s: at 11, 22, ... 99, and at the last.
    assert [line.split()[1] for line in lines] == [f"{k}/100" for k in (*range(11, 100, 11), 100)]
    assert lines[0] == "out/run 11/100 [89 s left] loss 0.5"  # 89 steps of a second
    # A resumed run: 89 steps were done before.
    for shown in (True, False):
        with Progress(100, "out/run", unit="step", shown=shown, done=89) as progress:
            now[0] += 20.0
            progress.update({"loss": "0.5"})
    assert capsys.readouterr().out == "out/run 90/100 [200 s left] loss 0.5\n"


# ---------------------------------------------------------------- trackers


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line_and_leaves_no_run(run, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, TRACKERS[tracker], None)  # import raises ImportError
    message = refusal(RunLog, str(run), Settings(), tracker)
    assert message == f"--tracker {tracker}: pip install {tracker} first"
    assert not list(run.glob("*"))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_gets_settings_and_records(run, monkeypatch, tracker):
    module = mock.MagicMock()
    monkeypatch.setitem(sys.modules, TRACKERS[tracker], module)
    (run / "tensorboard").mkdir(parents=True)  # as its writer does
    log = RunLog(str(run), Settings(), tracker)
    assert not is_finished(str(run), Settings())  # only held, it is free to start
    log.record("train", 3, loss=0.5)
    assert [record["loss"] for record in read_metrics(run)] == [0.5]
    if tracker == "wandb":
        [created] = module.init.call_args_list
        assert (created.kwargs["name"], created.kwargs["config"]["lr"]) == ("run", 0.5)
        assert module.init().log.call_args_list == [mock.call({"train/loss": 0.5}, step=3)]
    else:
        module.SummaryWriter.assert_called_once_with(str(run / "tensorboard"))
        writer = module.SummaryWriter()
        assert writer.add_scalar.call_args_list == [mock.call("train/loss", 0.5, 3)]
        assert "lr = 0.5" in writer.add_text.call_args.args[1]


# ---------------------------------------------------------------- curves


def write_run(folder: Path, steps: int = 5, **values: float) -> Path:
    folder.mkdir()
    records = [{"kind": "train", "step": k, "loss": 1 / k, **values} for k in range(1, steps + 1)]
    records += [{"kind": "eval", "step": steps, "loss": 0.3}, {"kind": "finished"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_the_curves_of_all_runs_are_drawn_into_the_first_with_a_panel_per_metric(tmp_path, capsys):
    first = write_run(tmp_path / "one")
    second = write_run(tmp_path / "two", steps=3, **dict.fromkeys(list(curves.PANELS)[:4], 0.1))
    sizes = []
    for runs in ([first], [first, second]):
        assert main_in_this_process(runlog.main, *runs) == 0
        sizes.append(size_of_png(first / "curves.png"))
    assert capsys.readouterr().out.splitlines() == [str(first / "curves.png")] * 2
    assert 500 < sizes[0][0] < sizes[1][0]  # one panel, then three columns
    assert 300 < sizes[0][1] < sizes[1][1]
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", "curves.png"}
    assert not (second / "curves.png").exists()


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_run_without_records_is_an_error_that_names_it(tmp_path, capsys, missing):
    (tmp_path / "empty").mkdir()
    first = write_run(tmp_path / "one")
    assert main_in_this_process(runlog.main, first, tmp_path / missing) == 2
    assert missing in capsys.readouterr().err
    assert not (first / "curves.png").exists()
