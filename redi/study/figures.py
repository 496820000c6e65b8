"""The figures of a study, drawn from its results: the paper's Figures 2 to 7 for other runs.

    accuracy    pass@1 over optimizer steps: best variant, and largest learning rate
    log_probs   chosen and rejected log-probs over steps, for the same two
    norms       of the gradient, and of the update if it is logged, over steps
    entropy     of the tokens of chosen and rejected traces, if it is logged, over steps
    lr          pass@1 against the learning rate: where each method collapses
    alpha       pass@1 against the weight of the rejected trace
    labels      gain over stage 1 against the share of mislabelled rejected traces

Lines are means over seeds, bands one SEM. A figure with nothing to draw is not made. Log-probs and
norms are those of a step's own rows, so they jitter together.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from redi.recipe import PUBLISHED
from redi.study.plan import STAGE_1
from redi.study.results import Results, Row, Run, paired_differences, sem, variant_of

WINDOWS = 12  # a point of a curve is the mean over this fraction of the run
GRAY = "0.45"


def figures(results: Results) -> dict[str, bytes]:
    """Name -> PNG of every figure that has something to draw."""
    drawn = {}
    for draw in FIGURES:
        if figure := draw(results):
            figure.savefig(file := io.BytesIO(), dpi=90, format="png")
            drawn[draw.__name__] = file.getvalue()
    return drawn


def name_of(settings: dict) -> str:
    """A variant's settings beside its method's name: "lr 1e-4, beta 0.1"."""
    parts = {k: v for k, v in settings.items() if k != "objective"}
    return ", ".join(f"{k} {number(v)}" for k, v in parts.items())


def number(value: object) -> str:
    """A setting as people write it: 1e-4, not 0.0001."""
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- rows, runs and axes


def first_setting(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first setting with the fewest mislabelled traces. Curves show only these."""
    setting = rows[0].setting
    share = min((row.mislabelled for row in rows if row.method != STAGE_1), default=0.0)
    return [
        row for row in rows
        if row.setting == setting and (row.method == STAGE_1 or row.mislabelled == share)
    ]  # fmt: skip


def stage_1_of(results: Results) -> Row | None:
    return next((row for row in first_setting(results.table) if row.method == STAGE_1), None)


def runs_of(results: Results, row: Row) -> list[Run]:
    return [run for run in results.runs if variant_of(run) == variant_of(row)]


def scores_of(results: Results, row: Row) -> list[float]:
    """pass@1 of the row's runs, one number per seed."""
    return [run.pass_at_1 for run in runs_of(results, row)]


