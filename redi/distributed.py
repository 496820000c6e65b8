"""Where a run computes, and in which precision.

fp32 weights are the truth the optimizer updates; bf16 is what CUDA computes in. The one mechanism
that keeps the two apart is FSDP2's mixed precision, on a single process as well: it casts the
parameters of a block when the block runs, and reduces gradients in fp32. No autocast.

Each technique is a function that is applied to a plain model from outside; `place_model` states
the order. One process only: WORLD_SIZE above 1 is refused.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from redi.config import UserError
from redi.model import Block, Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Place:
    """This process among all of them."""

    rank: int
    world_size: int
    device: torch.device


def start() -> Place:
    """Raises UserError under torchrun with more than one process."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(
            f"WORLD_SIZE is {world_size}: redi runs on one process; start it with python, or with "
            "torchrun --nproc_per_node 1"
        )
    return Place(
        0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    )


def compute_dtype(name: str, place: Place) -> torch.dtype:
    """The dtype of --dtype: auto is bf16 on CUDA and fp32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if place.device.type == "cuda" else "float32"
    return DTYPES[name]


# ---------------------------------------------------------------- applied to a plain model


def place_model(
    model: Transformer,
    place: Place,
    dtype: torch.dtype,
    checkpointed: int = 0,
    compiled: bool = False,
) -> None:
    """Move `model` (fp32) to the device, and apply in this order, in place: activation
    checkpointing of the first `checkpointed` blocks; compilation, if asked for; and for a compute
    dtype other than fp32, sharding with mixed precision."""
    model.to(place.device)
    for block in model.model.layers[:checkpointed]:
        checkpoint_block(block)
    if compiled:
        for block in model.model.layers:
            compile_block(block)
    if dtype != torch.float32:
        shard(model, place, dtype)


def checkpoint_block(block: Block) -> None:
    """Keep only the block's input, and run it again in backward. Names of parameters stay."""
    # Nothing in a block is random, so there is no random state to put back.
    block.forward = partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
    )


def compile_block(block: Block) -> None:
    """torch.compile what a block does before and after attention: norms, rotation, SwiGLU and
    residuals become few kernels. Packs have any length, so shapes are dynamic from the start."""
    block.before_attention = torch.compile(block.before_attention, dynamic=True)
    block.after_attention = torch.compile(block.after_attention, dynamic=True)


def shard(model: Transformer, place: Place, dtype: torch.dtype) -> None:
    """FSDP2, in place: every block a group, the rest (embedding, norm, head) in the root's.

    Gradients are summed, not averaged: losses already hold the whole step's counts. The divide
    factor does not recurse, so it is set on every module.
    """
    import torch.distributed as dist  # 0.7 s with fsdp: imported where it is used
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        backend = "nccl" if place.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(place.device.type, (place.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, a plain one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
