"""The engine's logits are the training forward's, whatever the memory."""

from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redi.attention import packed_attention
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.eval.engine import cache
from redi.eval.engine import generate as engine
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling

HOT = Sampling(temperature=1.0, top_p=0.95, seed=1)
CONTEXT = 128


@pytest.fixture(scope="module")
def model(save_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_qwen2(folder, max_position_embeddings=CONTEXT)
    return load_model(folder)[0]


@pytest.fixture(scope="module")
def double(model):
    import copy

    return copy.deepcopy(model).double()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(cache, "PAGE", 4)


def page_bytes(model) -> int:
    config, dtype = model.config, model.output_weight.dtype
    return 4 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


@torch.no_grad()
def training_logits(model, tokens: list[int]) -> Tensor:
    """(L, V) from the training forward over the whole text."""
    length = len(tokens)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, torch.tensor([0, length]), [length])

    hidden = model.model(torch.tensor(tokens), torch.arange(length), repeat(attend))
    return hidden @ model.output_weight.T


def uneven(count: int, seed: int = 0, longest: int = CONTEXT) -> list[Request]:
    """Prompts of 1 to 40 tokens, three samples each, and up to `longest` new ones."""
    rng = np.random.default_rng(seed)
    requests = []
    for key in range(count):
        if key % 3 == 0:
            prompt = tuple(rng.integers(0, 320, rng.integers(1, 41)).tolist())
        limit = int(rng.integers(1, min(longest, CONTEXT - len(prompt)) + 1))
        requests.append(Request(key, prompt, limit))
    return requests


@pytest.fixture
def seen(monkeypatch) -> dict[tuple[int, int], Tensor]:
    """(key, position) -> the logits (V,) that the engine drew from."""
    logits_of: dict[tuple[int, int], Tensor] = {}
    sample = engine.sample

    def recording(logits, draws, sampling):
        for row, name in zip(logits.clone(), zip(draws.keys.tolist(), draws.positions.tolist())):
            assert name not in logits_of, "a token was drawn twice"
            logits_of[name] = row
        return sample(logits, draws, sampling)

    monkeypatch.setattr(engine, "sample", recording)
    return logits_of


# ---------------------------------------------------------------- logits and memory


@pytest.mark.parametrize("pages", [None, 110, 60])
def test_logits_are_the_training_forwards_along_whole_generations(model, seen, pages):
    """Through refills; and with few pages through evictions, more than a hundred of them."""
    asked, usage = uneven(150), Usage()
    budget = None if pages is None else pages * page_bytes(model)
    results = list(generate(model, asked, [], HOT, 16, budget, usage))
    assert sorted(result.key for result in results) == list(range(150))
    for result in results:
        prompt = asked[result.key].prompt_ids
        right = training_logits(model, [*prompt, *result.token_ids])[len(prompt) - 1 : -1]
        found = torch.stack([seen[result.key, place] for place in range(result.num_tokens)])
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(seen) == sum(result.num_tokens for result in results)
    if pages is None:
        assert usage.evictions == 0
    else:
        assert usage.evictions >= 100


@pytest.mark.parametrize("pages", [33, 47, 64, 200])
def test_the_memory_given_is_never_exceeded(model, pages, monkeypatch):
    made = []
    new = engine.Cache.__init__

    def recording(self, *arguments):
        new(self, *arguments)
        made.append(self)

    monkeypatch.setattr(engine.Cache, "__init__", recording)
    budget = pages * page_bytes(model) + 5
    for _ in generate(model, uneven(20), [], HOT, 8, budget):
        [kept] = made
        tensors = [*kept.keys, *kept.values]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) <= budget
        owned = kept.owners >= 0
        assert owned.sum() + len(kept.free) == len(kept.owners) == min(pages, len(kept.owners))
        assert not owned[kept.free].any()
    assert kept.used == 0  # every page is given back


def test_a_budget_that_the_longest_request_does_not_fit_is_refused(model):
    asked = [Request(0, (1,) * 10, 91)]
    list(generate(model, asked, [], HOT, 4, 26 * page_bytes(model)))
    with pytest.raises(UserError, match="101 tokens"):
        next(generate(model, asked, [], HOT, 4, 26 * page_bytes(model) - 1))


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 16),
    slots=st.sampled_from([1, 2, 5, 16, 64]),
    pages=st.integers(32, 120),
    seed=st.integers(0, 1000),
)
def test_neither_slots_nor_memory_change_an_answer(double, count, slots, pages, seed):
    asked = uneven(count, seed)
    expected = {result.key: result for result in generate(double, asked, [7], HOT, count)}
    found = generate(double, asked, [7], HOT, slots, pages * page_bytes(double))
    assert {result.key: result for result in found} == expected


def test_samples_in_single_precision_do_not_depend_on_the_batch(model):
    """Rounding differs with the batch's shape; over 200 requests it changes no token drawn."""
    asked = uneven(200, longest=24)
    expected = {result.key: result for result in generate(model, asked, [7], HOT, 200)}
    budget = 70 * page_bytes(model)
    for slots, memory in ((1, None), (7, None), (32, budget)):
        found = generate(model, asked[::-1], [7], HOT, slots, memory)
        assert {result.key: result for result in found} == expected


def test_the_oldest_row_is_never_evicted(model):
    """So that there is progress however little memory there is."""
    asked = [Request(key, (1, 2, 3), CONTEXT - 3) for key in range(6)]
    usage = Usage()
    results = list(generate(model, asked, [], HOT, 6, 40 * page_bytes(model), usage))
    assert [result.key for result in results] == list(range(6))
    assert usage.evictions > 0


def test_pages_that_were_never_written_may_hold_anything(model, monkeypatch):
    """0 x NaN is NaN: what fresh memory holds must not come near a row's values."""
    new = engine.Cache.__init__

    def poisoned(self, *arguments):
        new(self, *arguments)
        for tensor in (*self.keys, *self.values):
            tensor.fill_(float("nan"))

    asked = uneven(12)
    expected = {result.key: result for result in generate(model, asked, [], HOT, 4)}
    monkeypatch.setattr(engine.Cache, "__init__", poisoned)
    assert {result.key: result for result in generate(model, asked, [], HOT, 4)} == expected


# ---------------------------------------------------------------- loops
