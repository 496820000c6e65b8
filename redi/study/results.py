"""What the runs of a study left on disk -> its numbers, as study.json holds them.

Of a variant (a method with its parameters and learning rate) on one setting:

    mean    of pass@1 over seeds; where there are several benchmarks, of their mean
    SEM     std (ddof 1) over seeds / sqrt(seeds): what another set of seeds might give. The paper's
            SEM is over samples of one model; evaluations hold that one
    p       two-sided paired t-test over seeds: is the mean difference from the stage-1 models, or
            from the best DPO models, of the same seeds another than 0?

A method's best variant has the highest mean, as in the paper's Table 2; it is chosen by the numbers
it is reported with, so more variants are a slight advantage. Left out: a correction for the number
of tests.
"""

import dataclasses
import json
import math
import os
import platform
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

ROUNDING = 1e-12  # two scores that differ at all differ by one completion, some 1e-5
# Of metrics.jsonl, in the order of the figures; a run that does not log one lacks it.
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
    curves: dict[str, list[float]]  # a value a step
    collapsed_at: int | None  # the step at which the guard warned


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant on a setting, over seeds."""

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
    samples: int  # of a problem, at the end
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
    """failed: jobs that have no result, and why. Raises UserError if nothing has one."""
    runs = [
        _run(study, model, model.folder / "eval" / "report.json")
        for model in study.models()
        if str(model.folder / "eval") not in failed
    ]
    grid = grid_of(runs)
    if not grid:
        first, why = next(iter(failed.items()))
        raise UserError(f"{study.out}: nothing to report on; first of what failed: {first}: {why}")
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


def _run(study: Study, model: Model, report: Path) -> Run:
    mean, benchmarks = _scores(report)
    metrics = list(read_metrics(model.folder))
    records = [record for record in metrics if record["kind"] == "train"]
    keys = [key for key in CURVES if records and key in records[0]]
    scored = [record for record in metrics if record["kind"] == "benchmark"]
    return Run(
        setting=model.setting.name,
        mislabelled=model.mislabelled,
        seed=model.seed,
        method=model.variant.method if model.variant else STAGE_1,
        settings=model.variant.settings if model.variant else {},
        pass_at_1=mean,
        benchmarks=benchmarks,
        on_the_way=[(r["step"], r["pass_at_1"]) for r in scored[:-1]],  # the last is the end's
        curves={key: [float(f"{r[key]:.5g}") for r in records] for key in keys},
        collapsed_at=_collapse(records, study, model) if model.variant else None,
    )


def _scores(path: Path) -> tuple[float, dict[str, dict[str, float]]]:
    """pass@1 over all benchmarks, and what the figures and tables say of each."""
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
            f"{path}: not a report of evaluate.py ({error}); delete it, and the same command makes "
            "it again"
        ) from None


def _collapse(records: list[dict[str, Any]], study: Study, model: Model) -> int | None:
    config = REDIConfig(**{**study.stage2, **model.variant.settings})
    guard = CollapseGuard(config.collapse_threshold, config.collapse_steps)
    return next((r["step"] for r in records if guard.check(r)), None)


# ---------------------------------------------------------------- over seeds


def grid_of(runs: Sequence[Run]) -> list[Row]:
    """A row for every variant of every setting, in the order of the runs."""
    groups: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        groups.setdefault(_variant(run), {})[run.seed] = run
    rows = []
    for group in groups.values():
        first = next(iter(group.values()))
        same_place = [g for g in groups.values() if _place(next(iter(g.values()))) == _place(first)]
        stage_1 = groups.get((first.setting, 0.0, STAGE_1, "{}"), {})
        dpo = [g for g in same_place if next(iter(g.values())).settings.get("objective") == "dpo"]
        best_dpo = max(dpo, key=_mean, default={})
        is_dpo = first.settings.get("objective") == "dpo"
        names = first.benchmarks
        per_seed = [run.pass_at_1 for run in group.values()]
        shared = [seed for seed in group if seed in stage_1]
        gains = [group[seed].pass_at_1 - stage_1[seed].pass_at_1 for seed in shared]
        rows.append(
            Row(
                setting=first.setting,
                mislabelled=first.mislabelled,
                method=first.method,
                settings=first.settings,
                seeds=len(group),
                mean=statistics.fmean(per_seed),
                sem=sem(per_seed),
                benchmarks={n: _over(group, n, "pass_at_1") for n in names},
                pass_at_n=statistics.fmean(_over(group, n, "pass_at_n") for n in names),
                mean_tokens=statistics.fmean(_over(group, n, "mean_tokens") for n in names),
                gain=statistics.fmean(gains) if gains and first.method != STAGE_1 else None,
                p_stage_1=None if first.method == STAGE_1 else _compare(group, stage_1),
                p_dpo=None if is_dpo or first.method == STAGE_1 else _compare(group, best_dpo),
                collapsed=sum(run.collapsed_at is not None for run in group.values()),
            )
        )
    return rows


def best_of(grid: Sequence[Row]) -> list[Row]:
    """Of each method on each setting the row with the highest mean; stage 1 first."""
    best: dict[tuple, Row] = {}
    for row in grid:
        key = (row.setting, row.mislabelled, row.method)
        if key not in best or row.mean > best[key].mean:
            best[key] = row
    return list(best.values())


def _variant(run: Run) -> tuple:
    return (run.setting, run.mislabelled, run.method, json.dumps(run.settings, sort_keys=True))


def _place(run: Run) -> tuple:
    return run.setting, run.mislabelled


def _mean(group: dict[int, Run]) -> float:
    return statistics.fmean(run.pass_at_1 for run in group.values())


def _over(group: dict[int, Run], benchmark: str, score: str) -> float:
    return statistics.fmean(run.benchmarks[benchmark][score] for run in group.values())


def _compare(group: dict[int, Run], other: dict[int, Run]) -> float | None:
    seeds = [seed for seed in group if seed in other]
    ours, theirs = ([g[seed].pass_at_1 for seed in seeds] for g in (group, other))
    return paired_t_test(ours, theirs)


# ---------------------------------------------------------------- statistics


def sem(values: Sequence[float]) -> float | None:
    """Standard error of the mean, ddof 1; None of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_t_test(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The two-sided p-value of the hypothesis that the mean difference is 0; None where the test
    says nothing: fewer than two pairs, or differences that are all alike."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = sem(differences)
    if error is None or error < ROUNDING:
        return None
    return t_tail(statistics.fmean(differences) / error, len(differences) - 1)


def t_tail(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's distribution with `df` degrees of freedom."""
    # sympy, which math-verify needs, needs mpmath.
    return float(betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


# ---------------------------------------------------------------- where it ran


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    found: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found
