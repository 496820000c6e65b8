"""docs/new-objective.md as a user follows it: its diff applies, and the result trains.

python -m pytest tests/test_new_objective.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import Oracle, read_jsonl

from redi.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "new-objective.md").read_text(encoding="utf-8")
[DIFF] = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def ran(*command: str, **where) -> subprocess.CompletedProcess:
    # As from a shell: import redi from the copy, not from this repository.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, **where
    )


@pytest.fixture
def copy(here) -> Path:
    """A checkout in which the document's diff is applied, beside a student and its pairs."""
    for name in ("train_redi.py", "redi", "recipes"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, here / name)
    if "unlikelihood" not in OBJECTIVES:  # this checkout may have it already
        (here / "new.diff").write_text(DIFF, encoding="utf-8")
        applied = ran("git", "apply", "new.diff", cwd=here)
        assert applied.returncode == 0, applied.stderr
    return here


def train(copy: Path, *flags: str) -> subprocess.CompletedProcess:
    settings = (
        "--model student --data pairs.jsonl --out run --max-prompt 100 --max-response 100 "
        "--max-length 200 --rows-per-step 10 --epochs 2 --lr 1e-3 --objective unlikelihood"
    )
    return ran(sys.executable, "train_redi.py", *settings.split(), *flags, cwd=copy)


def test_the_diff_changes_at_most_ten_lines_of_two_files():
    changed = [line for line in DIFF.splitlines() if re.match(r"[+-](?!\+\+|--)", line)]
    assert 0 < len(changed) <= 10
    files = re.findall(r"^\+\+\+ (.*)$", DIFF, re.MULTILINE)
    assert files == ["b/redi/related_losses.py", "b/redi/objectives.py"]


def test_the_new_objective_trains_and_has_the_loss_that_the_document_states(copy):
    done = train(copy, "--alpha", "0.5")
    assert done.returncode == 0, done.stderr
    lines = (copy / "run" / "metrics.jsonl").read_text().splitlines()
    first, second, finished = map(json.loads, lines)
    assert finished["kind"] == "finished"
    assert second["loss"] < first["loss"]
    oracle, losses = Oracle("student"), []
    for row in read_jsonl("pairs.jsonl"):
        chosen, rejected = (oracle.logps(row, side) for side in ("chosen", "rejected"))
        losses.append((-chosen.mean() - 0.5 * (1 - rejected.exp()).log().mean()).item())
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_its_parameter_is_a_flag_like_any_other(copy):
    missing, foreign = train(copy), train(copy, "--alpha", "0.5", "--gamma", "1")
    assert (missing.returncode, foreign.returncode) == (2, 2)
    assert missing.stderr == "error: --alpha is missing: unlikelihood needs it\n"
    assert foreign.stderr == "error: --gamma: expected none with unlikelihood; got 1.0\n"
