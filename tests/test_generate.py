"""redi/eval/generate.py against transformers' generate, a loop without a cache, and the definition
of nucleus sampling."""

import math
from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redi.attention import packed_attention
from redi.checkpoint import load_model
from redi.eval import generate as engine
from redi.eval.generate import Generated, Request, Sampling, generate, sample

GREEDY = Sampling(temperature=0.0)
LONGEST = 24  # new tokens
PROMPTS = [
    tuple(np.random.default_rng(length).integers(0, 320, length).tolist())
    for length in (1, 2, 5, 5, 9, 17, 30, 44)
]


@pytest.fixture(scope="module")
def folder(save_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_qwen2(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """In fp64, so that no argmax hangs on the order of additions."""
    return load_model(folder)[0].double()


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    monkeypatch.setattr(engine, "GROWTH", 4)  # the cache grows many times


@torch.no_grad()
def next_logits(model, tokens: tuple[int, ...]) -> Tensor:
    """Logits (V,) after `tokens`, from a forward pass over all of them."""
    length = len(tokens)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, torch.tensor([0, length]), [length])

    hidden = model.model(torch.tensor(tokens), torch.arange(length), repeat(attend))
    return hidden[-1] @ model.output_weight.T


@pytest.fixture(scope="module")
def uncached(model) -> dict[tuple, list[int]]:
    """The greedy continuation of every prompt, token by token without a cache."""
    continuations = {}
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(LONGEST):
            tokens.append(next_logits(model, tuple(tokens)).argmax().item())
        continuations[prompt] = tokens[len(prompt) :]
    return continuations


def cut(key: int, tokens: list[int], limit: int, stop_ids: set[int]) -> Generated:
    """What a request gives whose unlimited continuation is `tokens`."""
    tokens = tokens[:limit]
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return Generated(key, tokens[:position], position + 1, "stop")
    return Generated(key, tokens, limit, "length")


def by_key(results) -> list[Generated]:
    return sorted(results, key=lambda result: result.key)


def requests_for(prompts, limit: int = LONGEST) -> list[Request]:
    return [Request(key, prompt, limit) for key, prompt in enumerate(prompts)]


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("slots", [8, 3, 1])
@pytest.mark.parametrize("num_stops", [0, 1, 3])
def test_greedy_tokens_equal_transformers(save_qwen2, folder, tmp_path, slots, num_stops):
    theirs = save_qwen2(tmp_path)  # the same seed: the same weights as `folder`
    mine, _ = load_model(folder)

    def their_tokens(prompt, stop_ids):
        whole = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=stop_ids or None,
            pad_token_id=0,
        )
        return whole[0, len(prompt) :].tolist()

    # Stop at tokens that come up: at the third of one prompt, the tenth of another, ...
    places = [(0, 2), (4, 9), (6, 14)][:num_stops]
    stop_ids = [their_tokens(PROMPTS[row], [])[place] for row, place in places]
    results = by_key(generate(mine, requests_for(PROMPTS), stop_ids, GREEDY, slots))
    for prompt, result in zip(PROMPTS, results):
        expected = their_tokens(prompt, stop_ids)
        stopped = expected[-1] in stop_ids
        assert result.token_ids == (expected[:-1] if stopped else expected)
        assert result.num_tokens == len(expected)
        assert result.finish_reason == ("stop" if stopped else "length")
    assert {"stop"} <= {result.finish_reason for result in results} or not stop_ids


@pytest.mark.parametrize("slots", [1, 3, 8, 100])
def test_cached_generation_equals_uncached(model, uncached, slots):
    results = by_key(generate(model, requests_for(PROMPTS), [], GREEDY, slots))
    assert [result.token_ids for result in results] == [uncached[prompt] for prompt in PROMPTS]


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, LONGEST)), min_size=1, max_size=24
    ),
    slots=st.sampled_from([1, 2, 3, 5, 8, 16, 33, 48, 100]),
    stops=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, LONGEST - 1)), max_size=4),
)
def test_every_schedule_gives_the_uncached_answers(model, uncached, wanted, slots, stops):
    """Any mix of prompts, limits and stop tokens, through any number of slots."""
    stop_ids = {uncached[prompt][place] for prompt, place in stops}
    asked = [Request(key, prompt, limit) for key, (prompt, limit) in enumerate(wanted)]
    results = by_key(generate(model, asked, list(stop_ids), GREEDY, slots))
    assert results == [
        cut(request.key, uncached[request.prompt_ids], request.max_new_tokens, stop_ids)
        for request in asked
    ]


