"""Make docs/study.md and its pictures from the two studies on the toy.

    python docs/make_study.py       -> docs/study.md, docs/study/*.png; the runs stay in out/

Runs recipes/study_toy.toml and recipes/study_labels.toml (each within the hour on two CPU cores;
finished ones are not made again) and lays their results out as a page. Every number on it is taken
from study.json, and every "above", "collapsed" and "as in the paper" is decided here by comparing
numbers; the prose around them says why, and what to look at. Left out: advice on large models.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from appendix_b import AngleConfig, cosines

from redi.data.files import make_folder, write_aside
from redi.study.figures import alpha_of, curve, figures, name_of, number, runs_of
from redi.study.page import (
    CAPTIONS,
    Block,
    Heading,
    Picture,
    Table,
    Text,
    p_value,
    signed,
    summary,
    table,
    to_markdown,
)
from redi.study.plan import STAGE_1
from redi.study.results import Results, Row, paired_differences, paired_t_test

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = Path("docs/study.md"), Path("docs/study")
STUDIES = {"toy": "study_toy", "labels": "study_labels"}
REDI, SYMMETRIC, DPO = "REDI, alpha 0.8", "symmetric", "DPO"
SURE = 0.01  # a difference with a larger p value is not called one
# The paper's Table 2: mean pass@1 over five benchmarks, in percent, after three epochs of SFT.
PUBLISHED = {STAGE_1: 41.9, DPO: 47.2, "SimPO": 47.2, SYMMETRIC: 47.7, REDI: 48.3}


# ---------------------------------------------------------------- what numbers say


def compared(gain: float, p: float | None, other: str) -> str:
    """ "above DPO by 0.031 (p 0.004)", or that this cannot be told."""
    if p is None:
        return f"{signed(gain)} from {other} (no test is possible)"
    if p >= SURE:
        return f"not told apart from {other} ({signed(gain)}, p {p_value(p)})"
    return f"{'above' if gain > 0 else 'below'} {other} by {abs(gain):.3f} (p {p_value(p)})"


def is_above(gain: float, p: float | None) -> bool | None:
    """None: it cannot be told."""
    return None if p is None or p >= SURE else gain > 0


def find(rows: Sequence[Row], method: str) -> Row | None:
    return next((row for row in rows if row.method == method), None)


def agreement(claim: str, holds: bool | None, seen: str) -> str:
    verdict = {True: "As in the paper", False: "Not as in the paper", None: "Undecided"}[holds]
    return f"- **{verdict}**: {claim}. Here: {seen}."


def claims(results: Results) -> list[str]:
    """What the paper found, and whether the toy shows it too."""
    rows, found = results.table, []
    stage_1, redi, dpo = (find(rows, name) for name in (STAGE_1, REDI, DPO))
    seen = compared(redi.gain, redi.p_stage_1, "stage 1")
    said = f"REDI lifts the stage-1 model ({PUBLISHED[STAGE_1]} to {PUBLISHED[REDI]} there)"
    lifts = is_above(redi.gain, redi.p_stage_1)
    found.append(agreement(said, lifts, f"{name_of(redi.settings)}, {seen}"))
    above_dpo = is_above(redi.mean - dpo.mean, redi.p_dpo)
    said = f"REDI is above DPO ({PUBLISHED[REDI]} against {PUBLISHED[DPO]} there)"
    found.append(agreement(said, above_dpo, compared(redi.mean - dpo.mean, redi.p_dpo, "DPO")))
    found += beside_symmetric(results)
    found.append(log_probs_claim(results, redi, lifts))
    fast = [row for row in results.grid if row.method == SYMMETRIC]
    fastest = max(fast, key=lambda row: row.settings["lr"])
    above = is_above(fastest.gain, fastest.p_stage_1)
    collapsed = None if above is None else not above and fastest.collapsed > 0
    seen = (
        f"{number(fastest.settings['lr'])} gives {fastest.mean:.3f} against {stage_1.mean:.3f} "
        f"after stage 1, and the collapse guard warned in {fastest.collapsed} of {fastest.seeds} "
        "runs"
    )
    found.append(agreement("the symmetric objective collapses at a large lr", collapsed, seen))
    return found + small_alpha(results)


def beside_symmetric(results: Results) -> list[str]:
    """REDI and the symmetric objective, each at its best, and at the largest lr that both had."""
    best = [find(results.table, name) for name in (REDI, SYMMETRIC)]
    tried = [{r.settings["lr"]: r for r in results.grid if r.method == row.method} for row in best]
    largest = max(set(tried[0]) & set(tried[1]))
    gain, p = difference(results, *best)
    said = f"REDI is above the symmetric objective ({PUBLISHED[REDI]} against "
    said += f"{PUBLISHED[SYMMETRIC]} there)"
    found = [agreement(said, is_above(gain, p), compared(gain, p, SYMMETRIC))]
    gain, p = difference(results, *(rows[largest] for rows in tried))
    said = "at a large learning rate REDI is above the symmetric objective"
    seen = f"at {number(largest)}, the largest of both, it is {compared(gain, p, SYMMETRIC)}"
    return [*found, agreement(said, is_above(gain, p), seen)]


def difference(results: Results, ours: Row, theirs: Row) -> tuple[float, float | None]:
    """(mean difference over the seeds that both have, p)."""
    found = paired_differences(runs_of(results, ours), runs_of(results, theirs))
    return fmean(found), paired_t_test(found)


def log_probs_claim(results: Results, redi: Row, lifts: bool | None) -> str:
    runs = runs_of(results, redi)
    ends = {}
    for key in ("chosen_logp", "rejected_logp"):
        values = curve(runs, key)[1]
        ends[key] = float(values[0]), float(values[-1])
    both_fall = all(last < first for first, last in ends.values())
    chosen, rejected = (f"{first:.2f} to {last:.2f}" for first, last in ends.values())
    seen = f"chosen {chosen}, rejected {rejected} nats per token, accuracy {signed(redi.gain)}"
    return agreement(
        "with alpha 0.8 both log-probs fall while accuracy rises",
        both_fall and lifts,
        seen,
    )


def small_alpha(results: Results) -> list[str]:
    """The paper: alpha 0.2 stays near SFT. Shown for every alpha between 0 and 0.8."""
    rows = [row for row in results.table if 0 < (alpha_of(row) or 0) < 0.8]
    if not rows:
        return []
    near = None
    if all(row.p_stage_1 is not None for row in rows):
        near = all(is_above(row.gain, row.p_stage_1) is not False for row in rows)
    seen = "; ".join(
        f"alpha {number(alpha_of(row))} is {compared(row.gain, row.p_stage_1, 'stage 1')}"
        for row in sorted(rows, key=alpha_of)
    )
    return [agreement("a small alpha stays near SFT, or above it", near, seen)]


def lengths(results: Results) -> str:
    """How many tokens answers have, by alpha: the length effect, seen."""
    stage_1 = find(results.table, STAGE_1)
    rows = {alpha_of(row): row for row in results.table if alpha_of(row) is not None}
    parts = [f"alpha {number(at)}: {rows[at].mean_tokens:.1f}" for at in sorted(rows)]
    smallest = rows[min(rows)]
    shorter = smallest.mean_tokens < stage_1.mean_tokens
    return (
        f"Tokens of an answer after stage 1: {stage_1.mean_tokens:.1f}; after stage 2, "
        f"{', '.join(parts)}. With the smallest alpha answers are "
        f"{'shorter' if shorter else 'not shorter'} than after stage 1, and accuracy is "
        f"{compared(smallest.gain, smallest.p_stage_1, 'stage 1')}."
    )


def collapses(results: Results) -> str:
    """For each method where it is below stage 1, and where the guard warned."""
    lines = []
    for method in dict.fromkeys(row.method for row in results.grid if row.method != STAGE_1):
        rows = sorted(
            (row for row in results.grid if row.method == method), key=lambda r: r.settings["lr"]
        )
        below = [row for row in rows if is_above(row.gain, row.p_stage_1) is False]
        warned = [row for row in rows if row.collapsed]
        tried = ", ".join(dict.fromkeys(number(row.settings["lr"]) for row in rows))
        worse = ", ".join(name_of(row.settings) for row in below) or "none"
        guard = (
            ", ".join(
                f"{name_of(row.settings)} ({row.collapsed} of {row.seeds} runs)" for row in warned
            )
            or "none"
        )
        lines.append(
            f"- {method} (lr tried: {tried}): below stage 1 with {worse}; guard warned: {guard}."
        )
    return "\n".join(lines)


def label_lines(results: Results) -> str:
    """For each setting and method the mean gain at every share of mislabelled rejected traces."""
    lines = []
    rows = [row for row in results.table if row.method != STAGE_1]
    for setting, method in dict.fromkeys((row.setting, row.method) for row in rows):
        own = sorted(
            (r for r in rows if (r.setting, r.method) == (setting, method)),
            key=lambda r: r.mislabelled,
        )
        gains = ", ".join(f"{signed(row.gain)} at {row.mislabelled:g}" for row in own)
        hurt = ", ".join(f"{row.mislabelled:g}" for row in own if row.gain < 0)
        verdict = f"below stage 1 at {hurt}" if hurt else "above stage 1 at every share"
        lines.append(f"- {setting}, {method}: {gains}: {verdict}.")
    return "\n".join(lines)


def on_average(results: Results) -> str:
    """A method's gain at the cleanest and at the worst labels, over all settings."""
    rows = [row for row in results.table if row.method != STAGE_1]
    low, high = (pick(row.mislabelled for row in rows) for pick in (min, max))
    said = []
    for method in dict.fromkeys(row.method for row in rows):
        first, last = (
            fmean(r.gain for r in rows if (r.method, r.mislabelled) == (method, share))
            for share in (low, high)
        )
        said.append(f"{method} from {signed(first)} to {signed(last)}")
    return (
        f"Averaged over the settings, gains go from a share of {low:g} to one of {high:g} like "
        f"this: {', '.join(said)}."
    )


