"""The head's loss and its gradients, ours over plain logits: memory (C1) and CPU time (C2).

    python -m bench.loss            about three minutes on one core

R 4096 rows, D 512, V 32768, fp32, signed token weights, forward and backward, one thread. Plain is
what a trainer without a fused head does: logits, log_softmax, gather, autograd. The outputs and
gradients of all variants are compared in the same run; a difference ends it.

Memory: the peak over the inputs, each variant in a process of its own. Time: user and system CPU
seconds of this process, variants interleaved. Much of plain's time is system: it takes three fresh
mappings of 512 MB from the kernel every step. So that C2 is not mistaken for arithmetic, the table
has both columns, and a line with an allocator that keeps its memory ("warm").
"""

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import CPUSeconds, interleave, peak_bytes, result, write
from redi.logprobs import token_logps, weighted_logp_sum

R, D, V = 4096, 512, 32_768
ROUNDS = 5
PEER = "plain logits"
# Pages that were freed are kept and used again, instead of given back to the kernel.
WARM = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"

Outcome = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, log-probs (R,), d hidden, d weight


# ---------------------------------------------------------------- variants


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps @ token_weights, logps


def two_passes(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    logps = token_logps(hidden, weight, targets)
    return logps @ token_weights, logps


VARIANTS = {PEER: plain, "weighted_logp_sum": weighted_logp_sum, "token_logps": two_passes}


def inputs(rows: int = R) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=draw)
    weight = 0.05 * torch.randn(V, D, generator=draw)  # logits with a standard deviation of 1.1
    targets = torch.randint(V, (rows,), generator=draw)
    token_weights = torch.randn(rows, generator=draw) / rows
    return hidden.requires_grad_(), weight.requires_grad_(), targets, token_weights


def step(variant: str, given: tuple[Tensor, ...]) -> Outcome:
    """Forward and backward; the gradients are taken away, so that no step adds to another's."""
    loss, logps = VARIANTS[variant](*given)
    d_hidden, d_weight = torch.autograd.grad(loss, given[:2])
    return loss.detach(), logps.detach(), d_hidden, d_weight


# ---------------------------------------------------------------- measures


def compare(given: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless all variants agree, each tensor by its relative norm."""
    expected = step(PEER, given)
    for variant in VARIANTS:
        for name, ours, theirs in zip(
            ("loss", "log-probs", "d hidden", "d weight"), step(variant, given), expected
        ):
            error = ((ours - theirs).norm() / theirs.norm()).item()
            assert error < 1e-5, f"{variant}: {name} differs from {PEER} by {error:.1e}"


def memory(variant: str) -> int:
    """The peak of one step, in bytes, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.loss", "memory", variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(title: str, seconds: dict[str, list[CPUSeconds]], peaks: dict[str, int]) -> None:
    print(f"\n{title:<20}{'user s':>8}{'system s':>10}{'/ plain':>9}{'MiB':>8}{'/ plain':>9}")
    for variant, rounds in seconds.items():
        user = median(rounds, lambda s: s.user)
        system = median(rounds, lambda s: s.system)
        ratio = result(ratios(seconds, variant), 0, PEER)["median"]
        line = f"{variant:<20}{user:>8.2f}{system:>10.2f}{ratio:>9.3f}"
        if variant in peaks:
            line += f"{peaks[variant] / 2**20:>8.0f}{peaks[variant] / peaks[PEER]:>9.3f}"
        print(line)


def median(rounds: list[CPUSeconds], part: Callable[[CPUSeconds], float]) -> float:
    return result([part(seconds) for seconds in rounds], 0, PEER)["median"]


def ratios(seconds: dict[str, list[CPUSeconds]], variant: str) -> list[float]:
    return [a.total / b.total for a, b in zip(seconds[variant], seconds[PEER])]


def timed(title: str, rounds: int, peaks: dict[str, int]) -> dict[str, list[CPUSeconds]]:
    given = inputs()
    compare(given)
    seconds = interleave({v: lambda v=v: step(v, given) for v in VARIANTS}, rounds)
    table(title, seconds, peaks)
    return seconds


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        variant = sys.argv[2]
        step(variant, inputs(rows=8))  # libraries make their own buffers once
        given = inputs()
        print(peak_bytes(lambda: step(variant, given)))
        return
    if sys.argv[1:] == ["warm"]:
        timed("warm allocator", 3, {})
        return
    peaks = {variant: memory(variant) for variant in VARIANTS}
    seconds = timed("fresh memory", ROUNDS, peaks)
    sys.stdout.flush()
    subprocess.run(
        [sys.executable, "-m", "bench.loss", "warm"],
        env={**os.environ, "GLIBC_TUNABLES": WARM},
        check=True,
    )
    ours = "weighted_logp_sum"
    results = {
        "C1": result([peaks[ours] / peaks[PEER]], 0.15, PEER),
        "C2": result(ratios(seconds, ours), 0.75, PEER),
    }
    print()
    for name, entry in results.items():
        print(f"{name}  {entry['median']:.3f}  goal {entry['goal']}")
    write("loss", results)


if __name__ == "__main__":
    main()
