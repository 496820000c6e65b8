"""engine/sampling.py against the definition of the nucleus: in plain Python, by a full sort."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import (
    Sampling,
    by_sorting,
    invert,
    random_numbers,
    refused,
    sample,
    token_weights,
)


def defined_nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """By the definition: the fewest most probable tokens that hold top_p of the mass (of equally
    probable ones the first), and their shares of it."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept: list[int] = []
    while sum(weights[i] for i in kept) < top_p * sum(weights) - 1e-9:
        kept.append(order[len(kept)])
    mass = sum(weights[i] for i in kept)
    return {i: weights[i] / mass for i in kept}


def assert_follows(counts: dict[int, int], expected: dict[int, float]) -> None:
    """Chi-square is under its mean plus five standard deviations."""
    assert set(counts) <= set(expected)
    total, freedom = sum(counts.values()), len(expected) - 1
    terms = [(counts.get(i, 0) - total * p) ** 2 / (total * p) for i, p in expected.items()]
    assert sum(terms) < freedom + 5 * math.sqrt(2 * freedom)


def numbers(count: int, seed: int = 0, position: int = 0, attempt: int = 0) -> Tensor:
    return random_numbers(seed, np.arange(count), np.full(count, position), attempt)


def kept(weights: Tensor, top_p: float) -> Tensor:
    """weights (V,) -> (V,) bool: the tokens that `refused` lets pass."""
    tokens = torch.arange(len(weights))
    passing = torch.ones(len(weights), dtype=torch.bool)
    passing[refused(weights.expand(len(weights), -1), tokens, top_p)] = False
    return passing


# ---------------------------------------------------------------- which tokens


def rows_of(kind: str, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Logits (count, size)."""
    if kind == "smooth":
        rows = rng.normal(0, rng.uniform(0.1, 6, (count, 1)), (count, size))
    elif kind == "ties":  # a handful of values, so nearly every token shares its own
        rows = rng.integers(-3, 4, (count, size)) * rng.uniform(0.2, 2, (count, 1))
    else:  # flat: masses that are reached exactly
        rows = np.zeros((count, size))
        if kind == "flat tail":  # a few tokens stand out of a level that the edge runs through
            rows[:, ::17] = rng.normal(2, 2, rows[:, ::17].shape)
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("kind", ["smooth", "ties", "flat tail", "flat"])
def test_the_kept_set_is_that_of_the_full_sort(kind):
    """10,000 rows in all four kinds, every token of each: none is kept or refused wrongly."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    for top_p in (0.05, 0.5, 0.75, 0.9, 0.95):
        for row in token_weights(rows_of(kind, 500, 200, rng), 0.6):
            ordered, order = row.double().sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            expected = torch.zeros(len(row), dtype=torch.bool)
            expected[order] = before < top_p * ordered.sum()
            assert torch.equal(kept(row, top_p), expected)


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
def test_the_kept_set_is_as_transformers_cuts_it(top_p):
    from transformers import TopPLogitsWarper

    logits = torch.randn(16, 320, generator=torch.Generator().manual_seed(0)) * 2
    theirs = TopPLogitsWarper(top_p)(None, logits.clone()).isfinite()
    for weights, expected in zip(token_weights(logits, 1.0), theirs):
        assert torch.equal(kept(weights, top_p), expected)


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize(
    ("temperature", "top_p", "size"),
    [(0.6, 0.95, 100), (1.0, 0.5, 200), (1.0, 1.0, 64), (1.7, 0.1, 120), (1.7, 0.95, 30)],
)
def test_a_million_draws_follow_the_nucleus_distribution(temperature, top_p, size):
    """At top_p 0.1 two fifths of them by a sort, after eight refused draws."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * 1.5
    counts, keys = Counter(), np.arange(20_000)
    for position in range(50):
        rows, positions = logits.expand(len(keys), -1).clone(), np.full_like(keys, position)
        counts.update(sample(rows, keys, positions, Sampling(temperature, top_p, seed=0)))
    assert_follows(counts, defined_nucleus(logits.tolist(), temperature, top_p))


def test_the_samples_of_a_prompt_follow_the_models_distribution(qwen2):
    """Every request has its own random numbers: over many keys they must look independent."""
    peer, model, _ = qwen2
    prompt, temperature, top_p = (5, 9, 200, 33, 7), 0.6, 0.6
    requests = [Request(key, prompt, 2) for key in range(2000)]
    results = list(generate(model, requests, [], Sampling(temperature, top_p, seed=42), 2000))

    def following(*tokens: int) -> Counter[int]:
        logits = peer(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        return Counter(defined_nucleus(logits.tolist(), temperature, top_p))

    first, second = following(), Counter()
    for token, share in first.items():
        second.update({b: share * conditional for b, conditional in following(token).items()})
    for expected, drawn in zip((first, second), zip(*(result.token_ids for result in results))):
        counts = Counter(drawn)
        # Rare tokens together, so that every count is expected to be five at least.
        rare = [token for token, share in expected.items() if share * len(requests) < 5]
        for tally in (counts, expected):
            together = sum(tally.pop(token, 0) for token in rare)
            tally.update({-1: together} if together else {})
        assert_follows(counts, expected)


@pytest.mark.parametrize("uniform", [2.0**-54, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_mass(uniform):
    weights = token_weights(torch.tensor([[-1e4, 5.0, 4.0, 3.0, float("-inf")]]), 1.0)
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert invert(weights, uniforms).item() in (1, 2, 3)
    assert by_sorting(weights, uniforms, 0.5).item() == 1  # the nucleus is this token alone


def test_sharp_logits_have_no_denormal_weights():
    weights = token_weights(torch.randn(4, 1000) * 1000, 0.6)
    assert weights.min() > torch.finfo(torch.float32).tiny


def test_temperature_zero_takes_the_first_of_the_highest():
    logits, both = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]]), np.arange(2)
    assert sample(logits, both, both, Sampling(0.0)) == [1, 0]


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize("vary", ["seed", "key", "position", "attempt"])
def test_random_numbers_look_independent_along_every_part_of_their_name(vary):
    """Each third of the unit interval as often as the others, for neighbors and in pairs."""
    count = 90_000
    if vary == "key":
        values = numbers(count, seed=5)
    elif vary == "position":
        values = random_numbers(5, np.zeros(count, dtype=np.int64), np.arange(count))
    else:
        values = torch.cat([numbers(1, **{vary: number}) for number in range(count // 10)])
    thirds = (values * 3).long()
    pairs = (3 * thirds[:-1] + thirds[1:]).bincount(minlength=9)
    assert_follows(dict(enumerate(pairs.tolist())), dict.fromkeys(range(9), 1 / 9))
    assert len(values.unique()) == len(values)
    assert 0 < values.min() < values.max() < 1


def test_no_two_names_share_a_number():
    """Small seeds, keys, positions and attempts, in every combination."""
    names = itertools.product(range(8), range(16), range(4))
    found = torch.cat([numbers(64, *name) for name in names])
    assert len(found.unique()) == 8 * 64 * 16 * 4
