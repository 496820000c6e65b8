"""The engine against transformers' generate, and against the training forward without a cache."""

import copy
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_run import HOT, answers, bytes_of_pages, random_requests
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.eval.engine import cache
from redi.eval.engine import generate as engine
from redi.eval.engine.generate import Generated, Request, Usage, generate
from redi.eval.engine.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
LONGEST = 24  # new tokens after PROMPTS
PROMPTS = [
    tuple(np.random.default_rng(length).integers(0, 320, length).tolist())
    for length in (1, 2, 5, 5, 9, 17, 30, 44)
]


@pytest.fixture(scope="module")
def single(qwen2):
    return qwen2[1]


@pytest.fixture(scope="module")
def model(qwen2):
    """In float64, so that no token depends on the order of additions."""
    return qwen2[2]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(cache, "PAGE", 4)  # every row has many


@torch.no_grad()
def forward_logits(model, tokens: list[int]) -> Tensor:
    """(L, V) from the training forward over the whole text."""
    length = len(tokens)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, torch.tensor([0, length]), [length])

    hidden = model.model(torch.tensor(tokens), torch.arange(length), repeat(attend))
    return hidden @ model.output_weight.T


@pytest.fixture(scope="module")
def uncached(qwen2) -> dict[tuple, list[int]]:
    """transformers' greedy continuation of every prompt, without a cache."""
    continuations = {}
    for prompt in PROMPTS:
        whole = qwen2[0].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=LONGEST,
            do_sample=False,
            use_cache=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuations[prompt] = whole[0, len(prompt) :].tolist()
    return continuations


def cut(key: int, tokens: list[int], limit: int, stop_ids: set[int]) -> Generated:
    """The result of a request whose unlimited continuation is `tokens`."""
    for position, token in enumerate(tokens[:limit]):
        if token in stop_ids:
            return Generated(key, tokens[:position], position + 1, "stop")
    return Generated(key, tokens[:limit], limit, "length")


@pytest.fixture
def passes(model):
    """Tokens of every pass over the layers."""
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


# ---------------------------------------------------------------- greedy


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, LONGEST)), min_size=1, max_size=24
    ),
    slots=st.sampled_from([1, 2, 3, 5, 8, 16, 33, 100]),
    stops=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, LONGEST - 1)), max_size=4),
    count=st.none() | st.integers(20, 60),
)
@example(wanted=[(PROMPTS[0], 5)], slots=4, stops=[(PROMPTS[0], 0)], count=None)  # empty answer
@example(wanted=[(PROMPTS[0], 2)], slots=4, stops=[(PROMPTS[0], 1)], count=None)  # stop at limit
def test_greedy_tokens_equal_transformers_without_a_cache_on_every_schedule(
    model, uncached, wanted, slots, stops, count
):
    """Any mix of prompts, limits and stop tokens, any number of slots and of pages."""
    stop_ids = {uncached[prompt][position] for prompt, position in stops}
    requests = [Request(key, prompt, limit) for key, (prompt, limit) in enumerate(wanted)]
    budget = count and bytes_of_pages(model, count)
    assert answers(model, requests, slots, GREEDY, list(stop_ids), budget) == [
        cut(request.key, uncached[request.prompt_ids], request.max_new_tokens, stop_ids)
        for request in requests
    ]


# ---------------------------------------------------------------- what is computed


@dataclass
class Steps(Usage):
    rows: list[int] = field(default_factory=list)
    full_rows: list[int] = field(default_factory=list)  # of steps while requests wait

    def count_step(self, rows: int, queued: bool) -> None:
        self.rows.append(rows)
        if queued:
            self.full_rows.append(rows)


@pytest.mark.parametrize(("slots", "least"), [(32, 0.98), (64, 0.96)])
def test_a_free_row_is_refilled_at_once(model, slots, least):
    """With 64 slots prompts are admitted two at a time: neither one by one nor at the end."""
    limits = [1 + i % 11 for i in range(3 * slots)]
    requests = [Request(i, PROMPTS[i % 8], limit) for i, limit in enumerate(limits)]
    steps = Steps()
    answers(model, requests, slots, GREEDY, usage=steps)
    assert np.mean(steps.full_rows) >= least * slots
    assert sum(steps.rows) == sum(limits) - len(limits)  # a first token comes from the prefill
    assert steps.evictions == 0


@pytest.mark.parametrize("slots", [4, 3, 2, 1])
def test_one_prefill_serves_the_samples_of_a_prompt(model, uncached, passes, slots):
    """Also those that are admitted later, even when all others have finished. A step computes the
    live rows and no others, and the model is left as it was."""
    limits, before = [1, 3, 24, 3, 9], copy.deepcopy(model.state_dict())
    requests = [Request(key, PROMPTS[6], limit) for key, limit in enumerate(limits)]
    requests += [Request(10 + key, PROMPTS[7], limit) for key, limit in enumerate(limits)]
    results = answers(model, requests, slots, GREEDY)
    decoded = sum(limit - 1 for limit in limits)
    assert sum(passes) == len(PROMPTS[6]) + len(PROMPTS[7]) + 2 * decoded
    for result, request in zip(results, requests, strict=True):
        assert result.token_ids == uncached[request.prompt_ids][: request.max_new_tokens]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------- logits and memory


