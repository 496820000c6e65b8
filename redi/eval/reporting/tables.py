"""A report as Markdown that also reads well in a terminal; scores and shares are percentages."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

from redi.eval.reporting import paper_results
from redi.eval.reporting.scores import BenchmarkScore, Report, mean_pass_at_1
from redi.tables import Cells, markdown_table, text_table

NOTES = """\
pass@1 is the mean over all samples; SEM is the paper's, the spread between repeated runs; the
interval is for other problems of the same kind. Truncated, unanswered and timed-out completions
count as wrong. Loops are completions that end in one repeated passage. Where both graders judged
the same completions, a benchmark's first row is its score; the other tables, the page and
comparisons use the grader of that row."""
PUBLISHED = """\
pass@1 / pass@16 as the paper reports them (arXiv 2505.24850; 16 samples, its prompt and grader).
Nothing in this table was measured here."""

ANSWER_FROM = {"after_think": "after </think>", "whole": "in the whole response"}
# Column of a score table -> its cell.
COLUMNS: dict[str, Callable[[BenchmarkScore], str]] = {
    "benchmark": lambda score: score.benchmark,
    "grader": lambda score: score.grader,
    "problems": lambda score: f"{score.num_problems} x {score.num_samples}",
    "pass@1 ± SEM": lambda score: f"{percent(score.pass_at_1)} ± {percent(score.sem)}",
    "95 % interval": lambda score: " to ".join(map(percent, score.interval)),
    "pass@n": lambda score: percent(score.pass_at_k[-1]),
    "majority": lambda score: percent(score.majority),
    "tokens mean": lambda score: count(score.mean_tokens),
    "median": lambda score: count(score.median_tokens),
    "truncated": lambda score: percent(score.truncated),
    "no answer": lambda score: percent(score.no_answer),
    "timeout": lambda score: percent(score.timeout),
    "loops": lambda score: percent(score.loops),
    "answer read": lambda score: ANSWER_FROM[score.answer_from],
}
ON_SCREEN = {
    "model", "benchmark", "grader", "pass@1 ± SEM", "pass@n", "majority", "tokens mean", "truncated"
}  # fmt: skip


def markdown(report: Report) -> str:
    """The whole report.md."""
    settings = {**report.settings, "graded by": report.grader}
    described = ", ".join(f"{name} {_shown(value)}" for name, value in settings.items())
    parts = [f"# {report.model}", described, markdown_table(score_table(report)), NOTES]
    names = {f"{score.benchmark} ({score.grader})": score for score in report.benchmarks}
    columns = [map(percent, score.pass_at_k) for score in report.benchmarks]
    most = max(score.num_samples for score in report.benchmarks)
    if most > 1:
        rows = zip_longest(map(str, range(1, most + 1)), *columns, fillvalue="")
        parts += ["## pass@k", markdown_table([("k", *names), *rows])]
    for name, score in names.items():
        for kind, groups in (("difficulty", score.by_difficulty), ("subject", score.by_subject)):
            rows = [(kind, "problems", "pass@1", "tokens mean", "truncated")]
            for g in groups:
                values = percent(g.pass_at_1), count(g.mean_tokens), percent(g.truncated)
                rows.append((g.name, str(g.num_problems), *values))
            if groups:
                parts += [f"## {name} by {kind}", markdown_table(rows)]
    if published := paper_results.rows([score.benchmark for score in report.benchmarks]):
        parts += ["## The paper's results", PUBLISHED, markdown_table(published)]
    return "\n\n".join(parts) + "\n"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text) if "\n" in text or not text else text


def score_table(report: Report) -> Cells:
    """A row per benchmark and their mean if there are several; then the same for the second
    grader, if there are two."""
    return [tuple(COLUMNS), *_rows(report.benchmarks), *_rows(report.other_grader)]


def for_screen(table: Cells) -> str:
    """The columns of a score table that fit a terminal; the files of a report have the others."""
    shown = [number for number, name in enumerate(table[0]) if name in ON_SCREEN]
    return text_table([[row[number] for number in shown] for row in table])


def side_by_side(reports: dict[str, Report]) -> Cells:
    """The scores of several runs, by name; of two graders, those of the one that leads."""
    rows = [(name, *row) for name, report in reports.items() for row in _rows(report.benchmarks)]
    return [("model", *COLUMNS), *rows]


def _rows(scores: Sequence[BenchmarkScore]) -> list[tuple[str, ...]]:
    rows = [tuple(cell(score) for cell in COLUMNS.values()) for score in scores]
    if len(scores) > 1:
        graders = ", ".join(dict.fromkeys(score.grader for score in scores))
        mean = percent(mean_pass_at_1(scores))
        rows.append(("mean", graders, "", mean, *[""] * (len(COLUMNS) - 4)))
    return rows


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def count(tokens: float | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,.0f}"


def card(report: Report) -> str:
    """The scores of a model card: the table, and how the answers were sampled."""
    names = ("temperature", "top_p", "max_new_tokens", "seed", "dtype")
    settings = [f"{name} {report.settings[name]}" for name in names if name in report.settings]
    how = f"with {', '.join(settings)}" if settings else "by another program"
    table = markdown_table(score_table(report))
    return f"{table}\n\nSampled {how}; pass@n is of all samples."
