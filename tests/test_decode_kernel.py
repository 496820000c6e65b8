"""The Triton decode kernel against its torch twin in float64, and in place of the CPU's path.

On a machine without CUDA it runs under Triton's interpreter (see conftest.py), in fp32 and fp16:
it has no bf16 arithmetic.
"""

import numpy as np
import pytest
import torch

from redi.checkpoint import load_model
from redi.eval import cache
from redi.eval.generate import Request, generate
from redi.eval.sampling import Sampling

kernel = pytest.importorskip("redi.eval.decode_kernel", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def problem(lengths: list[int], heads: int, kv_heads: int, size: int, page: int, dtype):
    """Pages in random order; those of no row, and the ends of last pages, hold NaN."""
    draw = torch.Generator().manual_seed(sum(lengths))
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=draw).tolist()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    keys = torch.full((len(order), kv_heads, page, size), float("nan"))
    values = keys.clone()
    for row, (length, count) in enumerate(zip(lengths, counts)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own)
        for number, place in enumerate(own):
            filled = min(page, length - number * page)
            for tensor in (keys, values):
                fresh = torch.randn(kv_heads, filled, size, generator=draw)
                tensor[place, :, :filled] = fresh
    query = torch.randn(len(lengths), heads, size, generator=draw)
    tensors = [t.to(DEVICE, dtype) for t in (query, keys, values)]
    return *tensors, table.to(DEVICE), torch.tensor(lengths, device=DEVICE)


@dtypes
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
@pytest.mark.parametrize("programs", [1, 8, 1024])
def test_decode_attention_equals_its_twin_in_float64(
    lengths, heads, kv_heads, size, page, dtype, programs, monkeypatch
):
    """With one split a row, several, and as many as there are tiles."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    query, keys, values, table, rows = problem(lengths, heads, kv_heads, size, page, dtype)
    out = kernel.decode_attention(query, keys, values, table, rows)
    wide = [t.nan_to_num().double() for t in (query, keys, values)]
    right = kernel.decode_attention_reference(*wide, table, rows)
    assert out.dtype == dtype
    within = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(out.double(), right, rtol=within, atol=within)


def test_sharp_scores_do_not_overflow():
    query, keys, values, table, rows = problem([150, 70], 4, 2, 16, 8, torch.float32)
    out = kernel.decode_attention(query * 1e3, keys, values, table, rows)
    wide = [t.nan_to_num().double() for t in (query * 1e3, keys, values)]
    right = kernel.decode_attention_reference(*wide, table, rows)
    # Scores of thousands are rounded to some 1e-4 in fp32, and so are the weights.
    torch.testing.assert_close(out.double(), right, rtol=2e-3, atol=2e-3)


def test_the_engine_generates_the_same_with_the_kernel(save_qwen2, tmp_path, monkeypatch):
    """What cache.py does on CUDA."""
    save_qwen2(tmp_path)
    model = load_model(tmp_path)[0]
    rng = np.random.default_rng(0)
    asked = [Request(i, tuple(rng.integers(0, 320, 3 + 9 * i).tolist()), 6) for i in range(5)]
    expected = {r.key: r for r in generate(model, asked, [], Sampling(), 3)}
    used = []

    def attend(query, keys, values, step):
        used.append(len(query))
        return kernel.decode_attention(query, keys, values, step.table, step.lengths)

    monkeypatch.setattr(cache, "_attend", attend)
    assert {r.key: r for r in generate(model, asked, [], Sampling(), 3)} == expected
    assert used
