"""The curves of one or several runs as a picture: `python -m redi.runlog RUN [RUN ...]`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from redi.data.files import write_aside

PANELS = {  # metric -> title of its panel, in the order of the panels
    "loss": "loss",
    "chosen_logp": "mean log-prob, chosen (nats per token)",
    "rejected_logp": "mean log-prob, rejected (nats per token)",
    "margin": "margin, chosen - rejected (nats per token)",
    "ranked_right": "share of pairs ranked right",
    "chosen_entropy": "entropy at chosen tokens (nats)",
    "rejected_entropy": "entropy at rejected tokens (nats)",
    "grad_norm": "gradient norm before clipping",
    "update_norm": "norm of the weight update",
    "pass_at_1": "pass@1 during training",
    "mean_tokens": "tokens per completion",
    "lr": "learning rate",
}
STYLES = {"train": "-", "eval": "o", "benchmark": ".-"}  # kind of record -> line; dots are held-out


def draw(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a PNG: one panel per metric that any of the runs recorded, one color per run.
    histories: name of a run -> its records, as in metrics.jsonl; at least one record holds a metric
    of PANELS. Raises UserError if `path` cannot be written."""
    recorded = {key for records in histories.values() for record in records for key in record}
    metrics = [key for key in PANELS if key in recorded]
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for position, metric in enumerate(metrics, start=1):
        axis = figure.add_subplot(rows, columns, position)
        for number, (name, records) in enumerate(histories.items()):
            for kind, style in STYLES.items():
                points = [
                    (record["step"], record[metric])
                    for record in records
                    if record["kind"] == kind and metric in record
                ]
                if points:
                    label = f"{name}, held out" if kind == "eval" else name
                    axis.plot(*zip(*points), style, color=f"C{number}", lw=1, ms=4, label=label)
        axis.set(title=PANELS[metric], xlabel="optimizer step")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    with write_aside(path, binary=True) as file:
        figure.savefig(file, dpi=110, format="png")
