r"""Evaluations side by side, and whether two of them differ by more than chance.

Two runs on the same problems are compared problem by problem: most of a score's uncertainty comes
from hard and easy problems, which are the same for both.

    one sample per problem  McNemar's exact test on the numbers of problems that only one of the two
                            runs solves
    several                 the mean over problems of the difference of their pass@1; interval and
                            p-value by resampling problems
Left out: a correction for comparing many runs; each p-value is that of a single comparison.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Mark, by_problem
from redi.eval.reporting.scores import Report
from redi.eval.reporting.statistics import bootstrap_p_value, interval, mcnemar
from redi.eval.reporting.stored import Graded, load, run_names
from redi.eval.reporting.tables import ANSWER_FROM

SIGNIFICANT = 0.05  # a p-value below this is called a difference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A second run against a first on one benchmark; fractions of 1."""

    benchmark: str
    first: str
    second: str
    num_problems: int
    difference: float  # pass@1 of the second minus that of the first
    interval: tuple[float, float]
    won: int  # problems on which the second run has the larger share of correct samples
    lost: int
    p_value: float
    test: str

    def sentence(self) -> str:
        points = 100 * self.difference
        low, high = (f"{100 * end:+.1f}" for end in self.interval)
        chance = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        result = "chance may explain the difference"
        if self.p_value < SIGNIFICANT:
            better = (self.second, self.first) if points > 0 else (self.first, self.second)
            result = " is better than ".join(better)
        return (
            f"{self.benchmark}: {result}. {self.second} minus {self.first} is {points:+.1f} points "
            f"(95 % interval {low} to {high}; ahead on {self.won} and behind on {self.lost} of "
            f"{self.num_problems} problems; {chance}, {self.test})."
        )


def paired(
    test: Benchmark, names: tuple[str, str], first: list[Mark], second: list[Mark]
) -> Comparison:
    """Compare two runs' marks of the same problems."""
    shares = [
        [sum(mark.verdict == "correct" for mark in row) / len(row) for row in by_problem(test, m)]
        for m in (first, second)
    ]
    differences = [after - before for before, after in zip(*shares)]
    won, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    single = len(first) == len(second) == len(test.problems)
    return Comparison(
        benchmark=test.name,
        first=names[0],
        second=names[1],
        num_problems=len(test.problems),
        difference=sum(differences) / len(differences),
        interval=interval(differences),
        won=won,
        lost=lost,
        p_value=mcnemar(won, lost) if single else bootstrap_p_value(differences),
        test="McNemar's exact test" if single else "bootstrap over problems",
    )


def compare(runs: list[Path], grader: str | None = None) -> list[Comparison]:
    """Every two runs, on every benchmark of both. Raises UserError: two benchmarks of one name with
    different problems; verdicts of two graders, or of answers from two places."""
    loaded = [(name, load(run, grader)) for name, run in zip(run_names(runs), runs)]
    comparisons = []
    for (first, before), (second, after) in combinations(loaded, 2):
        for benchmark in filter(after.__contains__, before):
            one, other = before[benchmark], after[benchmark]
            _require_comparable(benchmark, (first, second), (one, other))
            marks = one.marks, other.marks
            comparisons.append(paired(one.test, (first, second), *marks))
    return comparisons


def _require_comparable(
    benchmark: str, names: tuple[str, str], graded: tuple[Graded, Graded]
) -> None:
    first, second = names
    graders = [one.grader for one in graded]
    if graders[0] != graders[1]:
        raise UserError(
            f"{benchmark}: {first} is graded by {graders[0]} and {second} by {graders[1]}; choose "
            "one: --grader"
        )
    rules = [one.marks[0].answer_from for one in graded]
    if rules[0] != rules[1]:
        raise UserError(
            f"{benchmark}: answers of {first} are read {ANSWER_FROM[rules[0]]} and those of "
            f"{second} {ANSWER_FROM[rules[1]]}; expected one rule: `python -m redi.eval.grade "
            f"regrade RUN --answer-from {rules[0]}` for {second}, or {rules[1]} for {first}"
        )
    if graded[0].test.problems != graded[1].test.problems:
        raise UserError(f"{benchmark}: {first} and {second} have different problems")


def result_rows(names: list[str], reports: list[Report]) -> list[dict[str, Any]]:
    """For JSON, a row per run and benchmark."""
    return [
        {
            "model": name,
            "benchmark": score.benchmark,
            "grader": score.grader,
            "answer_from": score.answer_from,
            "problems": score.num_problems,
            "samples": score.num_samples,
            "pass@1": score.pass_at_1,
            "sem": score.sem,
            f"pass@{score.num_samples}": score.pass_at_k[-1],
            "majority": score.majority,
            "mean_tokens": score.mean_tokens,
            "truncated": score.truncated,
        }
        for name, report in zip(names, reports)
        for score in report.scores
    ]
