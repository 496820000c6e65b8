"""What a run writes beside its model: which run a folder holds, its records, its curves."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from processes import main_in_this_process
from small_run import refusal, write_jsonl

from redi import curves, runlog
from redi.config import may_change, program, to_toml
from redi.runlog import Progress, RunLog, is_finished, read_facts, read_metrics


@dataclass(kw_only=True)
class Settings:
    lr: Annotated[float, "number"] = 0.5
    name: Annotated[str, "text"] = "a"
    limit: Annotated[int | None, "number or none"] = None
    tracker: Annotated[str, "not compared", may_change] = "none"
    dry_run: Annotated[bool, "not compared", may_change] = False


FIRST = {"kind": "train", "step": 1, "chosen_logp": -1.0}
LAST = {"kind": "finished"}


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, not yet there."""
    return tmp_path / "run"


def start(folder: Path, settings: Settings | None = None, **facts: str) -> RunLog:
    log = RunLog(str(folder), settings or Settings())
    log.start(facts)
    return log


def killed(folder: Path) -> None:
    start(folder).record("train", 1, chosen_logp=-1.0)  # its lock ends with it


def finished(folder: Path) -> None:
    log = start(folder)
    log.record("train", 1, chosen_logp=-1.0)
    log.finish()


# ---------------------------------------------------------------- which run a folder holds


@pytest.mark.parametrize(
    ("make", "now", "records"),
    [
        (lambda folder: None, Settings(), []),
        (killed, Settings(), [FIRST]),
        (finished, Settings(), [FIRST, LAST]),
        (finished, Settings(tracker="wandb", dry_run=True), [FIRST, LAST]),  # same result
    ],
)
def test_a_run_is_finished_or_may_be_started(run, make, now, records):
    make(run)
    before = sorted(run.glob("*"))
    assert is_finished(str(run), now) == (LAST in records)
    assert sorted(run.glob("*")) == before  # the check writes nothing
    assert list(read_metrics(run)) == records
    start(run)
    assert list(read_metrics(run)) == []  # from its first step


@pytest.mark.parametrize(
    ("make", "files", "now", "message"),
    [
        (Path.touch, {}, Settings(), "is a file"),
        (Path.mkdir, {"thesis.tex": b""}, Settings(), "holds files but no run"),
        (finished, {"config.toml": b"lr = \xff"}, Settings(), "config.toml: not a readable TOML"),
        (killed, {}, Settings(lr=0.25), "(lr was 0.5, now 0.25); choose another folder"),
        (finished, {}, Settings(limit=3), "(limit was None, now 3); choose another folder"),
    ],
)
def test_anything_else_is_refused_and_names_what_differs(run, make, files, now, message):
    make(run)
    for name, content in files.items():
        (run / name).write_bytes(content)
    assert message in refusal(is_finished, str(run), now)


# ---------------------------------------------------------------- records


def test_config_toml_holds_facts_as_comments_above_the_settings(run):
    facts = {"redi": "0.1", "parent": "C: # a\n path", "parent's weights": "af01"}
    settings = Settings(name="# no: fact")
    start(run, settings, **facts)
    comments = "# redi: 0.1\n# parent: C: # a path\n# parent's weights: af01\n"
    assert (run / "config.toml").read_text() == comments + to_toml(settings)
    facts["parent"] = "C: # a path"  # on one line
    assert read_facts(run) == facts
    (run / "config.toml").write_text(f"# a user's note\n#\n{comments}{to_toml(settings)}")
    assert read_facts(run) == facts


def test_records_are_on_disk_as_soon_as_they_are_written(run):
    log = start(run)
    log.record("train", 1, chosen_logp=-0.5, lr=1e-3)
    log.record("eval", 1, loss=float("nan"))
    written = [
        {"kind": "train", "step": 1, "chosen_logp": -0.5, "lr": 1e-3},
        {"kind": "eval", "step": 1, "loss": float("nan")},
    ]
    assert repr(list(read_metrics(run))) == repr(written)  # NaN differs from itself
    log.finish()
    assert repr(list(read_metrics(run))) == repr([*written, LAST])


def test_a_full_disk_is_one_line_that_names_the_file(run):
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    message = refusal(RunLog(str(run), Settings()).record, "train", 1, loss=0.5)
    assert message.startswith(f"{run}/metrics.jsonl: cannot be written (No space left")


