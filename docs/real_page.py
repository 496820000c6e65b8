"""What docs/make_real_model.py measured, as tables, answers to read, and curves.

    OUT/page/results.md      tables, and twelve answers
    OUT/page/*.png           stage_1, log_probs, accuracy

Everything is read from files of OUT: metrics.jsonl of the runs, completions and verdicts of the
evaluations, compared.json (of `redi report`), times.json. Nothing is measured here.
"""

import json
import re
import tomllib
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from redi.curves import smooth
from redi.data.files import write_aside
from redi.eval.completions import Completion, by_problem, completions_file, read_lines
from redi.eval.reporting.scores import BenchmarkScore, score
from redi.eval.reporting.statistics import interval, permutation_p_value
from redi.eval.reporting.stored import GradedBenchmark, load
from redi.runlog import read_metrics
from redi.tables import markdown_table

LABELS = {
    "base": "base", "sft": "stage 1", "redi": "REDI", "dpo": "DPO", "symmetric": "symmetric",
    "simpo": "SimPO", "own": "REDI, own traces",
}  # fmt: skip
# (first, second) of each comparison, both of the same seed; the base model has no seed.
TESTS = [
    ("base", "sft"),
    *(("sft", method) for method in ("redi", "dpo", "symmetric", "simpo", "own")),
]
TESTS += [(method, "redi") for method in ("dpo", "symmetric", "simpo")] + [("redi", "own")]
# Answers to read: kind, before and after REDI, and how many problems of it. Both answers are shown.
KINDS = {"repaired": (False, True, 2), "broken": (True, False, 2)}
KINDS |= {"still wrong": (False, False, 1), "still right": (True, True, 1)}


def write_page(out: Path, runs: dict[str, str], rates: tuple[str, ...]) -> str:
    """Returns what to print. runs: name -> folder of its training; rates: of the sweep."""
    graded = {name: graded_test(out / f"test/{name}") for name in ("base", *runs)}
    scores = {name: score(one) for name, one in graded.items()}
    logs = {name: train_records(out / run) for name, run in runs.items()}
    stage_2 = {name: records for name, records in logs.items() if not name.startswith("sft")}
    losses = {name: records for name, records in logs.items() if name not in stage_2}
    page = out / "page"
    page.mkdir(exist_ok=True)
    parts = {
        "Models": f"{model_table(out, scores, runs)}\n\n{unboxed(out)}",
        "Paired tests": tests_table(out, graded),
        "Log-probs": log_prob_table(stage_2),
        "Learning rates": rates_table(out, rates),
        "Cost": cost(out),
        "Answers": answers(out, "sft-1", "redi-1"),
    }
    with write_aside(page / "results.md") as file:
        file.write("\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n")
    draw(page / "stage_1.png", [(loss_curves, losses), (sweep, out, rates)])
    first_seed = [(log_probs, *one) for one in stage_2.items() if one[0].endswith("-1")]
    draw(page / "log_probs.png", first_seed)
    draw(page / "accuracy.png", [(accuracy, scores), (lengths, scores)])
    return "\n\n".join([parts["Models"], parts["Paired tests"], f"saved {page}"])


# ---------------------------------------------------------------- facts


def graded_test(folder: Path) -> GradedBenchmark:
    """The only benchmark of an evaluation."""
    [[graded]] = load(folder).benchmarks.values()
    return graded


def train_records(run: Path) -> list[dict]:
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def label(name: str) -> str:
    method, _, seed = name.partition("-")
    return f"{LABELS[method]}, seed {seed}" if seed else LABELS[method]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def completions(folder: Path) -> dict[str, list[Completion]]:
    """Problem's id -> its samples, in order."""
    benchmark = graded_test(folder).benchmark
    rows = list(read_lines(completions_file(folder, benchmark.name), Completion))
    return {samples[0].id: samples for samples in by_problem(benchmark, rows)}


# ---------------------------------------------------------------- tables


def model_table(out: Path, scores: dict[str, BenchmarkScore], runs: dict[str, str]) -> str:
    most = scores["base"].num_samples
    header = ("model", "lr", "pass@1 ± SEM", "95 % interval", f"pass@{most}")
    rows = [(*header, "tokens", "truncated", "no answer")]
    for name, one in scores.items():
        rate = ""
        if name in runs:
            rate = f"{tomllib.loads((out / runs[name] / 'config.toml').read_text())['lr']:g}"
        score_and_sem = f"{percent(one.pass_at_1)} ± {percent(one.sem)}"
        shares = one.pass_at_k[-1], one.truncated, one.no_answer
        best, truncated, unanswered = map(percent, shares)
        between = " to ".join(map(percent, one.interval))
        tokens = f"{one.mean_tokens:.0f}"
        rows.append(
            (label(name), rate, score_and_sem, between, best, tokens, truncated, unanswered)
        )
    return markdown_table(rows)


