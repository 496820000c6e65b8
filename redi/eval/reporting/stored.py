"""What an evaluation's folder holds: settings, and marks by one grader or both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, check_table, load_toml
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Mark, marks_file, read_lines, stored_benchmarks
from redi.eval.grading.grader import GraderChoice, grader_names
from redi.eval.reporting import paper_results

# The settings that decide what is read and how; EvalConfig, which has their types, needs torch.
USED = {"benchmark": list[str], "grader": GraderChoice, "prefix": str, "model": str}


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
    """The settings of evaluate.py. Raises UserError: no evaluation, a setting of another type."""
    stored_benchmarks(out)  # its message says what makes one
    path = out / "config.toml"
    settings = load_toml(path, str(path))
    used = {key: settings[key] for key in USED if key in settings}
    return settings | check_table(used, USED, str(path))


def load(out: Path, grader: GraderChoice | None = None) -> Evaluation:
    """Read an evaluation. grader: whose verdicts; None: those of its settings. Raises UserError: no
    evaluation, no such verdicts."""
    settings = settings_of(out)
    grader = grader or settings["grader"]
    names = [Path(name).stem for name in settings["benchmark"]]
    benchmarks, other_grader = {}, []
    for benchmark in sorted(stored_benchmarks(out), key=lambda b: names.index(b.name)):
        graders = grader_names(grader)
        if benchmark.name in paper_results.BENCHMARKS:
            graders.reverse()
        first, *others = [
            GradedBenchmark(benchmark, g, _marks(out, g, benchmark.name)) for g in graders
        ]
        benchmarks[benchmark.name] = first
        other_grader += others
    return Evaluation(out, settings, grader, benchmarks, other_grader)


def _marks(out: Path, grader: str, benchmark: str) -> list[Mark]:
    path = marks_file(out, grader, benchmark)
    if not path.is_file():
        raise UserError(
            f"{out}: {benchmark} is not graded by {grader}; "
            f"`python -m redi.eval.grade regrade {out} --grader {grader}` does it"
        )
    return list(read_lines(path, Mark))


def run_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ: sft and redi, or sft/eval and redi/eval."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]}: one run is named twice; name each run once")
