"""One new token a row over keys and values in pages: flash decoding in Triton, for CUDA.

    row of 200 tokens, 2 splits      program 0: tokens 0 .. 127     their softmax's parts, and
    of 128 tokens                    program 1: tokens 128 .. 199   log-sum-exps: added up at last

A program owns a row, a kv head and a split of the row's tokens. It holds the queries of the whole
group, so that keys and values are read once, and finds each token's page in the row's table. There
are as many splits as fill the machine: few rows of long texts would leave most of it idle.

Beside it stands the torch function it must equal; tests hold the two together under Triton's
interpreter. Left out: a kernel for adding the splits up (they are small), autotuning. Never run on
a GPU yet.
Letters: B rows, N pages, M pages of the longest row, H heads, K kv heads, G = H / K, d head size,
S splits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens that a program looks at at a time
PROGRAMS = 1024  # enough for every multiprocessor of a large GPU, several times


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    """query (B, H, d); keys, values (N, K, PAGE, d); table (B, M), lengths (B,) -> (B, H, d).

    Row b attends to its first lengths[b] tokens, at least 1; they lie in pages table[b]. Scores are
    scaled by d ** -0.5.
    """
    batch, heads, size = query.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    tiles = triton.cdiv(table.shape[1] * page, TILE)  # of the longest row
    splits = max(1, min(tiles, PROGRAMS // (batch * kv_heads)))
    tiles = triton.cdiv(tiles, splits)  # of a split
    parts = query.new_empty(batch, heads, splits, size, dtype=torch.float32)
    log_sums = query.new_empty(batch, heads, splits, dtype=torch.float32)
    _split[(batch, kv_heads, splits)](
        query.contiguous(),
        keys,
        values,
        table.contiguous(),
        lengths,
        parts,
        log_sums,
        size**-0.5,
        table.shape[1],
        splits,
        tiles,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),  # the least that tl.dot takes
        SIZE=size,
        WIDTH=max(16, triton.next_power_of_2(size)),
        PAGE=page,
        TILE=TILE,
    )
    shares = log_sums.softmax(dim=2)
    return (parts * shares[..., None]).sum(dim=2).to(query.dtype)


def decode_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    batch, _, size = query.shape
    keys, values = (
        t[table].transpose(1, 2).reshape(batch, keys.shape[1], -1, size) for t in (keys, values)
    )  # (B, K, M PAGE, d)
    seen = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]
    grouped = query.view(batch, keys.shape[1], -1, size)  # (B, K, G, d)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None])
    return out.reshape(query.shape)


@triton.jit
def _split(
    query,
    keys,
    values,
    table,
    lengths,
    parts,
    log_sums,
    scale,
    table_width,
    splits,
    tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    members = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    head = row * KV_HEADS * GROUP + kv_head * GROUP + members  # of all rows
    inside = (members[:, None] < GROUP) & (columns[None, :] < SIZE)
    q = tl.load(query + head[:, None] * SIZE + columns[None, :], mask=inside, other=0.0)

    # ---- softmax over the split's tokens, with a running maximum
    length = tl.load(lengths + row)
    start = split * tiles * TILE
    end = tl.minimum(start + tiles * TILE, length)
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, end, TILE):
        token = first + tl.arange(0, TILE)
        seen = token < end
        page = tl.load(table + row * table_width + token // PAGE, mask=seen, other=0).to(tl.int64)
        place = ((page * KV_HEADS + kv_head) * PAGE + token % PAGE) * SIZE
        there = seen[:, None] & (columns[None, :] < SIZE)
        k = tl.load(keys + place[:, None] + columns[None, :], mask=there, other=0.0)
        v = tl.load(values + place[:, None] + columns[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (ROWS, TILE)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))  # finite: a tile begins with a seen token
        shrink = tl.exp(maximum - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None]
        summed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = larger

    # ---- a split past the row's end has no tokens: its share will be exp(-inf)
    place = head * splits + split
    empty = total == 0.0
    log_sum = tl.where(empty, -float("inf"), maximum + tl.log(tl.where(empty, 1.0, total)))
    tl.store(log_sums + place, log_sum, mask=members < GROUP)
    share = summed / tl.where(empty, 1.0, total)[:, None]
    tl.store(parts + place[:, None] * SIZE + columns[None, :], share, mask=inside)
