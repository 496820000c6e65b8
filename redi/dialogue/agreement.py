"""How far a judge agrees with labels, and what that says about a rate that it measured.

    redi dialogue agreement out/judge test.jsonl --unseen unseen.jsonl --dev dev.jsonl
    redi dialogue agreement out/second_tutor test.jsonl --kind likelihood --dev dev.jsonl

Files are dialogues with labels (dialogues.py), best of tutors that the judge was not trained on.
The threshold, and min or mean for the likelihood, are chosen on --dev alone: the highest kappa.

    accuracy, kappa     good or bad; kappa is (po - pe) / (1 - pe): agreement beyond chance
    AUROC               the chance that a good reply scores higher than a bad one; ties count half
    TPR, TNR            the share of good replies judged good, of bad ones judged bad
    ECE                 mean distance of P(good) from the share of good ones, in 10 bins of P(good)
    recall of a fault   of replies with that label, those judged bad

Intervals are the middle 95 % over dialogues (scenarios) drawn with replacement. agreement.json has
it all, and the settings of the judge. Left out: a second annotator.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.files import refuse_overwriting, write_aside
from redi.dialogue.dialogues import Reply, read_dialogues
from redi.dialogue.judge import Judge, Judgement, JudgeSettings, make_judge, read_agreement
from redi.dialogue.rubric import GOOD, read_rubric
from redi.tables import text_table

LEVEL, DRAWS, BINS = 0.95, 1000, 10


@dataclass(kw_only=True)
class AgreementConfig:
    model: Annotated[str, "the judge: folder or hub id"]
    files: Annotated[list[str], "dialogues with labels, of seen topics"]
    kind: Annotated[Literal["labels", "likelihood"], "of the judge"] = "labels"
    unseen: Annotated[list[str], "the same of unseen topics"] = field(default_factory=list)
    dev: Annotated[list[str], "other dialogues, to choose the threshold on"] = field(
        default_factory=list
    )
    rubric: Annotated[str | None, "TOML file of labels; none: redi's own"] = None
    out: Annotated[str, "file to write"] = "agreement.json"

    def __post_init__(self) -> None:
        needs_dev = self.kind == "likelihood" and not self.dev
        require(not needs_dev, "dev", "none", "labels to choose the likelihood's threshold on")


# ---------------------------------------------------------------- figures


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of counts (labels, labels that were judged); nan if chance explains it all."""
    total = confusion.sum()
    observed = np.trace(confusion) / total
    expected = confusion.sum(0) @ confusion.sum(1) / total**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def confusion(labels: Sequence[str], judged: Sequence[str]) -> dict[str, Counter[str]]:
    """label -> what it was judged to be -> count; every label of either side has a row."""
    counts = {label: Counter() for label in sorted({*labels, *judged})}
    for label, other in zip(labels, judged):
        counts[label][other] += 1
    return counts


def auroc(good: np.ndarray, scores: np.ndarray) -> float:
    """good (N,) bool, scores (N,). nan if one class is missing."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; ties share their mean
    num_good, num_bad = good.sum(), (~good).sum()
    above = ranks[good].sum() - num_good * (num_good + 1) / 2
    return float(above / (num_good * num_bad)) if num_good and num_bad else math.nan


def calibration_error(good: np.ndarray, chances: np.ndarray) -> float:
    """good (N,) bool, chances (N,) of being good -> the expected calibration error."""
    bins = np.minimum((chances * BINS).astype(int), BINS - 1)
    errors = np.bincount(bins, chances - good, BINS)  # of each bin, summed over its replies
    return float(abs(errors).sum() / len(good))


def figures(good: np.ndarray, chances: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Of labels (N,) bool, P(good) (N,) and the scores that it is made of (N,)."""
    judged = chances >= 0.5
    table = np.bincount(2 * good + judged, minlength=4).reshape(2, 2)  # [label, judged]
    (bad_bad, _), (_, good_good) = table
    num_bad, num_good = table.sum(1)
    return {
        "accuracy": float((good == judged).mean()),
        "kappa": kappa(table),
        "AUROC": auroc(good, scores),
        "TPR": good_good / num_good if num_good else math.nan,
        "TNR": bad_bad / num_bad if num_bad else math.nan,
        "ECE": calibration_error(good, chances),
    }


