"""The figures of a study, drawn from its results, as the paper's Figures 2 to 7 are from its runs.

The docstring of a figure's function is its caption. Lines are means over seeds, bands one SEM.
Left out: norms, entropies and single runs, which `python -m redi.runlog RUN [RUN ...]` draws.
"""

import io
from collections.abc import Iterator
from statistics import fmean

from matplotlib.figure import Figure

from redi.study.plan import STAGE_1, as_text, in_words
from redi.study.results import Results, Row, Run, sem

Points = dict[float, list[float]]  # x -> one value per seed
Panels = dict[str, list[tuple[str, Points, str]]]  # title -> lines: label, points, Matplotlib style


def figures(results: Results) -> dict[str, bytes]:
    """Name -> PNG of every figure that has something to draw."""
    drawn = {name: draw(results) for name, draw in FIGURES.items()}
    return {name: png for name, png in drawn.items() if png}


def accuracy(results: Results) -> bytes | None:
    """pass@1 over optimizer steps, from the stage-1 model at 0: each method at its best (solid) and
    at its largest learning rate (dotted), on the first setting and share of mislabelled traces.
    The first and the last point are the final evaluation's, those between of the smaller one during
    training."""
    if not any(run.on_the_way for run in results.runs):
        return None
    lines = []
    for row, runs, color, style in _best_and_fastest(results):
        scored = [dict(run.on_the_way) for run in runs]
        shared = set.intersection(*map(set, scored))
        points = {step: [scores[step] for scores in scored] for step in shared}
        points[0] = next((r.scores for r in results.table if r.method == STAGE_1), [])
        points[max(len(run.curves["chosen_logp"]) for run in runs)] = row.scores
        lines.append((f"{row.method} ({row.name})", points, f"{color}o{style}"))
    return _draw({"": lines}, "pass@1", "optimizer step")


def log_probs(results: Results) -> bytes | None:
    """Chosen and rejected log-probs over optimizer steps: each method at its best (solid) and at
    its largest learning rate (dotted), on the first setting and share of mislabelled traces."""
    panels: Panels = {}
    for row, runs, _, style in _best_and_fastest(results):
        for kind, color in (("chosen", "C0"), ("rejected", "C3")):
            values = zip(*(run.curves[f"{kind}_logp"] for run in runs))
            points = {step: list(of_seeds) for step, of_seeds in enumerate(values, start=1)}
            line = f"{kind}, lr {as_text(row.settings['lr'])}", points, color + style
            panels.setdefault(row.method, []).append(line)
    return _draw(panels, "mean log-prob (nats per token)", "optimizer step")


def settings(results: Results) -> bytes | None:
    """Gain of pass@1 over stage 1 against each setting that was varied while the others were not;
    mislabelled is the share of rejected traces that are in fact right."""
    panels: Panels = {}
    rows = [(row, row.settings) for row in results.grid if row.gains]
    if len({row.mislabelled for row, _ in rows}) > 1:
        rows = [(row, values | {"mislabelled": row.mislabelled}) for row, values in rows]
    for key in dict.fromkeys(key for _, values in rows for key in values):
        lines: dict[str, Points] = {}
        for row, values in rows:
            if isinstance(values.get(key), (int, float)):
                others = in_words({k: v for k, v in values.items() if k != key})
                label = ", ".join(filter(None, [row.setting, row.settings["objective"], others]))
                lines.setdefault(label, {})[values[key]] = row.gains
        longer = [(label, points) for label, points in lines.items() if len(points) > 1]
        if longer:
            panels[key] = [(*line, f"C{number}o-") for number, line in enumerate(longer)]
    return _draw(panels, "gain of pass@1 over stage 1")


FIGURES = {draw.__name__: draw for draw in (accuracy, log_probs, settings)}


def _best_and_fastest(results: Results) -> Iterator[tuple[Row, list[Run], str, str]]:
    """(variant, its runs, color, style) of each method's best, and of the same with the largest
    lr."""
    methods = [row for row in results.table if row.method != STAGE_1]
    shown = [row for row in methods if row.key[:2] == methods[0].key[:2]]
    for position, best in enumerate(shown):
        rows = [row for row in results.grid if row.key[:3] == best.key[:3]]
        rows = [row for row in rows if {**row.settings, "lr": 0} == {**best.settings, "lr": 0}]
        fastest = max(rows, key=lambda row: row.settings["lr"])
        for row, style in [(best, "-"), (fastest, ":")][: 1 + (fastest != best)]:
            yield row, [run for run in results.runs if run.key == row.key], f"C{position}", style


def _draw(panels: Panels, ylabel: str, xlabel: str | None = None) -> bytes | None:
    """A PNG with one panel per title. xlabel: None if the titles are what x is."""
    if not panels:
        return None
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(max(8, 3.4 * columns), max(4, 3.1 * height)), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharey=True).flat
    for title, axis in zip(panels, axes):
        for label, points, style in panels[title]:
            x = sorted(at for at, values in points.items() if values)
            mean, error = ([f(points[at]) or 0.0 for at in x] for f in (fmean, sem))
            [line] = axis.plot(x, mean, style, lw=1.4, ms=3.5, label=_plain(label))
            low, high = ([m + sign * e for m, e in zip(mean, error)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
        if xlabel:
            axis.set(title=_plain(title), xlabel=xlabel)
        else:
            axis.set(xlabel=title, xscale="log" if title == "lr" else "linear")
            axis.axhline(0, color="0.45", ls="--", lw=1)
        axis.grid(alpha=0.3)
        outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(panels) == 1 else {}
        axis.legend(fontsize="x-small", framealpha=0.8, **outside)
    for axis in axes:  # those that are left
        axis.set_visible(False)
    figure.supylabel(ylabel, fontsize="medium")
    figure.savefig(file := io.BytesIO(), dpi=90, format="png")
    return file.getvalue()


def _plain(text: str) -> str:
    """Escape dollars, which would start a formula."""
    return text.replace("$", r"\$")
