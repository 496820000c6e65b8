"""A study's report from its results, twice: Markdown with pictures beside it, and one HTML file."""

import html
from collections.abc import Callable, Sequence
from typing import Any

from redi import pages
from redi.study.figures import FIGURES
from redi.study.plan import STAGE_1, as_text
from redi.study.results import Results, Row, name_of
from redi.tables import markdown_table

NOTES = (
    "pass@1 is the mean over seeds, with its SEM over seeds. p values are two-sided paired t-tests "
    "over seeds, uncorrected for their number. A method's best learning rate was chosen on these "
    "very numbers. 'collapsed' counts runs in which the collapse guard would have warned."
)
SETTINGS = "The study's file. config.toml in the folder of every run has all of its settings."
MARKDOWN: dict[str, Callable[[Any], str]] = {
    "h1": "# {}".format, "h2": "## {}".format, "p": str, "pre": "```\n{}\n```".format,
    "table": markdown_table,
    "figure": lambda name: f"![{name}](figures/{name}.png)\n\n*{caption(name)}*",
}  # fmt: skip


def to_markdown(results: Results, pictures: Sequence[str]) -> str:
    """pictures: names of the PNGs in figures/."""
    parts = [MARKDOWN[kind](content) for kind, content in _report(results, pictures)]
    return "\n\n".join(parts) + "\n"


def to_html(results: Results, pictures: dict[str, bytes]) -> str:
    """pictures: name -> PNG."""
    parts = []
    for kind, content in _report(results, list(pictures)):
        if kind == "table":
            parts.append(pages.table(content))
        elif kind == "figure":
            parts.append(pages.figure(content, pictures[content], caption(content)))
        else:
            parts.append(f"<{kind}>{html.escape(content)}</{kind}>")
    return pages.page(results.title, "\n".join(parts))


def caption(figure: str) -> str:
    return " ".join(FIGURES[figure].__doc__.split())


def _report(results: Results, pictures: Sequence[str]) -> list[tuple[str, Any]]:
    """(kind, content) of each part of the page, in order; kinds are those of MARKDOWN."""
    parts: list[tuple[str, Any]] = [("h1", results.title), ("p", summary(results))]
    if results.missing:
        rows = [["what has no result", "why"], *map(list, results.missing.items())]
        parts += [("h2", "Missing"), ("table", rows)]
    best = ("table", table(results, results.table))
    parts += [("h2", "Methods, each at its best"), best, ("p", NOTES)]
    parts += [("figure", name) for name in pictures]
    parts += [("h2", "The whole grid"), ("table", table(results, results.grid))]
    return [*parts, ("h2", "Settings"), ("p", SETTINGS), ("pre", results.study.strip())]


def summary(results: Results) -> str:
    """A paragraph: what was run, who graded it, and where."""
    seeds = ", ".join(map(str, sorted({run.seed for run in results.runs})))
    variants = {(row.method, name_of(row.settings)) for row in results.grid} - {(STAGE_1, "")}
    methods = {method for method, _ in variants}
    graders = " and ".join(sorted({run.grader for run in results.runs}))
    return (
        f"{len(results.runs)} models: {len(methods)} methods in {len(variants)} variants, seeds "
        f"{seeds}; graded by {graders}; {results.made_with}."
    )


def table(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """The paper's Table 2 with its header; setting, share of mislabelled traces and p against DPO
    are columns if they vary."""
    lines = []
    for row in rows:
        line = {"method": row.method, "variant": name_of(row.settings)}
        if len({row.setting for row in rows}) > 1:
            line["setting"] = row.setting
        if len({row.mislabelled for row in rows}) > 1:
            line["mislabelled"] = f"{row.mislabelled:g}"
        if len(row.benchmarks) > 1:
            line |= {name: f"{score:.3f}" for name, score in row.benchmarks.items()}
        error = "" if row.sem is None else f" ± {row.sem:.3f}"
        line["pass@1 ± SEM"] = f"{row.mean:.3f}{error}"
        line[f"pass@{results.samples}"] = f"{row.pass_at_n:.3f}"
        # Adding 0.0 turns -0.0 into 0.0.
        line["gain"] = "" if row.gain is None else f"{round(row.gain, 3) + 0.0:+.3f}"
        line["p, stage 1"] = p_value(row.p_stage_1)
        if any(row.p_dpo is not None for row in rows):
            line["p, DPO"] = p_value(row.p_dpo)
        line["tokens"] = f"{row.mean_tokens:.1f}"
        line |= {"collapsed": str(row.collapsed), "seeds": str(row.seeds)}
        lines.append(line)
    return [list(lines[0]), *(list(line.values()) for line in lines)]


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else as_text(float(f"{p:.0e}"))
