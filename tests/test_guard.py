"""The collapse guard: when it warns, which checkpoint it keeps, how it stops a run.

    python -m pytest tests/test_guard.py

First as a function of chosen log-probs worked out by hand (all exact in binary), then in real runs
that learn far too fast.
"""

import shutil
from pathlib import Path

import pytest
from processes import child
from small_run import HERE, REDI, assert_same_bits, redi_config, run, saved, steps

from redi import programs
from redi.checkpoint.resume import Checkpoints
from redi.config import UserError
from redi.monitor import CollapseGuard
from redi.runlog import read_metrics

# ---------------------------------------------------------------- as a function


def warnings_of(chosen: list[float], threshold: float = 0.5, in_a_row: int = 3) -> dict[int, str]:
    """Step -> warning, for a run with these chosen log-probs."""
    guard = CollapseGuard(threshold, in_a_row)
    warnings = {step: guard.check({"chosen_logp": c}) for step, c in enumerate(chosen, start=1)}
    return {step: warning for step, warning in warnings.items() if warning}


SEQUENCES = {  # threshold 0.5, three steps in a row: log-probs, steps that warn
    "fell below": ([-1, -2, -2, -2], [4]),
    "exactly at the threshold": ([-1, -1.5, -1.5, -1.5, -1.5], []),
    "a little beyond it": ([-1, -1.5625, -1.5625, -1.5625], [4]),
    "stayed one step too short": ([-1, -2, -2, -1], []),
    "counts from 0 after a step above": ([-1, -2, -2, -1.5, -2, -2, -2], [7]),
    "once, however long it stays": ([-1] + [-2] * 20, [4]),
    "again after it came back": ([-1, -2, -2, -2, -1, -2, -2, -2], [4, 8]),
    "measured from the first record": ([-3, -1, -1, -3.25, -3.25, -3.25], []),
    "a bad beginning is not a fall": ([-9, -9, -9, -9], []),
    "rose": ([-3, -2, -1, -0.5], []),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_it_warns_at_these_steps(name):
    chosen, due = SEQUENCES[name]
    assert list(warnings_of(chosen)) == due


@pytest.mark.parametrize(
    ("threshold", "in_a_row", "due"),
    # Chosen falls by 0.25 per step: by 0.5 at step 3, by 1 at step 5, by 3 at the last, step 13.
    [(0.5, 1, [4]), (0.5, 4, [7]), (1.0, 1, [6]), (0.125, 2, [3]), (2.5, 2, [13]), (3.0, 1, [])],
)
def test_threshold_and_steps_are_the_users(threshold, in_a_row, due):
    falling = [-1 - 0.25 * number for number in range(13)]
    assert list(warnings_of(falling, threshold, in_a_row)) == due


def test_the_warning_says_how_far_it_fell_and_what_helps():
    [warning] = warnings_of([-0.25, -1.0, -1.25, -1.5]).values()
    assert "over 0.5 nats per token less likely than at the start for 3 steps" in warning
    assert "now 1.25: -0.25 -> -1.50" in warning
    assert "smaller --lr" in warning


# Checkpoints after every step, three in a row to warn: log-probs, then the step pinned after each.
PINS = {
    "until it recovers": ([-1, -1, -2, -2, -1, -1], [0, 0, 1, 1, 0, 0]),
    "the second fall's": ([-1, -1, -2, -1, -1, -2, -2, -2], [0, 0, 1, 0, 0, 4, 4, 4]),
    "once it warned, for good": ([-1, -1, -1, -2, -2, -2, -1, -2], [0, 0, 0, 2, 2, 2, 2, 2]),
    "nothing is from before the fall": ([-1, -2, -2, -2], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", PINS)
def test_the_checkpoint_kept_from_before_the_fall(name, tmp_path):
    chosen, pinned = PINS[name]
    checkpoints = Checkpoints(tmp_path, HERE, {}, keep=1)
    guard, seen = CollapseGuard(0.5, 3), []
    for step, logp in enumerate(chosen, start=1):
        guard.watch(step, {"chosen_logp": logp}, checkpoints)
        seen.append(checkpoints.pinned)
        checkpoints.at(step).mkdir(parents=True)
    assert seen == pinned


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("collapse_threshold", 0.0, "above 0"),
        ("collapse_threshold", -0.5, "above 0"),
        ("collapse_steps", 0, "at least 1"),
    ],
)
def test_settings_that_would_always_warn_are_refused(flag, value, expected):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}: expected {expected}"):
        redi_config(**{flag: value})


# ---------------------------------------------------------------- in a run

