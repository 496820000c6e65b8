"""Decoding on CUDA: the Triton kernel against torch in float64, and decode steps against those of a
CPU.

Without CUDA the kernel runs under Triton's interpreter (see conftest.py), in fp32 and fp16 since it
has no bf16 arithmetic, and a recorded step is replayed by calling the function again: rows,
padding, tables and inputs are those of the device.
"""

import pytest
import torch
import torch.nn.functional as F
from small_run import answers, bytes_of_pages, random_requests

from redi.eval.engine import cache
from redi.eval.engine.generate import Usage

kernel = pytest.importorskip("redi.eval.engine.decode_kernel", reason="triton is not installed")
from redi.eval.engine import kernel_steps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 2, 4, 8)
REQUESTS = random_requests(30, longest=40)


def reference(query, keys, values, table, rows, lengths):
    """decode_attention row by row: its pages in their order, without the end of the last one."""
    outputs = []
    for q, row, length in zip(query, rows, lengths.tolist()):
        pages = table[row, : -(-length // keys.shape[2])]
        k, v = (t[pages].transpose(0, 1).flatten(1, 2)[:, :length] for t in (keys, values))
        out = F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)
        outputs.append(out[0, :, 0])
    return torch.stack(outputs)


# ---------------------------------------------------------------- the kernel


def problem(lengths: list[int], heads: int, kv_heads: int, size: int, page: int, dtype):
    """Pages in random order; those of no row, and the ends of last pages, hold NaN. The rows are
    some of a larger table's, in another order; its other entries are no page's numbers."""
    draw = torch.Generator().manual_seed(sum(lengths))
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=draw).tolist()
    table = torch.full((len(lengths) + 2, max(counts) + 1), 10**9)
    rows = torch.randperm(len(table), generator=draw)[: len(lengths)]
    keys = torch.full((len(order), kv_heads, page, size), float("nan"))
    values = keys.clone()
    for row, length, count in zip(rows, lengths, counts):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages)
        for number, owned in enumerate(pages):
            filled = min(page, length - number * page)
            for tensor in (keys, values):
                tensor[owned, :, :filled] = torch.randn(kv_heads, filled, size, generator=draw)
    query = torch.randn(len(lengths), heads, size, generator=draw)
    tensors = [t.to(DEVICE, dtype) for t in (query, keys, values)]
    return *tensors, *(t.to(DEVICE) for t in (table, rows, torch.tensor(lengths)))


def assert_equals_float64(inputs, within: float) -> None:
    out = kernel.decode_attention(*inputs)
    query, keys, values, *rest = inputs
    assert out.dtype == query.dtype
    expected = reference(query.double(), keys.double(), values.double(), *rest)
    torch.testing.assert_close(out.double(), expected, rtol=within, atol=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size", "page"),
    [
        ([1], 2, 2, 16, 4),
        ([1, 5, 64, 65, 200], 4, 2, 16, 4),
        ([31, 32, 33], 12, 2, 64, 32),
        ([700, 1], 12, 2, 128, 32),
        ([100, 3], 6, 6, 24, 8),  # a head size that is no power of two
        ([130] * 3, 40, 2, 16, 64),  # a group larger than a tile of tl.dot
    ],
)
@pytest.mark.parametrize("programs", [1, 8, 4096])
def test_decode_attention_equals_torch_in_float64(
    lengths, heads, kv_heads, size, page, dtype, programs, monkeypatch
):
    """With one split per row, several, and as many as there are tiles."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    inputs = problem(lengths, heads, kv_heads, size, page, dtype)
    assert_equals_float64(inputs, 1e-5 if dtype == torch.float32 else 3e-3)


def test_sharp_scores_do_not_overflow():
    query, *rest = problem([150, 70], 4, 2, 16, 8, torch.float32)
    # Scores of thousands are rounded to some 1e-4 in fp32, and so are the weights.
    assert_equals_float64((query * 1e3, *rest), 2e-3)


def test_numbers_that_are_not_finite_show():
    """The engine looks for them in the logits: a split must not lose one."""
    query, keys, values, table, rows, lengths = problem([700], 4, 2, 16, 32, torch.float32)
    keys[table[rows[0], 20], :, 3] = float("nan")  # token 643
    assert kernel.decode_attention(query, keys, values, table, rows, lengths).isnan().all()


# ---------------------------------------------------------------- whole generations


@pytest.fixture
def model(qwen2):
    return qwen2[2]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Decode as on CUDA; how often each recorded step was replayed."""
    replays: list[int] = []

    def recorded(function, inputs):
        output, number = function(inputs), len(replays)
        replays.append(0)

        def replay(new):
            replays[number] += 1
            inputs.copy_(new)
            return output.copy_(function(inputs))

        return replay

    monkeypatch.setattr(cache, "PAGE", 4)
    monkeypatch.setattr(cache, "uses_kernel", lambda device: True)
    monkeypatch.setattr(kernel_steps, "SIZES", SIZES)
    monkeypatch.setattr(kernel_steps, "recorded", recorded)
    return replays


@pytest.fixture
def replays(as_on_cuda, monkeypatch):
    """The same with attention in float64, whose products Triton's interpreter would round."""
    monkeypatch.setattr(kernel_steps, "decode_attention", reference)
    return as_on_cuda


def cpu_answers(*arguments, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "uses_kernel", lambda device: False)
        return answers(*arguments, **settings)


@pytest.mark.parametrize(("slots", "num_pages"), [(3, None), (8, None), (13, None), (8, 40)])
def test_the_answers_are_those_of_the_cpu(model, replays, slots, num_pages):
    """With full and padded sizes; with steps too large for any, of 13 slots; with evictions. Each
    row's pages change with time, so a step that wrote to a page of another row would show."""
    expected, steps = cpu_answers(model, REQUESTS, slots, stop_ids=[7]), []
    assert not replays
    usage, budget = Usage(), num_pages and bytes_of_pages(model, num_pages)
    usage.count_step = lambda rows, queued: steps.append(rows)
    found = answers(model, REQUESTS, slots, stop_ids=[7], budget=budget, usage=usage)
    assert found == expected
    assert usage.evictions > 10 if num_pages else usage.evictions == 0
    assert len(replays) == sum(size < 2 * min(slots, 8) for size in SIZES)  # each size once
    assert all(replays)
    assert sum(replays) == sum(rows <= SIZES[-1] for rows in steps)


def test_steps_of_a_model_in_training_are_not_recorded(model, replays, monkeypatch):
    monkeypatch.setattr(kernel_steps, "FSDPModule", type(model))
    assert answers(model, REQUESTS[:10], 4) == cpu_answers(model, REQUESTS[:10], 4)
    assert not replays


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model is on the CPU")
def test_the_answers_with_the_kernel_itself(qwen2, as_on_cuda):
    requests = random_requests(4, longest=8)
    assert answers(qwen2[1], requests, 3) == cpu_answers(qwen2[1], requests, 3)
    assert sum(as_on_cuda) > 4
