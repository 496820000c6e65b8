"""The head's loss and its gradients, ours over the other ways to compute it (C1 to C6).

    python -m bench.loss            about nine minutes on one core

R 4096 rows, D 512, V 32768, fp32, signed token weights, forward and backward, one thread. Ours with
its default chunk, 256 rows here. The peers:

    plain            what a trainer without a fused head does: logits, log_softmax, gather, autograd
    checkpoint       TRL 1.4 to 1.9 (April to July 2026), SFT's default loss there: chunks of 256
                     rows (ours here too), each under torch.utils.checkpoint
    TRL 1.16         its ChunkedLogProbFunction, which computes all its log-probs: tiles of 4096
                     rows by 32,768 words, computed again in backward; any token weights. On a
                     CPU it reduces tiles in torch, on CUDA in Triton (bench/gpu.py)
    torch none, sum  F.linear_cross_entropy of torch 2.13, at our chunk and at its own default.
                     "sum" has one weight for all tokens, so it is no way to train REDI; ours is
                     compared with it at weights of -1

    C1  memory over plain      C2  time over plain        C3   over checkpoint
    C3_TRL  over TRL 1.16      C5_TRL  token_logps, which needs as many products, over TRL 1.16
    C4  over torch none        C4b over torch sum         C5   token_logps over torch none
    C6  bf16 inputs: the error of both gradients over torch none's, and of the log-probs in nats
    wide_logits  time with logits of a standard deviation of 20 over one of 3: exponentials that
                 underflow must cost nothing

Outputs and gradients of all variants are compared in the same run; a difference ends it. Memory is
the peak beyond the inputs, each variant in its own process. Time is CPU time, variants interleaved.
Much of plain's is system time: it takes three fresh mappings of 512 MB from the kernel every step.
So the table shows both, and C2, C3 and C3_TRL are measured again with an allocator that keeps its
memory ("warm").
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.measure import CPUSeconds, Worker, interleave, peak_bytes, ratios, result, write
from redi.doctor.checks import (
    Given,
    Run,
    in_float64,
    likely_tokens,
    loss_and_gradients,
    relative_error,
    two_passes,
)
from redi.logprobs import weighted_logp_sum
from redi.tables import text_table

R, D, V = 4096, 512, 32_768
CHUNK = 256  # rows: 32 MiB of fp32 logits, ours by default, and TRL's default
TRL_CHUNK = 32_768  # words: trl.trainer.utils passes it
ROUNDS = 5
# Pages that were freed are kept and used again, instead of given back to the kernel.
WARM = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
IN_TORCH = hasattr(F, "linear_cross_entropy")  # from 2.13 on

PLAIN, CHECKPOINT, ONE_PASS, TWO_PASSES = "plain", "checkpoint", "weighted_logp_sum", "token_logps"
TRL = "TRL 1.16"
NONE, SUM = f"torch none, chunk {CHUNK}", f"torch sum, chunk {CHUNK}"
NONE_DEFAULT, SUM_DEFAULT = "torch none, default", "torch sum, default"

Seconds = dict[str, list[CPUSeconds]]


# ---------------------------------------------------------------- variants


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps @ token_weights.to(logps.dtype), logps


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    def chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    parts = zip(hidden.split(CHUNK), targets.split(CHUNK))
    logps = torch.cat([checkpoint(chunk, h, weight, t, use_reentrant=False) for h, t in parts])
    return logps @ token_weights.to(logps.dtype), logps


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    from trl.kernels import ChunkedLogProbFunction

    bias, temperature, softcap, scale, further = None, 1.0, None, 1.0, ()
    logps = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, TRL_CHUNK, softcap, scale, further
    )[0]
    return logps @ token_weights.to(logps.dtype), logps


def in_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    reduction: str,
    chunk: int | None,
):
    sizes = {} if chunk is None else {"batch_chunk_size": chunk, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**sizes)
    loss = F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)
    return (-loss @ token_weights.to(loss.dtype), -loss) if reduction == "none" else (loss, None)


def plain_in_bf16(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    """Logits in bf16, cross entropy in fp32, as transformers has it."""
    logps = -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    return logps @ token_weights, logps


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, impl: str):
    from liger_kernel.functional import fused_linear_cross_entropy

    losses = fused_linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
    return -losses[0].float() @ token_weights, -losses[0]


def liger_mean(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    """One weight for all tokens, so no way to train REDI. It needs only three matmuls."""
    from liger_kernel.functional import fused_linear_cross_entropy

    return fused_linear_cross_entropy(hidden, weight, targets, impl="nvidia-triton")[0], None


VARIANTS: dict[str, Run] = {
    PLAIN: plain,
    CHECKPOINT: checkpointed,
    ONE_PASS: weighted_logp_sum,
    TWO_PASSES: two_passes,
}
if find_spec("trl"):
    VARIANTS[TRL] = trl
if IN_TORCH:
    VARIANTS |= {
        NONE: partial(in_torch, reduction="none", chunk=CHUNK),
        NONE_DEFAULT: partial(in_torch, reduction="none", chunk=None),
        SUM: partial(in_torch, reduction="sum", chunk=CHUNK),
        SUM_DEFAULT: partial(in_torch, reduction="sum", chunk=None),
    }
COMPARED = {  # name -> ours, the peer, the goal
    "C2": (ONE_PASS, PLAIN, 0.60),
    "C3": (ONE_PASS, CHECKPOINT, 0.55),
    "C3_TRL": (ONE_PASS, TRL, 0.80),
    "C4": (ONE_PASS, NONE, 0.78),
    "C4_default": (ONE_PASS, NONE_DEFAULT, None),
    "C4b": (ONE_PASS, SUM, 1.03),
    "C4b_default": (ONE_PASS, SUM_DEFAULT, None),
    "C5": (TWO_PASSES, NONE, 1.05),
    "C5_TRL": (TWO_PASSES, TRL, 1.0),
    "C5_default": (TWO_PASSES, NONE_DEFAULT, None),
}
COMPARED_WARM = {
    "C2_warm": (ONE_PASS, PLAIN, 0.70),
    "C3_warm": (ONE_PASS, CHECKPOINT, 0.70),
    "C3_TRL_warm": (ONE_PASS, TRL, 0.80),
}


def inputs(rows: int = R, std: float = 1.1) -> Given:
    """std: of the logits."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=draw)
    weight = std / D**0.5 * torch.randn(V, D, generator=draw)
    targets = torch.randint(V, (rows,), generator=draw)
    token_weights = torch.randn(rows, generator=draw) / rows
    return hidden.requires_grad_(), weight.requires_grad_(), targets, token_weights


