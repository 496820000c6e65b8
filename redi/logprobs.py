"""Hidden states -> log-probs of the target tokens, without ever holding the logits.

For one row with hidden state h (D,), output weight W (V, D) and target t:

    z = W h      log-prob = z_t - log sum_v exp(z_v)      d log-prob / dz = onehot(t) - softmax(z)

Over R rows the logits would be (R, V): 18 GiB in fp32 for one 32k trace of Qwen2.5. Three ways:

    reference_token_logps   the formula with all its logits, in three lines. Tests compare with it.
    token_logps             two passes: rows in chunks forward, logits computed again in backward.
                            Takes any upstream gradient, as DPO and SimPO need. 4 matmuls.
    weighted_logp_sum       one pass: where every token's weight is known beforehand (SFT, REDI),
                            the gradient is formed while the chunk's logits exist. 3 matmuls.

Worked example, V = 2, z = [0, ln 3], target 0: softmax = [1/4, 3/4], log-prob = ln 1/4, and
d log-prob / dz = [3/4, -3/4].

Scaling the (C, V) gradient of a chunk by the token weights would cost a pass over memory, so the
torch path scales the (C, D) operands of the two products.

Entropy needs no further pass over the logits. With p = softmax(z), E[z] = sum_v p_v z_v,

    H = log sum_v exp(z_v) - E[z] = -log-prob + z_t - E[z]
      = -log-prob + h . (W_t - sum_v p_v W_v)

and the bracket is the gradient of the log-prob by h, which is computed anyway. The remaining cost
is R dot products of length D; in Triton, one more sum beside the exponentials.

Precision: logits, sums and the weight's gradient are at least fp32. The target is left out of the
row's sum of exponentials, so 1 - p is that sum over the total: exact when p is nearly 1.

On CUDA one Triton kernel (kernels.py) does all passes over a chunk, and bf16 operands are
multiplied into fp32 logits. Elsewhere torch does it, with fp32 operands.

Left out: gradient filtering (it drops small probabilities, where REDI pushes mass), ignore_index
(callers pass supervised rows only), z-loss. Letters: R supervised rows, D hidden, V vocabulary,
C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from redi.fused import in_triton

# Bytes of fp32 logits in memory at a time. Large chunks keep matmuls efficient; these are a few per
# cent of what training needs anyway.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": int(1.2 * (1 << 30))}

# exp(-50) is 2e-22: it changes no sum that contains a 1, and stays a normal fp32 number when it is
# multiplied by a token weight of one in a million. Numbers below 1e-38 are denormal, and many CPUs
# multiply those thirty times slower.
MIN_EXPONENT = -50.0


class PackLoss(NamedTuple):
    loss: Tensor  # (), the pack's share of the step's loss
    token_logps: Tensor  # (R,), detached
    entropies: Tensor | None  # (R,), valid after backward; None where no gradient is computed


def reference_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: log_softmax(hidden weight^T) at the targets. Shapes as in `token_logps`."""
    dtype = accumulation_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (R, V)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (R,)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target token, in nats, differentiable for any upstream gradient.

    hidden (R, D), weight (V, D), targets (R,) int64 in [0, V) -> (R,), at least fp32.
    """
    return token_logps_and_entropies(hidden, weight, targets)[0]


def token_logps_and_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`token_logps`, and the entropy (R,) of each prediction in nats, detached.

    The entropies are computed with the gradient: their values are valid after backward. Where no
    gradient will be computed, None.
    """
    if not _needs_gradient(hidden, weight):
        return _token_logps(hidden, weight, targets), None
    return _TwoPasses.apply(hidden, weight, targets)