def angles(found: dict[float, float]) -> Table:
    """found: appendix_b.cosines."""
    rows = [[number(beta), f"{value:.9f}", f"{1 - value:.1e}"] for beta, value in found.items()]
    return Table(["beta", "cosine", "1 - cosine"], rows)


# ---------------------------------------------------------------- the page

INTRO = (
    "This page is made by `python docs/make_study.py` from the results of two studies on the toy "
    "of `make demo`, made harder and sampled at temperature 1 (the paper: 0.6); nothing on it is "
    "typed by hand but the reasons, and what the paper reports. `python -m redi.study "
    "recipes/study_toy.toml` makes the first again. pass@1 is the mean over seeds; a seed shapes "
    "the data, the untrained student, and the order of the rows, and the benchmark is the same for "
    "all. 'Above' and 'below' are said where a paired t-test over seeds has p below "
    f"{SURE}; the section on wrong labels, with its fewer seeds, goes by the sign of means."
)
WHY_ALPHA = (
    "The objective takes a mean per trace, so a token of a short trace weighs more than one of a "
    "long trace. Among the toy's right traces the short ones are the lucky guesses: where the "
    "rejected traces weigh little, stage 2 teaches guessing. In the paper's data length and luck "
    "do not go together like that, and its small alpha is merely weak. The tokens of an answer say "
    "whether this is what happened."
)
WHY_DPO = (
    "What speaks for DPO on such a toy: a pair mostly shares its beginning, and a difference of "
    "sums cancels exactly what is shared, which REDI with alpha below 1 and means over different "
    "lengths does not; the sigmoid stops pushing a pair that is told apart, and the reference "
    "holds the rest. There is one habit to unlearn, guessing, and pairs show it purely."
)
WHY_LR = (
    "Linear objectives have no lower bound: they go on pushing rejected tokens down when nothing "
    "is left to learn there, and chosen ones, which are much alike, fall with them. Where that "
    "goes too far a method drops below stage 1. Sigmoids flatten instead. The dotted curves of the "
    "log-probs, and accuracy against the learning rate, show how far each went."
)
WHY_LABELS = (
    "A rejected trace that is right in truth (a verifier's false negative) teaches the model to "
    "avoid what is right. Three teachers: the impatient one of the first study, one that also goes "
    "over its chain again (so that length tells little), and one that also does multiplications "
    "first at times, a wrong strategy. Positives, stage 1 and all other traces are the same at "
    "every share; a rising part of the rejected ones is replaced. Look for where a line crosses "
    "zero: beyond it, stage 1 alone is better."
)
WHY_SIMPO = (
    "SimPO's gradient is that of the symmetric objective, each pair weighed by a sigmoid of its "
    "margin. The smaller beta, the more alike are these weights: what is left is a learning rate "
    "(Appendix B). Measured on all pairs of the first seed, at its stage-1 model:"
)


