"""What an evaluation's folder holds: settings, and marks by one grader or both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, check_table, load_toml
from redi.eval.benchmarks import Benchmark, check_fields
from redi.eval.completions import Mark, by_problem, marks_file, read_lines, stored_benchmarks
from redi.eval.grading.grader import GraderChoice, grader_names
from redi.eval.grading.workers import MOST_SECONDS
from redi.eval.reporting import paper_results

# The settings that decide what is read and how; EvalConfig, which has their types, needs torch.
USED = {"benchmark": list[str], "grader": GraderChoice, "prefix": str, "model": str}
USED |= {"graders": int, "grade_seconds": float}


@dataclass(frozen=True)
class GradedBenchmark:
    """A benchmark, and one grader's marks of an evaluation's completions."""

    benchmark: Benchmark
    grader: str
    marks: list[Mark]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, as it is on disk. Where both graders judged the completions, the paper's leads
    for the paper's benchmarks, Math-Verify's for all others."""

    out: Path
    settings: dict[str, Any]  # of evaluate.py
    grader: GraderChoice
    benchmarks: dict[str, GradedBenchmark]  # by name, in the order of --benchmark
    other_grader: list[GradedBenchmark]  # by the grader that does not lead, if both judged


def settings_of(out: Path) -> dict[str, Any]:
    """The settings of evaluate.py. Raises UserError: no evaluation, a setting that is missing, of
    another type or out of range."""
    stored_benchmarks(out)  # its message says what makes one
    where = str(out / "config.toml")
    settings = load_toml(where, where)
    settings |= check_table({key: settings.get(key) for key in USED}, USED, where)
    in_time = 0 < settings["grade_seconds"] <= MOST_SECONDS
    check_fields(settings, where, ("graders", settings["graders"] >= 1, "at least 1"))
    check_fields(settings, where, ("grade_seconds", in_time, "above 0, at most a day"))
    return settings


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
    benchmarks, other_grader = {}, []
    for benchmark in map(held.__getitem__, names):
        graders = grader_names(grader)
        if benchmark.name in paper_results.BENCHMARKS:
            graders.reverse()
        first, *others = [GradedBenchmark(benchmark, g, _marks(out, g, benchmark)) for g in graders]
        benchmarks[benchmark.name] = first
        other_grader += others
    return Evaluation(out, settings, grader, benchmarks, other_grader)


def _marks(out: Path, grader: str, benchmark: Benchmark) -> list[Mark]:
    path = marks_file(out, grader, benchmark.name)
    if not path.is_file():
        raise UserError(
            f"{out}: {benchmark.name} is not graded by {grader}; "
            f"`python -m redi.eval.grade regrade {out} --grader {grader}` does it"
        )
    marks = list(read_lines(path, Mark))
    by_problem(benchmark, marks, str(path))
    return marks


def run_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ: sft and redi, or sft/eval and redi/eval."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]}: one run is named twice; name each run once")
