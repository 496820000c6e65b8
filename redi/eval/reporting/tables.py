"""A report as Markdown that also reads well in a terminal. Scores and shares in percent."""

from collections.abc import Sequence

from redi.eval.report import Group, Report, Score, mean_pass_at_1
from redi.eval.reporting import paper_results

SUMMARY = (
    "benchmark", "grader", "problems", "pass@1 ± SEM", "95 % interval", "pass@n", "majority",
    "tokens mean", "median", "truncated", "no answer", "timeout", "loops",
)  # fmt: skip
NOTES = """\
pass@1 is the mean over all samples; SEM is the paper's, the spread between repeated runs; the
interval says what other problems like these would give. Truncated, unanswered and timed-out
completions count as wrong. Loops are completions that end in one passage over and over. Where both
graders judged the same completions, a benchmark's first row is its score; the other tables, the
page and comparisons use the grader of that row."""

ANSWER_FROM = {"after_think": "after </think>", "whole": "in the whole response"}


def markdown(report: Report) -> str:
    """The whole report.md."""
    said = {**report.settings, "graded by": report.grader, "answers are read": _rules(report)}
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in said.items())
    parts = [f"# {report.model}", settings, summary(report), NOTES]
    if any(score.num_samples > 1 for score in report.scores):
        parts += ["## pass@k", _pass_at_k(report.scores)]
    for score in report.scores:
        for kind, groups in (("difficulty", score.by_difficulty), ("subject", score.by_subject)):
            if groups:
                parts += [f"## {_name(score)} by {kind}", _groups(kind, groups)]
    if theirs := paper_results.rows([score.benchmark for score in report.scores]):
        parts += ["## Theirs, not ours", PUBLISHED, table(theirs)]
    return "\n\n".join(parts) + "\n"


def _rules(report: Report) -> list[str]:
    """Where answers were looked for; if the graders did not look in one place, each one's."""
    rules: dict[str, dict[str, None]] = {}
    for score in (*report.scores, *report.other_scores):
        rules.setdefault(ANSWER_FROM[score.answer_from], {})[score.grader] = None
    if len(rules) == 1:
        return [*rules]
    return [f"{rule} by {' and '.join(graders)}" for rule, graders in rules.items()]


PUBLISHED = """\
pass@1 / pass@16 as the paper reports them (arXiv 2505.24850; 16 samples, its prompt and grader).
Nothing in this table was measured here."""


def summary(report: Report) -> str:
    """One row per benchmark, and their mean if there are several; then the same for the second
    grader, if there are two."""
    rows = [SUMMARY]
    for scores in filter(None, (report.scores, report.other_scores)):
        rows += map(_row, scores)
        if len(scores) > 1:
            graders = ", ".join(dict.fromkeys(score.grader for score in scores))
            mean = percent(mean_pass_at_1(scores))
            rows.append(("mean", graders, "", mean, *[""] * (len(SUMMARY) - 4)))
    return table(rows)


def _name(score: Score) -> str:
    return f"{score.benchmark} ({score.grader})"


def _row(score: Score) -> tuple[str, ...]:
    low, high = score.interval
    return (
        score.benchmark,
        score.grader,
        f"{score.num_problems} x {score.num_samples}",
        f"{percent(score.pass_at_1)} ± {percent(score.sem)}",
        f"{percent(low)} to {percent(high)}",
        percent(score.pass_at_k[-1]),
        percent(score.majority),
        count(score.mean_tokens),
        count(score.median_tokens),
        percent(score.truncated),
        percent(score.no_answer),
        percent(score.timeout),
        percent(score.loops),
    )


def _pass_at_k(scores: list[Score]) -> str:
    longest = max(score.num_samples for score in scores)
    rows = [("k", *map(_name, scores))]
    for k in range(1, longest + 1):
        cells = (percent(s.pass_at_k[k - 1]) if k <= s.num_samples else "" for s in scores)
        rows.append((str(k), *cells))
    return table(rows)


def _groups(kind: str, groups: list[Group]) -> str:
    rows = [(kind, "problems", "pass@1", "tokens mean", "truncated")]
    for group in groups:
        values = percent(group.pass_at_1), count(group.mean_tokens), percent(group.truncated)
        rows.append((group.name, str(group.num_problems), *values))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first; the first column to the left, the others to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def count(tokens: float | None) -> str:
    return "not known" if tokens is None else f"{tokens:,.0f}"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text) if "\n" in text or not text else text