def page(
    toy: Results,
    labels: Results,
    turning: dict[float, float],
    drawn: dict[str, Sequence[str]],
) -> list[Block]:
    """turning: appendix_b.cosines. drawn: study -> names of its figures."""

    def pictures(study: str, *names: str) -> list[Block]:
        return [Picture(f"{study}_{n}", CAPTIONS[n]) for n in names if n in drawn[study]]

    return [
        Heading("What the toy teaches", 1),
        Text(INTRO),
        Text(summary(toy)),
        table(toy, toy.table),
        *pictures("toy", "accuracy"),
        Heading("As in the paper, and not"),
        Text("\n".join(claims(toy))),
        Heading("The weight of the rejected trace"),
        Text(WHY_ALPHA),
        Text(lengths(toy)),
        *pictures("toy", "alpha"),
        Heading("DPO"),
        Text(WHY_DPO),
        Heading("SimPO, as beta falls"),
        Text(WHY_SIMPO),
        angles(turning),
        Heading("Learning rates, and collapse"),
        Text(WHY_LR),
        Text(collapses(toy)),
        *pictures("toy", "lr", "log_probs", "norms", "entropy"),
        Heading("Wrong labels"),
        Text(WHY_LABELS),
        Text(summary(labels)),
        Text(label_lines(labels)),
        Text(on_average(labels)),
        *pictures("labels", "labels"),
        table(labels, labels.table),
        Heading("Settings, and the whole grid"),
        table(toy, toy.grid),
        folded(toy.study, f"recipes/{STUDIES['toy']}.toml"),
        folded(labels.study, f"recipes/{STUDIES['labels']}.toml"),
    ]