def unboxed(out: Path) -> str:
    """The base model may know an answer and not write it into a box."""
    problems = graded_test(out / "test/base").benchmark.problems
    answers = {problem.id: problem.answers[0] for problem in problems}
    found = [
        (re.findall(r"\d+", sample.text.replace(",", "")) or [""])[-1] == answers[id]
        for id, samples in completions(out / "test/base").items()
        for sample in samples
    ]
    return (
        "If the last number of a text counts as its answer, boxed or not, the base model is right "
        f"in {percent(fmean(found))} % of its samples."
    )


def tests_table(out: Path, graded: dict[str, GradedBenchmark]) -> str:
    """Those of `redi report` for each seed; where there are two, also of both seeds' samples."""
    report = json.loads((out / "compared.json").read_text())
    paired = {(one["first"], one["second"]): one for one in report["paired"]}
    rows = [("second against first", "seed", "difference", "95 % interval", "won, lost", "p")]
    for first, second in TESTS:
        found = {
            seed: pair
            for seed in ("1", "2")
            if (pair := (first if first == "base" else f"{first}-{seed}", f"{second}-{seed}"))
            in paired
        }
        tests = [(seed, paired[pair]) for seed, pair in found.items()]
        if len(found) > 1:
            sides = ([graded[name] for name in side] for side in zip(*found.values()))
            tests.append(("both", pooled(*sides)))
        for seed, one in tests:
            low, high = (f"{100 * end:+.1f}" for end in one["interval"])
            p = "< 0.001" if one["p_value"] < 0.001 else f"{one['p_value']:.3f}"
            rows.append((
                f"{LABELS[second]} against {LABELS[first]}", seed,
                f"{100 * one['difference']:+.1f}", f"{low} to {high}",
                f"{one['won']}, {one['lost']}", p,
            ))  # fmt: skip
    return markdown_table(rows)


def pooled(first: list[GradedBenchmark], second: list[GradedBenchmark]) -> dict:
    """A comparison of the samples of several evaluations with those of as many others, paired by
    problem as in redi/eval/reporting/compare.py."""
    before, after = (sum(graded.correct.sum(axis=1) for graded in side) for side in (first, second))
    differences = (after - before).tolist()
    samples = sum(graded.correct.shape[1] for graded in first)
    shares = [difference / samples for difference in differences]
    return {
        "difference": fmean(shares),
        "interval": interval(shares),
        "won": sum(share > 0 for share in shares),
        "lost": sum(share < 0 for share in shares),
        "p_value": permutation_p_value(differences),
    }


