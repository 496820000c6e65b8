"""engine/generate.py against transformers' generate, a loop without a cache, and the definition
of nucleus sampling."""

from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import chi_square, nucleus
from torch import Tensor

from redi.attention import packed_attention
from redi.checkpoint.folder import load_model
from redi.eval.engine import cache
from redi.eval.engine.decoder import Decoder
from redi.eval.engine.generate import Generated, Request, Usage, generate
from redi.eval.engine.sampling import Sampling

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
def small_pages(monkeypatch):
    monkeypatch.setattr(cache, "PAGE", 4)  # every row has many


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


@pytest.mark.parametrize("slots", [32, 48, 64])
def test_a_free_row_is_refilled_at_once(model, uncached, slots):
    """With 64 slots prompts are admitted two at a time: neither one by one nor at the end."""
    limits = [1 + i % 11 for i in range(3 * slots)]
    asked = [Request(i, PROMPTS[i % 8], limit) for i, limit in enumerate(limits)]
    usage = Usage()
    results = by_key(generate(model, asked, [], GREEDY, slots, usage=usage))
    assert [r.token_ids for r in results] == [
        uncached[r.prompt_ids][: r.max_new_tokens] for r in asked
    ]
    assert usage.full_row_steps >= (0.98 if slots < 64 else 0.96) * slots * usage.full_steps > 0
    assert usage.row_steps == sum(limits) - len(limits)  # a first token comes from the prefill
    assert usage.evictions == 0


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


@pytest.mark.parametrize("slots", [4, 3, 2, 1])
def test_one_prefill_serves_the_samples_of_a_prompt(model, uncached, slots):
    """Also those that are admitted later: their prompt is kept until the last has begun."""
    limits = [1, 3, 24, 3, 9]
    asked = [Request(key, PROMPTS[6], limit) for key, limit in enumerate(limits)]
    asked += [Request(10 + key, PROMPTS[7], limit) for key, limit in enumerate(limits)]
    usage = Usage()
    results = by_key(generate(model, asked, [], GREEDY, slots, usage=usage))
    assert usage.prefilled_tokens == len(PROMPTS[6]) + len(PROMPTS[7])
    assert [r.token_ids for r in results] == [
        uncached[r.prompt_ids][: r.max_new_tokens] for r in asked
    ]


def test_a_step_computes_the_live_rows_and_no_others(model, monkeypatch):
    rows = []
    logits = Decoder.logits

    def counting(self, tokens, *rest):
        rows.append(len(tokens))
        return logits(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "logits", counting)
    asked = [Request(limit, PROMPTS[1], limit) for limit in range(1, 17)]
    list(generate(model, asked, [], GREEDY, 16))
    assert rows == list(range(15, 0, -1))  # step i serves limits above i


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_generate_too(folder, dtype):
    mine = load_model(folder)[0].to(dtype)
    results = list(generate(mine, requests_for(PROMPTS, 6), [], HOT, 3))
    assert sorted(result.key for result in results) == list(range(len(PROMPTS)))
    assert {result.num_tokens for result in results} == {6}
