"""Agreement of a judge with labels: pure functions of small arrays.

    accuracy, kappa     good or bad; kappa is (po - pe) / (1 - pe): agreement beyond chance
    AUROC               the chance that a good reply scores higher than a bad one; ties count half
    TPR, TNR            the share of good replies judged good, of bad ones judged bad
    ECE                 mean distance of P(good) from the share of good ones, in 10 bins of P(good)
    recall of a fault   of replies with that label, those judged bad

Intervals are the middle 95 % over dialogues (scenarios) drawn with replacement.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from redi.config import UserError
from redi.eval.reporting.statistics import LEVEL, bootstrap

DRAWS, BINS = 1000, 10


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of counts (labels, labels that were judged); nan if chance explains it all."""
    total = confusion.sum()
    observed = np.trace(confusion) / total
    expected = confusion.sum(0) @ confusion.sum(1) / total**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def two_by_two(good: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(N,) bool both -> counts [label is good, judged good]."""
    return np.bincount(2 * good + judged, minlength=4).reshape(2, 2)


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
    table = two_by_two(good, judged)
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


def intervals(
    figures: Callable[[np.ndarray], dict[str, float]], ids: Sequence[str]
) -> dict[str, list[float]]:
    """The interval of each of the figures. figures: of the numbers of replies, which may repeat.
    ids: the dialogue of each reply; dialogues are drawn, with all their replies."""
    _, dialogues = np.unique(ids, return_inverse=True)
    members = [np.flatnonzero(dialogues == i) for i in range(dialogues.max() + 1)]

    def of_drawn(drawn: np.ndarray) -> list[float]:
        return list(figures(np.concatenate([members[i] for i in drawn])).values())

    names = figures(np.arange(len(ids)))
    return dict(zip(names, bootstrap(of_drawn, len(members), DRAWS).T.tolist()))


def choose_cut(good: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """good (N,) bool, scores (N,) -> the threshold with the highest kappa, of several the one
    in the widest gap between scores, and the scale of the logistic curve that fits best."""
    values = np.unique(scores)
    if len(values) < 2:
        raise UserError("--dev: the judge gives all replies the same score")
    middles, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    kappas = [kappa(two_by_two(good, scores > middle)) for middle in middles]
    threshold = middles[max(range(len(gaps)), key=lambda i: (kappas[i], gaps[i]))]
    signed = np.where(good, threshold - scores, scores - threshold)
    scales = np.geomspace(0.05, 20, 61)
    return threshold, min(scales, key=lambda scale: np.logaddexp(0, signed / scale).sum())


# ---------------------------------------------------------------- correcting a rate


@dataclass(frozen=True)
class Rates:
    """A judge's TPR over num_good labeled replies, and TNR over num_bad."""

    tpr: float
    num_good: int
    tnr: float
    num_bad: int


def corrected_rate(p: float, n: int, rates: Rates) -> tuple[float, float, float] | None:
    """The share of good replies, and its 95 % interval, if a judge finds a share p of n good.

    (p + TNR - 1) / (TPR + TNR - 1), with the adjusted interval of Lang and Reiczigel (2014), which
    Lee et al. (2511.21140) use for judges: the uncertainty of p, TPR and TNR enters. Replies count
    as independent. None if the judge is no better than chance, for then p says nothing, or if p is
    such that no share fits: then TPR and TNR are not those of these replies."""
    if rates.tpr + rates.tnr <= 1:
        return None
    rate = (p + rates.tnr - 1) / (rates.tpr + rates.tnr - 1)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    # Counts as if a few more had been seen: no share is 0 or 1, where its variance would vanish.
    n, num_good, num_bad = n + z**2, rates.num_good + 2, rates.num_bad + 2
    p = p + z**2 * (0.5 - p) / n
    tpr = (1 + rates.tpr * rates.num_good) / num_good
    tnr = (1 + rates.tnr * rates.num_bad) / num_bad
    of_p, of_tpr, of_tnr = p * (1 - p) / n, tpr * (1 - tpr) / num_good, tnr * (1 - tnr) / num_bad
    middle = (p + tnr - 1) / (tpr + tnr - 1)
    variance = of_p + middle**2 * of_tpr + (1 - middle) ** 2 * of_tnr
    reach = z * math.sqrt(variance) / (tpr + tnr - 1)
    middle += 2 * z**2 * (middle * of_tpr - (1 - middle) * of_tnr)
    low, high = middle - reach, middle + reach
    if low > 1 or high < 0:
        return None
    return tuple(min(max(value, 0.0), 1.0) for value in (rate, low, high))


def read_rates(path: str) -> dict[str, Rates]:
    """The rates in an agreement.json, by "seen replies", "unseen hints" and the like."""
    measured = read_agreement(path)["measured"]
    try:
        return {name: Rates(**group["rates"]) for name, group in measured.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not as redi dialogue agreement wrote it") from None


def read_agreement(path: str) -> dict[str, Any]:
    """What redi dialogue agreement wrote. Raises UserError."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; redi dialogue agreement writes it") from None
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict) or not {"judge", "measured"} <= set(facts):
        raise UserError(f"{path}: not written by redi dialogue agreement")
    return facts
