"""What an evaluation's folder holds: settings, marks, and the report of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, load_toml
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Mark, marks_file, read_lines, stored_benchmarks
from redi.eval.reporting import paper_results
from redi.eval.reporting.scores import Report, mean_pass_at_1, score

# Settings that describe what was measured. Of another program's completions only the first three
# are known.
REPORTED = (
    "benchmark", "samples", "completions", "user_prompt", "prefix", "temperature", "top_p",
    "max_new_tokens", "seed", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Graded:
    """A benchmark of an evaluation, and a grader's marks of its completions.

    Where both graders judged them, this one leads and has the score: the paper's for the paper's
    benchmarks, Math-Verify's for all others."""

    test: Benchmark
    grader: str
    marks: list[Mark]
    other: "Graded | None" = None  # the same by the other grader


def settings_of(out: Path) -> dict[str, Any]:
    """The settings of evaluate.py; {} if the folder has no config.toml."""
    path = out / "config.toml"
    return load_toml(path, str(path)) if path.is_file() else {}


def own_grader(out: Path) -> str:
    """The grader of the run's settings: a name, or "both"."""
    return settings_of(out).get("grader", "math-verify")


def load(out: Path, grader: str | None = None) -> dict[str, Graded]:
    """Each benchmark with its marks, by name, in the order of the run's --benchmark.

    grader: a name, "both", or None for own_grader. Raises UserError: no evaluation, no such marks.
    """
    grader = grader or own_grader(out)
    names = [Path(name).stem for name in settings_of(out).get("benchmark", [])]
    graded = {}
    for test in sorted(stored_benchmarks(out), key=lambda t: [*names, t.name].index(t.name)):
        graders = ["math-verify", "paper"] if grader == "both" else [grader]
        if test.name not in paper_results.BENCHMARKS:
            graders.reverse()  # the last one leads
        one = None
        for name in graders:
            path = marks_file(out, name, test.name)
            if not path.is_file():
                raise UserError(
                    f"{out}: {test.name} is not graded by {name}; "
                    f"`python -m redi.eval.grade regrade {out} --grader {name}` does it"
                )
            one = Graded(test, name, list(read_lines(path, Mark)), other=one)
        graded[test.name] = one
    return graded


def run_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ: sft and redi, or sft/eval and redi/eval."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]}: one run is named twice; name each run once")


def read(out: Path, grader: str | None = None) -> Report:
    """The report of an evaluation's marks. Raises UserError as `load` and `score`."""
    settings, graded = settings_of(out), load(out, grader).values()
    reported = REPORTED[:3] if "completions" in settings else REPORTED
    scores = [score(g.test, g.marks, g.grader) for g in graded]
    return Report(
        model=str(settings.get("model", out)),
        grader=grader or own_grader(out),
        settings={name: settings[name] for name in reported if name in settings},
        mean_pass_at_1=mean_pass_at_1(scores),
        benchmarks=scores,
        other_grader=[score(g.test, g.other.marks, g.other.grader) for g in graded if g.other],
    )


def folder(out: Path, grader: str) -> Path:
    """Where a report is written: beside the completions, or, for a grader that is not the run's
    own, beside that grader's verdicts."""
    return out if grader == own_grader(out) else out / "verdicts" / grader
