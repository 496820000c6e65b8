"""What a block computes between its matmuls, in one pass over memory each way.

    rotate    rotary positions of queries or keys; saves nothing but the angles for backward
    swiglu    silu(gate) * up; saves gate and up

The lines of torch in these two functions are the definitions, and what a CPU runs. CUDA runs Triton
kernels (kernels.py), which save and move less. Norms are torch's own, which are fused already.
Left out: kernels that fuse several of these steps; they would depend on the block's structure.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_triton(tensor: Tensor) -> bool:
    """Whether training's Triton kernels take this tensor. REDI_KERNELS=torch switches them off."""
    fits = tensor.is_cuda and tensor.dtype.itemsize <= 4
    return fits and os.environ.get("REDI_KERNELS") != "torch"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, d), cos and sin (T, d/2): turn each pair (x[i], x[i + d/2]) by its position's
    angle."""
    if in_triton(x):
        return _Rotate.apply(x, cos, sin)
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors (T, intermediate size)."""
    return _SwiGLU.apply(gate, up) if in_triton(gate) else F.silu(gate) * up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        from redi import kernels  # triton is installed with torch for CUDA

        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x.contiguous(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rotated: Tensor):
        from redi import kernels

        cos, sin = ctx.saved_tensors
        return kernels.rotate(d_rotated.contiguous(), cos, -sin), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor):
        from redi import kernels

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_product: Tensor):
        from redi import kernels

        return kernels.swiglu_gradients(d_product.contiguous(), *ctx.saved_tensors)