def weighted_logp_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> PackLoss:
    """A linear loss, sum_t token_weights[t] * token_logps[t], and the values to log per token.

    hidden (R, D), weight (V, D), targets (R,) int64, token_weights (R,) of either sign. The
    gradient is computed here, not in backward, so token_weights are constants.
    """
    if _needs_gradient(hidden, weight):
        return PackLoss(*_OnePass.apply(hidden, weight, targets, token_weights))
    logps = _token_logps(hidden, weight, targets)
    return PackLoss(logps @ token_weights.to(logps.dtype), logps, None)


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _needs_gradient(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor):
        logps = _token_logps(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.entropies = torch.zeros_like(logps)
        ctx.mark_non_differentiable(ctx.entropies)
        return logps, ctx.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor, _):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight, _, entropies = _gradients(hidden, weight, targets, grad_logps)
        ctx.entropies.copy_(entropies)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
        *gradients, logps, entropies = _gradients(hidden, weight, targets, token_weights)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logps, entropies)
        return logps @ token_weights.to(logps.dtype), logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        # Into new tensors: a second backward must find the saved ones intact.
        scaled = (
            torch.mul(grad, grad_loss, out=grad.new_empty(0, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *scaled, None, None


# ---------------------------------------------------------------- the passes over all chunks


def _token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (R,), without a gradient."""
    head = _Head(hidden, weight)
    logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
    for rows in head.chunks:
        logits = head.logits(rows)  # (C, V)
        if head.in_triton:
            from redi import kernels  # triton is installed with torch for CUDA

            logps[rows] = kernels.softmax_gradient_(logits, targets[rows])[1]
        else:
            logps[rows] = _exponentials_(logits, targets[rows])[0]
    return logps


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of sum_t token_weights[t] * token_logps[t] by hidden (R, D) and by weight
    (V, D); the log-probs (R,) and entropies (R,)."""
    head = _Head(hidden, weight)
    token_weights = token_weights.to(head.dtype)
    logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
    entropies = torch.empty_like(logps)
    d_hidden = torch.empty_like(head.hidden)
    d_weight = torch.zeros_like(head.weight, dtype=head.dtype)
    for rows in head.chunks:
        part, weights = head.hidden[rows], token_weights[rows]  # (C, D), (C,)
        logits = head.logits(rows)  # (C, V)
        if head.in_triton:
            from redi import kernels

            d_logits, logps[rows], entropies[rows] = kernels.softmax_gradient_(
                logits, targets[rows], weights, part.dtype
            )  # weight * (onehot - softmax)
            torch.mm(d_logits, head.weight, out=d_hidden[rows])
            torch.addmm(d_weight, d_logits.T, part, out=d_weight, **head.into_wide)
        else:
            logps[rows], others, total = _exponentials_(logits, targets[rows])
            unscaled = logits.scatter_(1, targets[rows, None], -others)  # total (softmax - onehot)
            scale = -weights[:, None] / total  # (C, 1), makes it weight * (onehot - softmax)
            d_part = torch.mm(unscaled, head.weight, out=d_hidden[rows])  # (C, D)
            entropies[rows] = -logps[rows] - torch.linalg.vecdot(part, d_part) / total[:, 0]
            d_part.mul_(scale)
            torch.addmm(d_weight, unscaled.T, part * scale, out=d_weight)
    return d_hidden, d_weight, logps, entropies.clamp_(min=0.0)  # rounding


def _exponentials_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (C, V) in place into exp(z - max), with 0 at the target.

    -> log-probs of the targets (C,), the row's sum without the target and with it (C, 1).
    """
    targets = targets[:, None]  # (C, 1)
    row_max = logits.amax(dim=1, keepdim=True)  # (C, 1)
    shifted = logits.gather(1, targets) - row_max  # (C, 1), <= 0
    logits.sub_(row_max).clamp_(min=MIN_EXPONENT).exp_()
    others = logits.scatter_(1, targets, 0.0).sum(dim=1, keepdim=True)  # (C, 1)
    target_exp = shifted.exp()
    # log(others + target_exp), but exact when the target holds nearly all the mass: then
    # target_exp is 1 and others is tiny.
    logps = shifted - torch.log1p(others + (target_exp - 1.0))
    return logps[:, 0], others, others + target_exp


class _Head:
    """The vocabulary projection, a chunk of rows at a time, into logits of at least fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.dtype = accumulation_dtype(hidden)
        # cuBLAS multiplies bf16 operands into an fp32 result; elsewhere the operands become fp32.
        self.in_triton = in_triton(hidden)
        native = self.in_triton and hidden.dtype == weight.dtype
        operands = hidden.dtype if native else self.dtype
        self.hidden, self.weight = hidden.to(operands), weight.to(operands)  # (R, D), (V, D)
        self.into_wide = {} if operands == self.dtype else {"out_dtype": self.dtype}
        row_bytes = len(weight) * self.dtype.itemsize
        size = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes)
        size -= size % 256 if size > 256 else 0  # whole tiles
        starts = range(0, len(hidden), size)
        self.chunks = [slice(start, min(start + size, len(hidden))) for start in starts]
        longest = self.chunks[0].stop if self.chunks else 0
        if self.in_triton:  # row-major, as the Triton kernels need it
            self.buffer = hidden.new_empty(longest, len(weight), dtype=self.dtype)
        else:  # column-major in whole cache lines: all three products are faster
            padded = -(-longest // 16) * 16
            self.buffer = hidden.new_empty(len(weight), padded, dtype=self.dtype).T[:longest]

    def logits(self, rows: slice) -> Tensor:
        """(C, V), in memory that the next chunk overwrites."""
        out = self.buffer[: rows.stop - rows.start]
        return torch.mm(self.hidden[rows], self.weight.T, out=out, **self.into_wide)
