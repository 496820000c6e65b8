"""redi/eval/engine/kernel_steps.py, what decoding does on CUDA, against what it does on a CPU.

Without CUDA the kernel runs in Triton's interpreter or is its torch twin, and a recording is played
back by calling the function again: rows, fillings, tables and inputs are those of the device.
"""

import numpy as np
import pytest
import torch

from redi.checkpoint.folder import load_model
from redi.eval.engine import cache
from redi.eval.engine.cache import Cache
from redi.eval.engine.decoder import Decoder
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling

kernel_steps = pytest.importorskip(
    "redi.eval.engine.kernel_steps", reason="triton is not installed"
)
from redi.eval.engine.decode_kernel import decode_attention_reference  # noqa: E402

SIZES = (1, 2, 4, 8)
HOT = Sampling(temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def model(save_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_qwen2(folder)
    return load_model(folder)[0].double()


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Decoding as on CUDA; how often each recording was played back."""
    made = []

    def again(run, device):
        output, number = run(), len(made)
        made.append(0)

        def play():
            made[number] += 1
            output.copy_(run())

        return output, play

    monkeypatch.setattr(cache, "PAGE", 4)
    monkeypatch.setattr(cache, "uses_kernel", lambda device: True)
    monkeypatch.setattr(kernel_steps, "SIZES", SIZES)
    monkeypatch.setattr(kernel_steps, "record", again)
    return made


@pytest.fixture
def twin(monkeypatch):
    """In float64, whose products Triton's interpreter would round."""
    monkeypatch.setattr(kernel_steps, "decode_attention", decode_attention_reference)


def uneven(count: int, longest: int = 40) -> list[Request]:
    """Prompts of 1 to 30 tokens, two samples each, and 1 to `longest` new ones."""
    rng = np.random.default_rng(count)
    requests = []
    for key in range(count):
        if key % 2 == 0:
            prompt = tuple(rng.integers(0, 320, rng.integers(1, 31)).tolist())
        requests.append(Request(key, prompt, int(rng.integers(1, longest + 1))))
    return requests


def answers(model, requests, slots, budget=None, usage=None):
    found = generate(model, requests, [7], HOT, slots, budget, usage)
    return sorted(found, key=lambda result: result.key)


# ---------------------------------------------------------------- whole generations


@pytest.mark.parametrize("slots", [3, 8, 13])
def test_the_answers_are_those_of_the_cpu(model, recorded, twin, slots, monkeypatch):
    """Full and half-full sizes, and with 13 slots steps that are too large for any."""
    with monkeypatch.context() as plain:
        plain.setattr(cache, "uses_kernel", lambda device: False)
        expected = answers(model, uneven(30), slots)
    assert not recorded
    usage = Usage()
    assert answers(model, uneven(30), slots, usage=usage) == expected
    assert len(recorded) == sum(size < 2 * min(slots, 8) for size in SIZES)  # each size once
    assert all(recorded)
    if slots <= SIZES[-1]:
        assert sum(recorded) == usage.steps
    else:
        assert 0 < sum(recorded) < usage.steps


def test_rows_that_wait_for_pages_come_to_the_same_end(model, recorded, twin):
    expected, usage = answers(model, uneven(30), 8), Usage()
    config = model.config
    one = 4 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 8
    assert answers(model, uneven(30), 8, 30 * one, usage) == expected
    assert usage.evictions > 10


def test_steps_of_a_model_in_training_are_not_recorded(model, recorded, twin, monkeypatch):
    expected = answers(model, uneven(10), 4)
    made = len(recorded)
    monkeypatch.setattr(kernel_steps, "FSDPModule", type(model))
    assert answers(model, uneven(10), 4) == expected
    assert len(recorded) == made > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model lies on the CPU")
def test_the_answers_with_the_kernel_itself(save_qwen2, tmp_path, recorded):
    save_qwen2(tmp_path)
    model = load_model(tmp_path)[0]
    found = answers(model, uneven(5, 8), 3)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(cache, "uses_kernel", lambda device: False)
        assert answers(model, uneven(5, 8), 3) == found
    assert sum(recorded) > 4


# ---------------------------------------------------------------- a step


def steps_of(model, lengths: list[int]):
    """Steps over rows whose keys and values are random; whatever is nobody's is far from them."""
    kept = Cache(model.config, model.output_weight, 60, None, 10, 40)
    for tensor in (*kept.keys, *kept.values):
        tensor.fill_(1e6)
    draw = torch.Generator().manual_seed(0)
    for row, length in enumerate(lengths):
        kept.lengthen(row, length)
        for tensor in (*kept.keys, *kept.values):
            pages = kept.pages_of(row)
            tensor[pages] = torch.randn(len(pages), *tensor.shape[1:], generator=draw).double()
    return kernel_steps.KernelSteps(kept, Decoder(model))


@torch.inference_mode()
def test_a_step_that_is_filled_up_writes_its_rows_tokens_and_the_spare_page(model, recorded, twin):
    lengths = [5, 8, 1, 12, 3]
    steps = steps_of(model, lengths)
    before = [tensor.clone() for tensor in (*steps.cache.keys, *steps.cache.values)]
    found = steps.logits([3, 0, 4], [11, 12, 13])
    assert found.shape == (3, 320)
    places = {(steps.cache.table[row, lengths[row] // 4], lengths[row] % 4) for row in (3, 0, 4)}
    spare = len(steps.cache.owners)
    assert len(before[0]) == spare + 1
    for now, then in zip((*steps.cache.keys, *steps.cache.values), before):
        changed = (now != then).any(dim=3).any(dim=1).nonzero().tolist()
        assert {tuple(place) for place in changed} == places | {(spare, 0)}


@torch.inference_mode()
def test_what_fills_a_step_up_changes_no_number(model, recorded, twin, monkeypatch):
    """The spare row's keys and values may be anything."""
    expected = steps_of(model, [5, 8, 1]).logits([0, 1, 2], [11, 12, 13])
    steps = steps_of(model, [5, 8, 1])
    for tensor in (*steps.cache.keys, *steps.cache.values):
        tensor[-1] = -1e7
    assert torch.equal(steps.logits([0, 1, 2], [11, 12, 13]), expected)
    monkeypatch.setattr(kernel_steps, "SIZES", ())
    alone = steps_of(model, [5, 8, 1]).logits([0, 1, 2], [11, 12, 13])
    torch.testing.assert_close(expected, alone, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_the_devices_table_learns_of_every_change(model, recorded, twin):
    """Pages that a row takes, gives back, or hands to another row."""
    steps = steps_of(model, [4, 8, 1])
    pages = steps.cache
    for rows in ([0, 1, 2], [1, 2]):
        steps.logits(rows, [9] * len(rows))
        for row in rows:
            own = pages.pages_of(row)
            assert steps.table[row, : len(own)].tolist() == own.tolist()
        if 0 in rows:
            pages.release(0)
            pages.lengthen(5, 7)
            pages.rename(1, 0)
            pages.rename(0, 1)
    pages.rename(5, 0)
    steps.logits([0], [9])
    assert steps.table[0, :2].tolist() == pages.pages_of(0).tolist()
    assert (steps.table[pages.spare_row] == len(pages.owners)).all()