@pytest.mark.parametrize("slots", [32, 48])
def test_slots_are_refilled_before_all_are_free(model, uncached, slots, monkeypatch):
    """With 32 slots prompts are admitted two at a time: neither one by one nor at the end."""
    admitted = []
    prefill = engine._Engine.prefill

    def counting(self, requests):
        admitted.append((len(requests), len(self.live)))
        return prefill(self, requests)

    monkeypatch.setattr(engine._Engine, "prefill", counting)
    limits = [1 + i % 11 for i in range(3 * slots)]
    asked = [Request(i, PROMPTS[i % 8], limit) for i, limit in enumerate(limits)]
    results = by_key(generate(model, asked, [], GREEDY, slots))
    assert [r.token_ids for r in results] == [
        uncached[r.prompt_ids][: r.max_new_tokens] for r in asked
    ]
    assert sum(count for count, _ in admitted) == len(asked)
    assert all(count + live <= slots for count, live in admitted)
    assert all(live > 0 for _, live in admitted[1:])
    assert all(count >= slots // 16 for count, _ in admitted[:-1])


def test_a_first_token_that_stops_gives_an_empty_answer(model, uncached):
    prompt = PROMPTS[4]
    [result] = generate(model, [Request(7, prompt, 5)], [uncached[prompt][0]], GREEDY, 4)
    assert result == Generated(7, [], 1, "stop")


def test_a_stop_at_the_limit_is_a_stop(model, uncached):
    prompt = PROMPTS[0]
    first = next(i for i in range(LONGEST) if uncached[prompt].index(uncached[prompt][i]) == i)
    [result] = generate(
        model, [Request(0, prompt, first + 1)], [uncached[prompt][first]], GREEDY, 1
    )
    assert result.finish_reason == "stop"


def test_one_prefill_serves_the_samples_of_a_prompt(model, uncached, monkeypatch):
    tokens = []
    forward = type(model.model).forward

    def counting(self, *arguments):
        tokens.append(len(arguments[0]))
        return forward(self, *arguments)

    monkeypatch.setattr(type(model.model), "forward", counting)
    limits = [1, 3, 24, 3]
    asked = [Request(key, PROMPTS[6], limit) for key, limit in enumerate(limits)]
    results = by_key(generate(model, asked, [], GREEDY, 4))
    assert tokens[0] == len(PROMPTS[6])
    assert [r.token_ids for r in results] == [uncached[PROMPTS[6]][:limit] for limit in limits]


def test_a_step_computes_fewer_than_twice_the_live_rows_once_nothing_waits(model, monkeypatch):
    rows = []
    forward = type(model.model).forward

    def counting(self, *arguments):
        rows.append(len(arguments[0]))
        return forward(self, *arguments)

    monkeypatch.setattr(type(model.model), "forward", counting)
    asked = [Request(limit, PROMPTS[1], limit) for limit in range(1, 17)]
    list(generate(model, asked, [], GREEDY, 16))
    decoded = rows[1:]  # the first pass is the prefill; step i then serves limits above i
    assert len(decoded) == 15
    assert all(live <= n < 2 * live + 2 for n, live in zip(decoded, range(15, 0, -1)))
    assert decoded[-1] == 1


@pytest.mark.parametrize(
    "request_",
    [
        Request(3, (1,) * 100, 29),  # the context is 128
        Request(3, (1,) * 129, 1),
        Request(3, (), 5),
        Request(3, (1, 2), 0),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(model, request_):
    with pytest.raises(ValueError, match="request 3"):
        next(generate(model, [Request(0, (1,), 1), request_], [], GREEDY, 2))


def test_a_request_may_fill_the_context(model):
    [result] = generate(model, [Request(0, (1,) * 100, 28)], [], GREEDY, 1)
    assert result.num_tokens == 28


def test_no_requests_give_no_results(model):
    assert list(generate(model, [], [0], GREEDY, 4)) == []


def test_the_model_is_left_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(generate(model, requests_for(PROMPTS, 3), [], GREEDY, 3))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------- sampling


HOT = Sampling(temperature=1.0, top_p=0.95, seed=1)


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_who_shares_the_batch_does_not_change_a_sampled_answer(model, slots):
    asked = [Request(100 + i, PROMPTS[i % 8], 4 + i % 9) for i in range(20)]
    alone = [next(generate(model, [request], [5], HOT, 1)) for request in asked]
    assert by_key(generate(model, asked, [5], HOT, slots)) == alone
    assert by_key(generate(model, asked[::-1], [5], HOT, slots)) == alone
    assert by_key(generate(model, asked[3::4], [5], HOT, slots)) == alone[3::4]


def test_answers_depend_on_the_seed_and_the_key_and_on_nothing_else(model):
    asked = [Request(key, PROMPTS[2], LONGEST) for key in range(6)]
    first = by_key(generate(model, asked, [], HOT, 6))
    torch.manual_seed(1), np.random.seed(1)
    assert by_key(generate(model, asked, [], HOT, 6)) == first
    assert len({tuple(result.token_ids) for result in first}) == 6
    other = by_key(generate(model, asked, [], Sampling(1.0, 0.95, seed=2), 6))
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other))


def test_a_longer_limit_goes_on_from_the_shorter_ones_answer(model):
    [short] = generate(model, [Request(0, PROMPTS[2], 5)], [], HOT, 1)
    [long] = generate(model, [Request(0, PROMPTS[2], 20)], [], HOT, 1)
    assert long.token_ids[:5] == short.token_ids


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


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_tokens_drawn_are_those_of_the_nucleus(temperature, top_p):
    """Small whole logits, so many ties; a grid of uniforms finds every token that can be drawn."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (8, 12)).astype(float)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for row in rows:
        logits = torch.tensor(row, dtype=torch.float32).expand(len(grid), -1)
        drawn = sample(logits, grid, Sampling(temperature, top_p))
        drawn = drawn.bincount(minlength=12) / len(grid)
        expected = nucleus(row.tolist(), temperature, top_p)
        assert set(drawn.nonzero()[:, 0].tolist()) == set(expected)
        for token, share in expected.items():
            assert abs(drawn[token].item() - share) < 2 / len(grid)


@pytest.mark.parametrize("logits", [[0.0] * 4, [0.0] * 8])
def test_a_mass_that_is_reached_exactly_keeps_no_further_token(logits):
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sample(torch.tensor(logits).expand(1000, -1), grid, Sampling(1.0, top_p=0.5))
    assert set(drawn.tolist()) == set(range(len(logits) // 2))


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
def test_the_nucleus_is_as_transformers_cuts_it(top_p):
    from transformers import TopPLogitsWarper

    logits = torch.randn(16, 320, generator=torch.Generator().manual_seed(0)) * 2
    theirs = TopPLogitsWarper(top_p)(None, logits.clone()).isfinite()
    for row, expected in zip(logits, theirs):
        assert set(expected.nonzero()[:, 0].tolist()) == set(nucleus(row.tolist(), 1.0, top_p))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_of_the_nucleus(uniform):
    logits = torch.tensor([[5.0, 4.0, 3.0, -100.0, float("-inf")]])
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert sample(logits, uniforms, Sampling(1.0, 0.95)).item() in (0, 1, 2)
    assert sample(logits, uniforms, Sampling(1.0, 1.0)).item() != 4


def test_a_token_is_drawn_from_where_its_share_begins_up_to_where_it_ends():
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.7, 0.75], dtype=torch.float64)
    drawn = sample(torch.zeros(6, 4), uniforms, Sampling(1.0, 1.0))
    assert drawn.tolist() == [0, 0, 1, 2, 2, 3]


def chi_square(counts: dict[int, int], expected: dict[int, float]) -> tuple[float, float]:
    """(the statistic, its mean plus five standard deviations)."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    terms = [(counts.get(i, 0) - total * p) ** 2 / (total * p) for i, p in expected.items()]
    freedom = len(expected) - 1
    return sum(terms), freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.5), (0.6, 0.95), (1.0, 1.0)])
