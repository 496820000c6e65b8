"""A study's results as a page, in Markdown with its pictures beside it and as one HTML file.

A page is a list of blocks, each of which both languages have: Heading, Text, Table, Picture, Code.
`report` lays out what any study has; a page with other prose (docs/make_study.py) is made of the
same blocks. Left out: scripts and styles beyond a readable width; the HTML loads nothing.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from redi.eval import tables
from redi.study.figures import name_of, number
from redi.study.plan import STAGE_1
from redi.study.results import Results, Row

CAPTIONS = {
    "accuracy": "pass@1 over optimizer steps, from the stage-1 model at 0: each method at its best "
    "(solid, with one SEM) and at its largest learning rate (dotted). The first and the last point "
    "are the final evaluation's, those between of the smaller one during training.",
    "log_probs": "Chosen and rejected log-probs over steps: each method at its best (solid) and at "
    "its largest learning rate (dotted).",
    "norms": "Norm of the gradient before clipping and, where logged, of the update. The last step "
    "of an epoch has the rows that were left: few, and so a large norm.",
    "entropy": "Entropy of the model's next token, on chosen and on rejected traces.",
    "lr": "pass@1 against the peak learning rate; dashed, stage 1.",
    "alpha": "pass@1 against alpha, the weight of the rejected trace: 0 is positives only, 1 the "
    "symmetric objective; dashed, stage 1.",
    "labels": "Gain over stage 1 against the share of rejected traces that are right in truth.",
}


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]  # the first column to the left, the others to the right


@dataclass(frozen=True)
class Picture:
    name: str  # of a figure
    caption: str


@dataclass(frozen=True)
class Code:
    text: str
    summary: str = ""  # with one, it is folded away under it


Block = Heading | Text | Table | Picture | Code


# ---------------------------------------------------------------- what a report says


def report(results: Results, pictures: Sequence[str]) -> list[Block]:
    """pictures: names of the figures that were drawn."""
    blocks: list[Block] = [Heading(results.title, 1), Text(summary(results))]
    if results.missing:
        rows = [[name, why] for name, why in results.missing.items()]
        blocks += [Heading("Missing"), Table(["what has no result", "why"], rows)]
    blocks += [Heading("Methods, each at its best"), table(results, results.table), Text(NOTES)]
    for name in pictures:
        blocks.append(Picture(name, CAPTIONS[name]))
    blocks += [Heading("The whole grid"), table(results, results.grid)]
    return [*blocks, Heading("Settings"), Text(COMMANDS), Code(results.study)]


NOTES = (
    "pass@1 is the mean over seeds, with its SEM over seeds. p values are two-sided paired t-tests "
    "over seeds, uncorrected for their number. A method's best learning rate was chosen on these "
    "very numbers. 'collapsed' counts runs in which the collapse guard would have warned."
)

COMMANDS = (
    "The study's file. done/ has the command lines and the seconds of every job it finished, and "
    "config.toml in the folder of every run all of its settings."
)


def summary(results: Results) -> str:
    """What was run, where and how long, in a paragraph."""
    seeds = sorted({run.seed for run in results.runs})
    methods = len({row.method for row in results.grid} - {STAGE_1})
    variants = len({(row.method, name_of(row.settings)) for row in results.grid} - {(STAGE_1, "")})
    machine = ", ".join(
        f"{value} cores" if key == "cores" else str(value) for key, value in results.machine.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"{len(results.runs)} models: {methods} methods in {variants} variants, seeds "
        f"{', '.join(map(str, seeds))}; {minutes(results.job_seconds)} of programs, on {machine} "
        f"({versions})."
    )


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def table(results: Results, rows: Sequence[Row]) -> Table:
    """The shape of the paper's Table 2; setting and share of mislabelled traces where they vary."""
    settings = len({row.setting for row in rows}) > 1
    shares = len({row.mislabelled for row in rows}) > 1
    names = list(rows[0].benchmarks) if len(rows[0].benchmarks) > 1 else []
    dpo = any(row.p_dpo is not None for row in rows)
    header = ["method", "variant", *(["setting"] * settings), *(["mislabelled"] * shares), *names]
    header += ["pass@1 ± SEM", f"pass@{results.samples}", "gain", "p, stage 1"]
    header += [*(["p, DPO"] * dpo), "tokens", "collapsed", "seeds"]
    cells = []
    for row in rows:
        line = [row.method, name_of(row.settings)]
        line += [row.setting] * settings + [f"{row.mislabelled:g}"] * shares
        line += [f"{row.benchmarks[name]:.3f}" for name in names]
        line += [mean(row), f"{row.pass_at_n:.3f}"]
        line += ["" if row.gain is None else signed(row.gain), p_value(row.p_stage_1)]
        line += [p_value(row.p_dpo)] * dpo
        line += [f"{row.mean_tokens:.1f}", str(row.collapsed), str(row.seeds)]
        cells.append(line)
    return Table(header, cells)


def mean(row: Row) -> str:
    return f"{row.mean:.3f}" + ("" if row.sem is None else f" ± {row.sem:.3f}")


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # no -0.000


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else number(float(f"{p:.0e}")) if p > 1e-12 else "< 1e-12"


# ---------------------------------------------------------------- Markdown and HTML


def to_markdown(blocks: Sequence[Block], pictures: str) -> str:
    """pictures: the folder of the PNGs, as seen from the page."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Picture(name, caption):
            return f"![{name}]({pictures}/{name}.png)\n\n*{caption}*"
        case Code(text, ""):
            return f"```\n{text.strip()}\n```"
        case Code(text, folded):
            inside = f"```\n{text.strip()}\n```"
            return f"<details><summary>{folded}</summary>\n\n{inside}\n\n</details>"
        case Table():
            return as_markdown(block)


def as_markdown(block: Table) -> str:
    rows = [block.header, *block.rows]
    return tables.table([[cell.replace("\n", " ") for cell in row] for row in rows])


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}"
    "th,td{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto;"
    "background:#f6f6f6;padding:.7rem;font-size:.85rem}figcaption{color:#555;font-size:.9rem}"
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def to_html(blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """One file; pictures: name -> PNG."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "study")
    body = "\n".join(_html(block, pictures) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n"
        "</body></html>\n"
    )


def _html(block: Block, pictures: dict[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Picture(name, caption):
            data = base64.b64encode(pictures[name]).decode()
            image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Code(text, ""):
            return f"<pre>{html.escape(text.strip())}</pre>"
        case Code(text, folded):
            inside = f"<pre>{html.escape(text.strip())}</pre>"
            return f"<details><summary>{html.escape(folded)}</summary>{inside}</details>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>\n" for line in lines)
            return f"<table><tr>{head}</tr>\n{body}</table>"
