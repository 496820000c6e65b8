"""Attention over a pack of documents, ours over the other ways to write it on a CPU (C7).

    python -m bench.attention          about two minutes on one core

12 documents of uneven lengths, 4096 tokens, 12 query and 2 kv heads of size 64, fp32, one thread:
forward and backward, through redi.attention.packed_attention and through

    dense mask      one call over the whole pack with a block-causal mask; the mask is made once
    padded batch    a batch of documents padded to the longest, is_causal; making it and cutting
                    the padding out again are inside the clock

Both get enable_gqa, or keys and values repeated beforehand: the faster one counts; `full causal`
(no documents: other numbers, the quadratic work that a mask hides) is shown for scale. The outputs
and gradients of all but the last are compared in the same run; a difference ends it.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import interleave, ratios, result, write
from redi.attention import packed_attention
from redi.tables import text_table

T, H, K, D = 4096, 12, 2, 64
LENGTHS = [96, 128, 160, 192, 224, 256, 304, 352, 416, 496, 608, 864]  # of traces, over 25
ROUNDS = 7
OURS, DENSE, PADDED, FULL = "ours", "dense mask", "padded batch", "full causal"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, H, d), k, v (T, K, d) -> (T, H, d)


# ---------------------------------------------------------------- variants


def attend(query: Tensor, key: Tensor, value: Tensor, repeat: bool, **how) -> Tensor:
    """(..., heads, L, d) with K kv heads. repeat: copy them for the H query heads beforehand."""
    if repeat:
        key, value = (t.repeat_interleave(H // K, dim=-3) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=not repeat, **how)


def whole_pack(query: Tensor, key: Tensor, value: Tensor, repeat: bool, **how) -> Tensor:
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, heads, T, d)
    return attend(*parts, repeat, **how)[0].transpose(0, 1)


def padded_batch(query: Tensor, key: Tensor, value: Tensor, repeat: bool) -> Tensor:
    def pad(part: Tensor) -> Tensor:  # (S, heads, longest, d)
        return torch.nn.utils.rnn.pad_sequence(part.split(LENGTHS), True).transpose(1, 2)

    output = attend(pad(query), pad(key), pad(value), repeat, is_causal=True).transpose(1, 2)
    return torch.cat([rows[:length] for rows, length in zip(output, LENGTHS)])


def variants() -> dict[str, Attend]:
    lengths = torch.tensor(LENGTHS)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    document = torch.arange(len(LENGTHS)).repeat_interleave(lengths)  # (T,)
    mask = (document[:, None] == document[None, :]).tril()  # (T, T) bool
    found: dict[str, Attend] = {
        OURS: partial(packed_attention, cu_seqlens=cu_seqlens, lengths=LENGTHS)
    }
    for repeat in (False, True):
        suffix = ", repeated" if repeat else ", gqa"
        found[DENSE + suffix] = partial(whole_pack, repeat=repeat, attn_mask=mask)
        found[PADDED + suffix] = partial(padded_batch, repeat=repeat)
    return found | {FULL: partial(whole_pack, repeat=False, is_causal=True)}


# ---------------------------------------------------------------- measures


def step(run: Attend, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output (T, H, d) and the gradients of query, key and value."""
    output = run(*given)
    return [output.detach(), *torch.autograd.grad(output, given, upstream)]


def compare(found: dict[str, Attend], given: list[Tensor], upstream: Tensor) -> None:
    """Raises AssertionError unless all agree with ours, each tensor by its relative norm."""
    expected = step(found[OURS], given, upstream)
    for name, run in found.items():
        if name != FULL:
            for part, a, b in zip(
                ("output", "dq", "dk", "dv"), step(run, given, upstream), expected
            ):
                error = ((a - b).norm() / b.norm()).item()
                assert error < 1e-5, f"{name}: {part} differs from ours by {error:.1e}"


def main() -> None:
    torch.set_num_threads(1)
    assert sum(LENGTHS) == T
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(T, heads, D, generator=draw).requires_grad_() for heads in (H, K, K)]
    upstream = torch.randn(T, H, D, generator=draw)
    found = variants()
    compare(found, given, upstream)
    seconds = interleave(
        {name: partial(step, run, given, upstream) for name, run in found.items()}, ROUNDS
    )
    rows = [("forward and backward", "user ms", "system ms", "/ ours")]
    for name, rounds in seconds.items():
        user = statistics.median(s.user for s in rounds) * 1e3
        system = statistics.median(s.system for s in rounds) * 1e3
        ratio = f"{statistics.median(ratios(rounds, seconds[OURS])):.1f}"
        rows.append((name, f"{user:.0f}", f"{system:.0f}", ratio))
    print(text_table(rows))
    results = {}
    for name, peer, goal in (("C7", DENSE, 8.0), ("C7_padded", PADDED, 4.0)):
        forms = [name for name in found if name.startswith(peer)]
        fastest = min(forms, key=lambda v: statistics.median(s.total for s in seconds[v]))
        results[name] = result(ratios(seconds[fastest], seconds[OURS]), goal, fastest)
    write("attention", results)


if __name__ == "__main__":
    main()
