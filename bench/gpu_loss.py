"""G1, G2: the head's loss and gradients at Qwen2.5's size, in milliseconds and in bytes.

R 32768 rows, D 1536, V 151936, bf16, signed token weights, forward and backward. The peers:

    Liger none   LigerFusedLinearCrossEntropyLoss(reduction="none"): signed weights, 4 matmuls
    Liger mean   the same with "mean": 3 matmuls, one weight for all tokens, no way to train REDI
    plain        logits in bf16, cross entropy in fp32, autograd; half the rows, for memory alone

    G1_ms, G1, G1_mean     weighted_logp_sum: milliseconds, over Liger none, over Liger mean
    G2_gib, G2             its peak, GiB, and over plain's, scaled to all rows
    *_token_logps          the two-pass kernel, shown beside

Bytes are counted over the inputs; both gradients, in bf16, are among them for everybody. Gradients
of ours and of Liger none are compared in the same run; a difference ends it. Letters: R rows, D
hidden, V vocabulary.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_meter import Entries, free, has, interleave, peak, relative_error
from bench.measure import result
from redi.logprobs import token_logps, weighted_logp_sum

R, D, V = 32_768, 1536, 151_936
ROUNDS = 7
DENSE_FLOPS = 790e12  # per second: a large bf16 matmul on an H200, measured
OURS, TWO_PASSES, LIGER, LIGER_MEAN = "weighted_logp_sum", "token_logps", "Liger none", "Liger mean"

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden (R, D), weight (V, D), targets, weights (R,)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# ---------------------------------------------------------------- variants


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    return weighted_logp_sum(hidden, weight, targets, token_weights)[0]


def two_passes(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    return token_logps(hidden, weight, targets) @ token_weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    loss = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    return -loss @ token_weights


def liger(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, reduction: str
) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, hidden, targets)
    return -loss.float() @ token_weights if reduction == "none" else loss


def losses(device: torch.device) -> dict[str, Loss]:
    found: dict[str, Loss] = {OURS: ours, TWO_PASSES: two_passes}
    if device.type == "cuda" and has("liger_kernel", "G1, G2"):
        found[LIGER] = partial(liger, reduction="none")
        found[LIGER_MEAN] = partial(liger, reduction="mean")
    return found


def inputs(rows: int, size: int, vocabulary: int, device: torch.device) -> Given:
    draw = torch.Generator(device).manual_seed(0)
    on = {"generator": draw, "device": device}
    hidden = torch.randn(rows, size, dtype=torch.bfloat16, **on)
    weight = torch.randn(vocabulary, size, dtype=torch.bfloat16, **on).mul_(size**-0.5)
    targets = torch.randint(vocabulary, (rows,), **on)
    token_weights = torch.randn(rows, **on) / rows
    return hidden.requires_grad_(), weight.requires_grad_(), targets, token_weights


def step(loss: Loss, given: Given) -> tuple[Tensor, ...]:
    """Forward and backward; the gradients are taken away, so that no step adds to another's."""
    return torch.autograd.grad(loss(*given), given[:2])


# ---------------------------------------------------------------- measures


def run(
    device: torch.device, rows: int = R, size: int = D, vocabulary: int = V, rounds: int = ROUNDS
) -> Entries:
    given = inputs(rows, size, vocabulary, device)
    found = losses(device)
    if LIGER in found:
        compare(step(found[OURS], given), step(found[LIGER], given))
    works = {name: partial(step, loss, given) for name, loss in found.items()}
    seconds = interleave(works, device, rounds)
    peaks = {name: peak(work, device)[0] for name, work in works.items()}
    del given, works
    free(device)
    half = inputs(rows // 2, size, vocabulary, device)
    everybody = half[1].numel() * half[1].element_size()  # dW, whatever the rows
    of_half = peak(partial(step, plain, half), device)[0]
    whole = everybody + (of_half - everybody) * rows / (rows // 2)
    flops = 3 * 2 * rows * size * vocabulary
    table(seconds, peaks, whole, flops)
    return times(seconds, flops) | bytes_(peaks, whole)


def compare(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless both gradients agree; Liger's logits and dW are bf16."""
    for part, a, b in zip(("d hidden", "d weight"), mine, theirs):
        error = relative_error(a, b)
        assert error < 3e-2, f"{part} differs from Liger's by {error:.1e}"


def table(seconds: dict[str, list[float]], peaks: dict[str, int], whole: float, flops: int) -> None:
    """TFLOP/s are those of three matmuls, for everybody."""
    print(f"{'forward and backward':<22}{'ms':>9}{'TFLOP/s':>10}{'of 790':>8}{'GiB':>8}")
    for name, taken in seconds.items():
        typical = statistics.median(taken)
        rate = flops / typical
        print(
            f"{name:<22}{typical * 1e3:>9.1f}{rate / 1e12:>10.0f}{rate / DENSE_FLOPS:>8.0%}"
            f"{peaks[name] / 2**30:>8.2f}"
        )
    print(f"{'plain, scaled':<22}{'':>27}{whole / 2**30:>8.2f}")


def times(seconds: dict[str, list[float]], flops: int) -> Entries:
    mine, double = seconds[OURS], seconds[TWO_PASSES]
    share = [flops / taken / DENSE_FLOPS for taken in mine]
    found = {
        "G1_ms": result([taken * 1e3 for taken in mine], 85.0, "milliseconds"),
        "G1_share": result(share, None, "790 TFLOP/s, three matmuls"),
        "G1_token_logps_ms": result([taken * 1e3 for taken in double], None, "milliseconds"),
    }
    for name, own, peer, goal in (
        ("G1", mine, LIGER, 0.75),
        ("G1_mean", mine, LIGER_MEAN, 1.0),
        ("G1_token_logps", double, LIGER, None),
    ):
        if peer in seconds:
            ratios = [a / b for a, b in zip(own, seconds[peer])]
            found[name] = result(ratios, goal, peer)
    return found


def bytes_(peaks: dict[str, int], whole: float) -> Entries:
    found = {
        "G2_gib": result([peaks[OURS] / 2**30], 2.8, "GiB, gradients included"),
        "G2": result([peaks[OURS] / whole], 0.10, "plain, scaled from half the rows"),
        "G2_token_logps_gib": result([peaks[TWO_PASSES] / 2**30], None, "GiB"),
    }
    if LIGER in peaks:
        found["G2_Liger"] = result([peaks[OURS] / peaks[LIGER]], None, LIGER)
    return found
