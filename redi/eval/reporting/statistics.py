r"""Statistics of verdicts: pure functions of small arrays.

For a benchmark of P problems with n samples each, where c of a problem's n samples are correct:

    pass@1     the mean over all P n samples
    SEM        std (ddof 0) over j of [the score of the benchmark's j-th samples] / sqrt(n)
    interval   the middle 95 % of pass@1 over sets of P problems drawn from these with replacement
    pass@k     the mean over problems of 1 - C(n-c, k) / C(n, k): the chance that k of the n
               samples, drawn without replacement, include a correct one (Chen et al., 2021, eq. 1)
    majority   the mean over problems of whether the most frequent answer is correct

SEM is the paper's: the spread between repeated runs of the same problems. It shrinks with samples;
the interval does not, and is the wider one on 30 problems. The bootstrap has a fixed seed, so the
same verdicts give the same report.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap: the error of an interval's ends is about 1 % of its width
LEVEL = 0.95


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them correct, include a correct one; 1 <= k <= n."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def sem(correct: np.ndarray) -> float | None:
    """The paper's standard error of pass@1; correct (P, n) of 0 and 1. None for n = 1: a single
    run shows no spread."""
    n = correct.shape[1]
    return None if n == 1 else float(correct.mean(axis=0).std() / math.sqrt(n))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The bootstrap's interval of the mean of problems' `scores` (P,)."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(_resampled_means(np.asarray(scores, float)), [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(scores: np.ndarray) -> np.ndarray:
    """Means (DRAWS,) of len(scores) scores, drawn with replacement."""
    random, count = np.random.default_rng(42), len(scores)
    return np.array([scores[random.integers(0, count, count)].mean() for _ in range(DRAWS)])


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """The chance that the most frequent answer is correct, where ties are broken at random.

    votes: (an answer's key, whether it is correct), for samples with an answer. Equal keys are one
    answer, as correct as its first vote.
    """
    correct = dict(reversed(votes))  # the first vote is the last to be set
    counts = Counter(key for key, _ in votes)
    winners = [correct[key] for key, count in counts.items() if count == max(counts.values())]
    return sum(winners) / len(winners) if winners else 0.0


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: `won` problems that only the second run
    solves, `lost` that only the first solves; by chance, both are equally likely."""
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def bootstrap_p_value(differences: Sequence[float]) -> float:
    """How often chance would give a mean as far from 0 as that of the problems' differences (P,).

    The differences are shifted to a mean of 0 and resampled; (r + 1) / (DRAWS + 1), never 0.
    """
    differences = np.asarray(differences, float)
    observed = abs(differences.mean())
    means = np.abs(_resampled_means(differences - differences.mean()))
    # Slightly below, since sums of the same differences in another order round differently.
    extreme = int((means >= observed * (1 - 1e-9)).sum()) if observed > 0 else DRAWS
    return (extreme + 1) / (DRAWS + 1)
