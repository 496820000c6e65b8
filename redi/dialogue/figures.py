"""Agreement of a judge with labels: pure functions of small arrays.

    accuracy, kappa     good or bad; kappa is (po - pe) / (1 - pe): agreement beyond chance
    AUROC               the chance that a good reply scores higher than a bad one; ties count half
    TPR, TNR            the share of good replies judged good, of bad ones judged bad
    ECE                 mean distance of P(good) from the share of good ones, in 10 bins of P(good)
    recall of a fault   of replies with that label, those judged bad

Intervals are the middle 95 % over dialogues (scenarios) drawn with replacement.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from redi.config import UserError

LEVEL, DRAWS, BINS = 0.95, 1000, 10


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
