"""A study's report: its table in a terminal; figures, and one HTML page with all of it.

Lines are means over seeds, bands one SEM.
Left out: norms, entropies and single runs, which `python -m redi.runlog RUN [RUN ...]` draws.
"""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from redi import pages
from redi.curves import as_label
from redi.data.files import make_folder, write_aside
from redi.study.plan import STAGE_1, as_text, in_words
from redi.study.results import Results, Row, sem

NOTES = (
    "pass@1 is the mean over seeds, with its SEM over seeds. p values are two-sided paired t-tests "
    "over seeds, uncorrected for their number. A method's best learning rate was chosen on these "
    "very numbers. 'collapsed' counts runs in which the collapse guard would have warned."
)


def write_reports(results: Results, out: Path) -> None:
    """Write study.json, then the figures and the page."""
    with write_aside(out / "study.json") as file:
        file.write(json.dumps(asdict(results)) + "\n")
    drawn = figures(results)
    make_folder(out / "figures")
    files = {f"figures/{name}.png": picture for name, picture in drawn.items()}
    files["report.html"] = page(results, drawn).encode()
    for name, content in files.items():
        with write_aside(out / name, binary=True) as file:
            file.write(content)


# ---------------------------------------------------------------- text


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
        parts.append(pages.figure(name, png, CAPTIONS[name]))
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


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Line:
    panel: str  # its title
    label: str
    points: dict[float, Sequence[float]]  # x -> one value per seed
    style: str  # Matplotlib's: color, marker, dashes


CAPTIONS = {
    "accuracy": "pass@1 over optimizer steps, from the stage-1 model at 0: each method at its best "
    "(solid) and at its largest learning rate (dotted), for the first teacher and share of "
    "mislabelled traces. The first and the last point are the final evaluation's, those between of "
    "the smaller one during training.",
    "log_probs": "Chosen and rejected log-probs over optimizer steps: each method at its best "
    "(solid) and at its largest learning rate (dotted), for the first teacher and share of "
    "mislabelled traces.",
    "gains": "Gain of pass@1 over stage 1 against each setting that was varied while the others "
    "were not; mislabelled is the share of rejected traces that are in fact right.",
}


def figures(results: Results) -> dict[str, bytes]:
    """Name -> PNG of every figure that has something to draw."""
    accuracy, log_probs = [], []
    stage_1 = next((row.scores for row in results.table if row.method == STAGE_1), [])
    methods = [row for row in results.table if row.method != STAGE_1]
    shown = [row for row in methods if row.key[:2] == methods[0].key[:2]]
    for position, best in enumerate(shown):
        rows = [row for row in results.grid if row.key[:3] == best.key[:3]]
        rows = [row for row in rows if {**row.settings, "lr": 0} == {**best.settings, "lr": 0}]
        fastest = max(rows, key=lambda row: row.settings["lr"])
        for row, dashes in [(best, "-"), (fastest, ":")][: 1 + (fastest != best)]:
            runs = [run for run in results.runs if run.key == row.key]
            scored = [dict(run.on_the_way) for run in runs]
            steps = set.intersection(*map(set, scored))
            points = {0: stage_1} | {step: [scores[step] for scores in scored] for step in steps}
            last = max(step for run in runs for step, _ in chain(*run.curves.values()))
            points[last] = row.scores
            label = f"{row.method} ({row.name})"
            accuracy.append(Line("", label, points, f"C{position}o{dashes}"))
            for side, color in (("chosen", "C0"), ("rejected", "C3")):
                values = [dict(run.curves[f"{side}_logp"]) for run in runs]
                steps = set.intersection(*map(set, values))
                label = f"{side}, lr {as_text(row.settings['lr'])}"
                points = {step: [one[step] for one in values] for step in steps}
                log_probs.append(Line(row.method, label, points, color + dashes))
    if not any(run.on_the_way for run in results.runs):
        accuracy = []
    drawn = {
        "accuracy": _draw(accuracy, "pass@1", "optimizer step"),
        "log_probs": _draw(log_probs, "mean log-prob (nats per token)", "optimizer step"),
        "gains": _draw(_gains(results), "gain of pass@1 over stage 1"),
    }
    return {name: png for name, png in drawn.items() if png}


def _gains(results: Results) -> list[Line]:
    rows = [(row, row.settings) for row in results.grid if row.gains]
    if len({row.mislabelled for row, _ in rows}) > 1:
        rows = [(row, values | {"mislabelled": row.mislabelled}) for row, values in rows]
    lines = []
    for key in dict.fromkeys(key for _, values in rows for key in values):
        found: dict[str, dict[float, list[float]]] = {}  # label -> points
        for row, values in rows:
            if isinstance(values.get(key), (int, float)):
                others = in_words({k: v for k, v in values.items() if k != key})
                label = ", ".join(filter(None, [row.teacher, row.settings["objective"], others]))
                found.setdefault(label, {})[values[key]] = row.gains
        varied = [(label, points) for label, points in found.items() if len(points) > 1]
        lines += [Line(key, *line, f"C{number}o-") for number, line in enumerate(varied)]
    return lines


def _draw(lines: Sequence[Line], ylabel: str, xlabel: str | None = None) -> bytes | None:
    """A PNG with a panel per title. xlabel: None if the titles are what x is."""
    titles = list(dict.fromkeys(line.panel for line in lines))
    if not titles:
        return None
    columns = min(4, len(titles))
    height = -(-len(titles) // columns)
    figure = Figure(figsize=(max(8, 3.4 * columns), max(4, 3.1 * height)), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharey=True).flatten()
    for axis, title in zip(axes, titles):
        for line in (line for line in lines if line.panel == title):
            x = sorted(at for at, values in line.points.items() if values)
            mean = np.array([fmean(line.points[at]) for at in x])
            error = np.array([sem(line.points[at]) or 0.0 for at in x])
            [drawn] = axis.plot(x, mean, line.style, lw=1.4, ms=3.5, label=as_label(line.label))
            band = {"color": drawn.get_color(), "alpha": 0.15, "lw": 0}
            axis.fill_between(x, mean - error, mean + error, **band)
        if xlabel:
            axis.set(title=as_label(title), xlabel=xlabel)
        else:
            axis.set(xlabel=as_label(title), xscale="log" if title == "lr" else "linear")
            axis.axhline(0, color="0.45", ls="--", lw=1)
        axis.grid(alpha=0.3)
        outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(titles) == 1 else {}
        axis.legend(fontsize="x-small", framealpha=0.8, **outside)
    for unused in axes[len(titles) :]:
        unused.remove()
    figure.supylabel(ylabel, fontsize="medium")
    figure.savefig(file := io.BytesIO(), dpi=90, format="png")
    return file.getvalue()
