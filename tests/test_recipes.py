"""Every recipe is one that its program accepts, and the paper's say what the paper says."""

import pytest
from processes import ROOT

from redi.config import parse
from redi.eval.protocol import EvalConfig
from redi.recipe import REDIConfig, SFTConfig
from redi.study.jobs import jobs
from redi.study.plan import read_study

RECIPES = ROOT / "recipes"
PROGRAMS = {
    "toy_sft": SFTConfig, "sft_3_epochs": SFTConfig, "toy_redi": REDIConfig, "dpo": REDIConfig,
    "dpo_norm": REDIConfig, "simpo": REDIConfig, "symmetric": REDIConfig, "toy_eval": EvalConfig,
    "eval_tables": EvalConfig, "eval_tuning": EvalConfig, "dialogue_tutor": SFTConfig,
    "dialogue_student": SFTConfig, "dialogue_judge": SFTConfig, "dialogue_redi": REDIConfig,
}  # fmt: skip
STUDIES = ("study_cliff", "study_labels", "study_paper", "study_toy")


def load(name: str):
    return parse(PROGRAMS[name], name, ["--config", str(RECIPES / f"{name}.toml")])


def test_every_recipe_is_accepted():
    assert {file.stem for file in RECIPES.iterdir()} == {*PROGRAMS, *STUDIES}
    for name in PROGRAMS:
        load(name)
    for name in STUDIES:
        words = {w for job in jobs(read_study(RECIPES / f"{name}.toml")) for w in job.command}
        assert words >= {"train-sft", "train-redi", "evaluate"}  # commands of redi


def test_the_grid_of_the_paper_is_that_of_its_appendix_c4():
    models = read_study(RECIPES / "study_paper.toml").models
    found = [tuple(model.settings.values()) for model in models if model.settings]
    assert sorted(found) == sorted([
        *(("dpo", 0.1, lr) for lr in (1e-6, 1e-7, 1e-8)),
        *(("dpo", beta, lr) for beta in (0.01, 0.001) for lr in (1e-6, 5e-7, 2e-7, 1e-7)),
        ("simpo", 2.0, 1.0, 5e-7),
        ("simpo", 10.0, 5.0, 3e-7),
        ("redi", 0.2, 1e-6),
        *(("redi", 0.5, lr) for lr in (1e-6, 2e-6)),
        ("redi", 0.8, 1e-6),
        *(("symmetric", lr) for lr in (1e-6, 2e-7, 1e-7)),
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", "simpo", "symmetric", "dpo_norm"])
def test_baselines_start_from_the_model_of_three_epochs(name):
    sft = load("sft_3_epochs")
    assert (sft.epochs, sft.lr, sft.rows_per_step) == (3, 5e-5, 128)
    assert load(name).model == sft.out


def test_the_cliffs_alphas_are_the_same_multiples_of_what_the_theorem_predicts():
    found = {}
    for model in read_study(RECIPES / "study_cliff.toml").models:
        if settings := model.settings:
            share, v = settings["right_rows"] / 10, settings.get("baseline")
            alpha = settings["alpha"] if v is None else v / (1 - v)
            multiple = alpha * (1 - share) / share
            found.setdefault((settings["objective"], share, model.seed), []).append(multiple)
    assert set(found) == {
        (o, s, seed) for o in ("redi", "asymre") for s in (0.3, 0.5, 0.7) for seed in (1, 2, 3)
    }
    for multiples in found.values():
        assert multiples == pytest.approx([0.5, 0.9, 1.1, 1.5], rel=1e-3)
