r"""Graded completions -> the numbers of a results table; `statistics.py` says what each means.

    python -m redi.eval.report out/sft/eval out/redi/eval        side by side, compared in pairs

A completion that is truncated, unanswered or timed out counts as wrong; its share is reported
beside the score, because a short limit looks like a bad model. Where both graders judged the
completions, the paper's comes first for its five benchmarks, Math-Verify's for the others. A report
needs only marks and problems, so it can be written again at any time: report.json for programs,
report.md for people, report.html to read completions in. Left out: votes weighted by length or
likelihood.
"""

import dataclasses
import json
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redi.config import UserError
from redi.data.files import make_folder, write_aside
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import Mark, asked, by_problem, marks_file, read_lines
from redi.eval.grading.normalize import LONGEST_ANSWER, text_key
from redi.eval.reporting import paper_results
from redi.eval.reporting.statistics import interval, majority, pass_at_k, sem

OWN_GRADER = "math-verify"  # of a run that does not say
# Settings that say what was measured; the first three are all that is known of completions that
# were made elsewhere.
REPORTED = (
    "benchmark", "samples", "completions", "user_prompt", "prefix", "temperature", "top_p",
    "max_new_tokens", "seed", "dtype",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Group:
    """The problems of one subject, or of one difficulty."""

    name: str
    num_problems: int
    pass_at_1: float
    mean_tokens: float | None
    truncated: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """One benchmark's results. Scores and shares are fractions of 1; tokens are per completion."""

    benchmark: str
    grader: str
    num_problems: int
    answer_from: str  # where answers were looked for: after_think or whole (grade.py)
    num_samples: int  # per problem
    pass_at_1: float
    sem: float | None  # None: a single sample per problem
    interval: tuple[float, float]  # of pass@1, 95 %, over problems
    pass_at_k: list[float]  # k = 1 .. num_samples
    majority: float
    mean_tokens: float | None  # None: completions made elsewhere, and nobody said
    median_tokens: float | None
    truncated: float
    no_answer: float
    timeout: float
    loops: float  # completions that end in circles
    by_difficulty: list[Group]
    by_subject: list[Group]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores in the order in which the benchmarks were asked for."""

    model: str
    grader: str  # math-verify, paper or both
    settings: dict[str, Any]
    scores: list[Score]
    other_scores: list[Score]  # of the second grader, if there are two


class Graded(NamedTuple):
    """A benchmark of an evaluation, and one grader's marks of its completions."""

    test: Benchmark
    marks: list[Mark]
    grader: str


def mean_pass_at_1(scores: Sequence[Score]) -> float:
    """The paper's "avg": every benchmark counts the same, however many problems it has."""
    return statistics.fmean(score.pass_at_1 for score in scores)


# ---------------------------------------------------------------- marks -> scores


def score(test: Benchmark, marks: Sequence[Mark], grader: str = OWN_GRADER) -> Score:
    """The numbers of one benchmark; marks in any order. Raises UserError as `by_problem`."""
    rows = by_problem(test, marks)
    correct = _correct(rows)  # (P, n)
    n = correct.shape[1]
    tokens = _tokens(rows)
    return Score(
        benchmark=test.name,
        grader=grader,
        num_problems=len(rows),
        answer_from=marks[0].answer_from,
        num_samples=n,
        pass_at_1=float(correct.mean()),
        sem=sem(correct),
        interval=interval(correct.mean(axis=1)),
        pass_at_k=[
            statistics.fmean(pass_at_k(n, int(c), k) for c in correct.sum(axis=1))
            for k in range(1, n + 1)
        ],
        majority=statistics.fmean(majority(_votes(row)) for row in rows),
        mean_tokens=statistics.fmean(tokens) if tokens else None,
        median_tokens=statistics.median(tokens) if tokens else None,
        truncated=_share(rows, "truncated"),
        no_answer=_share(rows, "no_answer"),
        timeout=_share(rows, "timeout"),
        loops=statistics.fmean(mark.loops for row in rows for mark in row),
        by_difficulty=_groups(test.problems, rows, _difficulty),
        by_subject=_groups(test.problems, rows, lambda problem: problem.subject),
    )


def _correct(rows: list[list[Mark]]) -> np.ndarray:
    return np.array([[mark.verdict == "correct" for mark in row] for row in rows], float)


def _tokens(rows: list[list[Mark]]) -> list[int]:
    """Of every completion; none if that of one is not known."""
    tokens = [mark.num_tokens for row in rows for mark in row]
    return [] if None in tokens else tokens


def _share(rows: list[list[Mark]], verdict: str) -> float:
    return statistics.fmean(mark.verdict == verdict for row in rows for mark in row)


def _votes(row: list[Mark]) -> list[tuple[str, bool]]:
    """Of the samples that finished with an answer. Equal spellings are one answer, no more."""
    given = [m for m in row if m.extracted is not None and m.verdict != "truncated"]
    # To clean up an answer as long as a loop's would take minutes.
    keys = [
        m.extracted if len(m.extracted) > LONGEST_ANSWER else text_key(m.extracted) for m in given
    ]
    return [(key, mark.verdict == "correct") for key, mark in zip(keys, given)]


def _difficulty(problem: Problem) -> str | None:
    """4 for 4, and 4 to 5 for what lies between."""
    if problem.difficulty is None:
        return None
    below, above = math.floor(problem.difficulty), math.ceil(problem.difficulty)
    return f"{below}" if below == above else f"{below} to {above}"


def _groups(
    problems: list[Problem], rows: list[list[Mark]], name_of: Callable[[Problem], str | None]
) -> list[Group]:
    """The groups in the order of their names; [] where problems have none, or all the same."""
    named: dict[str, list[list[Mark]]] = defaultdict(list)
    for problem, row in zip(problems, rows):
        named[name_of(problem) or "not said"].append(row)
    if len(named) == 1:
        return []

    def order(name: str) -> tuple[bool, float, str]:
        first = name.split()[0]
        return name == "not said", float(first) if first.isdigit() else math.inf, name

    groups = []
    for name in sorted(named, key=order):
        members = named[name]
        tokens = _tokens(members)
        groups.append(
            Group(
                name=name,
                num_problems=len(members),
                pass_at_1=float(_correct(members).mean()),
                mean_tokens=statistics.fmean(tokens) if tokens else None,
                truncated=_share(members, "truncated"),
            )
        )
    return groups


# ---------------------------------------------------------------- an evaluation on disk


def settings_of(out: Path) -> dict[str, Any]:
    """What evaluate.py was asked for; {} where it left nothing."""
    try:
        return tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'config.toml'}: not readable ({error})") from None


