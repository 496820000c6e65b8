"""A CUDA device and ranks that are not there: the code runs, no number is computed.

    with FakeCuda(find_gpu("H100"), world_size=8) as fake:
        world = distributed.start(30.0)         rank 0 of 8, on cuda:0
        ...                                     a training step at its true size
    fake.peak, fake.waits, fake.collectives, fake.costs

Tensors on the CPU are real. Tensors on "cuda" are torch's fake tensors: shape, dtype, strides and a
device, and every operator runs only its shape function. So an error of shape, dtype or device is
found, in seconds and in little memory, whatever the size. Pinned memory is fake as well, and what
is copied to the host without a wait, and what the host computes from either: offloaded weights take
no memory. Collectives of torch's fake process group return at once. Triton kernels are not run.
What the host reads from the device is 0.0, 1 or True.

Not seen: memory inside kernels (flash attention, NCCL, cuBLAS workspaces) and fragmentation.
It changes the process for good (guard.py), so it runs where nothing else needs torch.
"""

import os
import traceback
import weakref
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from redi import monitor
from redi.gpus import Gpu, find_gpu
from redi.trace import guard, stand_ins
from redi.trace.costs import Costs
from redi.trace.stand_ins import Capture, replacements

ROOT = Path(__file__).parents[2]
CODE = tuple(str(ROOT / folder) + os.sep for folder in ("redi", "bench", "tests"))
OWN = (__file__, stand_ins.__file__)
ALLOCATION = 512  # bytes: CUDA's allocator rounds up to a multiple