def log_prob_table(logs: dict[str, list[dict]]) -> str:
    """Means over the first and the last tenth of the steps. With one epoch, a pair is measured just
    before it is trained on for the first time."""
    keys = ("chosen_logp", "rejected_logp", "margin", "ranked_right")
    rows = [("first to last tenth of the steps", "chosen", "rejected", "margin", "ranked right")]
    for name, records in logs.items():
        tenth, cells = max(1, len(records) // 10), []
        for key in keys:
            parts = records[:tenth], records[-tenth:]
            ends = [fmean(r[key] for r in part) for part in parts if key in part[0]]
            cells.append(" to ".join(f"{end:.3f}" for end in ends))
        rows.append((label(name), *cells))
    return markdown_table(rows)


def tuning_scores(out: Path, rates: tuple[str, ...]) -> dict[str, list[float]]:
    """Method -> pass@1 on the tuning problems at each rate."""

    def read(name: str) -> float:
        return json.loads((out / f"tuning/{name}/report.json").read_text())["mean_pass_at_1"]

    swept = {m: [read(f"{m}-1-{rate}") for rate in rates] for m in ("redi", "dpo")}
    return {"sft": [read("sft-1")] * len(rates)} | swept


def rates_table(out: Path, rates: tuple[str, ...]) -> str:
    scores = tuning_scores(out, rates).items()
    rows = [("pass@1 on the tuning problems, seed 1", *(f"lr {rate}" for rate in rates))]
    return markdown_table(rows + [(LABELS[m], *map(percent, found)) for m, found in scores])


def cost(out: Path) -> str:
    """Tokens are counted as in metrics.jsonl: of prompts and responses, in every step."""
    times = json.loads((out / "times.json").read_text())
    kinds = {"config.json": "training", "report.md": "evaluation"}
    by_kind = sorted((kinds.get(Path(made).name, "the rest"), s) for made, s in times.items())
    hours = {
        kind: sum(seconds for _, seconds in group) / 3600
        for kind, group in groupby(by_kind, key=lambda item: item[0])
    }
    runs = sorted(path.parent for path in out.glob("*/metrics.jsonl"))
    trained = [record for run in runs for record in train_records(run)]
    tokens, seconds = (sum(record[key] for record in trained) for key in ("tokens", "seconds"))
    longest = max(times, key=times.get)
    cards = {d: json.loads((out / d / "card.json").read_text()) for d in ("data", "data_own")}
    lines = [
        f"{sum(hours.values()):.1f} hours: "
        + ", ".join(f"{kind} {spent:.1f}" for kind, spent in hours.items()),
        f"longest stage: {Path(longest).parent}, {times[longest] / 60:.0f} minutes",
        f"{tokens:,} tokens trained in {len(runs)} runs, {tokens / seconds:.0f} per second",
        f"the teacher: {cards['data']['rows']} problems, {cards['data']['traces']} traces, "
        f"{cards['data']['positives']} positives, {cards['data']['pairs']} pairs",
        f"the model's own: {cards['data_own']['rows']} problems, {cards['data_own']['traces']} "
        f"traces, {cards['data_own']['pairs']} pairs",
    ]
    return "\n".join(f"- {line}" for line in lines)


# ---------------------------------------------------------------- answers to read


def answers(out: Path, before: str, after: str) -> str:
    """The first samples of the first problems, in the benchmark's order, of each kind."""
    texts = {name: completions(out / f"test/{name}") for name in (before, after)}
    graded = {name: graded_test(out / f"test/{name}") for name in texts}
    first_samples = {name: one.correct[:, 0].astype(bool).tolist() for name, one in graded.items()}
    problems = list(zip(graded[before].benchmark.problems, *first_samples.values()))
    parts = []
    for kind, (was, now, count) in KINDS.items():
        of_kind = (problem for problem, *right in problems if right == [was, now])
        for problem in islice(of_kind, count):
            parts.append(f"**{kind}** (problem {problem.id}, answer {problem.answers[0]})")
            parts.append("\n".join(f"> {line}" for line in problem.problem.splitlines()))
            for name in texts:
                parts += [f"{label(name)}:", f"```text\n{texts[name][problem.id][0].text}\n```"]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- pictures


def draw(path: Path, panels: list[tuple]) -> None:
    """Write a PNG; a panel is a function and what it takes after the axis."""
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * height), layout="constrained")
    same = len({panel[0] for panel in panels}) == 1  # then they are to be compared
    axes = figure.subplots(height, columns, squeeze=False, sharey=same).flatten()
    for axis, (draw_panel, *arguments) in zip(axes, panels):
        draw_panel(axis, *arguments)
        axis.grid(alpha=0.3)
    for unused in axes[len(panels) :]:
        unused.remove()
    with write_aside(path, binary=True) as file:
        figure.savefig(file, dpi=90, format="png")


def loss_curves(axis: Axes, logs: dict[str, list[dict]]) -> None:
    for name, records in logs.items():
        steps = [record["step"] for record in records]
        axis.plot(steps, smooth([record["loss"] for record in records]), label=label(name))
    title = "stage 1, smoothed"
    axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axis.legend(fontsize="small")


def sweep(axis: Axes, out: Path, rates: tuple[str, ...]) -> None:
    for method, found in tuning_scores(out, rates).items():
        style = "--" if method == "sft" else "o-"
        axis.plot([*map(float, rates)], found, style, label=LABELS[method])
    axis.set(title="tuning problems, seed 1", xlabel="peak learning rate", ylabel="pass@1")
    axis.set_xscale("log")
    axis.set_xticks([*map(float, rates)], rates)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize="small")


def log_probs(axis: Axes, name: str, records: list[dict]) -> None:
    steps = [record["step"] for record in records]
    for side, color in (("chosen", "C0"), ("rejected", "C3")):
        values = [record[f"{side}_logp"] for record in records]
        axis.plot(steps, values, color=color, lw=0.8, alpha=0.3)
        axis.plot(steps, smooth(values), color=color, lw=1.5, label=side)
    axis.set(title=label(name), xlabel="optimizer step", ylabel="mean log-prob (nats per token)")
    axis.legend(fontsize="small")


def accuracy(axis: Axes, scores: dict[str, BenchmarkScore]) -> None:
    for place, one in enumerate(scores.values()):
        axis.plot(one.interval, [place, place], color="C0", lw=1.5)
        axis.plot([one.pass_at_1], [place], "o", color="C0")
        axis.plot([one.pass_at_k[-1]], [place], "|", ms=9, color="C3")
    title = f"test: pass@1 (95 % interval), pass@{one.num_samples} (red)"
    axis.set(title=title, xlim=(0, 1.02))
    _name_rows(axis, scores)


def lengths(axis: Axes, scores: dict[str, BenchmarkScore]) -> None:
    axis.barh(range(len(scores)), [one.mean_tokens for one in scores.values()], height=0.6)
    axis.set(title="tokens per answer")
    _name_rows(axis, scores)


def _name_rows(axis: Axes, scores: dict[str, BenchmarkScore]) -> None:
    axis.set_yticks(range(len(scores)), [label(name) for name in scores], fontsize="small")
    axis.invert_yaxis()
