"""The cliff at alpha = 1: the table, the tests and the picture of docs/study.md.

    redi study recipes/study_cliff.toml                       -> out/study_cliff/study.json
    python docs/make_cliff.py [out/study_cliff/study.json]    prints Markdown
                                                              -> docs/study/cliff.png

The rules were written before the study was run; docs/study.md states and applies them.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from matplotlib.figure import Figure

from redi.study.plan import STAGE_1
from redi.study.results import paired_t_test, sem
from redi.tables import markdown_table
from redi.toy import ROWS_PER_PROBLEM

PICTURE = Path(__file__).resolve().parent / "study/cliff.png"
# (share of right rows, alpha / alpha*) of two models. The first has the smaller alpha, but lies
# above its predicted cliff; the second lies below.
ORDER = [((0.3, 1.5), (0.7, 0.5)), ((0.3, 1.1), (0.7, 0.9))]


def setting_of(settings: dict) -> tuple[str, float, float]:
    """(objective, share of right rows, alpha / alpha*), with AsymRE's alpha V / (1 - V)."""
    share = settings["right_rows"] / ROWS_PER_PROBLEM
    alpha = settings.get("alpha")
    if alpha is None:
        alpha = settings["baseline"] / (1 - settings["baseline"])
    return settings["objective"], share, round(alpha * (1 - share) / share, 2)


def is_collapsed(run: dict, stage_1: float) -> bool:
    """The collapse guard warned, or pass@1 is below half of stage 1's."""
    return run["collapsed_at"] is not None or run["pass_at_1"] < stage_1 / 2


def cliff(collapsed: dict[float, float]) -> float | None:
    """The smallest alpha / alpha* from which on most seeds have collapsed. collapsed: alpha /
    alpha* -> share of the seeds."""
    first = None
    for multiple in sorted(collapsed, reverse=True):
        if collapsed[multiple] <= 0.5:
            break
        first = multiple
    return first


def with_p(differences: list[float]) -> str:
    """The mean difference over seeds, with the p of a paired t-test if it has one."""
    p = paired_t_test(differences)
    return f"{fmean(differences):+.3f}" + ("" if p is None else f" (p {p:.2g})")


def main() -> None:
    results = json.loads(Path(*sys.argv[1:2] or ["out/study_cliff/study.json"]).read_text())
    runs: dict[tuple, list[dict]] = {}  # (objective, share, alpha / alpha*) -> one run per seed
    stage_1: dict[int, float] = {}  # seed -> pass@1
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
        if run["method"] == STAGE_1:
            stage_1[run["seed"]] = run["pass_at_1"]
        else:
            runs.setdefault(setting_of(run["settings"]), []).append(run)

    header = ("objective", "right", "alpha / alpha*", "alpha or V", "pass@1 ± SEM", "gain")
    table = [(*header, "tokens", "collapsed")]
    collapsed: dict[tuple, dict[float, float]] = {}
    for (objective, share, multiple), found in sorted(runs.items()):
        settings, scores = found[0]["settings"], [run["pass_at_1"] for run in found]
        lost = [is_collapsed(run, stage_1[run["seed"]]) for run in found]
        collapsed.setdefault((objective, share), {})[multiple] = fmean(lost)
        table.append((
            objective, f"{share:g}", f"{multiple:g}",
            f"{settings.get('alpha', settings.get('baseline')):.3g}",
            f"{fmean(scores):.3f} ± {sem(scores) or 0:.3f}",
            with_p([run["pass_at_1"] - stage_1[run["seed"]] for run in found]),
            f"{fmean(run['mean_tokens'] for run in found):.1f}", f"{sum(lost)} of {len(lost)}",
        ))  # fmt: skip
    print(f"{markdown_table(table)}\n\nStage 1: {fmean(stage_1.values()):.3f}.\n")
    for (objective, share), found in collapsed.items():
        first = cliff(found)
        where = "no cliff" if first is None else f"a cliff, first seen at {first:g} alpha*"
        print(f"- {objective}, {share:g} right: {where}.")
    for objective in sorted({objective for objective, *_ in runs}):
        for above, below in ORDER:
            pairs = zip(runs[objective, *below], runs[objective, *above], strict=True)
            differences = [a["pass_at_1"] - b["pass_at_1"] for a, b in pairs]
            better, worse = (f"{s:g} right at {m:g} alpha*" for s, m in (below, above))
            print(f"- {objective}: {better} is {with_p(differences)} above {worse}.")
    draw(runs, fmean(stage_1.values()))


def draw(runs: dict[tuple, list[dict]], stage_1: float) -> None:
    """pass@1 against alpha / alpha*: a panel per objective, a line per share."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    objectives = sorted({objective for objective, *_ in runs}, reverse=True)
    panels = figure.subplots(1, len(objectives), sharey=True, squeeze=False)[0]
    for objective, panel in zip(objectives, panels):
        for share in sorted({share for _, share, _ in runs}):
            found = {m: r for (o, s, m), r in sorted(runs.items()) if (o, s) == (objective, share)}
            scores = [[run["pass_at_1"] for run in one] for one in found.values()]
            means, errors = [fmean(one) for one in scores], [sem(one) or 0 for one in scores]
            panel.errorbar([*found], means, errors, marker="o", capsize=3, label=f"{share:g} right")
        panel.axhline(stage_1, color="0.35", ls="--", lw=1)
        panel.axvline(1, color="0.35", ls=":", lw=1)
        panel.set(title=objective, xlabel="alpha / alpha*")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("pass@1")
    panels[0].legend(fontsize="small")
    figure.savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    main()
