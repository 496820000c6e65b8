"""The Triton decode kernel against its torch twin in float64.

On a machine without CUDA it runs under Triton's interpreter (see conftest.py), in fp32 and fp16:
it has no bf16 arithmetic.
"""

import pytest
import torch

kernel = pytest.importorskip("redi.eval.engine.decode_kernel", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


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
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own)
        for number, place in enumerate(own):
            filled = min(page, length - number * page)
            for tensor in (keys, values):
                fresh = torch.randn(kv_heads, filled, size, generator=draw)
                tensor[place, :, :filled] = fresh
    query = torch.randn(len(lengths), heads, size, generator=draw)
    tensors = [t.to(DEVICE, dtype) for t in (query, keys, values)]
    return *tensors, *(t.to(DEVICE) for t in (table, rows, torch.tensor(lengths)))


def in_float64(query, keys, values, table, rows, lengths):
    wide = [t.nan_to_num().double() for t in (query, keys, values)]
    table = table.where(table < len(keys), 0)
    return kernel.decode_attention_reference(*wide, table, rows, lengths)


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
@pytest.mark.parametrize("programs", [1, 8, 4096])
def test_decode_attention_equals_its_twin_in_float64(
    lengths, heads, kv_heads, size, page, dtype, programs, monkeypatch
):
    """With one split a row, several, and as many as there are tiles."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    given = problem(lengths, heads, kv_heads, size, page, dtype)
    out = kernel.decode_attention(*given)
    assert out.dtype == dtype
    within = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(out.double(), in_float64(*given), rtol=within, atol=within)


def test_sharp_scores_do_not_overflow():
    query, *rest = problem([150, 70], 4, 2, 16, 8, torch.float32)
    given = query * 1e3, *rest
    out = kernel.decode_attention(*given)
    # Scores of thousands are rounded to some 1e-4 in fp32, and so are the weights.
    torch.testing.assert_close(out.double(), in_float64(*given), rtol=2e-3, atol=2e-3)


def test_numbers_that_are_not_finite_show():
    """The engine looks for them in the logits: a split must not lose one."""
    query, keys, values, table, rows, lengths = problem([700], 4, 2, 16, 32, torch.float32)
    keys[table[rows[0], 20], :, 3] = float("nan")  # token 643
    assert kernel.decode_attention(query, keys, values, table, rows, lengths).isnan().all()