# ---------------------------------------------------------------- measures


def compare(given: Given, names: list[str]) -> None:
    """Raises AssertionError unless all variants agree with plain, each tensor by its norm."""
    uniform = (*given[:3], -torch.ones_like(given[3]))
    for weights in (given, uniform):
        expected = loss_and_gradients(plain, weights)
        for name in names:
            if (name in (SUM, SUM_DEFAULT)) != (weights is uniform):
                continue
            for part, ours, right in zip(
                ("loss", "log-probs", "d hidden", "d weight"),
                loss_and_gradients(VARIANTS[name], weights),
                expected,
            ):
                error = 0.0 if ours is None else relative_error(ours, right)
                assert error < 1e-5, f"{name}: {part} differs from {PLAIN} by {error:.1e}"


def memory(name: str, pipe: Connection) -> None:
    """Send the peak of one step in bytes: a worker of its own for each variant."""
    pipe.recv()
    run = VARIANTS[name]
    loss_and_gradients(run, inputs(rows=8))  # so that libraries have allocated their own buffers
    given = inputs()
    pipe.send(peak_bytes(partial(loss_and_gradients, run, given)))
    pipe.recv()


def timed(given: Given, names: list[str]) -> Seconds:
    return interleave(
        {name: partial(loss_and_gradients, VARIANTS[name], given) for name in names}, ROUNDS
    )


