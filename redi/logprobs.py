"""Hidden states -> log-probs of the target tokens, without ever holding the logits.

One row of the problem: hidden h (D,), output weight W (V, D), target t.

    z = W h      log-prob = z_t - log sum_v exp(z_v)      d log-prob / dz = onehot(t) - softmax(z)

Over R rows the logits would be (R, V): 18 GiB in fp32 for one 32k trace of Qwen2.5. Three ways:

    reference_token_logps   the formula, logits and all. Three lines; tests compare against it.
    token_logps             two passes: chunks of rows forward, logits made again in backward.
                            Takes any upstream gradient. DPO and SimPO need this. 4 matmuls.
    weighted_logp_sum       one pass: when the weight of every token is known beforehand (SFT, REDI:
                            see losses.py) the gradient is formed while the chunk's logits are
                            there. 3 matmuls, nothing of size (R, V) kept or made again.

Worked example, V = 2, z = [0, ln 3], target 0: softmax = [1/4, 3/4], log-prob = ln 1/4, and
d log-prob / dz = [3/4, -3/4].

Both make a chunk's gradient with the same few lines, `_gradients`: the two-pass kernel runs them in
backward, when the weights are known, the one-pass kernel at once. The torch path leaves a chunk's
exponentials unscaled and puts -weight / sum, a number a row, on what is D wide: on the hidden
states that go into one product, and on what comes out of the other.

Entropy costs no pass over the logits either. With p = softmax(z), E[z] = sum_v p_v z_v,

    H = log sum_v exp(z_v) - E[z] = -log-prob + z_t - E[z]
      = -log-prob + h . (W_t - sum_v p_v W_v)

and the bracket is the gradient of the log-prob by h, which is made anyway: R dot products of length
D. In Triton it is one more sum beside the exponentials.

Precision: logits, sums and the weight's gradient are at least fp32 whatever the inputs. The target
is taken out of a row before its exponentials are summed, so 1 - p comes from the others' sum and
stays exact when p is nearly 1, and softmax - onehot sums to zero but for one sum's rounding.

On CUDA the passes over a chunk are one Triton kernel (kernels.py), and bf16 operands are multiplied
into fp32 logits; elsewhere it is torch, with operands in fp32.

Left out: gradient filtering (biased for the mass REDI pushes into the tail), ignore_index (callers
pass supervised rows only), z-loss. Letters: R rows, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 logits alive at a time. Large chunks keep matmuls efficient; these are a few per cent of
# what training needs anyway.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": int(1.2 * (1 << 30))}

# exp(-50) is 2e-22: invisible in a sum that holds a 1, and still a normal fp32 number after the
# weight of one token in a million and the mean over a vocabulary are multiplied in. Below 1e-38
# numbers are denormal, and many a CPU multiplies those thirty times slower.
MIN_EXPONENT = -50.0

# The overloads of mm and addmm with an out_dtype.
MULTIPLIES_INTO_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()


def reference_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: log_softmax(hidden weight^T) at the targets. Shapes as in `token_logps`."""
    dtype = accumulation_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (R, V)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (R,)


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropies: Tensor | None = None
) -> Tensor:
    """Log-prob of each target token, in nats, differentiable for any upstream gradient.

    hidden (R, D), weight (V, D), targets (R,) int64 in [0, V) -> (R,), at least fp32. entropies
    (R,): memory for the entropy of each prediction, in nats. It is filled when the gradient by
    hidden is computed, which here is in backward.
    """
    return _TokenLogps.apply(hidden, weight, targets, entropies)