def test_a_last_line_cut_short_is_left_out_and_any_other_damaged_line_is_named(run):
    finished(run)
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])
    assert list(read_metrics(run)) == [FIRST]
    assert not is_finished(str(run), Settings())
    settings, text = Settings(), whole.replace
    for damaged in (
        "{" + whole, "[" * 200_000 + "\n", text('"kind": "train", ', ""), text('"step": 1, ', ""),
        text("1,", '"a",'), text("1,", "1e400,"), text("-1.0", '"abc"'), text("-1.0", "null"),
    ):  # fmt: skip
        path.write_text(damaged)
        expected = f"{path}:1: not a record of a run"
        assert refusal(lambda: list(read_metrics(run))) == expected
        assert refusal(is_finished, str(run), settings) == expected
    log = RunLog(str(run), settings)
    assert refusal(log.start, {}) == expected
    assert path.read_text() == damaged


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
def test_a_tracker_that_is_not_installed_is_one_line_and_leaves_no_folder(
    run, monkeypatch, tracker, capsys
):
    monkeypatch.delitem(sys.modules, TRACKERS[tracker], raising=False)
    monkeypatch.setitem(sys.modules, tracker, None)  # import raises ModuleNotFoundError
    with pytest.raises(SystemExit, match="2"):
        program(lambda: RunLog(str(run), Settings(), tracker))()
    line = f"error: {tracker} is not installed; pip install {tracker}\n"
    assert capsys.readouterr().err == line
    assert not run.exists()


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_gets_settings_and_records(run, monkeypatch, tracker):
    module = mock.MagicMock()
    monkeypatch.setitem(sys.modules, TRACKERS[tracker], module)
    (run / "tensorboard").mkdir(parents=True)  # as its writer does
    log = RunLog(str(run), Settings(), tracker)
    assert not is_finished(str(run), Settings())  # only held, it is free to start
    log.record("train", 3, loss=0.5)
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


def test_the_curves_of_all_runs_are_drawn_into_the_first_with_a_panel_per_metric(tmp_path, capsys):
    first, second, empty = (tmp_path / name for name in ("one", "two", "empty"))
    panels = dict.fromkeys(("rejected_logp", "margin", "loss", "lr"), 0.1)  # three more panels
    for folder, values in ((first, {}), (second, panels)):
        folder.mkdir()
        train = [{**FIRST, "step": step, **values} for step in range(1, 6)]
        write_jsonl(folder / "metrics.jsonl", [*train, {**FIRST, "kind": "eval"}, LAST])
    empty.mkdir()
    for missing in (empty, tmp_path / "nowhere"):
        assert main_in_this_process(runlog.main, first, missing) == 2
        assert str(missing) in capsys.readouterr().err
        assert not (first / "curves.png").exists()
    sizes = []
    for runs in ([first], [first, second]):
        assert main_in_this_process(runlog.main, *runs) == 0
        assert capsys.readouterr().out == f"saved {first}/curves.png\n"
        sizes.append(imread(first / "curves.png").shape)
    assert 300 < sizes[0][0] < sizes[1][0]  # one panel, then several rows
    assert 500 < sizes[0][1] < sizes[1][1]  # and three columns
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", "curves.png"}
    assert not (second / "curves.png").exists()


@pytest.mark.parametrize("name", ["_x", "cost $x_{$ <b>", "$$", r"\$", "C:\\$a$"])
def test_the_name_of_a_run_stands_in_the_legend_as_it_is(name):
    axis = Figure().subplots()
    axis.plot([0], label=curves.as_label(name))
    [text] = axis.legend().get_texts()
    axis.figure.canvas.draw()
    shown, is_formula = text._preprocess_math(text.get_text())
    assert (shown.strip(), bool(is_formula)) == (name, False)


def test_a_curve_is_smoothed_over_a_tenth_of_its_steps():
    assert curves.smooth([0, 0, 6, 0, 0]).tolist() == [0, 0, 6, 0, 0]
    spike = [0.0] * 9 + [6.0] + [0.0] * 9 + [6.0]  # 20 steps: the mean of three, of two at the end
    assert curves.smooth(spike).tolist() == [0] * 8 + [2] * 3 + [0] * 7 + [2, 3]
