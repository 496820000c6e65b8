"""What the runs of a study left on disk -> its numbers, as study.json holds them.

For a variant (a method with its parameters and learning rate) on one setting:

    mean    of pass@1 over seeds; with several benchmarks, of their mean
    SEM     std (ddof 1) over seeds / sqrt(seeds): how much another set of seeds may differ. The
            paper's SEM is over samples of one model; each evaluation reports that one
    p       two-sided paired t-test over seeds against the stage-1 models, or against the best DPO
            models, of the same seeds

A method's best variant has the highest mean, as in the paper's Table 2. It is chosen by the numbers
it is reported with, so more variants are a slight advantage. Left out: a correction for the number
of tests.
"""

import dataclasses
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpmath import betainc

import redi
from redi.config import UserError
from redi.data.files import write_aside
from redi.eval.protocol import EvalConfig
from redi.monitor import CollapseGuard
from redi.recipe import REDIConfig
from redi.runlog import read_metrics
from redi.study.jobs import seconds_of
from redi.study.plan import STAGE_1, Model, Study

ROUNDING = 1e-12  # scores that differ at all differ by one completion, about 1e-5
# Fields of metrics.jsonl; a run may lack some.
CURVES = (
    "chosen_logp", "rejected_logp", "grad_norm", "update_norm", "chosen_entropy",
    "rejected_entropy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model, trained and evaluated."""

    setting: str
    mislabelled: float
    seed: int
    method: str  # STAGE_1, or one of the study's
    settings: dict[str, Any]  # objective, lr, parameters; empty for stage 1
    pass_at_1: float  # mean over benchmarks
    benchmarks: dict[str, dict[str, float]]  # name -> pass@1, pass@n, tokens
    on_the_way: list[tuple[int, float]]  # (step, pass@1) during training
    curves: dict[str, list[float]]  # one value per step
    collapsed_at: int | None  # the step at which the guard warned


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant on one setting, over its seeds."""

    setting: str
    mislabelled: float
    method: str
    settings: dict[str, Any]
    seeds: int
    mean: float
    sem: float | None  # None with one seed
    benchmarks: dict[str, float]  # name -> mean pass@1
    pass_at_n: float  # mean over benchmarks and seeds
    mean_tokens: float
    gain: float | None  # over stage 1 of the same seeds
    p_stage_1: float | None
    p_dpo: float | None
    collapsed: int  # runs in which the guard warned


@dataclass(frozen=True, kw_only=True)
class Results:
    title: str
    study: str  # the TOML
    machine: dict[str, Any]
    versions: dict[str, str]
    job_seconds: float  # of all jobs, added up
    samples: int  # per problem in the final evaluation
    missing: dict[str, str]  # what has no result -> why
    runs: list[Run]
    grid: list[Row]  # every variant
    table: list[Row]  # stage 1, and every method's best variant

    def write(self, path: Path) -> None:
        with write_aside(path) as file:
            json.dump(dataclasses.asdict(self), file)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["runs"] = [Run(**run) for run in content["runs"]]
            for name in ("grid", "table"):
                content[name] = [Row(**row) for row in content[name]]
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not written by `python -m redi.study` ({error})") from None


# ---------------------------------------------------------------- from disk


def collect(study: Study, failed: dict[str, str]) -> Results:
    """failed: jobs without a result -> why. Raises UserError if no model has a result."""
    models = [model for model in study.models() if str(model.folder / "eval") not in failed]
    runs = [_run(study, model) for model in models]
    grid = grid_of(runs)
    if not grid:
        first, why = next(iter(failed.items()))
        raise UserError(f"{study.out}: nothing to report; the first failure: {first}: {why}")
    return Results(
        title=study.path.stem,
        study=study.path.read_text(encoding="utf-8"),
        machine=machine(),
        versions={
            "redi": redi.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        job_seconds=seconds_of(study.out),
        samples=EvalConfig(**study.evaluation).samples,
        missing=failed,
        runs=runs,
        grid=grid,
        table=best_of(grid),
    )


def _run(study: Study, model: Model) -> Run:
    mean, benchmarks = _scores(model.folder / "eval" / "report.json")
    metrics = list(read_metrics(model.folder))
    records = [record for record in metrics if record["kind"] == "train"]
    keys = [key for key in CURVES if records and key in records[0]]
    scored = [record for record in metrics if record["kind"] == "benchmark"]
    settings = model.variant.settings if model.variant else {}
    return Run(
        setting=model.setting.name,
        mislabelled=model.mislabelled,
        seed=model.seed,
        method=model.variant.method if model.variant else STAGE_1,
        settings=settings,
        pass_at_1=mean,
        benchmarks=benchmarks,
        on_the_way=[(r["step"], r["pass_at_1"]) for r in scored[:-1]],  # the last is of the end
        curves={key: [float(f"{r[key]:.5g}") for r in records] for key in keys},
        collapsed_at=_collapse(records, study.stage2 | settings) if model.variant else None,
    )


def _scores(path: Path) -> tuple[float, dict[str, dict[str, float]]]:
    """(mean pass@1 over benchmarks, scores per benchmark) from an evaluation's report.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = {
            score["benchmark"]: {
                "pass_at_1": score["pass_at_1"],
                "pass_at_n": score["pass_at_k"][-1],
                "mean_tokens": score["mean_tokens"],
            }
            for score in content["benchmarks"]
        }
        return content["mean_pass_at_1"], scores
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a report of evaluate.py ({error}); delete it and run the same command"
        ) from None