# 12 steps at two hundred times the learning rate of the other tests: log-probs of chosen traces
# collapse within a few.
FAST = {"lr": 0.2, "epochs": 4, "collapse_steps": 3, "save_every": 1, "keep": 5}


def collapse_warnings(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("warning: step ")]


def chosen_logps(out: str | Path) -> list[float]:
    return [record["chosen_logp"] for record in steps(list(read_metrics(Path(out))))]


def due(out: str | Path = "whole") -> int:
    """The step at which the guard must warn, from the run's own records."""
    first, *_ = chosen = chosen_logps(out)
    low = [first - now > 0.5 for now in chosen]
    return next(end for end in range(3, len(low) + 1) if all(low[end - 3 : end]))


@pytest.fixture(scope="module")
def ignored(made, tmp_path_factory) -> Path:
    """A folder with whole/, a run that ignored the guard's warning and trained to its end."""
    folder = tmp_path_factory.mktemp("collapsed")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    whole = child(folder, [*REDI, *flags, "--out", "whole"], main=programs.train_redi)
    whole.ends(0)
    [warning] = collapse_warnings(whole.errors)
    assert warning.startswith(f"warning: step {due(folder / 'whole')}: collapse: ")
    assert 5 <= due(folder / "whole") <= 8  # there are steps before and after it
    return folder


@pytest.fixture
def collapsed(ignored, monkeypatch) -> None:
    """That folder as the working folder, without run/."""
    monkeypatch.chdir(ignored)
    shutil.rmtree("run", ignore_errors=True)


def train_fast(**changes) -> list[dict]:
    return run(redi_config(**{**FAST, **changes}))


def test_with_collapse_stop_the_run_ends_there_and_resumes_only_without_it(collapsed, capsys):
    kept, step = f"run/checkpoints/step-{saved('whole')[0]:06d}", due()
    with pytest.raises(UserError, match=f"^--collapse-stop: stopped after step {step} of 12$"):
        train_fast(collapse_stop=True)
    [warning] = collapse_warnings(capsys.readouterr().err)
    assert warning.startswith(f"warning: step {step}: collapse: ")
    assert warning.endswith(f"; kept from before the fall: {kept}")
    assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": step}
    assert saved()[-1] == step

    # A scheduler that starts jobs again must not train on into the collapse.
    with pytest.raises(UserError, match=f"^--collapse-stop: step {step}: collapse: .*{kept}; with"):
        train_fast(collapse_stop=True)
    assert saved()[-1] == step

    train_fast()
    assert collapse_warnings(capsys.readouterr().err) == []
    assert saved() == saved("whole")
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("after", [-1, 3])
def test_stopped_before_or_after_the_warning_a_run_resumes_to_the_same_warning_and_checkpoints(
    after, collapsed, stop_at, capsys
):
    stop_at(redi_config(**FAST), due() + after)
    train_fast()
    [warning] = collapse_warnings(capsys.readouterr().err)
    assert warning.startswith(f"warning: step {due()}: ")
    assert saved() == saved("whole")
    assert_same_bits("run", "whole")


def test_at_the_last_step_there_is_nothing_to_stop(collapsed, capsys):
    records = train_fast(collapse_steps=3 + 12 - due(), collapse_stop=True)
    [warning] = collapse_warnings(capsys.readouterr().err)
    assert warning.startswith("warning: step 12: ")
    assert records[-1] == {"kind": "finished"}


def test_the_checkpoint_kept_is_the_newest_of_a_model_from_before_the_fall(collapsed):
    kept, *newest = saved("whole")
    assert newest == [7, 8, 9, 10, 11]
    # The record of the next step has the log-probs of a checkpoint's model.
    first, *after_step = chosen_logps("whole")
    assert first - after_step[kept - 1] <= 0.5 < first - after_step[kept]


@pytest.mark.parametrize("changes", [{"keep": 2}, {"keep": 1, "save_every": 11}])
def test_it_is_kept_beyond_keep_and_the_warning_says_if_there_is_none(changes, collapsed, capsys):
    train_fast(**changes)
    kept = f"run/checkpoints/step-{saved('whole')[0]:06d}"
    if "save_every" in changes:
        assert saved() == [11]
        kept = "no checkpoint"
    else:
        assert saved() == [saved("whole")[0], 10, 11]
    assert f"kept from before the fall: {kept}" in capsys.readouterr().err


def test_a_threshold_beyond_the_fall_does_not_warn(collapsed, capsys):
    train_fast(collapse_threshold=1000.0, collapse_stop=True)
    assert collapse_warnings(capsys.readouterr().err) == []
    assert saved() == [7, 8, 9, 10, 11]  # nothing kept beyond the newest
    assert_same_bits("run", "whole")
