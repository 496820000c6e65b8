"""How a run is distributed: devices, precision, and what ranks exchange.

Under torchrun every process is a rank with one device. Weights, gradients and optimizer state are
sharded over all ranks. FSDP2 all-gathers weights in the first forward pass of a step (ZeRO-3: in
every pass) and reduce-scatters gradients in the last backward pass; clipping all-reduces the
gradient's norm, and monitor.py the statistics. Ranks sum losses and gradients, never average them.

The optimizer updates fp32 weights; CUDA computes in bf16. FSDP2's mixed precision does both, also
in a single process: it casts a block's parameters when the block runs, and reduces gradients in
fp32. There is no autocast.
"""

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from redi.config import RankError, Stopped, UserError
from redi.model import Transformer

# On CUDA, gloo beside nccl: it exchanges what lies in host memory.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1  # ranks on this node
    patient: dist.ProcessGroup | None = None  # all ranks, which wait up to a year

    @property
    def is_local_rank_zero(self) -> bool:
        return self.rank % self.local_world_size == 0


def start(timeout_minutes: float) -> World:
    """Join the processes that torchrun started. Without torchrun, the world is this process.

    timeout_minutes: how long a rank waits for the others before it gives up. From here on only
    rank 0 writes to stdout. Raises UserError if nodes run different numbers of processes, this node
    runs more processes than it has GPUs, or another process does not join."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    # Packs differ in length: without this, a freed block cannot hold a slightly larger tensor.
    # Torch reads the variable at the first allocation.
    if cuda and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if world_size == 1:
        return World(0, 1, device)
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world_size}, but torchrun did not start this process")
    if world_size % local_world_size:
        raise UserError(
            f"{world_size} processes, {local_world_size} on this node: start equally many on each"
        )
    if cuda:
        gpus = torch.cuda.device_count()
        if local_world_size > gpus:
            need = f"{local_world_size} processes on this node need as many GPUs; torch sees {gpus}"
            raise UserError(f"{need}: start torchrun with --nproc_per_node {gpus}")
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(BACKENDS[device.type], timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    except RuntimeError as error:
        said = f"rank {rank} could not join the others; start all of them within {timeout}"
        raise RankError(f"{said}: {str(error).splitlines()[0]}") from error
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open as long as the process)
    return World(rank, world_size, device, local_world_size, patient)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """The dtype of --dtype: auto is bf16 on CUDA and fp32 on a CPU."""
    auto = "bfloat16" if world.device.type == "cuda" else "float32"
    return DTYPES[auto if name == "auto" else name]


@dataclass(frozen=True)
class Parallelism:
    """How a model is distributed: compute dtype, checkpointing, ZeRO stage, offload."""

    dtype: torch.dtype = torch.float32  # of the compute
    checkpointed: int = 0  # blocks that are recomputed in backward
    reshard_after_forward: bool = False  # ZeRO-3 instead of ZeRO-2
    offload: bool = False  # shards in host memory, where the optimizer runs


def parallelize(model: Transformer, world: World, how: Parallelism) -> None:
    """Distribute `model` in place. It is sharded over several ranks, for offload, or if the compute
    dtype is not that of the weights. A model on the meta device gets memory, but no values:
    checkpoint.weights fills in each rank's own rows."""
    # No block draws random numbers, so there is no random state to restore.
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.model.layers[: how.checkpointed]:
        block.forward = partial(recompute, block.forward)  # parameters keep their names
    if not model.output_weight.is_meta:
        model.to(world.device)
    if how.dtype != model.output_weight.dtype or world.world_size > 1 or how.offload:
        shard(model, world, how)
    if model.output_weight.is_meta:
        model.to_empty(device="cpu" if how.offload else world.device)


