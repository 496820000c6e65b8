"""A study's report: its table in a terminal, and one HTML page with figures and the whole grid."""

import html
from collections.abc import Sequence

from redi import pages
from redi.study.figures import FIGURES
from redi.study.plan import STAGE_1, as_text
from redi.study.results import Results, Row

NOTES = (
    "pass@1 is the mean over seeds, with its SEM over seeds. p values are two-sided paired t-tests "
    "over seeds, uncorrected for their number. A method's best learning rate was chosen on these "
    "very numbers. 'collapsed' counts runs in which the collapse guard would have warned."
)


def page(results: Results, pictures: dict[str, bytes]) -> str:
    """pictures: name of a figure -> PNG."""

    def element(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text)}</{tag}>"

    parts = [element("h1", results.title), element("p", summary(results))]
    if results.missing:
        rows = [("what has no result", "why"), *results.missing.items()]
        parts += [element("h2", "Missing"), pages.table(rows)]
    parts += [element("h2", "Methods, each at its best")]
    parts += [pages.table(table(results, results.table)), element("p", NOTES)]
    for name, png in pictures.items():
        parts.append(pages.figure(name, png, caption=" ".join(FIGURES[name].__doc__.split())))
    parts += [element("h2", "The whole grid"), pages.table(table(results, results.grid))]
    parts += [element("h2", "The study's file"), element("pre", results.study.strip())]
    return pages.page(results.title, "\n".join(parts))


def summary(results: Results) -> str:
    """A sentence: what was run, and who graded it."""
    seeds = ", ".join(map(str, sorted({run.seed for run in results.runs})))
    variants = {(row.method, row.name) for row in results.grid if row.method != STAGE_1}
    methods = {method for method, _ in variants}
    graders = " and ".join(sorted({run.grader for run in results.runs}))
    return (
        f"{len(results.runs)} models: {len(methods)} methods in {len(variants)} variants, seeds "
        f"{seeds}; graded by {graders}."
    )


def table(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """The paper's Table 2 with its header; teacher, share of mislabelled traces and p against DPO
    are columns if they vary."""
    lines = []
    for row in rows:
        line = {"method": row.method, "variant": row.name}
        if len({row.teacher for row in rows}) > 1:
            line["teacher"] = row.teacher
        if len({row.mislabelled for row in rows}) > 1:
            line["mislabelled"] = as_text(row.mislabelled)
        if len(row.benchmarks) > 1:
            line |= {name: f"{score:.3f}" for name, score in row.benchmarks.items()}
        error = "" if row.sem is None else f" ± {row.sem:.3f}"
        line["pass@1 ± SEM"] = f"{row.mean:.3f}{error}"
        line[f"pass@{results.samples}"] = f"{row.pass_at_n:.3f}"
        line["gain"] = _number(row.gain, "+.3f")
        line["p, stage 1"] = _number(row.p_stage_1, ".2g")
        if any(row.p_dpo is not None for row in rows):
            line["p, DPO"] = _number(row.p_dpo, ".2g")
        line["tokens"] = f"{row.mean_tokens:.1f}"
        line |= {"collapsed": str(row.collapsed), "seeds": str(len(row.scores))}
        lines.append(line)
    return [list(lines[0]), *(list(line.values()) for line in lines)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