def _collapse(records: list[dict[str, Any]], settings: dict[str, Any]) -> int | None:
    """The step at which the guard of a run with these settings warned."""
    config = REDIConfig(**settings)
    guard = CollapseGuard(config.collapse_threshold, config.collapse_steps)
    return next((r["step"] for r in records if guard.check(r)), None)


# ---------------------------------------------------------------- over seeds


def grid_of(runs: Sequence[Run]) -> list[Row]:
    """One row for every variant of every setting, in the order of the runs."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(variant_of(run), []).append(run)
    return [_row(group, list(groups.values())) for group in groups.values()]


def variant_of(item: Run | Row) -> tuple:
    """The identity of a variant on a setting: equal for runs that differ only in their seed."""
    return item.setting, item.mislabelled, item.method, json.dumps(item.settings, sort_keys=True)


def _row(runs: list[Run], groups: list[list[Run]]) -> Row:
    """The row of a variant's `runs`; groups: the runs of every variant, itself included."""
    first = runs[0]
    same_setting = [group for group in groups if group[0].setting == first.setting]
    stage_1 = next((group for group in same_setting if group[0].method == STAGE_1), [])
    same_share = [group for group in same_setting if group[0].mislabelled == first.mislabelled]
    dpo = [group for group in same_share if group[0].settings.get("objective") == "dpo"]
    best_dpo = max(dpo, key=_mean, default=[])
    is_stage_1, is_dpo = first.method == STAGE_1, first.settings.get("objective") == "dpo"
    gains = [] if is_stage_1 else paired_differences(runs, stage_1)
    over_dpo = [] if is_stage_1 or is_dpo else paired_differences(runs, best_dpo)

    def score(benchmark: str, name: str) -> float:
        return statistics.fmean(run.benchmarks[benchmark][name] for run in runs)

    return Row(
        setting=first.setting,
        mislabelled=first.mislabelled,
        method=first.method,
        settings=first.settings,
        seeds=len(runs),
        mean=_mean(runs),
        sem=sem([run.pass_at_1 for run in runs]),
        benchmarks={name: score(name, "pass_at_1") for name in first.benchmarks},
        pass_at_n=statistics.fmean(score(name, "pass_at_n") for name in first.benchmarks),
        mean_tokens=statistics.fmean(score(name, "mean_tokens") for name in first.benchmarks),
        gain=statistics.fmean(gains) if gains else None,
        p_stage_1=paired_t_test(gains),
        p_dpo=paired_t_test(over_dpo),
        collapsed=sum(run.collapsed_at is not None for run in runs),
    )


def best_of(grid: Sequence[Row]) -> list[Row]:
    """The row with the highest mean for each method on each setting; stage 1 first."""
    best: dict[tuple, Row] = {}
    for row in grid:
        key = (row.setting, row.mislabelled, row.method)
        if key not in best or row.mean > best[key].mean:
            best[key] = row
    return list(best.values())


def _mean(runs: Sequence[Run]) -> float:
    return statistics.fmean(run.pass_at_1 for run in runs)


def paired_differences(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    """Our pass@1 minus theirs, for every seed that both have."""
    scores = {run.seed: run.pass_at_1 for run in theirs}
    return [run.pass_at_1 - scores[run.seed] for run in ours if run.seed in scores]


def sem(values: Sequence[float]) -> float | None:
    """Standard error of the mean (ddof 1); None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean difference of 0; None for fewer than two, or all the same."""
    error = sem(differences)
    if error is None or error < ROUNDING:
        return None
    return t_tail(statistics.fmean(differences) / error, len(differences) - 1)


def t_tail(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's distribution with `df` degrees of freedom."""
    # sympy, which math-verify needs, needs mpmath.
    return float(betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def machine() -> dict[str, Any]:
    """The processor, its cores, and the GPUs if there are any."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    cpu = model[1].strip() if model else platform.processor()
    found: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found
