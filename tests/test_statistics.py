"""Every number of the report, against hand-worked examples and against brute force."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.eval.reporting import statistics
from redi.eval.reporting.statistics import interval, majority, pass_at_k, permutation_p_value


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


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=10), st.integers(1, 5))
def test_the_p_value_is_the_share_of_all_signs_whose_sum_is_as_far_from_zero(differences, unit):
    signs = itertools.product([-1, 1], repeat=len(differences))
    sums = [sum(s * d for s, d in zip(choice, differences)) for choice in signs]
    share = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert permutation_p_value([unit * d for d in differences]) == pytest.approx(share)


@pytest.mark.parametrize(("won", "lost"), [(9, 1), (1, 9), (30, 12), (22, 20), (5, 0), (0, 0)])
def test_of_one_sample_per_problem_it_is_mcnemars_exact_test(won, lost):
    """Of ten coins at most one tail, twice: 22 / 1024."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    differences = [1] * won + [-1] * lost + [0] * 5
    assert permutation_p_value(differences) == pytest.approx(min(1, 2 * tail))
    assert 0 < permutation_p_value([1] * 1076) < 1e-300  # 2^-1075, which no float holds
    assert permutation_p_value([1] * 9 + [-1]) == pytest.approx(22 / 1024)
