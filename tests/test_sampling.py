"""engine/sampling.py against the definition of the nucleus: in plain Python, by a full sort."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from redi.eval.engine import sampling
from redi.eval.engine.sampling import (
    Draws,
    Sampling,
    by_sorting,
    invert,
    mass_before,
    refused,
    sample,
    token_weights,
)


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """By the definition: the fewest most probable tokens that hold top_p of the mass, and their
    share of it. Of equally probable tokens the first."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept: list[int] = []
    while sum(weights[i] for i in kept) < top_p * sum(weights) - 1e-9:
        kept.append(order[len(kept)])
    mass = sum(weights[i] for i in kept)
    return {i: weights[i] / mass for i in kept}


def chi_square(counts: dict[int, int], expected: dict[int, float]) -> tuple[float, float]:
    """(the statistic, its mean plus five standard deviations)."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    terms = [(counts.get(i, 0) - total * p) ** 2 / (total * p) for i, p in expected.items()]
    freedom = len(expected) - 1
    return sum(terms), freedom + 5 * math.sqrt(2 * freedom)


def draws(count: int, seed: int = 0, position: int = 0) -> Draws:
    return Draws(seed, np.arange(count), np.full(count, position))


def all_kept(weights: Tensor, top_p: float) -> Tensor:
    """weights (V,) -> (V,) bool: the tokens that `refused` lets pass."""
    tokens = torch.arange(len(weights))
    kept = torch.ones(len(weights), dtype=torch.bool)
    kept[refused(weights.expand(len(weights), -1), tokens, top_p)] = False
    return kept


# ---------------------------------------------------------------- which tokens


def rows_of(kind: str, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Logits (count, size)."""
    if kind == "smooth":
        rows = rng.normal(0, rng.uniform(0.1, 6, (count, 1)), (count, size))
    elif kind == "ties":  # a handful of values, so nearly every token shares its own
        rows = rng.integers(-3, 4, (count, size)) * rng.uniform(0.2, 2, (count, 1))
    elif kind == "flat tail":  # a few tokens stand out of a level that the edge runs through
        rows = np.zeros((count, size))
        rows[:, ::17] = rng.normal(2, 2, rows[:, ::17].shape)
    else:  # flat: masses that are reached exactly
        rows = np.zeros((count, size))
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
            assert torch.equal(all_kept(row, top_p), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_kept_set_is_that_of_the_definition(temperature, top_p):
    """In plain Python, over whole logits that tie."""
    rows = np.random.default_rng(0).integers(-2, 3, (40, 12)).astype(float)
    for row in rows:
        weights = token_weights(torch.tensor(row[None]), temperature)[0]
        kept = all_kept(weights, top_p).nonzero()[:, 0].tolist()
        assert set(kept) == set(nucleus(row.tolist(), temperature, top_p))


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
def test_the_kept_set_is_as_transformers_cuts_it(top_p):
    from transformers import TopPLogitsWarper

    logits = torch.randn(16, 320, generator=torch.Generator().manual_seed(0)) * 2
    theirs = TopPLogitsWarper(top_p)(None, logits.clone()).isfinite()
    for weights, expected in zip(token_weights(logits, 1.0), theirs):
        assert torch.equal(all_kept(weights, top_p), expected)


def test_the_worked_example_of_the_module():
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    before = [mass_before(weights, torch.tensor([i])).item() for i in range(3)]
    assert before == pytest.approx([0, 0.5, 0.8])
    logits = weights.log().expand(160_000, -1).clone()
    counts = sample(logits, draws(160_000), Sampling(1.0, 0.7)).bincount(minlength=3).tolist()
    assert counts[2] == 0
    assert counts[0] == pytest.approx(100_000, abs=1000)


@pytest.mark.parametrize("size", [4, 8])
def test_a_mass_that_is_reached_exactly_keeps_no_further_token(size):
    drawn = sample(torch.zeros(1000, size), draws(1000), Sampling(1.0, top_p=0.5))
    assert set(drawn.tolist()) == set(range(size // 2))


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize(
    ("temperature", "top_p", "size"),
    [(0.6, 0.95, 100), (1.0, 0.5, 200), (1.0, 1.0, 64), (1.0, 0.3, 65), (1.7, 0.95, 30)],
)
def test_a_million_draws_follow_the_nucleus_distribution(temperature, top_p, size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * 1.5
    counts = torch.zeros(size, dtype=torch.int64)
    for position in range(50):
        rows = logits.expand(20_000, -1).clone()
        drawn = sample(rows, draws(20_000, position=position), Sampling(temperature, top_p))
        counts += drawn.bincount(minlength=size)
    found = {token: count for token, count in enumerate(counts.tolist()) if count}
    statistic, limit = chi_square(found, nucleus(logits.tolist(), temperature, top_p))
    assert statistic < limit


def test_draws_by_sorting_follow_the_nucleus_distribution():
    """What a small top_p comes down to when eight draws were refused."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    weights = token_weights(logits[None].clone(), 1.0).expand(100_000, -1)
    drawn = by_sorting(weights, draws(100_000).uniforms(0), 0.3).bincount(minlength=50)
    found = {token: count for token, count in enumerate(drawn.tolist()) if count}
    statistic, limit = chi_square(found, nucleus(logits.tolist(), 1.0, 0.3))
    assert statistic < limit


@pytest.mark.parametrize("size", [1, 5, 64, 65, 128, 300])
def test_inversion_finds_the_token_where_the_share_falls(size):
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(size)) + 0.1
    ends = weights.double().cumsum(1)[0] / weights.double().sum()
    starts = torch.cat([torch.zeros(1), ends[:-1]])
    for share in (0.001, 0.5, 0.999):  # a little after the start, the middle, before the end
        uniforms = starts + share * (ends - starts)
        assert invert(weights.expand(size, -1), uniforms).tolist() == list(range(size))


@pytest.mark.parametrize("uniform", [2.0**-54, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_mass(uniform):
    weights = token_weights(torch.tensor([[-1e4, 5.0, 4.0, 3.0, float("-inf")]]), 1.0)
    assert invert(weights, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 2, 3)


def test_sharp_logits_have_no_denormal_weights():
    weights = token_weights(torch.randn(4, 1000) * 1000, 0.6)
    assert weights.min() > torch.finfo(torch.float32).tiny


def test_temperature_zero_takes_the_first_of_the_highest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample(logits, draws(2), Sampling(0.0)).tolist() == [1, 0]


# ---------------------------------------------------------------- random numbers


def test_a_row_draws_the_same_whoever_shares_the_batch():
    logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    keys, positions = np.arange(40) * 7, np.arange(40) % 5
    together = sample(logits.clone(), Draws(1, keys, positions), Sampling())
    for row in range(40):
        own = Draws(1, keys[row : row + 1], positions[row : row + 1])
        assert sample(logits[row : row + 1].clone(), own, Sampling()).item() == together[row]


@pytest.mark.parametrize("vary", ["seed", "key", "position", "attempt"])
def test_uniforms_look_independent_along_every_part_of_their_name(vary):
    """Each third of the unit interval as often as the others, for neighbours and in pairs."""
    count = 90_000
    numbers = {"seed": np.zeros, "key": np.zeros, "position": np.zeros}
    name = {part: make(count, dtype=np.int64) for part, make in numbers.items()}
    if vary in ("key", "position"):
        name[vary] = np.arange(count)
        values = Draws(5, name["key"], name["position"]).uniforms(0)
    elif vary == "seed":
        values = torch.cat([draws(1, seed=seed).uniforms(0) for seed in range(count // 10)])
    else:
        values = torch.cat([draws(1).uniforms(attempt) for attempt in range(count // 10)])
    thirds = (values * 3).long()
    pairs = (3 * thirds[:-1] + thirds[1:]).bincount(minlength=9)
    found = dict(enumerate(pairs.tolist()))
    statistic, limit = chi_square(found, dict.fromkeys(range(9), 1 / 9))
    assert statistic < limit
    assert len(values.unique()) == len(values)
    assert 0 < values.min() < values.max() < 1


def test_no_two_names_share_a_number():
    """Small seeds, keys, positions and attempts, in every combination."""
    numbers = [
        Draws(seed, np.arange(64), np.full(64, position)).uniforms(attempt)
        for seed in range(8)
        for position in range(16)
        for attempt in range(4)
    ]
    assert len(torch.cat(numbers).unique()) == 8 * 64 * 16 * 4


def test_refused_draws_are_drawn_again_and_at_last_sorted(monkeypatch):
    """At top_p 0.01 hardly a draw is accepted: the sort must finish what eight attempts leave."""
    sorted_rows = []

    def counting(weights, *rest):
        sorted_rows.append(len(weights))
        return by_sorting(weights, *rest)

    monkeypatch.setattr(sampling, "by_sorting", counting)
    logits = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0)) * 0.1
    drawn = sample(logits.clone(), draws(100), Sampling(1.0, 0.01))
    assert sorted_rows[0] > 80
    for row, token in zip(logits, drawn.tolist()):
        assert token in nucleus(row.tolist(), 1.0, 0.01)
