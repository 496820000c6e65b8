r"""Graded completions -> the numbers of a results table.

For a benchmark of P problems with n samples each, where c of a problem's n samples are correct:

    pass@1  the mean over all P n samples
    SEM     std (ddof 0) over j of [the score of the benchmark's j-th samples] / sqrt(n)
    pass@k  the mean over problems of 1 - C(n-c, k) / C(n, k): the chance that k of the n samples,
            drawn without replacement, hold a correct one (unbiased; Chen et al., 2021, eq. 1)

SEM is the spread between repeated runs of the same benchmark, not between problems: it says how far
another evaluation of the same model may differ. A completion that is truncated, unanswered or timed
out counts as wrong, and its share stands beside the score, because a short limit looks like a bad
model. `python -m redi.eval.report RUN [RUN ...]` puts evaluations side by side. Left out: majority
votes and confidence intervals over problems; the paper reports neither.
"""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from redi.config import UserError, parse, program
from redi.data.files import write_aside


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response to one problem, with its verdict; a line of completions.jsonl."""

    benchmark: str
    id: str  # of the problem
    sample: int  # 0 .. n-1
    text: str
    num_tokens: int
    finish_reason: str
    extracted: str | None  # the boxed answer
    verdict: str  # correct, incorrect, no_answer, truncated or timeout

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Completion":
        """The completion of one JSON line. Raises UserError: not JSON, missing or unknown fields,
        a field of another type."""
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"completion: not valid JSON ({error})") from None
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        if not isinstance(row, dict) or sorted(row) != sorted(names):
            given = ", ".join(row) if isinstance(row, dict) else repr(row)[:40]
            raise UserError(f"completion: expected the fields {', '.join(names)}; got {given}")
        for field in fields:
            if not isinstance(row[field.name], field.type) or isinstance(row[field.name], bool):
                raise UserError(f"completion: field {field.name!r}: got {row[field.name]!r}")
        return cls(**row)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One benchmark's results. Scores and shares are fractions of 1; tokens are per completion."""

    benchmark: str
    num_problems: int
    num_samples: int  # per problem
    pass_at_1: float
    sem: float
    pass_at_k: list[float]  # k = 1 .. num_samples
    mean_tokens: float
    median_tokens: float
    truncated: float
    no_answer: float
    timeout: float


