"""What a run writes beside its model: which run a folder holds, its records, its curves.

python -m pytest tests/test_runlog.py
"""

import json
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest

from redi import curves, runlog
from redi.config import UserError, may_change, to_toml
from redi.runlog import Progress, RunLog, is_finished, read_facts, read_metrics


@dataclass(kw_only=True)
class Settings:
    lr: Annotated[float, "number"] = 0.5
    name: Annotated[str, "text"] = "a"
    limit: Annotated[int | None, "number or none"] = None
    tracker: Annotated[str, "not compared", may_change] = "none"
    dry_run: Annotated[bool, "not compared", may_change] = False


def started(folder: Path, settings: Settings | None = None, **facts: str) -> RunLog:
    log = RunLog(str(folder), settings or Settings())
    log.start(facts)
    return log


def finished(folder: Path, settings: Settings | None = None) -> None:
    log = started(folder, settings)
    log.record("train", 1, loss=1.0)
    log.finish()


# ---------------------------------------------------------------- which run a folder holds


def test_a_missing_or_empty_folder_is_free(tmp_path):
    assert not is_finished(str(tmp_path / "new"), Settings())
    assert not is_finished(str(tmp_path), Settings())
    assert list(tmp_path.iterdir()) == []  # the check writes nothing


def test_the_same_run_finished_is_finished(tmp_path):
    finished(tmp_path / "run")
    assert is_finished(str(tmp_path / "run"), Settings())


def test_the_same_run_unfinished_may_be_started_again(tmp_path):
    log = started(tmp_path / "run")
    log.record("train", 1, loss=1.0)
    assert not is_finished(str(tmp_path / "run"), Settings())
    del log  # as if its process had ended
    started(tmp_path / "run")
    assert list(read_metrics(tmp_path / "run")) == []


def test_only_one_process_at_a_time_writes_to_a_folder(tmp_path):
    log = started(tmp_path / "run")
    log.record("train", 1, loss=1.0)
    with pytest.raises(UserError, match="another process is running there"):
        started(tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]


