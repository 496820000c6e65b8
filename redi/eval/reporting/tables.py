"""A report as Markdown that also reads well in a terminal, and as JSON.

Scores and shares are percentages in Markdown and fractions of 1 in JSON.
"""

import json
from dataclasses import asdict
from typing import Any

from redi.eval.reporting import paper_results
from redi.eval.reporting.scores import Group, Report, Score, mean_pass_at_1
from redi.tables import markdown_table

SUMMARY = (
    "benchmark", "grader", "problems", "pass@1 ± SEM", "95 % interval", "pass@n", "majority",
    "tokens mean", "median", "truncated", "no answer", "timeout", "loops",
)  # fmt: skip
NOTES = """\
pass@1 is the mean over all samples; SEM is the paper's, the spread between repeated runs; the
interval is for other problems of the same kind. Truncated, unanswered and timed-out completions
count as wrong. Loops are completions that end in one repeated passage. Where both graders judged
the same completions, a benchmark's first row is its score; the other tables, the page and
comparisons use the grader of that row."""

ANSWER_FROM = {"after_think": "after </think>", "whole": "in the whole response"}


def markdown(report: Report) -> str:
    """The whole report.md."""
    settings = {**report.settings, "graded by": report.grader, "answers are read": _rules(report)}
    described = ", ".join(f"{name} {_shown(value)}" for name, value in settings.items())
    parts = [f"# {report.model}", described, summary(report), NOTES]
    if any(score.num_samples > 1 for score in report.scores):
        parts += ["## pass@k", _pass_at_k(report.scores)]
    for score in report.scores:
        for kind, groups in (("difficulty", score.by_difficulty), ("subject", score.by_subject)):
            if groups:
                parts += [f"## {_name(score)} by {kind}", _groups(kind, groups)]
    if published := paper_results.rows([score.benchmark for score in report.scores]):
        parts += ["## The paper's results", PUBLISHED, markdown_table(published)]
    return "\n\n".join(parts) + "\n"


def _rules(report: Report) -> list[str]:
    """Where the graders looked for answers; which grader where, if they looked in two places."""
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
    """One row per benchmark and their mean if there are several; then the same for the second
    grader, if there are two."""
    rows = [SUMMARY]
    for scores in filter(None, (report.scores, report.other_scores)):
        rows += map(_row, scores)
        if len(scores) > 1:
            graders = ", ".join(dict.fromkeys(score.grader for score in scores))
            mean = percent(mean_pass_at_1(scores))
            rows.append(("mean", graders, "", mean, *[""] * (len(SUMMARY) - 4)))
    return markdown_table(rows)


def side_by_side(names: list[str], reports: list[Report]) -> str:
    """A row per run and benchmark."""
    rows = [(n, *_row(score)) for n, report in zip(names, reports) for score in report.scores]
    return markdown_table([("model", *SUMMARY), *rows])


def _name(score: Score) -> str:
    return f"{score.benchmark} ({score.grader})"


def _row(score: Score) -> tuple[str, ...]:
    low, high = map(percent, score.interval)
    shares = (score.truncated, score.no_answer, score.timeout, score.loops)
    return (
        score.benchmark,
        score.grader,
        f"{score.num_problems} x {score.num_samples}",
        f"{percent(score.pass_at_1)} ± {percent(score.sem)}",
        f"{low} to {high}",
        percent(score.pass_at_k[-1]),
        percent(score.majority),
        count(score.mean_tokens),
        count(score.median_tokens),
        *map(percent, shares),
    )


def _pass_at_k(scores: list[Score]) -> str:
    rows = [("k", *map(_name, scores))]
    for k in range(max(score.num_samples for score in scores)):
        cells = (percent(s.pass_at_k[k]) if k < s.num_samples else "" for s in scores)
        rows.append((str(k + 1), *cells))
    return markdown_table(rows)


def _groups(kind: str, groups: list[Group]) -> str:
    rows = [(kind, "problems", "pass@1", "tokens mean", "truncated")]
    for group in groups:
        values = percent(group.pass_at_1), count(group.mean_tokens), percent(group.truncated)
        rows.append((group.name, str(group.num_problems), *values))
    return markdown_table(rows)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def count(tokens: float | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,.0f}"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text) if "\n" in text or not text else text


def to_json(report: Report) -> str:
    """Indented JSON: {"model", "grader", "settings", "mean_pass_at_1", "benchmarks": [{...}],
    "other_grader": [{...}]}; the mean is that of "benchmarks"."""
    content: dict[str, Any] = {
        "model": report.model,
        "grader": report.grader,
        "settings": report.settings,
        "mean_pass_at_1": mean_pass_at_1(report.scores),
        "benchmarks": [asdict(score) for score in report.scores],
        "other_grader": [asdict(score) for score in report.other_scores],
    }
    return json.dumps(content, indent=2) + "\n"
