"""docs/objectives.md as a user follows it: its diff applies, and the result trains.

python -m pytest tests/test_new_objective.py
"""

import re
import shutil
import subprocess

import pytest
from processes import ROOT, run_command
from small_run import REDI, Oracle, read_jsonl, records

from redi.objectives import OBJECTIVES

TEXT = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
[DIFF] = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_diff_changes_at_most_ten_lines_of_two_files():
    changed = [line for line in DIFF.splitlines() if re.match(r"[+-](?!\+\+|--)", line)]
    assert 0 < len(changed) <= 10
    files = re.findall(r"^\+\+\+ (.*)$", DIFF, re.MULTILINE)
    assert files == ["b/redi/related_losses.py", "b/redi/objectives.py"]


def test_the_new_objective_trains_by_its_flag_and_has_the_loss_that_the_document_states(here):
    shutil.copy(ROOT / "train_redi.py", here)
    shutil.copytree(ROOT / "redi", here / "redi")
    if "unlikelihood" not in OBJECTIVES:  # this checkout may have it already
        subprocess.run(["git", "apply", "-"], input=DIFF, text=True, check=True)

    new = ("--objective", "unlikelihood", "--alpha", 0.5, "--rows-per-step", 10)
    # As from a shell: redi is imported from the folder of the program.
    status, _, errors = run_command("train_redi.py", *REDI, *new, PYTHONPATH="")
    assert status == 0, errors
    first, second, finished_record = records()
    assert finished_record["kind"] == "finished"
    assert second["loss"] < first["loss"]
    oracle, losses = Oracle("student"), []
    for row in read_jsonl("pairs.jsonl"):
        chosen, rejected = (oracle.logps(row, side) for side in ("chosen", "rejected"))
        losses.append((-chosen.mean() - 0.5 * (1 - rejected.exp()).log().mean()).item())
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