def own_grader(out: Path) -> str:
    """The grader that the run was made with: a name, or "both"."""
    return settings_of(out).get("grader", OWN_GRADER)


def load(out: Path, grader: str | None = None) -> dict[str, list[Graded]]:
    """Benchmark's name -> its marks by each grader, in the order of a report: benchmarks as asked
    for, and of two graders first the one that leads.

    grader: a name, "both", or None for own_grader. Raises UserError: no evaluation, no such marks.
    """
    grader = grader or own_grader(out)
    names = [Path(name).stem for name in settings_of(out).get("benchmark", [])]
    graded = {}
    for test in sorted(asked(out), key=lambda test: [*names, test.name].index(test.name)):
        graders = [grader] if grader != "both" else ["math-verify", "paper"]
        if test.name in paper_results.BENCHMARKS:
            graders.reverse()
        graded[test.name] = [Graded(test, _marks(out, g, test.name), g) for g in graders]
    return graded


def _marks(out: Path, grader: str, benchmark: str) -> list[Mark]:
    path = marks_file(out, grader, benchmark)
    if not path.is_file():
        raise UserError(
            f"{out}: {benchmark} is not graded by {grader}; "
            f"`python -m redi.eval.grade regrade {out} --grader {grader}` does it"
        )
    return list(read_lines(path, Mark))


def run_names(runs: list[Path]) -> list[str]:
    """The last part of each path, or as much of it as tells them apart: sft/eval, redi/eval."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]}: is given twice")


def read(out: Path, grader: str | None = None) -> Report:
    """The report of an evaluation's verdicts. Raises UserError as `load` and `score`."""
    settings, graded = settings_of(out), load(out, grader).values()
    reported = REPORTED[:3] if "completions" in settings else REPORTED
    return Report(
        model=str(settings.get("model", out)),
        grader=grader or own_grader(out),
        settings={name: settings[name] for name in reported if name in settings},
        scores=[score(*first) for first, *_ in graded],
        other_scores=[score(*other) for _, *others in graded for other in others],
    )


def folder(out: Path, grader: str) -> Path:
    """Where a report goes: beside the completions, or, of another grader than the run's own,
    beside its verdicts."""
    return out if grader == own_grader(out) else out / "verdicts" / grader


def write(out: Path, grader: str | None = None) -> Report:
    """Write report.json, report.md and report.html of an evaluation's verdicts."""
    from redi.eval.reporting import page, tables

    report = read(out, grader)
    target = folder(out, report.grader)
    make_folder(target)
    for name, content in (
        ("report.json", to_json(report)),
        ("report.md", tables.markdown(report)),
        ("report.html", page.page([out], report.grader)),
    ):
        with write_aside(target / name) as file:
            file.write(content)
    return report


def to_json(report: Report) -> str:
    """Indented JSON: {"model", "grader", "settings", "mean_pass_at_1", "benchmarks": [{...}],
    "other_grader": [{...}]}; the mean is that of "benchmarks"."""
    content: dict[str, Any] = {
        "model": report.model,
        "grader": report.grader,
        "settings": report.settings,
        "mean_pass_at_1": mean_pass_at_1(report.scores),
        "benchmarks": [dataclasses.asdict(score) for score in report.scores],
        "other_grader": [dataclasses.asdict(score) for score in report.other_scores],
    }
    return json.dumps(content, indent=2) + "\n"


def main() -> None:
    from redi.eval.reporting import compare

    compare.main()


if __name__ == "__main__":
    main()
