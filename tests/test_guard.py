"""The collapse guard: when it warns, which checkpoint it keeps, how it stops a run.

    python -m pytest tests/test_guard.py

First as a function of chosen log-probs worked out by hand, then in runs that learn far too fast.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run_ranks
from small_run import HERE, REDI, assert_same_bits, flags, redi_config, refusal, run, saved, steps

from redi import programs
from redi.checkpoint.resume import Checkpoints
from redi.monitor import CollapseGuard
from redi.runlog import read_metrics

# ---------------------------------------------------------------- as a function

SEQUENCES = {  # log-probs; steps that warn, with threshold 0.5 and three steps in a row
    "fell below": ([-1, -2, -2, -2], [4]),
    "exactly at the threshold": ([-1, -1.5, -1.5, -1.5, -1.5], []),
    "stayed one step too short": ([-1, -2, -2, -1], []),
    "counts from 0 after a step above": ([-1, -2, -2, -1.5, -2, -2, -2], [7]),
    "once, however long it stays": ([-1] + [-2] * 20, [4]),
    "again after it came back": ([-1, -2, -2, -2, -1, -2, -2, -2], [4, 8]),
    "measured from the first record": ([-3, -1, -1, -3.25, -3.25, -3.25], []),
    "rose": ([-3, -2, -1, -0.5], []),
}
# Checkpoints after every step: log-probs, then the step of the one that is kept after each.
PINS = {
    "until it recovers": ([-1, -1, -2, -2, -1, -1], [0, 0, 1, 1, 0, 0]),
    "the second fall's": ([-1, -1, -2, -1, -1, -2, -2, -2], [0, 0, 1, 0, 0, 4, 4, 4]),
    "once it warned, for good": ([-1, -1, -1, -2, -2, -2, -1, -2], [0, 0, 0, 2, 2, 2, 2, 2]),
    "nothing is from before the fall": ([-1, -2, -2, -2], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_it_warns_at_these_steps(name):
    chosen, due = SEQUENCES[name]
    guard = CollapseGuard(threshold=0.5, steps=3)
    warnings = [guard.check({"chosen_logp": logp}) for logp in chosen]
    assert [step for step, warning in enumerate(warnings, start=1) if warning] == due


@pytest.mark.parametrize("name", PINS)
def test_the_checkpoint_kept_from_before_the_fall_is_named_in_the_warning(name, tmp_path):
    chosen, pinned = PINS[name]
    checkpoints = Checkpoints(tmp_path, HERE, {}, keep=1)
    guard, seen = CollapseGuard(0.5, 3), []
    for step, logp in enumerate(chosen, start=1):
        warning = guard.watch(step, {"chosen_logp": logp}, checkpoints)
        seen.append(checkpoints.pinned)
        kept = checkpoints.at(seen[-1]) if seen[-1] else "no checkpoint"
        assert warning in (
            "",
            f"step {step}: collapse: chosen traces have been over 0.5 nats per token less likely "
            f"than at the start for 3 steps (now 1.00: -1.00 -> -2.00); a smaller --lr helps; kept "
            f"from before the fall: {kept}",
        )
        checkpoints.at(step).mkdir(parents=True)
    assert seen == pinned


def test_steps_without_right_rows_say_nothing_of_the_fall(tmp_path):
    checkpoints, warning = Checkpoints(tmp_path, HERE, {}, keep="all"), ""
    guard = CollapseGuard(0.5, 2)
    for step, logp in enumerate([-1.0, -1.0, None, None, -3.0, None, -3.0], start=1):
        record = {} if logp is None else {"chosen_logp": logp}
        warning = guard.watch(step, record, checkpoints)
        checkpoints.at(step).mkdir(parents=True)
    # Step 2's record is of the model after step 1, the last that is known to be good.
    assert warning.endswith(f"kept from before the fall: {checkpoints.at(1)}")


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
    [whole] = run_ranks(folder, fast, 1, main=programs.train_redi)
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