def wide_logits() -> list[float]:
    """Time of both kernels with logits of a standard deviation of 20 over that of 3."""
    given = {std: inputs(R // 4, std) for std in (3.0, 20.0)}
    runs = {
        f"{name} {std}": partial(loss_and_gradients, VARIANTS[name], given[std])
        for name in (ONE_PASS, TWO_PASSES)
        for std in given
    }
    seconds = interleave(runs, ROUNDS)
    kernels = (ONE_PASS, TWO_PASSES)
    return [r for k in kernels for r in ratios(seconds[f"{k} 20.0"], seconds[f"{k} 3.0"])]


def low_precision() -> dict[str, dict]:
    """C6: errors against float64 of bf16 inputs like a trained model's."""
    given = likely_tokens()
    right = in_float64(given)
    sure = (right[1].exp() > 0.9).double().mean().item()
    print(f"\nbf16: mean NLL {-right[1].mean().item():.2f}, {sure:.0%} of tokens above 0.9")
    errors, rows = {}, [("error against float64", "log-prob, nats", "d hidden", "d weight")]
    for name in [n for n in (PLAIN, ONE_PASS, TWO_PASSES, TRL, NONE) if n in VARIANTS]:
        _, logps, d_hidden, d_weight = loss_and_gradients(VARIANTS[name], given)
        worst = (logps.double() - right[1]).abs().max().item()
        errors[name] = worst, relative_error(d_hidden, right[2]), relative_error(d_weight, right[3])
        rows.append((name, *(f"{error:.1e}" for error in errors[name])))
    print(text_table(rows))
    found = {"C6_logp": result([errors[ONE_PASS][0]], 1e-4, "float64, nats")}
    if IN_TORCH:
        for part, number, goal in (("dH", 1, 1.3), ("dW", 2, 0.5)):
            ratio = errors[ONE_PASS][number] / errors[NONE][number]
            found[f"C6_{part}"] = result([ratio], goal, NONE)
    return found


# ---------------------------------------------------------------- report


def table(title: str, seconds: Seconds, peaks: dict[str, int]) -> None:
    rows = [(title, "user s", "system s", "/ plain", "MiB", "/ plain")]
    for name, rounds in seconds.items():
        user = statistics.median(s.user for s in rounds)
        system = statistics.median(s.system for s in rounds)
        ratio = statistics.median(ratios(seconds[name], seconds[PLAIN]))
        sizes = ("", "")
        if name in peaks:
            sizes = (f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[PLAIN]:.3f}")
        rows.append((name, f"{user:.2f}", f"{system:.2f}", f"{ratio:.3f}", *sizes))
    print(f"\n{text_table(rows)}", flush=True)


def measured(title: str, compared: dict, names: list[str], peaks: dict[str, int]) -> dict:
    given = inputs()
    compare(given, names)
    seconds = timed(given, names)
    table(title, seconds, peaks)
    return {
        name: result(ratios(seconds[ours], seconds[peer]), goal, peer)
        for name, (ours, peer, goal) in compared.items()
        if peer in seconds
    }


def warm(pipe: Connection) -> None:
    """Send COMPARED_WARM's results: a worker whose allocator keeps its memory."""
    pipe.recv()
    names = [n for n in (PLAIN, CHECKPOINT, TRL, ONE_PASS) if n in VARIANTS]
    pipe.send(measured("warm allocator", COMPARED_WARM, names, {}))
    pipe.recv()


def in_worker(target: Callable, *arguments: str, **environment: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        with Worker("loss", Path(folder), target, *arguments, **environment) as worker:
            answer = worker.ask("measure")
        print(worker.log.read_text(), end="", flush=True)
    return answer


def main() -> None:
    torch.set_num_threads(1)
    peaks = {name: in_worker(memory, name) for name in VARIANTS}
    results = {"C1": result([peaks[ONE_PASS] / peaks[PLAIN]], 0.12, PLAIN)}
    results |= measured("fresh memory", COMPARED, list(VARIANTS), peaks)
    results |= in_worker(warm, GLIBC_TUNABLES=WARM) | low_precision()
    results["wide_logits"] = result(wide_logits(), 1.5, "logits of a standard deviation of 3")
    write("loss", results)


if __name__ == "__main__":
    main()