def bootstrap(
    statistics: Callable[[np.ndarray], Sequence[float]], ids: Sequence[str]
) -> np.ndarray:
    """(S, 2): the interval of each of S statistics. statistics: of the numbers of replies, which
    may repeat. ids: the dialogue of each reply; dialogues are drawn, with all their replies."""
    _, dialogues = np.unique(ids, return_inverse=True)
    members = [np.flatnonzero(dialogues == i) for i in range(dialogues.max() + 1)]
    random = np.random.default_rng(42)
    draws = random.integers(0, len(members), (DRAWS, len(members)))
    values = [statistics(np.concatenate([members[i] for i in draw])) for draw in draws]
    return np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


# ---------------------------------------------------------------- correcting a rate


@dataclass(frozen=True)
class Rates:
    """A judge's TPR over num_good labelled replies, and TNR over num_bad."""

    tpr: float
    num_good: int
    tnr: float
    num_bad: int


def corrected_rate(p: float, n: int, rates: Rates) -> tuple[float, float, float] | None:
    """The share of good replies, and its 95 % interval, if a judge finds a share p of n good.

    (p + TNR - 1) / (TPR + TNR - 1), with the adjusted interval of Lang and Reiczigel (2014), which
    Lee et al. (2511.21140) use for judges: the uncertainty of p, TPR and TNR enters. Replies count
    as independent. None if the judge is no better than chance: then p says nothing."""
    if rates.tpr + rates.tnr <= 1:
        return None
    rate = (p + rates.tnr - 1) / (rates.tpr + rates.tnr - 1)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    # Counts as if a few more had been seen: no share is 0 or 1, where its variance would vanish.
    n, num_good, num_bad = n + z**2, rates.num_good + 2, rates.num_bad + 2
    p = p + z**2 * (0.5 - p) / n
    tpr, tnr = (
        (1 + rates.tpr * rates.num_good) / num_good,
        (1 + rates.tnr * rates.num_bad) / num_bad,
    )
    of_p, of_tpr, of_tnr = p * (1 - p) / n, tpr * (1 - tpr) / num_good, tnr * (1 - tnr) / num_bad
    middle = (p + tnr - 1) / (tpr + tnr - 1)
    variance = of_p + middle**2 * of_tpr + (1 - middle) ** 2 * of_tnr
    reach = z * math.sqrt(variance) / (tpr + tnr - 1)
    middle += 2 * z**2 * (middle * of_tpr - (1 - middle) * of_tnr)
    return tuple(min(max(value, 0.0), 1.0) for value in (rate, middle - reach, middle + reach))


def read_rates(path: str) -> dict[str, Rates]:
    """The rates in an agreement.json, by "seen replies", "unseen replies", "seen hints", "unseen
    hints", as far as they were measured. Raises UserError."""
    measured = read_agreement(path)["measured"]
    return {name: Rates(**group["rates"]) for name, group in measured.items()}


# ---------------------------------------------------------------- the command


def labeled_replies(files: Sequence[str], left_out: Counter[str]) -> dict[str, list[Reply]]:
    """replies, hints -> those that have a label; the others are counted."""
    found: dict[str, list[Reply]] = {"replies": [], "hints": []}
    for file in files:
        for dialogue in read_dialogues(file, {}):
            for reply in dialogue.all_replies():
                kind = "hints" if reply.is_hint else "replies"
                if reply.label is None:
                    left_out[f"{kind} without a label"] += 1
                else:
                    found[kind].append(reply)
    return found


def is_good(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.label == GOOD for reply in replies])


