r"""What can be said of verdicts: pure functions of small arrays.

For a benchmark of P problems with n samples each, where c of a problem's n samples are correct:

    pass@1     the mean over all P n samples
    SEM        std (ddof 0) over j of [the score of the benchmark's j-th samples] / sqrt(n)
    interval   holds 95 % of the pass@1 of P problems drawn from these with replacement: what
               another set of problems like these would give
    pass@k     the mean over problems of 1 - C(n-c, k) / C(n, k): the chance that k of the n
               samples, drawn without replacement, include a correct one (Chen et al., 2021, eq. 1)
    majority   the mean over problems of whether the most frequent answer is correct

SEM is the paper's: the spread between repeated runs of the same problems. It shrinks with samples;
the interval does not, and is the wider one on 30 problems. The bootstrap has a fixed seed, so the
same verdicts give the same report.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap: the ends of an interval are then sure to about 1 % of its width
LEVEL = 0.95
SEED = 42


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them correct, hold a correct one; 1 <= k <= n."""
    assert 0 <= c <= n, f"{c} correct of {n} samples"
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def sem(correct: np.ndarray) -> float | None:
    """The paper's standard error of pass@1; correct (P, n) of 0 and 1. None for n = 1: a single
    run shows no spread."""
    if correct.shape[1] == 1:
        return None
    return float(correct.mean(axis=0).std(ddof=0) / math.sqrt(correct.shape[1]))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The bootstrap's interval of the mean of problems' `scores` (P,)."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(_resampled_means(np.asarray(scores, float)), [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(scores: np.ndarray) -> np.ndarray:
    """Means (DRAWS,) of as many scores as there are, drawn with replacement."""
    random, count = np.random.default_rng(SEED), len(scores)
    return np.array([scores[random.integers(0, count, count)].mean() for _ in range(DRAWS)])


def majority(votes: Iterable[tuple[str, bool]]) -> float:
    """The chance that the most frequent answer is correct, where ties are broken by lot.

    votes: (an answer's key, whether it is correct), for samples that gave one. Equal keys are one
    answer, as correct as its first vote.
    """
    counts: dict[str, int] = defaultdict(int)
    right: dict[str, bool] = {}
    for key, correct in votes:
        counts[key] += 1
        right.setdefault(key, correct)
    most = max(counts.values(), default=0)
    winners = [right[key] for key, count in counts.items() if count == most]
    return sum(winners) / len(winners) if winners else 0.0


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: `won` problems that only the second run
    solves, `lost` that only the first does; by chance each is as likely the one as the other."""
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def bootstrap_p_value(differences: Sequence[float]) -> float:
    """How often chance would give problems' mean difference (P,), or a larger one of either sign.

    The differences are moved to a mean of 0 and drawn anew; (r + 1) / (DRAWS + 1), never 0.
    """
    differences = np.asarray(differences, float)
    observed = abs(differences.mean())
    means = np.abs(_resampled_means(differences - differences.mean()))
    # A hair below, since sums of the same differences in another order round differently.
    extreme = int((means >= observed * (1 - 1e-9)).sum()) if observed > 0 else DRAWS
    return (extreme + 1) / (DRAWS + 1)