def weighted_logp_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum_t token_weights[t] * logp[t], logp detached): a linear loss and what to log of it.

    hidden (R, D), weight (V, D), targets (R,) int64, token_weights (R,) of either sign
    -> scalar, (R,); both at least fp32. The gradient is computed here, not in backward, so
    token_weights are constants. entropies as in `token_logps`, filled here, for tokens of weight 0
    too.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _WeightedLogpSum.apply(hidden, weight, targets, token_weights, entropies, with_grad)


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (R, D) times weight (D, V), the output weight turned round -> (R, V), at least fp32.
    For sampling, which has few rows."""
    dtype = accumulation_dtype(hidden)
    if hidden.is_cuda and hidden.dtype == weight.dtype != dtype and MULTIPLIES_INTO_FP32:
        return torch.mm(hidden, weight, out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype)


# ---------------------------------------------------------------- two passes


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, entropies: Tensor | None):
        head = _Head(hidden, weight)
        logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
        for rows in head.chunks:
            logps[rows] = target_logps_(head.logits(rows), targets[rows])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.entropies = entropies
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight, _ = _gradients(
            hidden, weight, targets, grad_logps, ctx.entropies, *ctx.needs_input_grad[:2]
        )
        return _as(hidden.dtype, d_hidden), _as(weight.dtype, d_weight), None, None


# ---------------------------------------------------------------- one pass


class _WeightedLogpSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, entropies, with_grad: bool):
        wanted = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        d_hidden, d_weight, logps = _gradients(
            hidden, weight, targets, token_weights, entropies, *wanted
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logps)
        return logps @ token_weights.to(logps.dtype), logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _):
        # Scaled into new tensors of the inputs' dtype: the saved ones serve another backward.
        scaled = (
            None if grad is None else torch.mul(grad, grad_sum, out=grad.new_empty(0, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *scaled, None, None, None, None


# ---------------------------------------------------------------- what both share


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    entropies: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """d sum_t token_weights[t] * logp[t] by hidden (R, D) and weight (V, D), and logp (R,)."""
    head = _Head(hidden, weight)
    token_weights = token_weights.to(head.dtype)
    logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
    d_hidden = torch.empty_like(head.hidden) if for_hidden else None
    d_weight = torch.zeros_like(head.weight, dtype=head.dtype) if for_weight else None
    for rows in head.chunks:
        part, weights = head.hidden[rows], token_weights[rows]  # (C, D), (C,)
        chunk, total, logps[rows], entropy = softmax_gradient_(
            head.logits(rows), targets[rows], weights, part.dtype
        )
        if for_hidden:
            d_part = torch.mm(chunk, head.weight, out=d_hidden[rows])  # (C, D)
        if total is not None:  # the gradient is scale * chunk
            scale = (-weights / total)[:, None]  # (C, 1)
            if for_hidden and entropies is not None:
                entropy = -logps[rows] - torch.linalg.vecdot(part, d_part) / total
            if for_hidden:
                d_part.mul_(scale)
            part = part * scale
        if entropies is not None and entropy is not None:
            entropies[rows] = entropy.clamp_(min=0.0).to(entropies.dtype)
        if for_weight:
            torch.addmm(d_weight, chunk.T, part, out=d_weight, **head.into_wide)
    return d_hidden, d_weight, logps


def softmax_gradient_(
    logits: Tensor, targets: Tensor, token_weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """token_weights * (onehot - softmax), log-probs (C,) and entropies (C,) of a chunk.

    logits (C, V), targets (C,), token_weights (C,). dtype: of the gradient, which takes the memory
    of the logits. -> gradient (C, V), None, log-probs, entropies from Triton; elsewhere the
    gradient times -total / token_weights, total (C,), log-probs, None: see the top of the file.
    """
    if logits.is_cuda and logits.dtype == torch.float32:
        from redi import kernels  # where triton is installed

        gradient, logps, entropies = kernels.softmax_gradient_(
            logits, targets, token_weights, dtype
        )
        return gradient, None, logps, entropies
    logps, others, total = _exponentials_(logits, targets)
    logits.scatter_(1, targets[:, None], -others)
    return logits, total[:, 0], logps, None


def target_logps_(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (C,) of the targets (C,) under logits (C, V), whose memory is used up."""
    if logits.is_cuda and logits.dtype == torch.float32:
        from redi import kernels

        return kernels.target_logps(logits, targets)
    return _exponentials_(logits, targets)[0]


def _exponentials_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (C, V) in place into exp(z - max), with 0 at the target.

    -> log-probs of the targets (C,); the sum of what stands there, and with the target's (C, 1).
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
        # cuBLAS multiplies bf16 operands into an fp32 result; elsewhere the operands are widened.
        native = hidden.is_cuda and hidden.dtype == weight.dtype and MULTIPLIES_INTO_FP32
        operands = hidden.dtype if native else self.dtype
        self.hidden, self.weight = hidden.to(operands), weight.to(operands)  # (R, D), (V, D)
        self.into_wide = {} if operands == self.dtype else {"out_dtype": self.dtype}
        row_bytes = len(weight) * self.dtype.itemsize
        size = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes)
        size -= size % 256 if size > 256 else 0  # whole tiles
        starts = range(0, len(hidden), size)
        self.chunks = [slice(start, min(start + size, len(hidden))) for start in starts]
        longest = self.chunks[0].stop if self.chunks else 0
        if hidden.is_cuda:  # a row in one piece, as the kernels want it
            self.buffer = hidden.new_empty(longest, len(weight), dtype=self.dtype)
        else:  # a column in one piece, in whole cache lines: all three products are faster
            padded = -(-longest // 16) * 16
            self.buffer = hidden.new_empty(len(weight), padded, dtype=self.dtype).T[:longest]

    def logits(self, rows: slice) -> Tensor:
        """(C, V), in memory that every chunk uses again."""
        out = self.buffer[: rows.stop - rows.start]
        return torch.mm(self.hidden[rows], self.weight.T, out=out, **self.into_wide)


def _as(dtype: torch.dtype, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.to(dtype)