def test_a_run_without_any_record_is_unfinished(tmp_path):
    started(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert not is_finished(str(tmp_path / "run"), Settings())


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Settings(lr=0.25), "lr was 0.5, now 0.25"),
        (Settings(name="b"), "name was 'a', now 'b'"),
        (Settings(limit=3), "limit was None, now 3"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_run_is_refused_naming_what_differs(tmp_path, now, said, complete):
    finished(tmp_path / "run") if complete else started(tmp_path / "run")
    with pytest.raises(UserError, match="choose another folder") as raised:
        is_finished(str(tmp_path / "run"), now)
    assert said in str(raised.value)
    assert str(raised.value).count(" was ") == 1


def test_a_run_that_another_program_made_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text('title = "somebody else\'s"\n')
    with pytest.raises(UserError, match="title was"):
        is_finished(str(tmp_path), Settings())


def test_what_does_not_change_the_result_is_not_compared(tmp_path):
    finished(tmp_path / "run")
    assert is_finished(str(tmp_path / "run"), Settings(tracker="wandb", dry_run=True))


def test_foreign_files_are_refused_and_left(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files but no run"):
        is_finished(str(tmp_path), Settings())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        is_finished(str(tmp_path / "run"), Settings())
    with pytest.raises(UserError, match="run"):
        started(tmp_path / "run")


def test_text_with_quotes_and_newlines_is_the_same_run(tmp_path):
    settings = Settings(name='a "quoted"\r\n\\ \x7f name')
    finished(tmp_path / "run", settings)
    assert is_finished(str(tmp_path / "run"), settings)


# ---------------------------------------------------------------- records


def test_config_toml_holds_facts_as_comments_above_the_settings(tmp_path):
    started(tmp_path / "run", redi="0.1", rows="12")
    text = (tmp_path / "run" / "config.toml").read_text()
    assert text == "# redi: 0.1\n# rows: 12\n" + to_toml(Settings())


def test_facts_are_read_back(tmp_path):
    facts = {"redi": "0.1", "parent": "C: # a\n path", "parent's weights": "af01"}
    started(tmp_path / "run", Settings(name="# no: fact"), **facts)
    assert read_facts(tmp_path / "run") == facts | {"parent": "C: # a path"}  # on one line


def test_a_damaged_config_toml_is_an_error_that_names_it(tmp_path):
    finished(tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_bytes(b"lr = \xff")
    with pytest.raises(UserError, match=r"run/config\.toml: not a readable TOML file"):
        is_finished(str(tmp_path / "run"), Settings())


def test_a_damaged_line_of_metrics_is_an_error_that_names_it(tmp_path):
    finished(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    for damaged in ("{" + path.read_text(), "[" * 200_000 + "\n"):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a record of a run"):
            list(read_metrics(tmp_path / "run"))


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = started(tmp_path / "run")
    log.record("train", 1, loss=0.5, lr=1e-3)
    log.record("eval", 1, loss=0.25)
    assert list(read_metrics(tmp_path / "run")) == [
        {"kind": "train", "step": 1, "loss": 0.5, "lr": 1e-3},
        {"kind": "eval", "step": 1, "loss": 0.25},
    ]
    log.finish()
    assert list(read_metrics(tmp_path / "run"))[-1] == {"kind": "finished"}


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    log = started(tmp_path / "run")
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), log._metrics.fileno())
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        log.record("train", 1, loss=0.5)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_short_is_left_out(tmp_path, cut):
    finished(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-cut])
    assert list(read_metrics(tmp_path / "run")) == [{"kind": "train", "step": 1, "loss": 1.0}]
    assert not is_finished(str(tmp_path / "run"), Settings())


def test_a_run_without_metrics_has_no_records(tmp_path):
    assert list(read_metrics(tmp_path)) == []


def test_a_loss_that_is_not_finite_is_recorded(tmp_path):
    log = started(tmp_path / "run")
    log.record("train", 1, loss=float("nan"))
    [record] = read_metrics(tmp_path / "run")
    assert record["loss"] != record["loss"]


def test_progress_without_a_terminal_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with Progress(100, "out/run", unit="step") as progress:
        for _ in range(100):
            now[0] += 1.0
            progress.update({"loss": "0.5"})
    lines = capsys.readouterr().out.splitlines()
    # A line is due after more than 10 s: at 11, 22, ... 99, and at the last.
    assert [line.split()[1] for line in lines] == [
        *(f"{k}/100" for k in range(11, 100, 11)), "100/100",
    ]  # fmt: skip
    assert lines[0] == "out/run 11/100 [89 s left] loss 0.5"  # 89 steps of a second


def test_progress_counts_from_where_a_run_resumes_and_is_silent_if_not_shown(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    for shown in (True, False):
        with Progress(100, "out/run", unit="step", shown=shown, done=89) as progress:
            now[0] += 20.0
            progress.update({"loss": "0.5"})
    assert capsys.readouterr().out == "out/run 90/100 [200 s left] loss 0.5\n"


# ---------------------------------------------------------------- trackers


def without(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError


@pytest.mark.parametrize(
    ("tracker", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_not_installed_is_one_line_and_leaves_no_run(
    tmp_path, monkeypatch, tracker, module
):
    without(monkeypatch, module)
    with pytest.raises(UserError, match=f"--tracker {tracker}: pip install {tracker}") as raised:
        RunLog(str(tmp_path / "run"), Settings(), tracker)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "run").glob("*"))


class Writer:
    """A SummaryWriter that keeps what it is given."""

    made: list["Writer"]

    def __init__(self, folder: str):
        self.folder, self.scalars, self.texts = folder, [], []
        Path(folder).mkdir(parents=True)
        Writer.made.append(self)

    def add_text(self, name: str, text: str) -> None:
        self.texts.append((name, text))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass


def test_tensorboard_gets_the_records(tmp_path, monkeypatch):
    module, Writer.made = ModuleType("torch.utils.tensorboard"), []
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = RunLog(str(tmp_path / "run"), Settings(), "tensorboard")
    assert not is_finished(str(tmp_path / "run"), Settings())  # only held, it is free to start
    log.record("train", 3, loss=0.5)
    [writer] = Writer.made
    assert writer.folder == str(tmp_path / "run" / "tensorboard")
    assert writer.scalars == [("train/loss", 0.5, 3)]
    assert "lr = 0.5" in writer.texts[0][1]
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == [0.5]


def test_wandb_gets_the_records(tmp_path, monkeypatch):
    module, calls = ModuleType("wandb"), []

    class Run:
        def log(self, values, step):
            calls.append((values, step))

    module.init = lambda **settings: calls.append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = RunLog(str(tmp_path / "run"), Settings(), "wandb")
    log.record("eval", 3, loss=0.5)
    assert calls[0]["name"] == "run"
    assert calls[0]["config"]["lr"] == 0.5
    assert calls[1] == ({"eval/loss": 0.5}, 3)


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


def draw(runs: list[Path], path: Path) -> None:
    curves.draw({run.name: list(read_metrics(run)) for run in runs}, path)


def test_curves_of_several_runs_are_one_picture(tmp_path):
    first = write_run(tmp_path / "one", chosen_logp=-0.5, rejected_logp=-0.7, margin=0.2)
    second = write_run(tmp_path / "two", steps=3, lr=1e-3)
    draw([first, second], first / "curves.png")
    width, height = size_of_png(first / "curves.png")
    assert width > 500
    assert height > 300
    assert not (second / "curves.png").exists()
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_the_picture_grows_with_what_there_is_to_show(tmp_path):
    sizes = []
    for name, values in (("few", {}), ("many", dict.fromkeys(curves.PANELS, 0.1))):
        folder = write_run(tmp_path / name, **values)
        draw([folder], folder / "curves.png")
        sizes.append(size_of_png(folder / "curves.png"))
    assert sizes[1][0] > sizes[0][0]  # one panel; then three columns
    assert sizes[1][1] > sizes[0][1]


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["runlog", *arguments])
    try:
        runlog.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command_draws_into_the_first_run(tmp_path, monkeypatch, capsys):
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert call(monkeypatch, str(first), str(second)) == 0
    size_of_png(first / "curves.png")
    assert capsys.readouterr().out.strip().endswith("curves.png")


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_run_without_records_is_an_error_that_names_it(tmp_path, monkeypatch, capsys, missing):
    (tmp_path / "empty").mkdir()
    first = write_run(tmp_path / "one")
    assert call(monkeypatch, str(first), str(tmp_path / missing)) == 2
    assert missing in capsys.readouterr().err
    assert not (first / "curves.png").exists()