def choose_cut(good: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The threshold of the highest kappa, of several the one in the widest gap between scores; and
    the scale by which the logistic curve through it fits the labels best."""
    values = np.unique(scores)
    middles, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    kappas = [figures(good, (scores > middle) * 1.0, scores)["kappa"] for middle in middles]
    threshold = middles[max(range(len(gaps)), key=lambda i: (kappas[i], gaps[i]))]
    signed = np.where(good, threshold - scores, scores - threshold)
    scales = np.geomspace(0.05, 20, 61)
    return threshold, min(scales, key=lambda scale: np.logaddexp(0, signed / scale).sum())


def choose_settings(judge: Judge, dev: dict[str, list[Reply]]) -> JudgeSettings:
    """The statistic with the highest AUROC on replies, and its thresholds."""
    statistic, cuts = judge.settings.statistic, {}
    for kind, replies in dev.items():
        good = is_good(replies)
        if kind == "hints" and len(set(good)) < 2:
            continue  # they get the threshold of replies
        require_both(good, "--dev")
        scores = {name: np.array(values) for name, values in judge.scores(replies).items()}
        if kind == "replies":
            statistic = max(scores, key=lambda name: auroc(good, scores[name]))
        cuts[kind] = [float(x) for x in choose_cut(good, scores[statistic])]
    return replace(judge.settings, statistic=statistic, cuts=cuts)


def require_both(good: np.ndarray, where: str) -> None:
    if len(set(good)) < 2:
        count = f"{good.sum()} good and {(~good).sum()} bad labels of replies"
        raise UserError(f"{where}: {count}; both are needed to measure a judge")


def measure(replies: Sequence[Reply], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What agreement.json has for a group of replies."""
    good, labels = is_good(replies), [reply.label for reply in replies]
    chances, scores, masses = (
        np.array([getattr(one, name) for one in judgements]) for name in ("good", "score", "mass")
    )
    values = figures(good, chances, scores)
    ends = bootstrap(
        lambda rows: list(figures(good[rows], chances[rows], scores[rows]).values()),
        [reply.scenario.id for reply in replies],
    )
    counts = confusion(labels, [one.label for one in judgements])
    table = np.array([[row[label] for label in counts] for row in counts.values()])
    faults = {label: row for label, row in counts.items() if label != GOOD and row}
    return {
        "dialogues": len({reply.scenario.id for reply in replies}),
        "figures": {name: [values[name], *ends[i].tolist()] for i, name in enumerate(values)},
        "kappa of labels": kappa(table),
        "mass of labels": float(masses.mean()),
        "recall": {name: [row.total() - row[GOOD], row.total()] for name, row in faults.items()},
        "confusion": counts,
        "rates": asdict(Rates(values["TPR"], int(good.sum()), values["TNR"], int((~good).sum()))),
    }


def as_table(measured: dict[str, dict[str, Any]], kind: str) -> str:
    groups = measured.values()
    rows = [["", *measured], ["replies, good"]]
    rows[1] += [
        f"{g['rates']['num_good'] + g['rates']['num_bad']}, {g['rates']['num_good']}"
        for g in groups
    ]
    for name in ("accuracy", "kappa", "AUROC", "TPR", "TNR", "ECE"):
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*group["figures"][name]) for group in groups)
        rows.append([name, *cells])
    for name in ("kappa of labels", "mass of labels") if kind == "labels" else ():
        rows.append([name, *(f"{group[name]:.2f}" for group in groups)])
    for fault in sorted({fault for group in groups for fault in group["recall"]}):
        cells = (group["recall"].get(fault) for group in groups)
        rows.append([f"recall of {fault}", *("{}/{}".format(*c) if c else "-" for c in cells)])
    return text_table(rows)


@program
def main() -> None:
    config = parse(AgreementConfig, "Measure how far a judge agrees with labels.")
    refuse_overwriting("out", config.out, [*config.files, *config.unseen, *config.dev])
    left_out: Counter[str] = Counter()
    sources = {"seen": config.files, "unseen": config.unseen, "dev": config.dev}
    replies = {side: labeled_replies(files, left_out) for side, files in sources.items()}
    dev = replies.pop("dev")
    groups = {f"{side} {kind}": group for side in replies for kind, group in replies[side].items()}
    for name, group in list(groups.items()):
        if name.endswith("replies") and sources[name.split()[0]]:
            require_both(is_good(group), name)
        elif len(set(is_good(group))) < 2:
            left_out[f"{name} with one label only"] += len(groups.pop(name))
    rubric = vars(read_rubric(config.rubric)) if config.kind == "labels" else {}
    judge = make_judge(config.model, JudgeSettings(kind=config.kind, rubric=rubric))
    if config.dev:
        judge.settings = choose_settings(judge, dev)
    measured = {name: measure(group, judge.judge(group)) for name, group in groups.items()}
    facts = {"model": config.model, "files": sources, "left out": left_out}
    facts |= {"judge": asdict(judge.settings), "measured": measured}
    with write_aside(config.out) as file:
        file.write(json.dumps(facts, indent=2) + "\n")
    print(as_table(measured, config.kind))
    print(f"{judge.settings.statistic}, [threshold, scale]: {judge.settings.cuts or 'P(good) 0.5'}")
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    print(f"saved {config.out}")
