"""docs/make_study.py: what the page says follows from the numbers, whichever way they fall."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_study import a_run, results_of

from redi.study.figures import figures
from redi.study.page import to_markdown
from redi.study.results import STAGE_1, Results

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))  # as for a script there
spec = importlib.util.spec_from_file_location("make_study", ROOT / "docs" / "make_study.py")
make_study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_study)

STAGE_1_SCORES = [0.50, 0.52, 0.54, 0.56]
FALLEN = [-0.4, -0.41, -0.4, -0.43]


def runs(method: str, gains: list[float], share: float = 0.0, setting: str = "", **settings):
    scores = [base + gain for base, gain in zip(STAGE_1_SCORES, gains)]
    return [a_run(method, seed, x, setting, share, **settings) for seed, x in enumerate(scores)]


def toy(redi: list[float], dpo: list[float], fast: list[float], **warned) -> Results:
    fastest = runs("symmetric", fast, objective="symmetric", lr=3e-4)
    return results_of(
        [
            *runs(STAGE_1, [0.0] * 4),
            *runs("REDI, alpha 0.8", redi, objective="redi", alpha=0.8, lr=1e-4),
            *runs("symmetric", [0.01] * 4, objective="symmetric", lr=1e-4),
            *(replace(run, **warned) for run in fastest),
            *runs("DPO", dpo, objective="dpo", beta=0.1, lr=1e-4),
            *runs("weak", [-0.2, -0.21, -0.2, -0.22], objective="redi", alpha=0.2, lr=1e-4),
        ]
    )


def test_claims_agree_with_the_paper_where_the_numbers_do():
    lines = make_study.claims(
        toy([0.30, 0.31, 0.32, 0.33], [0.1, 0.12, 0.1, 0.12], FALLEN, collapsed_at=21)
    )
    # gains 0.30 to 0.33: mean 0.315, SEM 0.00645, t = 49 with 3 degrees of freedom
    assert lines[0].startswith("- **As in the paper**: REDI lifts the stage-1 model")
    assert "above stage 1 by 0.315" in lines[0]
    assert lines[1].startswith("- **As in the paper**: REDI is above DPO")
    assert "above DPO by 0.205" in lines[1]
    assert "REDI is above the symmetric objective (48.3 against 47.7 there)" in lines[2]
    assert "above symmetric by 0.305" in lines[2]  # 0.315 - 0.01
    assert "at a large learning rate REDI is above the symmetric objective" in lines[3]
    assert "at 1e-4, the largest of both, it is above symmetric by 0.305" in lines[3]
    assert "chosen -0.10 to -0.50, rejected -0.10 to -0.50" in lines[4]
    assert lines[4].startswith("- **As in the paper**")
    assert lines[5].startswith("- **As in the paper**")
    assert "3e-4 gives 0.120 against 0.530 after stage 1" in lines[5]
    assert "warned in 4 of 4 runs" in lines[5]
    assert lines[6].startswith("- **Not as in the paper**: a small alpha stays near SFT")
    assert "alpha 0.2 is below stage 1 by 0.207" in lines[6]


def test_claims_do_not_agree_where_the_numbers_do_not():
    risen = [0.1, 0.11, 0.1, 0.12]
    lines = make_study.claims(toy([-0.30, -0.31, -0.3, -0.32], [0.1, 0.2, 0.1, 0.2], risen))
    assert all(line.startswith("- **Not as in the paper**") for line in lines[:2])
    assert "below stage 1 by 0.307 (p" in lines[0]
    assert lines[5].startswith("- **Not as in the paper**")
    assert "warned in 0 of 4 runs" in lines[5]


def test_a_difference_that_cannot_be_told_decides_nothing():
    lines = make_study.claims(toy([0.3, -0.2, 0.2, -0.1], [0.1, 0.0, 0.1, 0.0], [0.1] * 4))
    assert all(line.startswith("- **Undecided**") for line in lines[:4])
    assert "not told apart from stage 1 (+0.050, p" in lines[0]


def test_the_learning_rates_at_which_a_method_falls_below_stage_1_are_named():
    said = make_study.collapses(toy([0.3] * 4, [0.1] * 4, FALLEN, collapsed_at=21))
    assert "- symmetric (lr tried: 1e-4, 3e-4): below stage 1 with lr 3e-4; guard warned: " in said
    assert "lr 3e-4 (4 of 4 runs)." in said
    assert "- DPO (lr tried: 1e-4): below stage 1 with none; guard warned: none." in said


@pytest.fixture
def labels() -> Results:
    kind = {"objective": "redi", "lr": 1e-4}
    return results_of(
        [
            *runs(STAGE_1, [0.0] * 4, setting="a"),
            *runs("REDI, alpha 0.8", [0.2] * 4, 0.0, "a", **kind),
            *runs("REDI, alpha 0.8", [0.1] * 4, 0.3, "a", **kind),
            *runs("REDI, alpha 0.8", [-0.1] * 4, 0.5, "a", **kind),
        ]
    )


def test_the_share_of_wrong_labels_up_to_which_negatives_help(labels):
    said = make_study.label_lines(labels)
    assert said == (
        "- a, REDI, alpha 0.8: +0.200 at 0, +0.100 at 0.3, -0.100 at 0.5: below stage 1 at 0.5."
    )
    assert make_study.on_average(labels).endswith("this: REDI, alpha 0.8 from +0.200 to -0.100.")


def test_the_page_shows_the_pictures_that_there_are(labels):
    results = toy([0.3, 0.31, 0.32, 0.33], [0.1, 0.2, 0.1, 0.2], [-0.4] * 4)
    drawn = {"toy": list(figures(results)), "labels": list(figures(labels))}
    blocks = make_study.page(results, labels, {0.001: 0.99999}, drawn)
    text = to_markdown(blocks, "study")
    assert "| 1e-3 | 0.999990000 | 1.0e-05 |" in re.sub(" +", " ", text)
    for name in (
        "toy_accuracy",
        "toy_log_probs",
        "toy_norms",
        "toy_lr",
        "toy_alpha",
        "labels_labels",
    ):
        assert f"![{name}](study/{name}.png)" in text
    assert "toy_entropy" not in text
    assert "nan" not in text
