"""Every number of the report, against hand-worked examples and against brute force."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.eval.reporting import statistics
from redi.eval.reporting.statistics import (
    bootstrap_p_value,
    interval,
    majority,
    mcnemar,
    pass_at_k,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_of_many_samples_is_the_product_of_drawing_wrong_ones(drawn):
    """1 - (n-c)/n * (n-c-1)/(n-1) * ...: wrong samples drawn one after another, in fractions."""
    n, c = drawn
    all_wrong = Fraction(1)
    for k in range(1, n + 1):
        all_wrong *= Fraction(max(n - c - k + 1, 0), n - k + 1)
        assert pass_at_k(n, c, k) == pytest.approx(float(1 - all_wrong), abs=1e-12)


def test_the_interval_is_the_quantiles_of_every_possible_draw(monkeypatch):
    """Scores 0, 1/2, 1/2, 1: all 4^4 = 256 draws of four, their 2.5 % and 97.5 % quantiles."""
    scores = [0, 0.5, 0.5, 1]
    means = [sum(draw) / 4 for draw in itertools.product(scores, repeat=4)]
    expected = tuple(np.quantile(means, [0.025, 0.975]))
    assert interval(scores) == pytest.approx(expected, abs=0.06)  # one step is 1/8
    assert interval(scores) == interval(scores)
    assert interval([0.25] * 30) == (0.25, 0.25)
    monkeypatch.setattr(statistics, "DRAWS", 200_000)
    assert interval(scores) == expected


def test_intervals_and_p_values_are_right_about_as_often_as_they_say(monkeypatch):
    """300 benchmarks of 60 problems that a model solves with chance 0.7: the percentile bootstrap
    covers a little less than its level on so few. 200 comparisons of a run with its equal: p < 0.1
    in about a tenth of them."""
    monkeypatch.setattr(statistics, "DRAWS", 500)
    random = np.random.default_rng(0)
    intervals = [interval(random.random(60) < 0.7) for _ in range(300)]
    assert 0.89 <= sum(low <= 0.7 <= high for low, high in intervals) / 300 <= 0.99
    small = [bootstrap_p_value(random.choice([-1, 0, 0, 1], 80)) < 0.1 for _ in range(200)]
    assert 0.04 <= sum(small) / 200 <= 0.18


@pytest.mark.parametrize(
    ("votes", "chance"),
    [
        ([("3", True), ("5", False), ("3", True)], 1),
        ([("3", True), ("5", False), ("5", False)], 0),
        ([("3", True), ("5", False)], 1 / 2),
        ([("3", True), ("5", False), ("7", False)], 1 / 3),
        ([("3", True), ("3", True), ("5", False), ("5", False), ("7", False)], 1 / 2),
        ([], 0),
    ],
)
def test_the_most_frequent_answer_wins_and_ties_are_broken_at_random(votes, chance):
    assert majority(votes) == pytest.approx(chance)
    assert majority(votes[::-1]) == pytest.approx(chance)


def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven():
    """All throws of up to 12 coins. Worked: of ten at most one tail, (1 + 10) / 1024, twice."""
    for won, lost in itertools.product(range(7), range(7)):
        throws = itertools.product([0, 1], repeat=won + lost)
        uneven = [abs(2 * sum(throw) - won - lost) >= abs(won - lost) for throw in throws]
        assert mcnemar(won, lost) == pytest.approx(sum(uneven) / len(uneven))
    assert mcnemar(9, 1) == mcnemar(1, 9) == pytest.approx(22 / 1024)


def test_the_bootstrap_agrees_with_mcnemar_where_both_apply():
    """One sample per problem, 200 problems: 30 won, 12 lost (p = 0.008); 22 and 20 (p = 0.88)."""
    for won, lost in ((30, 12), (22, 20)):
        differences = [1] * won + [-1] * lost + [0] * (200 - won - lost)
        assert bootstrap_p_value(differences) == pytest.approx(mcnemar(won, lost), abs=0.15)
    assert bootstrap_p_value([1] * 30 + [-1] * 12 + [0] * 158) < 0.02
    assert bootstrap_p_value([0.0] * 20) == 1
    assert bootstrap_p_value([0.5, -0.5]) == 1
