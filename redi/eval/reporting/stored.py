"""What an evaluation's folder holds: settings, and marks by one grader or both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from redi.config import UserError, check_table, load_toml
from redi.eval.benchmarks import KNOWN, Benchmark
from redi.eval.completions import Mark, by_problem, marks_file, read_lines, stored_benchmarks
from redi.eval.grading.grader import GraderChoice, grader_names

USED = {  # settings that decide what is read; EvalConfig, which has their types, needs torch
    "benchmark": list[str], "grader": GraderChoice, "prefix": str, "model": str, "graders": int,
    "grade_seconds": float, "user_prompt": Literal["paper", "plain"],
}  # fmt: skip


@dataclass(frozen=True)
class GradedBenchmark:
    """A benchmark, and one grader's marks of an evaluation's completions."""

    benchmark: Benchmark
    grader: str
    rows: list[list[Mark]]  # by problem and sample

    @property
    def correct(self) -> np.ndarray:
        """(P, n) of 0 and 1: whether a problem's sample is correct."""
        return np.array([[int(mark.verdict == "correct") for mark in row] for row in self.rows])


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, as it is on disk."""

    out: Path
    settings: dict[str, Any]  # of evaluate.py
    grader: GraderChoice
    # By name, in the order of --benchmark: by the leading grader, then by the other one, if both
    # judged. The paper's leads for the paper's benchmarks, Math-Verify's for all others.
    benchmarks: dict[str, list[GradedBenchmark]]


def settings_of(out: Path) -> dict[str, Any]:
    """The settings of evaluate.py. Raises UserError: no evaluation, a setting that is missing or of
    another type."""
    stored_benchmarks(out)  # its message says what makes one
    where = str(out / "config.toml")
    settings = load_toml(where, where)
    return settings | check_table({key: settings.get(key) for key in USED}, USED, where)


def load(out: Path, grader: GraderChoice | None = None) -> Evaluation:
    """Read an evaluation. grader: whose verdicts; None: those of its settings. Raises UserError: no
    evaluation, other problems than its settings say, no such verdicts, verdicts that are not one
    per sample."""
    settings = settings_of(out)
    grader = grader or settings["grader"]
    names = [Path(name).stem for name in settings["benchmark"]]
    held = {benchmark.name: benchmark for benchmark in stored_benchmarks(out)}
    if held.keys() != set(names):
        raise UserError(f"{out}/problems: expected {', '.join(names)}; holds {', '.join(held)}")
    benchmarks = {}
    for name in names:
        graders = grader_names(grader)
        if name in KNOWN:  # the paper's benchmarks
            graders.reverse()
        benchmarks[name] = [_graded(out, g, held[name]) for g in graders]
    return Evaluation(out, settings, grader, benchmarks)


def _graded(out: Path, grader: str, benchmark: Benchmark) -> GradedBenchmark:
    path = marks_file(out, grader, benchmark.name)
    if not path.is_file():
        raise UserError(
            f"{out}: {benchmark.name} is not graded by {grader}; "
            f"`python -m redi.eval.grade regrade {out} --grader {grader}` does it"
        )
    rows = by_problem(benchmark, read_lines(path, Mark), str(path))
    return GradedBenchmark(benchmark, grader, rows)


def run_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ: sft and redi, or sft/eval and redi/eval."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]}: one run is named twice; name each run once")