def folded(code: str, title: str) -> Text:
    inside = f"```\n{code.strip()}\n```"
    return Text(f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>")


def main() -> None:
    results, drawn = {}, {}
    for short, name in STUDIES.items():
        command = [sys.executable, "-m", "redi.study", f"recipes/{name}.toml"]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            sys.exit(status)  # it has said why
        results[short] = Results.load(ROOT / "out" / name / "study.json")
        drawn[short] = figures(results[short])
    make_folder(ROOT / PICTURES)
    seed = ROOT / "out" / STUDIES["toy"] / f"seed-{results['toy'].runs[0].seed}"
    paths = {"model": "sft", "data": "data/pairs.jsonl", "cache": "../tokens"}
    turning = cosines(AngleConfig(**{key: str(seed / path) for key, path in paths.items()}))
    names = {short: list(pictures) for short, pictures in drawn.items()}
    blocks = page(results["toy"], results["labels"], turning, names)
    wanted = {block.name for block in blocks if isinstance(block, Picture)}
    for short, pictures in drawn.items():
        for name, png in pictures.items():
            if f"{short}_{name}" in wanted:
                with write_aside(ROOT / PICTURES / f"{short}_{name}.png", binary=True) as file:
                    file.write(png)
    with write_aside(ROOT / PAGE) as file:
        file.write(to_markdown(blocks, PICTURES.name))
    print(f"saved {PAGE} and {len(wanted)} pictures in {PICTURES}/")


if __name__ == "__main__":
    main()
