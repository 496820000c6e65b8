"""The collapse guard: when it warns, which checkpoint it keeps, how it stops a run.

    python -m pytest tests/test_guard.py

First as a function of chosen log-probs worked out by hand (all exact in binary), then in real runs
that learn far too fast.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import undisturbed
from small_run import (
    HERE,
    REDI,
    assert_same_bits,
    flags,
    records,
    redi_config,
    refusal,
    run,
    saved,
    steps,
)

from redi import programs
from redi.checkpoint.resume import Checkpoints
from redi.monitor import CollapseGuard
from redi.runlog import read_metrics

# ---------------------------------------------------------------- as a function


def warnings_of(chosen: list[float], threshold: float = 0.5, in_a_row: int = 3) -> dict[int, str]:
    """Step -> warning, for a run with these chosen log-probs."""
    guard = CollapseGuard(threshold, in_a_row)
    warnings = {step: guard.check({"chosen_logp": c}) for step, c in enumerate(chosen, start=1)}
    return {step: warning for step, warning in warnings.items() if warning}


FALLING = [-1 - 0.25 * number for number in range(13)]  # by 0.5 at step 3, by 3 at step 13
SEQUENCES = {  # log-probs; steps that warn; threshold and steps in a row, if not 0.5 and 3
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
    "0.5 for 1 step": (FALLING, [4], 0.5, 1),
    "0.5 for 4 steps": (FALLING, [7], 0.5, 4),
    "1 for 1 step": (FALLING, [6], 1.0, 1),
    "0.125 for 2 steps": (FALLING, [3], 0.125, 2),
    "2.5 for 2 steps": (FALLING, [13], 2.5, 2),
    "3, never exceeded": (FALLING, [], 3.0, 1),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_it_warns_at_these_steps(name):
    chosen, due, *settings = SEQUENCES[name]
    assert list(warnings_of(chosen, *settings)) == due


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
def test_the_checkpoint_kept_from_before_the_fall_is_named_in_the_warning(name, tmp_path):
    chosen, pinned = PINS[name]
    checkpoints = Checkpoints(tmp_path, HERE, {}, keep=1)
    guard, seen = CollapseGuard(0.5, 3), []
    for step, logp in enumerate(chosen, start=1):
        warning = guard.watch(step, {"chosen_logp": logp}, checkpoints)
        seen.append(checkpoints.pinned)
        kept = checkpoints.at(seen[-1]) if seen[-1] else "no checkpoint"
        assert not warning or warning.endswith(f"; kept from before the fall: {kept}")
        checkpoints.at(step).mkdir(parents=True)
    assert seen == pinned


@pytest.mark.parametrize(
    ("name", "value"),
    [("collapse_threshold", 0.0), ("collapse_threshold", -0.5), ("collapse_steps", 0)],
)
def test_settings_that_would_always_warn_are_refused(name, value):
    expected = "at least 1" if name == "collapse_steps" else "above 0"
    message = refusal(redi_config, **{name: value})
    assert message.startswith(f"--{name.replace('_', '-')}: expected {expected}")


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
    fast = [*REDI, *flags(FAST), "--out", "whole"]
    [whole] = undisturbed(folder, fast, 1, main=programs.train_redi)
    [warning] = collapse_warnings(whole.errors)
    assert warning.startswith(f"warning: step {due(folder / 'whole')}: collapse: ")
    assert 5 <= due(folder / "whole") <= 8  # there are steps before and after it
    return folder


@pytest.fixture
def train_fast(ignored, monkeypatch, capsys) -> Callable:
    """train_fast(**changes) -> the warnings of such a run in that folder, where run/ is new."""
    monkeypatch.chdir(ignored)
    shutil.rmtree("run", ignore_errors=True)

    def train(**changes) -> list[str]:
        run(redi_config(**{**FAST, **changes}))
        return collapse_warnings(capsys.readouterr().err)

    return train


def test_with_collapse_stop_the_run_ends_there_and_resumes_only_without_it(train_fast, capsys):
    step, kept = due(), f"run/checkpoints/step-{saved('whole')[0]:06d}"
    message = refusal(train_fast, collapse_stop=True)
    assert message == f"--collapse-stop: stopped after step {step} of 12"
    [warning] = collapse_warnings(capsys.readouterr().err)
    assert warning.startswith(f"warning: step {step}: collapse: ")
    assert warning.endswith(f"; kept from before the fall: {kept}")
    assert list(read_metrics(Path("run")))[-1] == {"kind": "stopped", "step": step}
    assert saved()[-1] == step

    # A scheduler that starts jobs again must not train on into the collapse.
    message = refusal(train_fast, collapse_stop=True)
    assert message.startswith(f"--collapse-stop: step {step}: collapse: ")
    assert f"{kept}; with" in message
    assert saved()[-1] == step

    capsys.readouterr()
    assert train_fast() == []
    assert saved() == saved("whole")
    assert_same_bits("run", "whole")


@pytest.mark.parametrize("after", [-1, 3])
def test_stopped_before_or_after_the_warning_a_run_resumes_to_the_same_warning_and_checkpoints(
    after, train_fast, stop_at
):
    stop_at(redi_config(**FAST), due() + after)
    [warning] = train_fast()
    assert warning.startswith(f"warning: step {due()}: ")
    assert saved() == saved("whole")
    assert_same_bits("run", "whole")


def test_at_the_last_step_there_is_nothing_to_stop(train_fast):
    [warning] = train_fast(collapse_steps=3 + 12 - due(), collapse_stop=True)
    assert warning.startswith("warning: step 12: ")
    assert records()[-1] == {"kind": "finished"}


def test_the_checkpoint_kept_is_the_newest_from_before_the_fall_and_beyond_keep(train_fast):
    kept, *newest = saved("whole")
    assert newest == [7, 8, 9, 10, 11]
    # The record of the next step has the log-probs of a checkpoint's model.
    first, *after_step = chosen_logps("whole")
    assert first - after_step[kept - 1] <= 0.5 < first - after_step[kept]


def test_a_threshold_beyond_the_fall_does_not_warn(train_fast):
    assert train_fast(collapse_threshold=1000.0, collapse_stop=True) == []
    assert saved() == [7, 8, 9, 10, 11]  # nothing kept beyond the newest
    assert_same_bits("run", "whole")