@dataclass(frozen=True)
class Report:
    """Scores in the order in which their benchmarks first occur."""

    scores: list[Score]

    @property
    def mean_pass_at_1(self) -> float:
        """The paper's "avg": every benchmark counts the same, however many problems it has."""
        return statistics.fmean(score.pass_at_1 for score in self.scores)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them correct, hold a correct one; 1 <= k <= n."""
    assert 0 <= c <= n, f"{c} correct of {n} samples"
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summary(completions: Iterable[Completion]) -> Report:
    """Scores of every benchmark among the completions, in any order.

    Raises UserError: no completions; a sample given twice; a problem that lacks a sample others
    have, for then neither the SEM nor pass@k is defined.
    """
    by_benchmark: dict[str, list[Completion]] = defaultdict(list)
    for completion in completions:
        by_benchmark[completion.benchmark].append(completion)
    if not by_benchmark:
        raise UserError("no completions to report on")
    return Report([_score(name, group) for name, group in by_benchmark.items()])


def _score(benchmark: str, completions: list[Completion]) -> Score:
    correct: dict[str, dict[int, bool]] = defaultdict(dict)  # problem id -> sample -> correct
    for completion in completions:
        samples = correct[completion.id]
        if completion.sample in samples:
            raise UserError(
                f"{benchmark}: problem {completion.id!r} has sample {completion.sample} twice"
            )
        samples[completion.sample] = completion.verdict == "correct"
    n = max(len(samples) for samples in correct.values())
    for problem, samples in correct.items():
        if samples.keys() != set(range(n)):
            raise UserError(
                f"{benchmark}: problem {problem!r} has samples {sorted(samples)}, "
                f"expected 0 to {n - 1}"
            )

    runs = [statistics.fmean(samples[j] for samples in correct.values()) for j in range(n)]
    counts = [sum(samples.values()) for samples in correct.values()]
    tokens = [completion.num_tokens for completion in completions]
    verdicts = [completion.verdict for completion in completions]
    return Score(
        benchmark=benchmark,
        num_problems=len(correct),
        num_samples=n,
        pass_at_1=verdicts.count("correct") / len(verdicts),
        sem=statistics.pstdev(runs) / math.sqrt(n),
        pass_at_k=[statistics.fmean(pass_at_k(n, c, k) for c in counts) for k in range(1, n + 1)],
        mean_tokens=statistics.fmean(tokens),
        median_tokens=statistics.median(tokens),
        truncated=verdicts.count("truncated") / len(verdicts),
        no_answer=verdicts.count("no_answer") / len(verdicts),
        timeout=verdicts.count("timeout") / len(verdicts),
    )


def to_json(report: Report) -> str:
    """The report as indented JSON: {"mean_pass_at_1": ..., "benchmarks": [{...}]}."""
    content: dict[str, Any] = {
        "mean_pass_at_1": report.mean_pass_at_1,
        "benchmarks": [dataclasses.asdict(score) for score in report.scores],
    }
    return json.dumps(content, indent=2) + "\n"


HEADER = (
    "benchmark", "problems", "pass@1 %", "pass@n %", "tokens mean", "median",
    "truncated %", "no answer %", "timeout %",
)  # fmt: skip


def table(report: Report) -> str:
    """A Markdown table that also reads well in a terminal; scores and shares in percent."""
    rows = [HEADER, *(_row(score) for score in report.scores)]
    if len(report.scores) > 1:
        mean = f"{100 * report.mean_pass_at_1:.1f}"
        rows.append(("mean", "", mean, *[""] * (len(HEADER) - 3)))
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _row(score: Score) -> tuple[str, ...]:
    return (
        score.benchmark,
        f"{score.num_problems} x {score.num_samples}",
        f"{100 * score.pass_at_1:.1f} ± {100 * score.sem:.1f}",
        f"{100 * score.pass_at_k[-1]:.1f}",
        f"{score.mean_tokens:.0f}",
        f"{score.median_tokens:.0f}",
        f"{100 * score.truncated:.1f}",
        f"{100 * score.no_answer:.1f}",
        f"{100 * score.timeout:.1f}",
    )


# ---------------------------------------------------------------- several models side by side


@dataclass(kw_only=True)
class CompareConfig:
    runs: Annotated[list[str], "folders that evaluate.py wrote; each is named by its last part"]
    out: Annotated[str | None, "JSON file for the table"] = None


def compare(runs: list[Path]) -> list[dict[str, Any]]:
    """A row for each run and benchmark, from the report.json of each run."""
    rows = []
    for run in runs:
        path = run / "report.json"
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
            rows += [_comparison_row(run.name, Score(**score)) for score in scores]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `python evaluate.py` makes it") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a report of evaluate.py ({error})") from None
    return rows


def _comparison_row(model: str, score: Score) -> dict[str, Any]:
    return {
        "model": model,
        "benchmark": score.benchmark,
        "problems": score.num_problems,
        "samples": score.num_samples,
        "pass@1": score.pass_at_1,
        "sem": score.sem,
        f"pass@{score.num_samples}": score.pass_at_k[-1],
        "mean_tokens": score.mean_tokens,
        "truncated": score.truncated,
    }


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `compare` as a Markdown table; fractions as they are."""
    cells = [["model", "benchmark", "pass@1 ± SEM", "pass@n", "mean tokens", "truncated"]]
    for row in rows:
        n = row["samples"]
        cells.append(
            [
                row["model"],
                row["benchmark"],
                f"{row['pass@1']:.3f} ± {row['sem']:.3f}",
                f"{row[f'pass@{n}']:.3f} (n = {n})",
                f"{row['mean_tokens']:.1f}",
                f"{row['truncated']:.1%}",
            ]
        )
    return _markdown(cells)


@program
def main() -> None:
    config = parse(CompareConfig, "Put evaluations side by side.")
    rows = compare([Path(run) for run in config.runs])
    print(comparison_table(rows))
    if config.out:
        with write_aside(config.out) as file:
            json.dump({"rows": rows}, file, indent=2)
            file.write("\n")
        print(f"\nsaved {config.out}")


if __name__ == "__main__":
    main()
