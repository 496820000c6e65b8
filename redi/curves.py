"""The curves of one or several runs as a picture: `python -m redi.runlog RUN [RUN ...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from redi.data.files import write_aside

PANELS = {  # title -> its metrics, in the order of the panels
    "loss": ("loss",),
    "mean log-prob (nats per token)": ("chosen_logp", "rejected_logp"),
    "margin, chosen - rejected (nats per token)": ("margin",),
    "pass@1 during training": ("pass_at_1",),
    "tokens per completion": ("mean_tokens",),
    "share of pairs ranked right": ("ranked_right",),
    "entropy (nats)": ("chosen_entropy", "rejected_entropy"),
    "gradient norm before clipping": ("grad_norm",),
    "norm of the weight update": ("update_norm",),
    "learning rate": ("lr",),
}
SIDES = (("chosen", "-", "C0"), ("rejected", "--", "C3"))  # name, dashes, color of a single run


def draw(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a PNG with a panel for each of PANELS that any of the runs recorded. Colors are runs,
    or the two sides of the pairs if there is one run; dots are held-out rows.
    histories: name of a run -> its records, as in metrics.jsonl; at least one record holds a metric
    of PANELS. Raises UserError if `path` cannot be written."""
    recorded = {key for records in histories.values() for record in records for key in record}
    panels = [(title, keys) for title, keys in PANELS.items() if recorded.intersection(keys)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for position, (title, keys) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, position)
        for number, (name, records) in enumerate(histories.items()):
            for key, (side, dashes, alone) in zip(keys, SIDES):
                color = alone if len(histories) == 1 else f"C{number}"
                label = as_label(name) if len(keys) == 1 else side
                _plot(axis, records, key, label, color, dashes)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            drawn, labels = axis.get_legend_handles_labels()
            once = dict(zip(labels, drawn))  # not for every run
            axis.legend(once.values(), once.keys(), fontsize="small")
    runs = figure.axes[0].get_legend_handles_labels()
    meaning = "lines: smoothed; faint: every step; dots: held-out rows"
    figure.legend(*runs, title=meaning, loc="outside upper left", ncols=3, fontsize="small")
    with write_aside(path, binary=True) as file:
        figure.savefig(file, dpi=110, format="png")


def as_label(text: str) -> str:
    """Text as Matplotlib shows it unchanged: `$` begins no formula, and `_` hides no label."""
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def _plot(
    axis: Axes, records: list[dict[str, Any]], key: str, label: str, color: str, dashes: str
) -> None:
    """One metric of one run: every step faint under a smoothed line, held-out rows as dots."""
    for kind, style in (("train", dashes), ("eval", "o"), ("benchmark", ".-")):
        found = [record for record in records if record["kind"] == kind and key in record]
        steps, values = [r["step"] for r in found], [r[key] for r in found]
        if not found:
            continue
        if kind == "train":
            axis.plot(steps, values, color=color, lw=0.8, alpha=0.3)
            values = values if key == "lr" else smooth(values)
        named = None if kind == "eval" else label
        axis.plot(steps, values, style, color=color, lw=1.5, ms=4, label=named)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over a tenth of the values around each one; over fewer at the ends."""
    window, ones = np.ones(2 * (len(values) // 20) + 1), np.ones(len(values))
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same")
