r"""Marks -> the numbers of a results table; `statistics.py` says what each means.

A completion that is truncated, unanswered or timed out counts as wrong. Its share is reported
beside the score, because a short limit looks like a bad model. Left out: votes weighted by length
or likelihood.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Mark, by_problem
from redi.eval.grading.normalize import LONGEST_ANSWER, text_key
from redi.eval.reporting.statistics import interval, majority, pass_at_k, sem

OTHERS = "not said"  # the group of problems without a subject or difficulty


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
    benchmarks: list[Score]
    other_grader: list[Score]  # of the second grader, if there are two


def mean_pass_at_1(scores: Sequence[Score]) -> float:
    """The paper's "avg": every benchmark counts the same, however many problems it has."""
    return statistics.fmean(score.pass_at_1 for score in scores)


def score(test: Benchmark, marks: Sequence[Mark], grader: str) -> Score:
    """The numbers of one benchmark; marks in any order. Raises UserError as `by_problem`."""
    rows = by_problem(test, marks)
    correct = np.array([[mark.verdict == "correct" for mark in row] for row in rows], float)
    n = correct.shape[1]  # of (P, n)
    verdicts = Counter(mark.verdict for mark in marks)
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
        mean_tokens=_of_tokens(statistics.fmean, marks),
        median_tokens=_of_tokens(statistics.median, marks),
        truncated=verdicts["truncated"] / len(marks),
        no_answer=verdicts["no_answer"] / len(marks),
        timeout=verdicts["timeout"] / len(marks),
        loops=statistics.fmean(mark.loops for mark in marks),
        by_difficulty=_groups([_difficulty(p.difficulty) for p in test.problems], rows),
        by_subject=_groups([p.subject for p in test.problems], rows),
    )


def _of_tokens(mean: Callable[[list[int]], float], marks: Sequence[Mark]) -> float | None:
    """Of every completion's length; None if any of them is unknown."""
    tokens = [mark.num_tokens for mark in marks]
    return None if None in tokens else mean(tokens)


def _votes(row: list[Mark]) -> list[tuple[str, bool]]:
    """Of the samples that finished with an answer. Only equal texts count as one answer."""

    def key(answer: str) -> str:  # normalizing an answer as long as a loop's would take minutes
        return text_key(answer) if len(answer) <= LONGEST_ANSWER else answer

    voters = [m for m in row if m.extracted is not None and m.verdict != "truncated"]
    return [(key(m.extracted), m.verdict == "correct") for m in voters]


def _difficulty(number: float | None) -> str | None:
    """4 for 4, and "4 to 5" for what is between."""
    if number is None:
        return None
    below, above = math.floor(number), math.ceil(number)
    return f"{below}" if below == above else f"{below} to {above}"


def _groups(names: list[str | None], rows: list[list[Mark]]) -> list[Group]:
    """names: each problem's group. Sorted, numbers first; [] if all problems are in the same."""
    members: dict[str, list[Mark]] = defaultdict(list)
    for name, row in zip(names, rows):
        members[name or OTHERS] += row

    def order(name: str) -> tuple[bool, float, str]:
        first = name.split()[0]
        return name == OTHERS, float(first) if first.isdigit() else math.inf, name

    groups = [
        Group(
            name=name,
            num_problems=len(members[name]) // len(rows[0]),
            pass_at_1=statistics.fmean(mark.verdict == "correct" for mark in members[name]),
            mean_tokens=_of_tokens(statistics.fmean, members[name]),
            truncated=statistics.fmean(mark.verdict == "truncated" for mark in members[name]),
        )
        for name in sorted(members, key=order)
    ]
    return groups if len(groups) > 1 else []
