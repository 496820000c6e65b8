"""What the runs of a study left on disk -> its numbers, as study.json holds them.

For a variant (a method with its parameters and learning rate) on one teacher's data:

    mean    of pass@1 over seeds; with several benchmarks, of their mean
    SEM     std (ddof 1) over seeds / sqrt(seeds): how much another set of seeds may differ. The
            paper's SEM is over samples of one model; each evaluation reports that one
    p       two-sided paired t-test over seeds against the stage-1 models, or against the best DPO
            models, of the same seeds

A method's best variant has the highest mean, as in the paper's Table 2. It is chosen by the numbers
it is reported with, so more variants are a slight advantage. Left out: a correction for the number
of tests.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mpmath import betainc

from redi.config import UserError
from redi.eval.protocol import EvalConfig
from redi.monitor import CollapseGuard
from redi.recipe import REDIConfig
from redi.runlog import read_metrics
from redi.study.plan import STAGE_1, Model, Study, Variant

ROUNDING = 1e-12  # scores that differ at all differ by one completion, about 1e-5
CURVES = ("chosen_logp", "rejected_logp")  # fields of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Run(Variant):
    """One model, trained and evaluated."""

    seed: int
    grader: str  # of the pass@1
    pass_at_1: float  # mean over benchmarks
    benchmarks: dict[str, float]  # name -> pass@1
    pass_at_n: float  # mean over benchmarks
    mean_tokens: float
    on_the_way: list[tuple[int, float]]  # (step, pass@1) during training
    curves: dict[str, list[tuple[int, float]]]  # (step, value) where a step has one
    collapsed_at: int | None  # the step at which the guard warned


@dataclass(frozen=True, kw_only=True)
class Row(Variant):
    """A variant over its seeds."""

    scores: list[float]  # pass@1 of each seed
    mean: float
    sem: float | None  # None with one seed
    benchmarks: dict[str, float]  # name -> mean pass@1
    pass_at_n: float
    mean_tokens: float
    gains: list[float]  # over stage 1 of the same seeds
    gain: float | None  # their mean
    p_stage_1: float | None
    p_dpo: float | None
    collapsed: int  # runs in which the guard warned


@dataclass(frozen=True, kw_only=True)
class Results:
    title: str
    study: str  # the TOML
    samples: int  # per problem in the final evaluation
    missing: dict[str, str]  # what has no result -> why
    runs: list[Run]
    grid: list[Row]  # every variant
    table: list[Row]  # stage 1, and every method's best variant


# ---------------------------------------------------------------- from disk


def collect(study: Study, missing: dict[str, str]) -> Results:
    """missing: jobs without a result -> why. Raises UserError if no model has a result."""
    models = [model for model in study.models if str(model.folder / "eval") not in missing]
    if not models:
        first, why = next(iter(missing.items()))
        raise UserError(f"{study.out}: nothing to report; the first failure: {first}: {why}")
    runs = [_run(study, model) for model in models]
    grid = grid_of(runs)
    return Results(
        title=study.path.stem,
        study=study.text,
        samples=study.evaluation.get("samples", EvalConfig.samples),
        missing=missing,
        runs=runs,
        grid=grid,
        table=best_of(grid),
    )


def _run(study: Study, model: Model) -> Run:
    metrics = list(read_metrics(model.folder))
    records = [record for record in metrics if record["kind"] == "train"]
    if not records:
        raise UserError(f"{model.folder}/metrics.jsonl: no training records; remove the folder")
    during = [record for record in metrics if record["kind"] == "benchmark"]
    settings = study.stage2 | model.settings
    names = ("collapse_threshold", "collapse_steps")
    guard = CollapseGuard(*(settings.get(name, getattr(REDIConfig, name)) for name in names))
    collapsed_at = next((record["step"] for record in records if guard.check(record)), None)
    return Run(
        **model.variant,
        seed=model.seed,
        **_read_scores(model.folder / "eval"),
        # The last score is of the end, where the final evaluation counts.
        on_the_way=[(score["step"], score["pass_at_1"]) for score in during[:-1]],
        curves={key: [(r["step"], r[key]) for r in records if key in r] for key in CURVES},
        collapsed_at=None if model.method == STAGE_1 else collapsed_at,
    )


def _read_scores(folder: Path) -> dict[str, Any]:
    """What a Run has of an evaluation's report.json. Raises UserError."""
    path = folder / "report.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        return {
            "grader": scores[0]["grader"],
            "pass_at_1": fmean(score["pass_at_1"] for score in scores),
            "benchmarks": {score["benchmark"]: score["pass_at_1"] for score in scores},
            "pass_at_n": fmean(score["pass_at_k"][-1] for score in scores),
            "mean_tokens": fmean(score["mean_tokens"] for score in scores),
        }
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a report of evaluate.py ({error}); "
            f"`python -m redi.eval.grade regrade {folder}` writes it again"
        ) from None


# ---------------------------------------------------------------- over seeds


def grid_of(runs: Sequence[Run]) -> list[Row]:
    """One row for every variant, in the order of the runs."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return [_row(group, groups.values()) for group in groups.values()]


def _row(runs: list[Run], groups: Collection[list[Run]]) -> Row:
    """The row of a variant's `runs`; groups: the runs of every variant, itself included."""
    first, objective = runs[0], runs[0].settings.get("objective")
    same_teacher = [group for group in groups if group[0].teacher == first.teacher]
    stage_1 = next((group for group in same_teacher if group[0].method == STAGE_1), [])
    same_data = [group for group in same_teacher if group[0].mislabelled == first.mislabelled]
    dpo = [group for group in same_data if group[0].settings.get("objective") == "dpo"]
    best_dpo = max(dpo, key=lambda group: _mean(group, "pass_at_1"), default=[])
    gains = paired_differences(runs, stage_1) if objective else []
    over_dpo = paired_differences(runs, best_dpo) if objective not in (None, "dpo") else []
    scores = [run.pass_at_1 for run in runs]
    return Row(
        **first.variant,
        scores=scores,
        mean=fmean(scores),
        sem=sem(scores),
        benchmarks={name: fmean(r.benchmarks[name] for r in runs) for name in first.benchmarks},
        pass_at_n=_mean(runs, "pass_at_n"),
        mean_tokens=_mean(runs, "mean_tokens"),
        gains=gains,
        gain=fmean(gains) if gains else None,
        p_stage_1=paired_t_test(gains),
        p_dpo=paired_t_test(over_dpo),
        collapsed=sum(run.collapsed_at is not None for run in runs),
    )


def best_of(grid: Sequence[Row]) -> list[Row]:
    """For each teacher, share and method the row with the highest mean, in the grid's order."""
    best: dict[tuple, Row] = {}
    for row in grid:
        method = row.key[:3]
        best[method] = max(best.get(method, row), row, key=lambda row: row.mean)
    return list(best.values())


def _mean(runs: Sequence[Run], name: str) -> float:
    return fmean(getattr(run, name) for run in runs)


def paired_differences(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    """Our pass@1 minus theirs, for every seed that both have."""
    scores = {run.seed: run.pass_at_1 for run in theirs}
    return [run.pass_at_1 - scores[run.seed] for run in ours if run.seed in scores]


def sem(values: Sequence[float]) -> float | None:
    """Standard error of the mean (ddof 1); None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean difference of 0; None for fewer than two, or all the same."""
    error = sem(differences)
    if error is None or error < ROUNDING:
        return None
    return t_tail(fmean(differences) / error, len(differences) - 1)


def t_tail(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's distribution with `df` degrees of freedom."""
    return float(betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))
