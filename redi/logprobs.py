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

Precision: logits, sums and the weight's gradient are at least fp32 whatever the inputs. The target
is taken out of a row before its exponentials are summed, so 1 - p comes from the others' sum and
stays exact when p is nearly 1, and softmax - onehot sums to zero but for one sum's rounding.

Left out: gradient filtering (biased for the mass REDI pushes into the tail), ignore_index (callers
pass supervised rows only), z-loss. Letters: R rows, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 logits alive at a time. Large chunks keep matmuls efficient; these are a few per cent of
# what training needs anyway.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": int(1.2 * (1 << 30))}

# exp(-80) is 2e-35: invisible in a sum that holds a 1, but still a normal fp32 number. Below -87
# exponentials are denormal, and a CPU multiplies those thirty times slower.
MIN_EXPONENT = -80.0


def reference_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: log_softmax(hidden weight^T) at the targets. Shapes as in `token_logps`."""
    dtype = accumulation_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (R, V)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (R,)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target token, in nats, differentiable for any upstream gradient.

    hidden (R, D), weight (V, D), targets (R,) int64 in [0, V) -> (R,), at least fp32.
    """
    return _TokenLogps.apply(hidden, weight, targets)


def weighted_logp_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum_t token_weights[t] * logp[t], logp detached): a linear loss and what to log of it.

    hidden (R, D), weight (V, D), targets (R,) int64, token_weights (R,) of either sign
    -> scalar, (R,); both at least fp32. The gradient is computed here, not in backward, so
    token_weights are constants.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _WeightedLogpSum.apply(hidden, weight, targets, token_weights, with_grad)


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


# ---------------------------------------------------------------- two passes


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = _Head(hidden, weight)
        logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
        row_max, total = logps.new_empty(2, len(logps), 1)  # (R, 1) each
        for rows in head.chunks:
            row_max[rows], total[rows], logps[rows] = _softmax_minus_onehot_(
                head.logits(rows), targets[rows]
            )
        ctx.save_for_backward(hidden, weight, targets, logps, row_max, total)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        hidden, weight, targets, logps, row_max, total = ctx.saved_tensors
        head = _Head(hidden, weight)
        grads = _Gradients(head, *ctx.needs_input_grad[:2])
        for rows in head.chunks:
            # As in the forward pass, total * (softmax - onehot): subtracting a rounded log-sum-exp
            # instead would shift every exponential of a row whose logits are large.
            logits = head.logits(rows).sub_(row_max[rows]).clamp_(min=MIN_EXPONENT).exp_()
            target_grads = torch.expm1(logps[rows, None]) * total[rows]
            logits.scatter_(1, targets[rows, None], target_grads)
            grads.add(head, rows, logits, -grad_logps[rows, None] / total[rows])
        return *grads.as_dtypes(hidden.dtype, weight.dtype), None


# ---------------------------------------------------------------- one pass


class _WeightedLogpSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, with_grad: bool):
        head = _Head(hidden, weight)
        token_weights = token_weights.to(head.dtype)
        logps = torch.empty(len(targets), dtype=head.dtype, device=hidden.device)  # (R,)
        grads = _Gradients(head, *(with_grad and needed for needed in ctx.needs_input_grad[:2]))
        for rows in head.chunks:
            logits = head.logits(rows)
            _, total, logps[rows] = _softmax_minus_onehot_(logits, targets[rows])
            # The buffer holds total * (softmax - onehot); the division rides on the row scale.
            grads.add(head, rows, logits, -token_weights[rows, None] / total)
        ctx.save_for_backward(grads.hidden, grads.weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logps)
        return logps @ token_weights, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _):
        # Scaled into new tensors of the inputs' dtype: the saved ones serve another backward.
        scaled = (
            None if grad is None else torch.mul(grad, grad_sum, out=grad.new_empty(0, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *scaled, None, None, None


# ---------------------------------------------------------------- what both share


def _softmax_minus_onehot_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (C, V) in place into total * (softmax - onehot); targets (C,).

    -> row maximum (C, 1), total = sum_v exp(z_v - max) (C, 1), log-probs of the targets (C,).
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
    logits.scatter_(1, targets, -others)
    return row_max, others + target_exp, logps[:, 0]


class _Head:
    """The vocabulary projection over chunks of rows, and the precision of its operands."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.dtype = accumulation_dtype(hidden)
        # CUDA multiplies bf16 operands into an fp32 result; a CPU needs fp32 operands for that.
        native = hidden.is_cuda and hidden.dtype == weight.dtype
        self.hidden = hidden if native else hidden.to(self.dtype)  # (R, D)
        self.weight = weight if native else weight.to(self.dtype)  # (V, D)
        row_bytes = len(weight) * self.dtype.itemsize
        size = max(1, CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // row_bytes)
        starts = range(0, len(hidden), size)
        self.chunks = [slice(start, min(start + size, len(hidden))) for start in starts]
        self.buffer: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """(C, V) in a buffer that every chunk uses again: the first, largest one makes it."""
        hidden = self.hidden[rows]
        if hidden.dtype != self.dtype:
            return self.mm(hidden, self.weight.T)
        if self.buffer is None:
            self.buffer = hidden.new_empty(len(hidden), len(self.weight))
        return torch.mm(hidden, self.weight.T, out=self.buffer[: len(hidden)])

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of two operands in at least fp32."""
        return torch.mm(a, b) if a.dtype == self.dtype else torch.mm(a, b, out_dtype=self.dtype)


class _Gradients:
    """d sum / d hidden and d sum / d weight, gathered chunk by chunk in at least fp32."""

    def __init__(self, head: _Head, for_hidden: bool, for_weight: bool):
        self.hidden = torch.empty_like(head.hidden, dtype=head.dtype) if for_hidden else None
        self.weight = torch.zeros_like(head.weight, dtype=head.dtype) if for_weight else None

    def add(self, head: _Head, rows: slice, logit_grads: Tensor, scale: Tensor) -> None:
        """Add the part of a chunk: logit_grads (C, V), each row times scale (C, 1)."""
        operand = logit_grads.to(head.hidden.dtype)
        if self.hidden is not None:
            torch.mul(head.mm(operand, head.weight), scale, out=self.hidden[rows])
        if self.weight is not None:
            scaled = (head.hidden[rows] * scale).to(head.hidden.dtype)  # (C, D)
            if operand.dtype == head.dtype:
                self.weight.addmm_(operand.T, scaled)
            else:
                self.weight.add_(head.mm(operand.T, scaled))

    def as_dtypes(self, hidden: torch.dtype, weight: torch.dtype) -> tuple[Tensor | None, ...]:
        """Both, each in its parameter's dtype, or None where it was not wanted."""
        wanted = ((self.hidden, hidden), (self.weight, weight))
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in wanted)
