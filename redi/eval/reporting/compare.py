r"""Whether two evaluations differ by more than chance.

Two runs on the same problems are compared problem by problem: most of a score's uncertainty comes
from hard and easy problems, which are the same for both. Left out: a correction for comparing many
runs; each p-value is that of a single comparison.
"""

from dataclasses import dataclass
from itertools import combinations

from redi.config import UserError
from redi.eval.reporting.statistics import interval, permutation_p_value
from redi.eval.reporting.stored import Evaluation, GradedBenchmark
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
    test: str = "exact permutation test"

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


def compare(evaluations: dict[str, Evaluation]) -> list[Comparison]:
    """Every two runs, by name, on every benchmark of both. Raises UserError: two benchmarks of one
    name with different problems; verdicts of two graders, or of answers from two places."""
    return [
        _paired(first, second, old.benchmarks[benchmark][0], new.benchmarks[benchmark][0])
        for (first, old), (second, new) in combinations(evaluations.items(), 2)
        for benchmark in old.benchmarks
        if benchmark in new.benchmarks
    ]


def _paired(first: str, second: str, old: GradedBenchmark, new: GradedBenchmark) -> Comparison:
    name, problems = old.benchmark.name, old.benchmark.problems
    rules = [f"by {g.grader} {ANSWER_FROM[g.rows[0][0].answer_from]}" for g in (old, new)]
    if rules[0] != rules[1]:
        raise UserError(
            f"{name}: {first} is graded {rules[0]}, {second} {rules[1]}; choose one --grader, or "
            "one --answer-from for `python -m redi.eval.grade regrade RUN`"
        )
    if problems != new.benchmark.problems:
        raise UserError(f"{name}: {first} and {second} have different problems")
    (o, old_samples), (n, new_samples) = ((g.correct, g.correct.shape[1]) for g in (old, new))
    unit = old_samples * new_samples  # shares of correct samples differ by multiples of 1 / unit
    differences = (n.sum(axis=1) * old_samples - o.sum(axis=1) * new_samples).tolist()
    fractions = [difference / unit for difference in differences]
    return Comparison(
        benchmark=name,
        first=first,
        second=second,
        num_problems=len(problems),
        difference=sum(fractions) / len(problems),
        interval=interval(fractions),
        won=sum(difference > 0 for difference in differences),
        lost=sum(difference < 0 for difference in differences),
        p_value=permutation_p_value(differences),
    )
