"""G3: attention over a pack of 32,768 tokens, 12 query and 2 kv heads of size 128, bf16.

Forward and backward through redi.attention.packed_attention and through

    flex         torch's flex_attention, compiled, with a document-causal block mask, which is made
                 beforehand
    raw op       torch's varlen_attn as it is, without our function around it
    dense mask   one call with a block-causal mask, over 8,192 tokens only, for scale

    G3            flex over ours                     G3_overhead   ours over the raw op
    G3_dense_8k   dense mask over ours, 8k tokens    G3_tflops     7 * H * d * sum L^2 a second

torch 2.11 has no enable_gqa in varlen_attn: ours gives every query head its own copy of keys and
values there. The raw op gets the two heads as they are if it takes them and is right, otherwise the
copies, made beforehand. Outputs and gradients of all are compared with ours in the same run; a
difference ends it. Letters: T packed tokens, H heads, K kv heads, d head size, S documents.
"""

import inspect
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_meter import Entries, interleave, relative_error
from bench.measure import result
from bench.plan import LONGEST_TRACE, MEDIAN_TRACE, draw
from redi.attention import packed_attention

TOKENS, DENSE_TOKENS = 32_768, 8192
HEADS = (12, 2, 128)  # H, K, d
ROUNDS, CALLS = 7, 4
SEED = 11  # its pack has sum L^2 / sum L = 9.4k, the law's own is 9.3k
OURS, FLEX, RAW, DENSE = "ours", "flex, compiled", "raw op", "dense mask"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, H, d), k, v (T, K, d) -> (T, H, d)


def pack_lengths(tokens: int, seed: int = SEED) -> list[int]:
    """Traces' lengths as they are drawn, the last cut so that all are `tokens` together."""
    drawn = draw(np.random.default_rng(seed), tokens // 200 + 1, MEDIAN_TRACE, LONGEST_TRACE)
    ends = np.minimum(drawn.cumsum(), tokens)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0].tolist()


# ---------------------------------------------------------------- variants


