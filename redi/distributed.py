"""Where a run computes, in which precision, and together with whom.

fp32 weights are the truth the optimizer updates; bf16 is what CUDA computes in. The one mechanism
that keeps the two apart is FSDP2's mixed precision, on a single process as well: it casts the
parameters of a block when the block runs, and reduces gradients in fp32. No autocast.

Under torchrun every process is a rank with one device. Weights, gradients and optimizer state are
sharded over the ranks of a node and, where there are several nodes, replicated over them (a 2-D
mesh: all-gathers stay inside a node). Ranks add up what they computed, they never average: losses
hold the whole step's counts already.

Each technique is a function that is applied to a plain model from outside; `parallelize` states
the order. torch.distributed and fsdp cost 0.7 s to import: they are imported where they are used.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from redi.config import RankError, UserError
from redi.model import Block, Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1  # ranks on a node

    @property
    def is_local_rank_zero(self) -> bool:
        return self.rank % self.local_world_size == 0

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size


def start(timeout_minutes: float) -> World:
    """Join the other processes that torchrun started; alone without it.

    timeout_minutes: how long a rank waits for the others before it gives up. What ranks other than
    the first print goes nowhere. Raises UserError if the ranks of the nodes are uneven.
    """
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (
        int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world_size == 1:
        return World(0, 1, device)
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world_size}, but torchrun did not start this process")
    if world_size % local_world_size:
        raise UserError(
            f"{world_size} processes, {local_world_size} on this node: start as many on each"
        )
    import torch.distributed as dist

    if cuda:
        torch.cuda.set_device(device)
    # gloo beside nccl: what lies on the host (objects, checkpoints) is exchanged there.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)
    return World(rank, world_size, device, local_world_size)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """The dtype of --dtype: auto is bf16 on CUDA and fp32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if world.device.type == "cuda" else "float32"
    return DTYPES[name]


# ---------------------------------------------------------------- applied to a plain model


@dataclass(frozen=True)
class Parallelism:
    """What is applied to a model beside moving it."""

    dtype: torch.dtype = torch.float32  # of the compute
    checkpointed: int = 0  # blocks that are run again in backward
    compiled: bool = False
    reshard_after_forward: bool = False  # ZeRO-3 instead of ZeRO-2


def parallelize(model: Transformer, world: World, how: Parallelism) -> None:
    """Apply in this order, in place: activation checkpointing of the first blocks; compilation;
    sharding, where there are several ranks or another compute dtype than the weights'; the device.

    A model on the meta device is given memory, not numbers: checkpoint.fill reads those, each rank
    its own."""
    for block in model.model.layers[: how.checkpointed]:
        checkpoint_block(block)
    if how.compiled:
        for block in model.model.layers:
            compile_block(block)
    on_meta = model.output_weight.is_meta
    if not on_meta:
        model.to(world.device)
    if how.dtype != model.output_weight.dtype or world.world_size > 1:
        shard(model, world, how)
    if on_meta:
        model.to_empty(device=world.device)


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


def shard(model: Transformer, world: World, how: Parallelism) -> None:
    """FSDP2, in place: every block a group, the rest (embedding, norm, head) in the root's.

    Gradients are summed, not averaged: losses already hold the whole step's counts. What says so
    does not recurse, so it is set on every module.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = _mesh(world)
    policy = MixedPrecisionPolicy()
    if how.dtype != model.output_weight.dtype:
        policy = MixedPrecisionPolicy(param_dtype=how.dtype, reduce_dtype=torch.float32)
    for module in [*model.model.layers, model]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=how.reshard_after_forward and module is not model,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # and not by a product with 1


@cache
def _mesh(world: World):
    """One for all models of a process: every mesh brings groups of its own, with their threads."""
    import torch.distributed as dist

    sizes, names = (world.world_size,), ("shard",)
    if world.num_nodes > 1:
        sizes, names = (world.num_nodes, world.local_world_size), ("replicate", "shard")
    return dist.init_device_mesh(world.device.type, sizes, mesh_dim_names=names)


def last_pack(model: nn.Module, last: bool, reshard_after_forward: bool) -> None:
    """Tell a sharded model whether the pack at hand is the step's last one. Only its backward adds
    up gradients over ranks and frees the whole weights, which ZeRO-3 frees after every pack."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or reshard_after_forward)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """For forward passes that no backward follows: torch.no_grad, and sharded weights are shards
    again at the end. FSDP2 leaves that to backward; until then a module's parameters are whole
    copies that no optimizer and no checkpoint may see."""
    with torch.no_grad():
        yield
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """For passes without gradients that ranks make in different numbers: the whole weights, in the
    dtype of the compute, lie on every rank, and no pass inside exchanges anything."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        with without_gradients(model):
            yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(
                reshard_after_forward and module is not model, recurse=False
            )


# ---------------------------------------------------------------- between ranks


def sum_over_ranks(tensor: Tensor, world: World) -> None:
    """Sum over all ranks, in place."""
    if world.world_size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    sum_over_ranks(torch.zeros(()), world)


@contextmanager
def report_lost_ranks(world: World, timeout: str) -> Iterator[None]:
    """What a rank sees when another one died or stalls, in a sentence: RankError. timeout: what
    `start` was given, in words. Ranks that end well leave the group: one that just exits right
    after an exchange is often aborted in gloo's threads, and torchrun then ends those that still
    have work."""
    if world.world_size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        why = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RankError(
            f"rank {world.rank} lost another process, which died or did not answer within "
            f"{timeout}: {why}"
        ) from None
    dist.destroy_process_group()


@contextmanager
def local_rank_zero_first(world: World) -> Iterator[None]:
    """The body runs on the first rank of every node, then on the others: what one of them makes on
    disk, the others find. Where it fails, the others end with it."""
    if world.world_size == 1:
        yield
        return
    if not world.is_local_rank_zero and not all_ranks_ok(True, world):
        sys.exit(2)  # the rank that failed reports why
    try:
        yield
    except BaseException:
        if world.is_local_rank_zero:
            all_ranks_ok(False, world)
        raise
    if world.is_local_rank_zero and not all_ranks_ok(True, world):
        sys.exit(2)


def all_ranks_ok(ok: bool, world: World) -> bool:
    """Whether something succeeded on every rank. All ranks must call it."""
    failed = torch.tensor(0.0 if ok else 1.0)
    sum_over_ranks(failed, world)
    return not failed


def first_row(parameter: Tensor) -> int:
    """Where this rank's rows of a parameter begin in the whole one: 0 if it is not sharded."""
    if not hasattr(parameter, "device_mesh"):
        return 0
    mesh = parameter.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(index * -(-len(parameter) // shards), len(parameter))


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, a plain one as it is. All ranks must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