def shard(model: Transformer, world: World, how: Parallelism) -> None:
    """FSDP2, in place: one group per block; the root's group is embedding, norm and head.

    With offload, gradients stay on the device, in fp32, from the first pack of a step to the last,
    as without. So they are copied to the host once per step, and weights to the device as often as
    they are gathered."""
    from torch.distributed import fsdp  # takes a second

    kind = world.device.type
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group(BACKENDS[kind], store=store, rank=0, world_size=1)
    reduce_dtype = torch.promote_types(how.dtype, torch.float32)
    precision = fsdp.MixedPrecisionPolicy(param_dtype=how.dtype, reduce_dtype=reduce_dtype)
    settings = {"mesh": _mesh(world), "mp_policy": precision}
    if how.offload:
        settings["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=kind == "cuda")
    for module in [*model.model.layers, model]:
        reshard = how.reshard_after_forward and module is not model
        fsdp.fully_shard(module, **settings, reshard_after_forward=reshard)
        # Sum gradients. Neither setting recurses, so each module gets its own.
        if world.world_size > 1:  # for one rank, FSDP2 would divide by it
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, not a product with 1


@cache
def _mesh(world: World):
    """One mesh for all models of a process: each mesh creates its own groups and their threads."""
    return dist.init_device_mesh(world.device.type, (world.world_size,))


def last_pack(model: nn.Module, last: bool, reshard_after_forward: bool) -> None:
    """Tell a sharded model whether this pack is the last one of the step: only its backward reduces
    gradients over ranks. It also frees the whole weights, which ZeRO-3 does after every pack."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or reshard_after_forward)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """torch.no_grad for forward passes only, after which weights are sharded again: FSDP2 reshards
    in backward, and neither the optimizer nor a checkpoint may use the whole copies until then."""
    with torch.no_grad():
        yield
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """For forward passes that differ in number from rank to rank: without gradients, and without
    exchange, because every rank holds the whole weights in the compute dtype."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    with without_gradients(model):
        yield
    for module in sharded[1:]:  # the first is the root, which `shard` never reshards after forward
        module.set_reshard_after_forward(reshard_after_forward, recurse=False)


def first_row(parameter: Tensor) -> int:
    """The row of the whole parameter at which this rank's shard begins; 0 if it is not sharded."""
    if not hasattr(parameter, "device_mesh"):
        return 0
    mesh = parameter.device_mesh
    return min(mesh.get_local_rank() * -(-len(parameter) // mesh.size()), len(parameter))


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sum_over_ranks(tensor: Tensor, world: World, group: dist.ProcessGroup | None = None) -> None:
    """Sum over all ranks, in place. All ranks must call it; `group` holds them all."""
    if world.world_size > 1:
        dist.all_reduce(tensor, group=group)


def all_ranks_ok(ok: bool, world: World) -> bool:
    """Whether something succeeded on every rank. All ranks must call it."""
    failed = torch.tensor(0.0 if ok else 1.0)
    sum_over_ranks(failed, world)
    return not failed


@contextmanager
def local_rank_zero_first(world: World) -> Iterator[None]:
    """Run the body on rank 0 of every node, then on the other ranks, which find its files on disk.
    Those ranks wait up to a year, because downloading and tokenizing may take long. If the body
    fails on rank 0 of a node, all others end."""
    if world.is_local_rank_zero:
        yield
        sum_over_ranks(torch.zeros(1), world, world.patient)
        return
    try:
        sum_over_ranks(torch.zeros(1), world, world.patient)
    except RuntimeError:
        sys.exit(2)  # the rank that failed reports why
    try:
        yield
    except UserError as error:
        raise RankError(str(error)) from error  # which the first rank of this node did not meet


def require_same(values: dict[str, object], world: World) -> None:
    """Raise UserError, on every rank, if a value differs between ranks. All ranks must call it."""
    ranks = [values] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(ranks, values)
    for rank, other in enumerate(ranks):
        for name in [name for name in values if other.get(name) != ranks[0].get(name)]:
            dist.destroy_process_group()  # see `report_lost_ranks`; here all ranks leave it
            raise UserError(
                f"{name} is {other.get(name)!r} on rank {rank}, but {ranks[0].get(name)!r} on rank "
                "0; all nodes need the same flags, and files with the same contents"
            )


# Every failure is a RuntimeError in gloo, a DistBackendError in NCCL; these texts mean a lost rank.
LOST = re.compile(
    "gloo/transport/.*(closed|reset by peer|refused|[Bb]roken pipe|[Tt]imed? ?out)"
    "|remote process exited|collective operation timeout|store->get"
)


@contextmanager
def report_lost_ranks(world: World, timeout: str) -> Iterator[None]:
    """Turn the error that a rank gets when another one has died, or does not answer over gloo, into
    a RankError. While it waits for NCCL it gets none: after the timeout, torch aborts the process.
    timeout: how long `start` lets ranks wait, in words.

    After the body, leave the process group: gloo's threads often abort a process that exits right
    after an exchange, and torchrun would then stop the ranks that are still working. After an error
    only a single process leaves it: several would wait for the ranks that are gone."""
    several = world.world_size > 1
    leaving = not dist.is_initialized()  # a single process, for which `shard` creates a group
    try:
        yield
        leaving |= several
    except (Stopped, SystemExit):  # all ranks raise it; the rank that they waited for has failed
        leaving |= several
        raise
    except RuntimeError as error:
        lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if not several or not (lost or LOST.search(str(error))):
            raise
        why = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RankError(
            f"rank {world.rank} lost another process, which ended (see its own message) or did not "
            f"answer within {timeout}: {why}"
        ) from error
    finally:
        if leaving and dist.is_initialized():
            dist.destroy_process_group()
            _mesh.cache_clear()


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    per_gib = 2**30 if sys.platform == "darwin" else 2**20  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gib
