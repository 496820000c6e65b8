"""A study's results as a page: Markdown with pictures beside it, and one HTML file.

A page is a list of blocks that both formats have: Heading, Text, Table, Picture, Code. `report`
lays out any study; docs/make_study.py uses the same blocks with its own prose. Left out: scripts
and any style beyond a readable width; the HTML loads nothing.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from redi.eval.reporting import tables
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
    text: str


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]  # the first column left-aligned, the others right-aligned


@dataclass(frozen=True)
class Picture:
    name: str  # of a figure
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Table | Picture | Code


# ---------------------------------------------------------------- what a report says


def report(results: Results, pictures: Sequence[str]) -> list[Block]:
    """pictures: names of the figures that were drawn."""
    blocks: list[Block] = [Heading(results.title, 1), Text(summary(results))]
    if results.missing:
        rows = [[name, why] for name, why in results.missing.items()]
        blocks += [Heading("Missing"), Table(["what has no result", "why"], rows)]
    blocks += [Heading("Methods, each at its best"), table(results, results.table), Text(NOTES)]
    blocks += [Picture(name, CAPTIONS[name]) for name in pictures]
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
    """A paragraph: what was run, where and for how long."""
    seeds = ", ".join(map(str, sorted({run.seed for run in results.runs})))
    variants = {(row.method, name_of(row.settings)) for row in results.grid} - {(STAGE_1, "")}
    seconds = results.job_seconds
    duration = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    machine = [f"{v} cores" if k == "cores" else str(v) for k, v in results.machine.items()]
    versions = [f"{name} {version}" for name, version in results.versions.items()]
    return (
        f"{len(results.runs)} models: {len({method for method, _ in variants})} methods in "
        f"{len(variants)} variants, seeds {seeds}; {duration} of programs, on "
        f"{', '.join(machine)} ({', '.join(versions)})."
    )


def table(results: Results, rows: Sequence[Row]) -> Table:
    """The paper's Table 2; setting and share of mislabelled traces are columns if they vary."""
    settings = len({row.setting for row in rows}) > 1
    shares = len({row.mislabelled for row in rows}) > 1
    dpo = any(row.p_dpo is not None for row in rows)
    lines = []
    for row in rows:
        line = [("method", row.method), ("variant", name_of(row.settings))]
        if settings:
            line.append(("setting", row.setting))
        if shares:
            line.append(("mislabelled", f"{row.mislabelled:g}"))
        if len(row.benchmarks) > 1:
            line += [(name, f"{score:.3f}") for name, score in row.benchmarks.items()]
        error = "" if row.sem is None else f" ± {row.sem:.3f}"
        line.append(("pass@1 ± SEM", f"{row.mean:.3f}{error}"))
        line.append((f"pass@{results.samples}", f"{row.pass_at_n:.3f}"))
        line.append(("gain", "" if row.gain is None else signed(row.gain)))
        line.append(("p, stage 1", p_value(row.p_stage_1)))
        if dpo:
            line.append(("p, DPO", p_value(row.p_dpo)))
        line.append(("tokens", f"{row.mean_tokens:.1f}"))
        line += [("collapsed", str(row.collapsed)), ("seeds", str(row.seeds))]
        lines.append(line)
    header = [name for name, _ in lines[0]]
    return Table(header, [[cell for _, cell in line] for line in lines])


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # no -0.000


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else number(float(f"{p:.0e}"))


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
        case Code(text):
            return f"```\n{text.strip()}\n```"
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
        case Code(text):
            return f"<pre>{html.escape(text.strip())}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>\n" for line in lines)
            return f"<table><tr>{head}</tr>\n{body}</table>"
