"""The figures of a study, drawn from its results, as the paper's Figures 2 to 7 are from its runs.

The docstring of a figure's function is its caption. Lines are means over seeds, bands one SEM.
Left out: norms, entropies and single runs, which `python -m redi.runlog RUN [RUN ...]` draws.
"""

import io
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from redi.curves import as_label
from redi.study.plan import STAGE_1, as_text, in_words
from redi.study.results import Results, Row, Run, sem


@dataclass(frozen=True)
class Line:
    label: str
    points: dict[float, list[float]]  # x -> one value per seed
    style: str  # Matplotlib's: color, marker, dashes


Panels = dict[str, list[Line]]  # by title


def figures(results: Results) -> dict[str, bytes]:
    """Name -> PNG of every figure that has something to draw."""
    drawn = {name: draw(results) for name, draw in FIGURES.items()}
    return {name: png for name, png in drawn.items() if png}


def accuracy(results: Results) -> bytes | None:
    """pass@1 over optimizer steps, from the stage-1 model at 0: each method at its best (solid) and
    at its largest learning rate (dotted), for the first teacher and share of mislabelled traces.
    The first and the last point are the final evaluation's, those between of the smaller one during
    training."""
    if not any(run.on_the_way for run in results.runs):
        return None
    lines = []
    for row, runs, color, dashes in _best_and_fastest(results):
        scored = [dict(run.on_the_way) for run in runs]
        shared = set.intersection(*map(set, scored))
        points = {step: [scores[step] for scores in scored] for step in shared}
        points[0] = next((r.scores for r in results.table if r.method == STAGE_1), [])
        points[max(len(run.curves["chosen_logp"]) for run in runs)] = row.scores
        lines.append(Line(f"{row.method} ({row.name})", points, f"{color}o{dashes}"))
    return _draw({"": lines}, "pass@1", "optimizer step")


def log_probs(results: Results) -> bytes | None:
    """Chosen and rejected log-probs over optimizer steps: each method at its best (solid) and at
    its largest learning rate (dotted), for the first teacher and share of mislabelled traces."""
    panels: Panels = {}
    for row, runs, _, dashes in _best_and_fastest(results):
        for side, color in (("chosen", "C0"), ("rejected", "C3")):
            per_step = zip(*(run.curves[f"{side}_logp"] for run in runs))
            points = {step: list(values) for step, values in enumerate(per_step, start=1)}
            label = f"{side}, lr {as_text(row.settings['lr'])}"
            panels.setdefault(row.method, []).append(Line(label, points, color + dashes))
    return _draw(panels, "mean log-prob (nats per token)", "optimizer step")


def gains(results: Results) -> bytes | None:
    """Gain of pass@1 over stage 1 against each setting that was varied while the others were not;
    mislabelled is the share of rejected traces that are in fact right."""
    rows = [(row, row.settings) for row in results.grid if row.gains]
    if len({row.mislabelled for row, _ in rows}) > 1:
        rows = [(row, values | {"mislabelled": row.mislabelled}) for row, values in rows]
    panels: Panels = {}
    for key in dict.fromkeys(key for _, values in rows for key in values):
        found: dict[str, dict[float, list[float]]] = {}  # label -> points
        for row, values in rows:
            if isinstance(values.get(key), (int, float)):
                others = in_words({k: v for k, v in values.items() if k != key})
                label = ", ".join(filter(None, [row.teacher, row.settings["objective"], others]))
                found.setdefault(label, {})[values[key]] = row.gains
        varied = [(label, points) for label, points in found.items() if len(points) > 1]
        if varied:
            panels[key] = [Line(*line, f"C{number}o-") for number, line in enumerate(varied)]
    return _draw(panels, "gain of pass@1 over stage 1")


FIGURES = {draw.__name__: draw for draw in (accuracy, log_probs, gains)}


def _best_and_fastest(results: Results) -> list[tuple[Row, list[Run], str, str]]:
    """(row, its runs, color, dashes) of each method's best variant, and of the variant that differs
    from it in nothing but the largest learning rate."""
    methods = [row for row in results.table if row.method != STAGE_1]
    shown = [row for row in methods if row.key[:2] == methods[0].key[:2]]
    found = []
    for position, best in enumerate(shown):
        rows = [row for row in results.grid if row.key[:3] == best.key[:3]]
        rows = [row for row in rows if {**row.settings, "lr": 0} == {**best.settings, "lr": 0}]
        fastest = max(rows, key=lambda row: row.settings["lr"])
        for row, dashes in [(best, "-"), (fastest, ":")][: 1 + (fastest != best)]:
            runs = [run for run in results.runs if run.key == row.key]
            found.append((row, runs, f"C{position}", dashes))
    return found


def _draw(panels: Panels, ylabel: str, xlabel: str | None = None) -> bytes | None:
    """A PNG with one panel per title. xlabel: None if the titles are what x is."""
    if not panels:
        return None
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(max(8, 3.4 * columns), max(4, 3.1 * height)), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharey=True).flatten()
    for axis, (title, lines) in zip(axes, panels.items()):
        for line in lines:
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
        outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(panels) == 1 else {}
        axis.legend(fontsize="x-small", framealpha=0.8, **outside)
    for unused in axes[len(panels) :]:
        unused.remove()
    figure.supylabel(ylabel, fontsize="medium")
    figure.savefig(file := io.BytesIO(), dpi=90, format="png")
    return file.getvalue()