def test_draws_follow_the_nucleus_distribution(temperature, top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1.5
    uniforms = torch.from_numpy(np.random.default_rng(0).random(50_000))
    drawn = sample(logits.expand(50_000, -1), uniforms, Sampling(temperature, top_p))
    tokens, counts = drawn.unique(return_counts=True)
    expected = nucleus(logits.tolist(), temperature, top_p)
    statistic, limit = chi_square(dict(zip(tokens.tolist(), counts.tolist())), expected)
    assert statistic < limit


@pytest.mark.parametrize("position", [0, 1])
def test_the_samples_of_a_prompt_follow_the_models_distribution(model, position):
    """Requests draw from streams of their own: over many keys they must look independent."""
    sampling = Sampling(temperature=0.6, top_p=0.6, seed=42)
    prompt = PROMPTS[2]
    asked = [Request(key, prompt, position + 1) for key in range(2000)]
    answers = [result.token_ids for result in generate(model, asked, [], sampling, 2000)]
    expected: dict[int, float] = {}
    first = nucleus(next_logits(model, prompt).tolist(), 0.6, 0.6)
    if position == 0:
        expected = first
    else:
        for token, share in first.items():
            after = nucleus(next_logits(model, (*prompt, token)).tolist(), 0.6, 0.6)
            for second, conditional in after.items():
                expected[second] = expected.get(second, 0.0) + share * conditional
    # Rare tokens together, so that every count is expected to be five at least.
    rare = {token for token, share in expected.items() if share * len(asked) < 5}
    expected = {t: s for t, s in expected.items() if t not in rare} | (
        {-1: sum(expected[t] for t in rare)} if rare else {}
    )
    counts: dict[int, int] = {}
    for answer in answers:
        token = -1 if answer[position] in rare else answer[position]
        counts[token] = counts.get(token, 0) + 1
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit


def test_temperature_zero_takes_the_first_of_the_highest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample(logits, torch.tensor([0.9, 0.9]), GREEDY).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_generate_too(folder, dtype):
    mine = load_model(folder)[0].to(dtype)
    results = list(generate(mine, requests_for(PROMPTS, 6), [], HOT, 3))
    assert sorted(result.key for result in results) == list(range(len(PROMPTS)))
    assert {result.num_tokens for result in results} == {6}
