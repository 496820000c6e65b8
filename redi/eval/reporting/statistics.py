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
from collections.abc import Callable, Sequence
from typing import Any

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
    scores = np.asarray(scores, float)
    low, high = bootstrap(lambda drawn: scores[drawn].mean(), len(scores), DRAWS)
    return float(low), float(high)


def bootstrap(statistics: Callable[[np.ndarray], Any], count: int, draws: int) -> np.ndarray:
    """(2, ...): the ends of the intervals of `statistics` of `count` numbers below `count`, drawn
    with replacement. A draw's statistic that is nan is left out."""
    random, tail = np.random.default_rng(42), (1 - LEVEL) / 2
    values = [statistics(random.integers(0, count, count)) for _ in range(draws)]
    return np.nanquantile(values, [tail, 1 - tail], axis=0)


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """The chance that the most frequent answer is correct, where ties are broken at random.

    votes: (an answer's key, whether it is correct), for samples with an answer. Equal keys are one
    answer, as correct as its first vote.
    """
    correct = dict(reversed(votes))  # the first vote is the last to be set
    counts = Counter(key for key, _ in votes)
    winners = [correct[key] for key, count in counts.items() if count == max(counts.values())]
    return sum(winners) / len(winners) if winners else 0.0


def permutation_p_value(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of the paired permutation test.

    differences (P,): of two runs, per problem, in any unit in which they are whole. If the runs are
    equally good, each difference is as likely to have the other sign: the p-value is the share of
    all 2^P choices of signs whose sum is at least as far from 0 as the observed one. With a single
    sample per problem, this is McNemar's exact test. A share that a float cannot hold, of more than
    a thousand problems, is given as the smallest float above 0.
    """
    unit = math.gcd(*differences) or 1
    steps = [abs(difference) // unit for difference in differences if difference]
    zero = sum(steps)
    chances = np.zeros(2 * zero + 1)  # of the sums -zero .. zero
    chances[zero] = 1
    for step in steps:
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    distance = abs(np.arange(-zero, zero + 1))
    share = float(chances[distance >= abs(sum(differences)) // unit].sum())
    return min(1.0, max(share, math.ulp(0.0)))