def fastest(results: Results, best: Row) -> Row:
    """A method's best variant at the largest learning rate that was tried with it."""

    def without_lr(row: Row) -> tuple:
        return row.setting, row.mislabelled, row.method, row.settings | {"lr": None}

    same = [row for row in results.grid if without_lr(row) == without_lr(best)]
    return max(same, key=lambda row: row.settings["lr"])


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means over seeds and a window of steps), up to the last step that all runs have."""
    curves = [run.curves[key] for run in runs if key in run.curves]
    shortest = min(map(len, curves), default=0)
    if not shortest:
        return np.empty(0), np.empty(0)
    mean = np.mean([values[:shortest] for values in curves], axis=0)
    window = max(1, shortest // WINDOWS)
    means = np.convolve(mean, np.ones(window) / window, "valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def _panels(count: int, height: float = 3.1) -> tuple[Figure, list]:
    columns = min(4, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(4.6, 3.4 * columns), height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def _methods(rows: Sequence[Row]) -> list[Row]:
    return [row for row in first_setting(rows) if row.method != STAGE_1]


# ---------------------------------------------------------------- over steps


def accuracy(results: Results) -> Figure | None:
    rows = _methods(results.table)
    if not any(run.on_the_way for row in rows for run in runs_of(results, row)):
        return None
    figure, [axis] = _panels(1, 4.2)
    for place, row in enumerate(rows):
        _line(axis, on_the_way(results, row), f"{row.method} ({name_of(row.settings)})", place)
        fast = fastest(results, row)
        if fast.settings != row.settings:
            points = on_the_way(results, fast)
            means = [np.mean(points[step]) for step in sorted(points)]
            axis.plot(sorted(points), means, ":", color=f"C{place % 10}", lw=1.2)
    axis.set(title="accuracy", xlabel="optimizer step", ylabel="pass@1")
    _finished(figure, [axis])
    figure.set_figwidth(8.4)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def on_the_way(results: Results, row: Row) -> dict[float, list[float]]:
    """Step -> one score per seed: of the stage-1 model, during training, and at the end."""
    runs, stage_1 = runs_of(results, row), stage_1_of(results)
    steps = set.intersection(*({step for step, _ in run.on_the_way} for run in runs))
    points = {step: [dict(run.on_the_way)[step] for run in runs] for step in steps}
    if stage_1:
        points[0] = scores_of(results, stage_1)
    last = max(len(next(iter(run.curves.values()), [])) for run in runs)
    points[last] = scores_of(results, row)
    return points


def _line(axis, points: dict[float, list[float]], label: str, place: int) -> None:
    """Means over seeds with a band of one SEM; points: x -> values."""
    x = sorted(points)
    mean = np.array([np.mean(points[at]) for at in x])
    error = np.array([sem(points[at]) or 0.0 for at in x])
    axis.plot(x, mean, "o-", color=f"C{place % 10}", lw=1.4, ms=3.5, label=_plain(label))
    axis.fill_between(x, mean - error, mean + error, color=f"C{place % 10}", alpha=0.15, lw=0)


def _plain(text: str) -> str:
    """Escape dollars, which would start a formula."""
    return text.replace("$", r"\$")


def _finished(figure: Figure, axes: Sequence) -> Figure:
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small", framealpha=0.8)
    return figure


def _over_steps(
    results: Results, lines: dict[str, tuple[str, str]], label: str, log: bool = False
) -> Figure | None:
    """One panel per method, best variant solid, largest lr dotted. lines: curve -> name, color."""
    logged = {key for run in results.runs if run.method != STAGE_1 for key in run.curves}
    rows = _methods(results.table)
    if logged.isdisjoint(lines) or not rows:
        return None
    figure, axes = _panels(len(rows))
    for axis, row in zip(axes, rows):
        fast = fastest(results, row)
        shown = [(row, "-", 1.4)] + ([(fast, ":", 1.2)] if fast.settings != row.settings else [])
        for variant, style, width in shown:
            for key, (name, color) in lines.items():
                steps, values = curve(runs_of(results, variant), key)
                if len(values):
                    text = f"{name}, lr {number(variant.settings['lr'])}"
                    axis.plot(steps, values, style, color=color, lw=width, label=text)
        axis.set_title(_plain(row.method), fontsize="medium")
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize="x-small", framealpha=0.8)
        if log:
            axis.set_yscale("log")
    axes[0].set_ylabel(label)
    return _finished(figure, axes)


def log_probs(results: Results) -> Figure | None:
    lines = {"chosen_logp": ("chosen", "C0"), "rejected_logp": ("rejected", "C3")}
    return _over_steps(results, lines, "mean log-prob (nats per token)")


def norms(results: Results) -> Figure | None:
    lines = {"grad_norm": ("gradient", "C2"), "update_norm": ("update", "C4")}
    return _over_steps(results, lines, "norm", log=True)


def entropy(results: Results) -> Figure | None:
    lines = {"chosen_entropy": ("chosen", "C0"), "rejected_entropy": ("rejected", "C3")}
    return _over_steps(results, lines, "entropy (nats per token)")


# ---------------------------------------------------------------- against a setting


def lr(results: Results) -> Figure | None:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in _methods(results.grid):
        others = name_of({k: v for k, v in row.settings.items() if k != "lr"})
        label = f"{row.method} ({others})" if others else row.method
        lines.setdefault(label, {})[row.settings["lr"]] = scores_of(results, row)
    title, label = "accuracy against learning rate", "peak learning rate"
    return _against_setting(results, lines, title=title, xlabel=label, xscale="log")


def alpha(results: Results) -> Figure | None:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in sorted(_methods(results.grid), key=lambda row: row.settings["lr"]):
        if (weight := alpha_of(row)) is not None:
            label = f"lr {number(row.settings['lr'])}"
            lines.setdefault(label, {})[weight] = scores_of(results, row)
    title = "the weight of the rejected trace"
    return _against_setting(results, lines, title=title, xlabel="alpha")


def alpha_of(row: Row) -> float | None:
    """The weight of the rejected trace, for objectives with such a weight and no sigmoid."""
    redi = row.settings.get("alpha", PUBLISHED["redi"]["alpha"])
    weights = {"redi": redi, "symmetric": 1.0, "positives": 0.0}
    return weights.get(row.settings.get("objective"))


def _against_setting(
    results: Results, lines: dict[str, dict[float, list[float]]], **axis_settings: str
) -> Figure | None:
    """pass@1 against a setting; lines: label -> setting -> one score per seed."""
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, [axis] = _panels(1, 4.2)
    for place, (label, points) in enumerate(lines.items()):
        _line(axis, points, label, place)
    if stage_1 := stage_1_of(results):
        axis.axhline(stage_1.mean, color=GRAY, ls="--", lw=1, label="stage 1")
    axis.set(ylabel="pass@1", **axis_settings)
    return _finished(figure, [axis])


def labels(results: Results) -> Figure | None:
    """One panel per method, one line per setting: the best variant's gain at each share."""
    rows = [row for row in results.table if row.method != STAGE_1]
    if len({row.mislabelled for row in rows}) < 2:
        return None
    methods = list(dict.fromkeys(row.method for row in rows))
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = _panels(len(methods), 3.6)
    for axis, method in zip(axes, methods):
        for place, setting in enumerate(settings):
            base = [r for r in results.runs if (r.method, r.setting) == (STAGE_1, setting)]
            own = [row for row in rows if (row.method, row.setting) == (method, setting)]
            gains = {r.mislabelled: paired_differences(runs_of(results, r), base) for r in own}
            points = {share: values for share, values in gains.items() if values}
            _line(axis, points, setting or "the toy", place)
        axis.axhline(0, color=GRAY, ls="--", lw=1)
        axis.set_title(_plain(method), fontsize="medium")
        axis.set_xlabel("share of rejected traces that are right")
    axes[0].set_ylabel("gain of pass@1 over stage 1")
    return _finished(figure, axes)


FIGURES = (accuracy, log_probs, norms, entropy, lr, alpha, labels)