def documents(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens (S+1,) int32; the document of every token (T,)."""
    counts = torch.tensor(lengths, device=device)
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
    return cu_seqlens, torch.arange(len(lengths), device=device).repeat_interleave(counts)


def flex(lengths: list[int], device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, document = documents(lengths, device)

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    tokens = sum(lengths)
    mask = create_block_mask(may_see, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, heads, T, d)
        return compiled(*parts, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def raw(lengths: list[int], device: torch.device) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, _ = documents(lengths, device)
    longest = max(lengths)
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        grouped = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        where = (cu_seqlens, cu_seqlens, longest, longest)
        return varlen_attn(query, key, value, *where, window_size=(-1, 0), **grouped)

    return attend


def dense(lengths: list[int], device: torch.device) -> Attend:
    _, document = documents(lengths, device)
    mask = (document[:, None] == document[None, :]).tril()  # (T, T) bool

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        parts = (part.transpose(0, 1)[None] for part in (query, key, value))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask)[0].transpose(0, 1)

    return attend


def ours(lengths: list[int], device: torch.device) -> Attend:
    return partial(packed_attention, cu_seqlens=documents(lengths, device)[0], lengths=lengths)


# ---------------------------------------------------------------- measures


def inputs(tokens: int, heads: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """query (T, H, d), key and value (T, K, d), and the gradient from above (T, H, d)."""
    queries, keys, size = heads
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shapes = [(tokens, count, size) for count in (queries, keys, keys, queries)]
    *leaves, upstream = (torch.randn(s, dtype=torch.bfloat16, **on) for s in shapes)
    return [leaf.requires_grad_() for leaf in leaves] + [upstream]


def step(attend: Attend, given: list[Tensor]) -> list[Tensor]:
    """Output (T, H, d) and the gradients of query, key and value."""
    output = attend(*given[:3])
    return [output.detach(), *torch.autograd.grad(output, given[:3], given[3])]


def compare(mine: list[Tensor], theirs: list[Tensor], name: str) -> None:
    """Raises AssertionError unless they agree; both are rounded to bf16 on the way."""
    for part, a, b in zip(("output", "dq", "dk", "dv"), mine, theirs):
        error = relative_error(b, a)
        assert error < 2e-2, f"{name}: {part} differs from ours by {error:.1e}"


def with_copies(given: list[Tensor]) -> list[Tensor]:
    """The inputs with keys and values for every query head."""
    query, key, value, upstream = given
    group = query.shape[1] // key.shape[1]
    copies = (t.detach().repeat_interleave(group, dim=1).requires_grad_() for t in (key, value))
    return [query, *copies, upstream]


def raw_step(lengths: list[int], given: list[Tensor], mine: list[Tensor]) -> Callable[[], list]:
    """The raw op on the heads as they are if it can, else on copies of keys and values."""
    attend = raw(lengths, given[0].device)
    try:
        compare(mine, step(attend, given), RAW)
        return partial(step, attend, given)
    except (AssertionError, RuntimeError, ValueError) as error:
        print(f"the raw op does not take {HEADS[1]} kv heads here ({str(error)[:80]}): copies")
        copied = with_copies(given)
        compare(mine[:2], step(attend, copied)[:2], RAW)
        return partial(step, attend, copied)


def against_dense(
    device: torch.device, tokens: int, heads: tuple[int, int, int], rounds: int
) -> Entries:
    lengths, given = pack_lengths(tokens), inputs(tokens, heads, device)
    runs = {name: make(lengths, device) for name, make in ((OURS, ours), (DENSE, dense))}
    compare(*(step(attend, given) for attend in runs.values()), DENSE)
    runs = {name: partial(step, attend, given) for name, attend in runs.items()}
    seconds = interleave(runs, device, rounds)
    ratios = [theirs / mine for mine, theirs in zip(seconds[OURS], seconds[DENSE])]
    return {"G3_dense_8k": result(ratios, None, f"{DENSE}, {tokens:,} tokens")}


def run(
    device: torch.device,
    tokens: int = TOKENS,
    dense_tokens: int = DENSE_TOKENS,
    heads: tuple[int, int, int] = HEADS,
    rounds: int = ROUNDS,
) -> Entries:
    lengths, given = pack_lengths(tokens), inputs(tokens, heads, device)
    squares = sum(length**2 for length in lengths)
    print(f"documents: {lengths}, sum L^2 / sum L = {squares / tokens:,.0f}")
    attend = ours(lengths, device)
    mine = step(attend, given)
    runs = {OURS: partial(step, attend, given)}
    if device.type == "cuda":  # neither has a backward on a CPU
        runs[RAW] = raw_step(lengths, given, mine)
        compiled = flex(lengths, device)
        compare(mine, step(compiled, given), FLEX)
        runs[FLEX] = partial(step, compiled, given)
    seconds = interleave(runs, device, rounds, CALLS)
    flops = 7 * heads[0] * heads[2] * squares
    print(f"{'forward and backward':<22}{'ms':>9}{'TFLOP/s':>10}")
    for name, taken in seconds.items():
        typical = statistics.median(taken)
        print(f"{name:<22}{typical * 1e3:>9.2f}{flops / typical / 1e12:>10.0f}")
    rates = [flops / taken / 1e12 for taken in seconds[OURS]]
    found = {"G3_tflops": result(rates, None, "TFLOP/s, work of the documents alone")}
    if device.type == "cuda":
        pairs = list(zip(seconds[OURS], seconds[FLEX], seconds[RAW]))
        found["G3"] = result([theirs / own for own, theirs, _ in pairs], 1.15, FLEX)
        found["G3_overhead"] = result([own / bare for own, _, bare in pairs], 1.03, RAW)
    return found | against_dense(device, dense_tokens, heads, rounds)
