"""Triton kernels of training, for CUDA. The passes over a chunk's logits (logprobs.py):

    without weights   logits (C, V)  ->  log-probs of the targets (C,)             one read
    with weights      the same, the entropies (C,), and the gradient of            two reads,
                      sum_c weights[c] * logp[c], written over the logits in       half a write
                      the dtype of the matmuls that follow

One program per row. It reads the row once for its log-sum-exp, with a running maximum and sum per
lane (and for the entropy log Z - E[z] a sum of exponential times exponent), and once more for the
gradient. A 16-bit gradient is written to the first half of the row's own memory: each block is read
completely before anything is written over it.

Between the matmuls of a block (fused.py), computed in fp32 and rounded once:

    rotate              queries or keys, by their positions' angles
    swiglu              silu(gate) * up
    swiglu_gradients    its gradients by gate and up

Tests compare all with a few lines of torch under Triton's interpreter, which runs on a CPU. Left
out: matmuls (at D = 1536 cuBLAS is faster), autotuning.
Letters: C rows of a chunk, V vocabulary, D hidden, T tokens, H heads, K kv heads, d head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row in a program's registers at a time
ELEMENTS = 1024  # of a program of the elementwise kernels


def softmax_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient (C, V) in dtype, log-probs of the targets (C,) fp32, entropies (C,) fp32).

    gradient = weights * (onehot(targets) - softmax(logits)), written over the logits; a 16-bit one
    fills the first half of each row. logits (C, V) fp32 with contiguous rows, targets (C,) int64,
    weights (C,) fp32 of either sign; without them only the log-probs are computed and
    the logits stay as they are. Raises ValueError for other logits.
    """
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError("logits must be fp32 with contiguous rows")
    rows, vocabulary = logits.shape
    gradient = logits.view(dtype or logits.dtype)[:, :vocabulary]
    logps, entropies = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _row[(rows,)](
            logits,
            logits.stride(0),
            targets,
            vocabulary,
            logps,
            entropies,
            logps if weights is None else gradient,  # an unused pointer
            gradient.stride(0),
            logps if weights is None else weights,
            WITH_GRADIENT=weights is not None,
            BLOCK=BLOCK,
            num_warps=16,
        )
    return gradient, logps, entropies


@triton.jit
def _row(
    logits, logits_stride, targets, vocabulary, logps, entropies, gradient, gradient_stride,
    weights, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31
    logits += row * logits_stride
    target = tl.load(targets + row)
    target_logit = tl.load(logits + target)
    row_max, others, weighted = _exponentials(
        logits, target, target_logit, vocabulary, WITH_GRADIENT, BLOCK
    )
    target_exp = tl.exp(target_logit - row_max)

    # log(others + target_exp), exact also when the target holds nearly all the mass. Triton has no
    # log1p: below 1e-4 two terms of its series are exact in fp32 (the third is 3e-9 of the first).
    small = others + (target_exp - 1.0)
    log_sum = tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(others + target_exp))
    tl.store(logps + row, target_logit - row_max - log_sum)

    if WITH_GRADIENT:
        # log Z - E[z]: every term is at least 0
        mean = (weighted + (target_logit - row_max) * target_exp) / (others + target_exp)
        tl.store(entropies + row, log_sum - mean)
        # weight * (onehot - softmax)
        gradient += row * gradient_stride
        scale = -tl.load(weights + row) / (others + target_exp)
        for start in range(0, vocabulary, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < vocabulary
            z = tl.load(logits + index, mask=inside, other=-float("inf"))
            share = tl.where(index == target, -others, tl.exp(z - row_max))
            tl.debug_barrier()  # all lanes have read before one writes over the block
            tl.store(gradient + index, (scale * share).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _exponentials(
    logits, target, target_logit, vocabulary, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """The row's maximum, and over all tokens but the target, with x = z - maximum, sum e^x and (for
    the entropy) sum x e^x. When the maximum changes by old - new = d (`moved`), x becomes x + d:
    sum e^(x+d) = e^d sum e^x, and sum (x+d) e^(x+d) = e^d (sum x e^x + d sum e^x)."""
    maxima = tl.full((BLOCK,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # A mask that may differ between neighbors would turn a load of 16 bytes into 4 of 4 bytes.
        z = tl.load(logits + index, mask=index < vocabulary, other=-float("inf"))
        z = tl.where(index == target, -float("inf"), z)
        larger = tl.maximum(maxima, z)
        # A lane that has seen no token yet: exp(-inf - -inf) would be nan, exp(-inf - 0) is 0.
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        if WITH_GRADIENT:
            # 0 * -inf would be nan; e^-10000 is 0 already.
            x, moved = tl.maximum(z - shift, -1e4), tl.maximum(maxima - shift, -1e4)
            products = (products + moved * sums) * tl.exp(moved) + x * tl.exp(x)
        sums = sums * tl.exp(maxima - shift) + tl.exp(z - shift)
        maxima = larger
    row_max = tl.maximum(tl.max(maxima, 0), target_logit)
    weighted = 0.0
    if WITH_GRADIENT:
        moved = tl.maximum(maxima - row_max, -1e4)
        weighted = tl.sum((products + moved * sums) * tl.exp(moved), 0)
    return row_max, tl.sum(sums * tl.exp(maxima - row_max), 0), weighted


# ---------------------------------------------------------------- between the matmuls of a block


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, d), cos and sin (T, d/2), contiguous: each pair (x[i], x[i + d/2]) becomes
    (x[i] cos - x[i + d/2] sin, x[i + d/2] cos + x[i] sin)."""
    (tokens, heads, size), turned = x.shape, torch.empty_like(x)
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(size // 2)}
    if tokens:
        _rotate[(tokens,)](x, turned, cos, sin, heads, size // 2, **sizes)
    return turned


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors."""
    product = torch.empty_like(gate)
    if size := gate.numel():
        _swiglu[(triton.cdiv(size, ELEMENTS),)](gate, up, product, size, BLOCK=ELEMENTS)
    return product


def swiglu_gradients(d_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up) of contiguous tensors."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if size := gate.numel():
        tensors = d_product, gate, up, d_gate, d_up
        _swiglu_gradients[(triton.cdiv(size, ELEMENTS),)](*tensors, size, BLOCK=ELEMENTS)
    return d_gate, d_up


@triton.jit
def _rotate(x, turned, cos, sin, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    c = tl.load(cos + token * half + pair, mask=pair < half).to(tl.float32)
    s = tl.load(sin + token * half + pair, mask=pair < half).to(tl.float32)
    index, inside = (token * heads + head) * half * 2 + pair, (head < heads) & (pair < half)
    left = tl.load(x + index, mask=inside).to(tl.float32)
    right = tl.load(x + index + half, mask=inside).to(tl.float32)
    tl.store(turned + index, left * c - right * s, mask=inside)
    tl.store(turned + index + half, right * c + left * s, mask=inside)


@triton.jit
def _swiglu(gate, up, product, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + index, mask=index < size).to(tl.float32)
    u = tl.load(up + index, mask=index < size).to(tl.float32)
    tl.store(product + index, g * tl.sigmoid(g) * u, mask=index < size)


@triton.jit
def _swiglu_gradients(d_product, gate, up, d_gate, d_up, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(d_product + index, mask=index < size).to(tl.float32)
    g = tl.load(gate + index, mask=index < size).to(tl.float32)
    u = tl.load(up + index, mask=index < size).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(d_gate + index, d * u * (sigmoid + silu * (1.0 - sigmoid)), mask=index < size)
    tl.store(d_up + index, d * silu, mask=index < size)