@pytest.fixture
def drawn_from(monkeypatch) -> dict[tuple[int, int], Tensor]:
    """(key, position) -> the logits (V,) that the engine drew from."""
    logits_of: dict[tuple[int, int], Tensor] = {}
    sample = engine.sample

    def recording(logits, keys, positions, sampling):
        for row, name in zip(logits.clone(), zip(keys.tolist(), positions.tolist())):
            assert name not in logits_of, "a token was drawn twice"
            logits_of[name] = row
        return sample(logits, keys, positions, sampling)

    monkeypatch.setattr(engine, "sample", recording)
    return logits_of


@pytest.mark.parametrize("count", [None, 60])
def test_logits_are_the_training_forwards_along_whole_generations(single, drawn_from, count):
    """Through refills; and with few pages through evictions, more than a hundred of them."""
    requests, usage = random_requests(150), Usage()
    budget = count and bytes_of_pages(single, count)
    results = answers(single, requests, 16, budget=budget, usage=usage)
    assert [result.key for result in results] == list(range(150))
    for result in results:
        prompt = requests[result.key].prompt_ids
        expected = forward_logits(single, [*prompt, *result.token_ids])[len(prompt) - 1 : -1]
        found = [drawn_from[result.key, position] for position in range(result.num_tokens)]
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=1e-5)
    assert len(drawn_from) == sum(result.num_tokens for result in results)
    assert usage.evictions >= 100 if count else usage.evictions == 0


def test_samples_in_single_precision_do_not_depend_on_the_batch(single):
    """Neither on slots and memory nor on other requests: with one slot a request is alone. Rounding
    differs with the batch's shape; over 200 requests it changes no token drawn."""
    requests = random_requests(200, longest=24)
    expected = answers(single, requests, 200, stop_ids=[7])
    for slots, count in ((1, None), (32, 70)):
        budget = count and bytes_of_pages(single, count)
        assert answers(single, requests[::-1], slots, stop_ids=[7], budget=budget) == expected


@pytest.fixture
def caches(monkeypatch) -> list[cache.Cache]:
    """The caches that are made, each filled with numbers where it should be zeros."""
    found: list[cache.Cache] = []
    init = cache.Cache.__init__

    def filled(self, *arguments):
        init(self, *arguments)
        found.append(self)
        for tensor in (*self.keys, *self.values):
            assert not tensor.any()  # the ends of pages are multiplied by 0, and 0 x NaN is NaN
            tensor.fill_(1e4)

    monkeypatch.setattr(cache.Cache, "__init__", filled)
    return found


@pytest.mark.parametrize("count", [33, 64, 200])
def test_the_memory_given_is_never_exceeded_and_what_it_held_before_changes_nothing(
    single, count, request
):
    expected = answers(single, random_requests(20), 8)
    caches = request.getfixturevalue("caches")
    budget, found = bytes_of_pages(single, count) + 5, []
    for result in generate(single, random_requests(20), [], HOT, 8, budget):
        found.append(result)
        [only] = caches
        tensors = [*only.keys, *only.values]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) <= budget
        owned = [page for row in range(8) for page in only.row_pages(row)]
        assert sorted([*owned, *only.free]) == list(range(len(only.keys[0])))  # each page once
    assert len(only.free) == len(only.keys[0])
    assert sorted(found, key=lambda result: result.key) == expected


def test_the_oldest_row_is_never_evicted(single):
    """So there is progress however little memory there is."""
    requests, usage = [Request(key, (1, 2, 3), 125) for key in range(6)], Usage()
    results = generate(single, requests, [], HOT, 6, bytes_of_pages(single, 40), usage)
    assert [result.key for result in results] == list(range(6))
    assert usage.evictions > 0


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("prompt_length", "limit"),
    [(100, 29), (129, 1), (0, 5), (2, 0)],  # the context is 128
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(
    model, passes, prompt_length, limit
):
    requests = [Request(0, (1,), 1), Request(3, (1,) * prompt_length, limit)]
    with pytest.raises(ValueError, match="request 3"):
        next(generate(model, requests, [], GREEDY, 2))
    assert not passes


def test_a_request_may_fill_the_context_and_the_budget(single):
    requests = [Request(0, (1,) * 100, 28)]
    budget = bytes_of_pages(single, 32)
    assert answers(single, requests, 4, budget=budget)[0].num_tokens == 28
    with pytest.raises(UserError, match="128 tokens"):
        answers(single, requests, 4, budget=budget - 1)
    assert answers(single, [], 4) == []


def test_answers_depend_on_the_seed_and_the_key_and_on_nothing_else(model):
    requests = [Request(key, PROMPTS[2], LONGEST) for key in range(6)]
    first = answers(model, requests, 6)
    torch.manual_seed(1), np.random.seed(1)
    assert answers(model, requests, 6) == first
    assert len({tuple(result.token_ids) for result in first}) == 6
    other = answers(model, requests, 6, Sampling(1.0, 0.95, seed=2))
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other))
    short = answers(model, [Request(0, PROMPTS[2], 5)], 1)[0]  # a limit only cuts an answer
    assert first[0].token_ids[:5] == short.token_ids


def test_bfloat16_generates_too(single):
    results = answers(copy.deepcopy(single).bfloat16(), random_requests(8, longest=6), 3)
    assert [result.key for result in results] == list(range(8))