H100 = find_gpu("H100")
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
    rows = x.shape[: x.ndim - len(shape)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(*rows, *[1] * len(shape), dtype=wide)


ONLY_ON_CUDA = {  # operator -> its results
    "silu_backward": lambda grad, x: torch.empty_like(x),
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": lambda grad, x, shape, rstd, weight, mask: (
        torch.empty_like(x), torch.empty_like(weight)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wait:
    """A place where the host would wait for the device."""

    function: str  # the innermost of the project: "train.train_step"
    cause: str


class FakeCuda:
    """Context manager: a fake GPU, and fake ranks of which this process is rank 0."""

    def __init__(self, gpu: Gpu = H100, world_size: int = 1, memory: float | None = None):
        """A node has 8 GPUs. memory: bytes of each, if not those of `gpu`."""
        self.world_size, self.gpus_per_node = world_size, min(8, world_size)
        self.gpu, self.memory = gpu, int(memory or gpu.memory_gib * 2**30)
        self.costs = Costs(gpu)
        self.waits: list[Wait] = []
        self.captures: list[Capture] = []
        self.collectives: Counter[str] = Counter()
        self.launches: list[str] = []  # names of Triton kernels
        self.backends: list[str] = []  # of process groups, as asked for
        # Bytes in live storages; FSDP frees a storage by resizing it to 0.
        self.allocated = self.peak = 0
        self.peak_at = ""  # the project's function in which the peak was reached
        self.capturing = False
        self._sizes: dict[int, int] = {}  # live storages
        self.pinned: set[int] = set()  # storages of the host

    def __enter__(self) -> "FakeCuda":
        guard.load()
        torchrun = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.gpus_per_node), "MASTER_ADDR": "fake", "MASTER_PORT": "1",
        }  # fmt: skip
        with ExitStack() as stack:
            for owner, functions in replacements(self):
                stack.enter_context(mock.patch.multiple(owner, create=True, **functions))
            stack.enter_context(mock.patch.dict(os.environ, torchrun))
            if not torch.version.cuda:  # a CPU build of torch has no CUDA kernel for these
                kernels = torch.library.Library("aten", "IMPL")
                for name, shapes in ONLY_ON_CUDA.items():
                    kernels.impl(name, shapes, "CUDA")
                stack.callback(kernels._destroy)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # torch.tensor(..., device="cuda") copies a CPU tensor, which a mode sees.
            only_cpu = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)
            stack.callback(torch._C._set_only_lift_cpu_tensors, only_cpu)
            # A fake has no cache, for which the update norm would work in small batches on a CPU.
            stack.enter_context(mock.patch.dict(monitor.BATCH, cpu=monitor.BATCH["cuda"]))
            self.mode = stack.enter_context(_Dispatch(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)
        if dist.is_initialized():
            dist.destroy_process_group()

    def reset(self) -> None:
        """Forget what was recorded. The peak begins at what is allocated now."""
        for record in self.waits, self.captures, self.collectives, self.launches:
            record.clear()
        self.peak, self.costs = self.allocated, Costs(self.gpu)

    def wait(self, cause: str) -> None:
        """Note that the host waits, on behalf of the innermost function of the project."""
        self.waits.append(Wait(_function(), cause))

    def launch(self, name: str, args: tuple) -> None:
        """In place of running a Triton kernel."""
        self.launches.append(name)
        self.costs.add_triton(name, args)

    # ---- memory

    def allocate(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._free, storage._cdata)
        self.resize(storage)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage's present size, if it is on the device."""
        if storage._cdata in self._sizes:
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self.allocated += size - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = size
            if self.allocated > self.peak:
                self.peak, in_backward = self.allocated, torch._C._current_graph_task_id() != -1
                self.peak_at = _function() + ", in a backward pass" * in_backward

    def _free(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key)


def _function() -> str:
    """The innermost function of the project that is running, as "train.train_step"."""
    codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
    ours = (code for code in codes if code.co_filename.startswith(CODE))
    code = next((c for c in ours if c.co_filename not in OWN), _function.__code__)
    return f"{Path(code.co_filename).stem}.{code.co_qualname}"


# ---------------------------------------------------------------- operators


class _Dispatch(TorchDispatchMode):
    """Runs operators on CUDA tensors as fake ones, and records what they would do."""

    def __init__(self, fake: FakeCuda):
        super().__init__()
        self.fake, self.fake_mode = fake, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t not in (Tensor, FakeTensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a DTensor runs the operator on its local tensors, seen here
        leaves = tree_leaves((args, kwargs))
        on = {leaf.fake_device.type for leaf in leaves if isinstance(leaf, FakeTensor)}
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not (on or to_cuda) or operator.namespace == "prim":  # the host's
            return operator(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # else autograd has decomposed it already
            with self:
                parts = operator.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if (answer := self._answer(operator.overloadpacket, args, kwargs)) is not None:
            self.fake.costs.add_operator(operator, args, kwargs, answer)
            return answer
        self._record(operator, args, kwargs)
        if not on:  # a copy of a real tensor to the device
            args = tree_map_only(Tensor, self.fake_mode.from_tensor, args)
        with self.fake_mode:
            results = operator(*args, **kwargs)
        # Module.to cannot swap a tensor to which this memo keeps a weak reference.
        self.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        if "cuda" in on or to_cuda:
            self.fake.costs.add_operator(operator, args, kwargs, results)
        without_values = kwargs.get("non_blocking") or "cpu" in on
        return tree_map_only(FakeTensor, partial(self._result, without_values), results)

    def _result(self, without_values: bool, tensor: FakeTensor) -> Tensor:
        """Count an operator's output; what the host may read becomes a real tensor."""
        if tensor.is_cuda:
            self.fake.allocate(tensor)
        return tensor if tensor.is_cuda or without_values else _host_values(tensor)

    def _answer(self, operator: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator that has no shape function; None for the others."""
        if operator is aten._local_scalar_dense:
            self.fake.wait("item()")
            return _host_values(args[0]).item()
        if operator is aten.nonzero:  # as if all were zero
            self.fake.wait("nonzero()")
            return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)
        if operator is aten.equal:
            self.fake.wait("equal()")
            return True
        if operator is aten.copy_ and not isinstance(args[0], FakeTensor):
            self.fake.wait("copy to the host")
            return args[0].copy_(_host_values(args[1]))
        with_out_dtype = operator is aten.addmm and torch.dtype in map(type, args)
        if with_out_dtype and torch.__version__.startswith("2.11"):
            return kwargs["out"]  # its shape function does not know the argument
        return None

    def _record(self, operator: Any, args: tuple, kwargs: dict) -> None:
        """Record collectives and waits, and assert what shape functions do not check."""
        packet, name = operator.overloadpacket, operator.overloadpacket.__name__
        if operator.namespace in ("c10d", "_c10d_functional") and name != "_wrap_tensor_autograd":
            self.fake.collectives[name.strip("_")] += 1
        if packet is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._record_copy(args[0], target.type, kwargs.get("non_blocking"))
        if packet is aten.copy_:
            self._record_copy(args[1], args[0].device.type, args[2:] == (True,))
        if packet in INDEXING and any(index is not None and index.is_cpu for index in args[1]):
            self.fake.wait("index on the CPU")
        if operator.namespace == "torch_attn" and name == "_varlen_attn":
            for tensor in args[:3]:  # query, key, value
                assert tensor.stride(-1) == 1, "flash attention: last dimension not contiguous"
                assert tensor.shape[-1] % 8 == 0, f"flash attention: head size {tensor.shape[-1]}"
            for starts in args[3:5]:
                assert starts.dtype == torch.int32, f"flash attention: cu_seqlens {starts.dtype}"

    def _record_copy(self, source: Tensor, target: str, non_blocking: bool | None) -> None:
        if source.is_cuda and target == "cpu":
            if not non_blocking:
                self.fake.wait("copy to the host")
        elif source.is_cpu and target == "cuda":
            if not source.is_pinned():
                self.fake.wait("copy from memory that is not pinned")
            elif self.fake.capturing or not non_blocking:
                self.fake.wait("copy from the host")


def _host_values(tensor: FakeTensor) -> Tensor:
    """What the host reads: 0.0, 1 or True. Zeros take no memory until they are read."""
    make = torch.zeros if tensor.is_floating_point() else torch.ones
    return make(tensor.shape, dtype=tensor.dtype, device="cpu")
