r"""Marks -> the numbers of a results table; `statistics.py` says what each means.

A completion that is truncated, unanswered or timed out counts as wrong. Its share is reported
beside the score, because a short limit looks like a bad model. Left out: votes weighted by length
or likelihood.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from redi.eval.completions import Mark
from redi.eval.grading.normalize import text_key
from redi.eval.reporting.statistics import interval, majority, pass_at_k, sem
from redi.eval.reporting.stored import Evaluation, GradedBenchmark

OTHERS = "not said"  # the group of problems without a subject or difficulty
# Settings that describe what was measured. Of another program's completions only the first three
# are known.
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
class BenchmarkScore:
    """One benchmark's results. Scores and shares are fractions of 1; tokens are per completion."""

    benchmark: str
    grader: str
    num_problems: int
    answer_from: str  # where the grader looked for answers: after_think or whole
    num_samples: int  # per problem
    pass_at_1: float
    sem: float | None  # None: a single sample per problem
    interval: tuple[float, float]  # of pass@1, 95 %, over problems
    pass_at_k: list[float]  # k = 1 .. num_samples
    majority: float
    mean_tokens: float | None  # None: another program's completions, of unknown length
    median_tokens: float | None
    truncated: float
    no_answer: float
    timeout: float
    loops: float  # completions that end in repetition
    by_difficulty: list[Group]
    by_subject: list[Group]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What report.json holds: scores in the order of the evaluation's --benchmark."""

    model: str
    grader: str  # math-verify, paper or both
    settings: dict[str, Any]
    mean_pass_at_1: float  # of `benchmarks`
    benchmarks: list[BenchmarkScore]
    other_grader: list[BenchmarkScore]  # of the second grader, if there are two


def report(evaluation: Evaluation) -> Report:
    """The numbers of an evaluation."""
    settings = evaluation.settings
    reported = REPORTED[:3] if "completions" in settings else REPORTED
    scores = [score(leading) for leading, *_ in evaluation.benchmarks.values()]
    return Report(
        model=settings["model"],
        grader=evaluation.grader,
        settings={name: settings[name] for name in reported if name in settings},
        mean_pass_at_1=mean_pass_at_1(scores),
        benchmarks=scores,
        other_grader=[score(g) for _, *others in evaluation.benchmarks.values() for g in others],
    )


def mean_pass_at_1(scores: Sequence[BenchmarkScore]) -> float:
    """The paper's "avg": every benchmark counts the same, however many problems it has."""
    return statistics.fmean(score.pass_at_1 for score in scores)


def score(graded: GradedBenchmark) -> BenchmarkScore:
    """The numbers of one benchmark."""
    problems, rows, correct = graded.benchmark.problems, graded.rows, graded.correct
    marks, counts, n = list(chain(*rows)), correct.sum(axis=1).tolist(), correct.shape[1]
    return BenchmarkScore(
        benchmark=graded.benchmark.name,
        grader=graded.grader,
        num_problems=len(rows),
        answer_from=marks[0].answer_from,
        num_samples=n,
        pass_at_1=_share(marks, "correct"),
        sem=sem(correct),
        interval=interval(correct.mean(axis=1)),
        pass_at_k=[statistics.fmean(pass_at_k(n, c, k) for c in counts) for k in range(1, n + 1)],
        majority=statistics.fmean(majority(_votes(row)) for row in rows),
        mean_tokens=_of_tokens(statistics.fmean, marks),
        median_tokens=_of_tokens(statistics.median, marks),
        truncated=_share(marks, "truncated"),
        no_answer=_share(marks, "no_answer"),
        timeout=_share(marks, "timeout"),
        loops=statistics.fmean(mark.loops for mark in marks),
        by_difficulty=_groups([problem.difficulty for problem in problems], rows),
        by_subject=_groups([problem.subject for problem in problems], rows),
    )


def _share(marks: Sequence[Mark], verdict: str) -> float:
    return statistics.fmean(mark.verdict == verdict for mark in marks)


def _of_tokens(mean: Callable[[list[int]], float], marks: Sequence[Mark]) -> float | None:
    """Of every completion's length; None if any of them is unknown."""
    tokens = [mark.num_tokens for mark in marks]
    return None if None in tokens else mean(tokens)


def _votes(row: list[Mark]) -> list[tuple[str, bool]]:
    """Of the samples that finished with an answer. Only equal texts count as one answer."""
    voters = [m for m in row if m.extracted is not None and m.verdict != "truncated"]
    return [(text_key(m.extracted), m.verdict == "correct") for m in voters]


def _groups(keys: Sequence[float | str | None], rows: list[list[Mark]]) -> list[Group]:
    """Sorted; [] if all problems are in the same. keys: each problem's subject or difficulty; None
    where the benchmark does not say."""
    members: dict[float | str | None, list[Mark]] = defaultdict(list)
    for key, row in zip(keys, rows):
        members[key] += row
    groups = [
        Group(
            name=OTHERS if key is None else f"{key:g}" if isinstance(key, float) else key,
            num_problems=len(members[key]) // len(rows[0]),
            pass_at_1=_share(members[key], "correct"),
            mean_tokens=_of_tokens(statistics.fmean, members[key]),
            truncated=_share(members[key], "truncated"),
        )
        for key in sorted(members, key=lambda key: (key is None, key))
    ]
    return groups if len(groups) > 1 else []
