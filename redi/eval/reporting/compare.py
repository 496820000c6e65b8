r"""Evaluations side by side, and whether every two of them differ by more than chance.

    python -m redi.eval.report out/sft/eval out/redi/eval --out results.json --page both.html

Two runs on the same problems are compared problem by problem: most of a score's uncertainty comes
from hard and easy problems, which are the same for both.

    one sample a problem    McNemar's exact test: of the problems only one of the two solves, how
                            many each
    several                 the mean over problems of the difference of their pass@1; interval and
                            p-value by drawing problems anew
Left out: a correction for comparing many runs; the p-values are of one comparison each.
"""

import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from redi.config import UserError, parse, program
from redi.data.files import write_aside
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Mark, by_problem
from redi.eval.grading.grader import GraderName
from redi.eval.report import Report, load, read, run_names
from redi.eval.reporting import page, paper_results
from redi.eval.reporting.statistics import bootstrap_p_value, interval, mcnemar
from redi.eval.reporting.tables import ANSWER_FROM, PUBLISHED, count, percent, table

SURE = 0.05  # the p-value below which a difference is said to be one


@dataclass(kw_only=True)
class CompareConfig:
    runs: Annotated[list[str], "folders that evaluate.py wrote; each is named by its last part"]
    grader: Annotated[GraderName | None, "whose verdicts; none: what each report puts first"] = None
    out: Annotated[str | None, "JSON file for the tables"] = None
    page: Annotated[str | None, "HTML file to read the completions of two runs side by side"] = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of a second run with a first on one benchmark; fractions of 1."""

    benchmark: str
    first: str
    second: str
    num_problems: int
    difference: float  # pass@1 of the second less that of the first
    interval: tuple[float, float]
    won: int  # problems on which the second run's share of correct samples is the larger
    lost: int
    p_value: float
    test: str

    def sentence(self) -> str:
        points, sides = 100 * self.difference, (self.second, self.first)
        better, worse = sides if points >= 0 else sides[::-1]
        low, high = (f"{100 * end:+.1f}" for end in self.interval)
        chance = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        measured = (
            f"{self.second} less {self.first} is {points:+.1f} points (95 % interval {low} to "
            f"{high}; ahead on {self.won} and behind on {self.lost} of {self.num_problems} "
            f"problems; {chance}, {self.test})"
        )
        if self.p_value < SURE:
            return f"{self.benchmark}: {better} is better than {worse}. {measured}."
        return f"{self.benchmark}: chance may explain the difference. {measured}."


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
    """Every two runs, on every benchmark that both hold. Raises UserError: two benchmarks of one
    name with other problems; verdicts of two graders, or of answers read in two places."""
    loaded = [(name, load(run, grader)) for name, run in zip(run_names(runs), runs)]
    comparisons = []
    for (first, before), (second, after) in combinations(loaded, 2):
        for benchmark in filter(after.__contains__, before):
            one, other = before[benchmark][0], after[benchmark][0]
            if one.grader != other.grader:
                raise UserError(
                    f"{benchmark}: {first} is graded by {one.grader} and {second} by "
                    f"{other.grader}; choose one: --grader"
                )
            here, there = (graded.marks[0].answer_from for graded in (one, other))
            if here != there:
                raise UserError(
                    f"{benchmark}: answers of {first} are read {ANSWER_FROM[here]} and those of "
                    f"{second} {ANSWER_FROM[there]}; expected one rule: `python -m "
                    f"redi.eval.grade regrade RUN --answer-from {here}` for {second}, or {there} "
                    f"for {first}"
                )
            if one.test.problems != other.test.problems:
                raise UserError(f"{benchmark}: {first} and {second} have different problems")
            comparisons.append(paired(one.test, (first, second), one.marks, other.marks))
    return comparisons


# ---------------------------------------------------------------- tables


def result_rows(names: list[str], reports: list[Report]) -> list[dict[str, Any]]:
    """A row for each run and benchmark."""
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


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; scores in percent."""
    header = "model", "benchmark", "grader", "answers read", "pass@1 ± SEM", "pass@n", "majority"
    cells = [(*header, "mean tokens", "truncated")]
    for row in rows:
        n = row["samples"]
        cells.append(
            (
                row["model"],
                row["benchmark"],
                row["grader"],
                ANSWER_FROM[row["answer_from"]],
                f"{percent(row['pass@1'])} ± {percent(row['sem'])}",
                f"{percent(row[f'pass@{n}'])} (n = {n})",
                percent(row["majority"]),
                count(row["mean_tokens"]),
                percent(row["truncated"]),
            )
        )
    return table(cells)


@program
def main() -> None:
    config = parse(CompareConfig, "Put evaluations side by side.")
    runs = [Path(run) for run in config.runs]
    for flag, path in (("--out", config.out), ("--page", config.page)):
        if path and any(run.resolve() in Path(path).resolve().parents for run in runs):
            raise UserError(f"{flag} {path}: expected a file outside the evaluations")
    names = run_names(runs)
    rows = result_rows(names, [read(run, config.grader) for run in runs])
    print(comparison_table(rows))
    comparisons = compare(runs, config.grader)
    if comparisons:
        print("", *(comparison.sentence() for comparison in comparisons), sep="\n")
    if theirs := paper_results.rows([row["benchmark"] for row in rows]):
        print("", PUBLISHED, "", table(theirs), sep="\n")
    if config.out:
        with write_aside(config.out) as file:
            content = {"rows": rows, "paired": [asdict(c) for c in comparisons]}
            json.dump(content, file, indent=2)
            file.write("\n")
        print(f"\nsaved {config.out}")
    if config.page:
        with write_aside(config.page) as file:
            file.write(page.page(runs, config.grader))
        print(f"saved {config.page}")
