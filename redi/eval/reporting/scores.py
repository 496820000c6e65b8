r"""Marks -> the numbers of a results table; `statistics.py` says what each means.

A completion that is truncated, unanswered or timed out counts as wrong. Its share is reported
beside the score, because a short limit looks like a bad model. Left out: votes weighted by length
or likelihood.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redi.eval.benchmarks import Benchmark, Problem
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
    """Scores in the order of the evaluation's --benchmark."""

    model: str
    grader: str  # math-verify, paper or both
    settings: dict[str, Any]
    scores: list[Score]
    other_scores: list[Score]  # of the second grader, if there are two


def mean_pass_at_1(scores: Sequence[Score]) -> float:
    """The paper's "avg": every benchmark counts the same, however many problems it has."""
    return statistics.fmean(score.pass_at_1 for score in scores)


def score(test: Benchmark, marks: Sequence[Mark], grader: str) -> Score:
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
    """Of every completion; [] if the length of any of them is unknown."""
    tokens = [mark.num_tokens for row in rows for mark in row]
    return [] if None in tokens else tokens


def _share(rows: list[list[Mark]], verdict: str) -> float:
    return statistics.fmean(mark.verdict == verdict for row in rows for mark in row)


def _votes(row: list[Mark]) -> list[tuple[str, bool]]:
    """Of the samples that finished with an answer. Only equal texts count as one answer."""
    votes = []
    for mark in row:
        if mark.extracted is not None and mark.verdict != "truncated":
            # Normalizing an answer as long as a loop's would take minutes.
            short = len(mark.extracted) <= LONGEST_ANSWER
            key = text_key(mark.extracted) if short else mark.extracted
            votes.append((key, mark.verdict == "correct"))
    return votes


def _difficulty(problem: Problem) -> str | None:
    """4 for 4, and "4 to 5" for what is between."""
    if problem.difficulty is None:
        return None
    below, above = math.floor(problem.difficulty), math.ceil(problem.difficulty)
    return f"{below}" if below == above else f"{below} to {above}"


def _groups(
    problems: list[Problem], rows: list[list[Mark]], name_of: Callable[[Problem], str | None]
) -> list[Group]:
    """The groups sorted by name, numbers first; [] if all problems are in the same one."""
    members: dict[str, list[list[Mark]]] = defaultdict(list)
    for problem, row in zip(problems, rows):
        members[name_of(problem) or OTHERS].append(row)
    if len(members) == 1:
        return []

    def order(name: str) -> tuple[bool, float, str]:
        first = name.split()[0]
        return name == OTHERS, float(first) if first.isdigit() else math.inf, name

    return [_group(name, members[name]) for name in sorted(members, key=order)]


def _group(name: str, rows: list[list[Mark]]) -> Group:
    tokens = _tokens(rows)
    return Group(
        name=name,
        num_problems=len(rows),
        pass_at_1=float(_correct(rows).mean()),
        mean_tokens=statistics.fmean(tokens) if tokens else None,
        truncated=_share(rows, "truncated"),
    )
