r"""Whether two evaluations differ by more than chance.

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

from redi.config import UserError
from redi.eval.completions import by_problem
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


def compare(runs: list[Path], grader: str | None = None) -> list[Comparison]:
    """Every two runs, on every benchmark of both. Raises UserError: two benchmarks of one name with
    different problems; verdicts of two graders, or of answers from two places."""
    loaded = {name: load(run, grader) for name, run in zip(run_names(runs), runs)}
    return [
        _paired(first, second, loaded[first][benchmark], loaded[second][benchmark])
        for first, second in combinations(loaded, 2)
        for benchmark in loaded[first]
        if benchmark in loaded[second]
    ]


def _paired(first: str, second: str, before: Graded, after: Graded) -> Comparison:
    name, problems = before.test.name, before.test.problems
    rules = [f"by {g.grader} {ANSWER_FROM[g.marks[0].answer_from]}" for g in (before, after)]
    if rules[0] != rules[1]:
        raise UserError(
            f"{name}: {first} is graded {rules[0]}, {second} {rules[1]}; choose one --grader, or "
            "one --answer-from for `python -m redi.eval.grade regrade RUN`"
        )
    if problems != after.test.problems:
        raise UserError(f"{name}: {first} and {second} have different problems")
    shares = [
        [sum(mark.verdict == "correct" for mark in row) / len(row) for row in by_problem(*graded)]
        for graded in ((before.test, before.marks), (after.test, after.marks))
    ]
    differences = [new - old for old, new in zip(*shares)]
    won, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    single = len(before.marks) == len(after.marks) == len(problems)
    return Comparison(
        benchmark=name,
        first=first,
        second=second,
        num_problems=len(problems),
        difference=sum(differences) / len(differences),
        interval=interval(differences),
        won=won,
        lost=lost,
        p_value=mcnemar(won, lost) if single else bootstrap_p_value(differences),
        test="McNemar's exact test" if single else "bootstrap over problems",
    )
