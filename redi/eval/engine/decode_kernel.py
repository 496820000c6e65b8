"""One new token per row over keys and values in pages: flash decoding in Triton, for CUDA.

    row of 200 tokens, 2 splits      program 0: tokens 0 .. 127     the softmax's parts, and
    in tiles of 64                   program 1: tokens 128 .. 199   log-sum-exps; a second kernel
                                                                    adds them up

A program handles a row, a kv head and a split of the row's tokens, and holds the queries of the
whole group, so keys and values are read once. There are enough splits to fill the machine, since
few rows of long texts would leave it idle. A row is split by its own length, so the launch depends
on no length and can be captured in a CUDA graph. Left out: autotuning. Never run on a GPU yet.
Letters: B rows, R rows of the table, N pages, M pages of a row of the table, H heads, K kv heads,
G = H / K, d head size, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens that a program looks at at a time
# Programs of a launch: a large GPU holds about a thousand at a time, and where rows differ in
# length four times as many end more evenly.
PROGRAMS = 4096
MOST_SPLITS = 128


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Tensor, lengths: Tensor
) -> Tensor:
    """query (B, H, d); keys, values (N, K, PAGE, d); table (R, M) int64; rows, lengths (B,) int64
    -> (B, H, d).

    Query b attends to the first lengths[b] tokens, at least 1, that lie in pages table[rows[b]].
    Scores are scaled by d ** -0.5. Keys, values and the table are contiguous.
    """
    batch, heads, size = query.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    tiles = triton.cdiv(table.shape[1] * page, TILE)  # of the longest possible row
    splits = max(1, min(tiles, MOST_SPLITS, PROGRAMS // (batch * kv_heads)))
    parts = query.new_empty(batch, heads, splits, size, dtype=torch.float32)
    log_sums = query.new_empty(batch, heads, splits, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(size))
    tensors = (query.contiguous(), keys, values, table, rows, lengths, parts, log_sums)
    _split[(batch, kv_heads, splits)](
        *tensors,
        size**-0.5,
        table.shape[1],
        splits,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),  # the least that tl.dot takes
        SIZE=size,
        WIDTH=width,
        PAGE=page,
        TILE=TILE,
        num_warps=4,
        # Tiles in flight. Compiled for sm_90 with d = 128, a program takes 38,912 bytes of shared
        # memory in bf16, and 73,728 in fp32 with one tile. Every GPU from sm_80 on has 101,376.
        num_stages=2 if query.element_size() <= 2 else 1,
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    most = triton.next_power_of_2(splits)
    _add_up[(batch * heads,)](
        parts, log_sums, out, splits, SPLITS=most, SIZE=size, WIDTH=width, num_warps=4
    )
    return out


@triton.jit
def _split(
    query,
    keys,
    values,
    table,
    rows,
    lengths,
    parts,
    log_sums,
    scale,
    table_width,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of a row, for the queries of a kv head: mean of its values, log of its mass."""
    row = tl.program_id(0).to(tl.int64)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    member, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)  # member: query head of the group
    head = (row * KV_HEADS + kv_head) * GROUP + member  # index into (B, H)
    inside = (member[:, None] < GROUP) & (columns[None, :] < SIZE)
    q = tl.load(query + head[:, None] * SIZE + columns[None, :], mask=inside, other=0.0)
    row_pages = table + tl.load(rows + row) * table_width

    # ---- softmax over the split's tokens, with a running maximum
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE  # tokens of a split
    start, end = split * share, tl.minimum((split + 1) * share, length)
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, end, TILE):
        token = first + tl.arange(0, TILE)
        exists = token < end
        page = tl.load(row_pages + token // PAGE, mask=exists, other=0).to(tl.int64)
        token_index = (page * KV_HEADS + kv_head) * PAGE + token % PAGE  # into (N, K, PAGE)
        offsets = token_index[:, None] * SIZE + columns[None, :]
        inside_tile = exists[:, None] & (columns[None, :] < SIZE)
        k = tl.load(keys + offsets, mask=inside_tile, other=0.0)
        v = tl.load(values + offsets, mask=inside_tile, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (ROWS, TILE)
        scores = tl.where(exists[None, :], scores, -float("inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))  # finite: the tile's first token exists
        shrink, weights = tl.exp(maximum - larger), tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = larger

    # ---- a split past the end of the row has a log-sum of -inf and writes no part
    index = head * splits + split  # into (B, H, S)
    if start < length:
        tl.store(log_sums + index, maximum + tl.log(total), mask=member < GROUP)
        tl.store(parts + index[:, None] * SIZE + columns[None, :], summed / total[:, None], inside)
    else:
        tl.store(log_sums + index, tl.full((ROWS,), -float("inf"), tl.float32), member < GROUP)


@triton.jit
def _add_up(
    parts, log_sums, out, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """The parts of a head of a row, weighted by the softmax mass of each."""
    head = tl.program_id(0).to(tl.int64)
    split, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    index = head * splits + split
    log_sum = tl.load(log_sums + index, mask=split < splits, other=-float("inf"))
    mass = tl.exp(log_sum - tl.max(log_sum, 0))  # 0 where there is no part; the first split has one
    written = (mass > 0.0)[:, None] & (columns[None, :] < SIZE)
    part = tl.load(parts + index[:, None] * SIZE + columns[None, :], mask=written, other=0.0)
    value = tl.sum(part * mass[:, None], 0) / tl.sum(mass, 0)
    tl.store(out + head * SIZE + columns, value.to(out.dtype.element_ty), mask=columns < SIZE)
