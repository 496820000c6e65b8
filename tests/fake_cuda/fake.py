"""A CUDA device and ranks that are not there: the code runs, no number is computed.

    with FakeCuda(world_size=8, memory=80e9) as fake:
        world = distributed.start(30.0)         rank 0 of 8, on cuda:0
        ...                                     a training step at its true size
    fake.peak, fake.waits, fake.collectives

Tensors on the CPU are real. Tensors on "cuda" are torch's fake tensors: shape, dtype, strides and a
device, and every operator runs only its shape function. So an error of shape, dtype or device is
found, in seconds and in little memory, whatever the size. Collectives of torch's fake process group
return at once. Triton kernels are not run (aot.py compiles them). What the host reads from the
device is 0.0, 1 or True.

Not seen: memory inside kernels (flash attention, NCCL, cuBLAS workspaces) and fragmentation.
It changes the process for good (guard.py), so each use gets a process of its own.
"""

import os
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from . import guard

ROOT = Path(__file__).parents[2]
CODE = tuple(str(ROOT / folder) + os.sep for folder in ("redi", "bench", "tests"))
ALLOCATION = 512  # bytes: CUDA's allocator rounds up to a multiple

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@dataclass(frozen=True)
class Wait:
    """A place where the host would wait for the device."""

    function: str  # the innermost of the project: "train.train_step"
    cause: str


@dataclass(frozen=True)
class Capture:
    """What a CUDA graph would hold."""

    waits: list[Wait]  # each would be an error
    launches: int  # of Triton kernels


class FakeCuda:
    """Context manager: a fake GPU, and fake ranks of which this process is rank 0."""

    def __init__(
        self, world_size: int = 1, memory: float = 80e9, name: str = "NVIDIA H100 80GB HBM3"
    ):
        """memory: bytes of the GPU. A node has 8 of them."""
        self.world_size, self.gpus_per_node = world_size, min(8, world_size)
        self.memory, self.name = int(memory), name
        self.waits: list[Wait] = []
        self.captures: list[Capture] = []
        self.collectives: Counter[str] = Counter()
        self.launches: list[str] = []  # names of Triton kernels
        self.backends: list[str] = []  # of process groups, as asked for
        # Bytes in live storages; FSDP frees a storage by resizing it to 0.
        self.allocated = self.peak = 0
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
            for owner, functions in _replacements(self):
                stack.enter_context(mock.patch.multiple(owner, create=True, **functions))
            stack.enter_context(mock.patch.dict(os.environ, torchrun))
            if not torch.version.cuda:  # else torch decomposes silu_backward, which has no kernel
                kernels = torch.library.Library("aten", "IMPL")
                kernels.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
                stack.callback(kernels._destroy)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # torch.tensor(..., device="cuda") copies a CPU tensor, which a mode sees.
            only_cpu = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)
            stack.callback(torch._C._set_only_lift_cpu_tensors, only_cpu)
            stack.enter_context(_Dispatch(self))
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
        self.peak = self.allocated

    def wait(self, cause: str) -> None:
        """Note that the host waits, on behalf of the innermost function of the project."""
        frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
        ours = (code for code in frames if code.co_filename.startswith(CODE))
        code = next((c for c in ours if c.co_filename != __file__), self.wait.__code__)
        function = f"{Path(code.co_filename).stem}.{code.co_qualname}"
        self.waits.append(Wait(function, cause))

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
            self.peak = max(self.peak, self.allocated)

    def _free(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key)


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
        on_cuda = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not (on_cuda or to_cuda) or operator.namespace == "prim":  # the host's
            return operator(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # else autograd has decomposed it already
            with self:
                parts = operator.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if (answer := self._answer(operator.overloadpacket, args, kwargs)) is not None:
            return answer
        self._record(operator, args, kwargs)
        if not on_cuda:  # a copy of a real tensor to the device
            args = tree_map_only(Tensor, self.fake_mode.from_tensor, args)
        with self.fake_mode:
            results = operator(*args, **kwargs)
        # Module.to cannot swap a tensor to which this memo keeps a weak reference.
        self.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return tree_map_only(FakeTensor, self._result, results)

    def _result(self, tensor: FakeTensor) -> Tensor:
        """Count an operator's output; what is on the CPU becomes a real tensor."""
        if tensor.fake_device.type == "cpu":
            return _host_values(tensor)
        self.fake.allocate(tensor)
        return tensor

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


# ---------------------------------------------------------------- in place of torch's functions


def _replacements(fake: FakeCuda) -> list[tuple[Any, dict[str, Any]]]:
    """Modules and classes, and what is replaced in them."""
    init, new_group, resize = dist.init_process_group, dist.new_group, torch.UntypedStorage.resize_

    def fake_init(backend: str, **_: Any) -> None:
        fake.backends.append(backend)
        init("fake", store=FakeStore(), rank=0, world_size=fake.world_size)

    def fake_group(*_: Any, backend: str, **__: Any) -> Any:
        fake.backends.append(backend)
        return new_group(backend="fake")

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        fake.resize(storage)
        return storage

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        fake.pinned.add(storage._cdata)
        weakref.finalize(storage, fake.pinned.discard, storage._cdata)
        return pinned

    on_tensors = {
        "pin_memory": pin_memory,
        "is_pinned": lambda tensor, *_: tensor.untyped_storage()._cdata in fake.pinned,
        "record_stream": lambda *_: None,
    }
    cuda = _cuda_functions(fake)
    return [
        (torch.cuda, cuda),
        (torch.accelerator, {"current_stream": cuda["current_stream"]}),
        (torch.Tensor, on_tensors),
        (torch.UntypedStorage, {"resize_": resize_}),
        (FakeTensor, {"tolist": lambda tensor: tensor.cpu().tolist()}),
        (fake_tensor, {"init_gpu_context": lambda *_: None}),
        (dist, {"init_process_group": fake_init, "new_group": fake_group}),
        (JITFunction, {"run": lambda kernel, *_, **__: fake.launches.append(kernel.fn.__name__)}),
    ]


def _cuda_functions(fake: FakeCuda) -> dict[str, Any]:
    """Name in torch.cuda -> what takes its place."""

    class Work:
        """A stream, an event or a graph: all work is done at once."""

        device, device_index, device_type = torch.device("cuda", 0), 0, 1
        stream_id = cuda_stream = 0

        def __init__(self, *_: Any, **__: Any): ...
        def wait(self, *_: Any) -> None: ...
        def synchronize(self) -> None:
            fake.wait("synchronize()")

        wait_stream = wait_event = record = replay = wait

        def record_event(self, event: Any = None) -> Any:
            return event or Work()

        def query(self) -> bool:
            return True

        def is_capturing(self) -> bool:
            return fake.capturing

        def elapsed_time(self, end: Any) -> float:
            return 1.0  # milliseconds

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        waits, launches, fake.capturing = len(fake.waits), len(fake.launches), True
        try:
            yield
        finally:
            fake.capturing = False
        fake.captures.append(Capture(fake.waits[waits:], len(fake.launches) - launches))

    gpu = SimpleNamespace(
        name=fake.name, total_memory=fake.memory, major=9, minor=0, multi_processor_count=132
    )
    constants = {
        **dict.fromkeys(["is_available", "is_initialized", "is_bf16_supported"], True),
        **dict.fromkeys(["init", "_lazy_init", "set_device", "set_stream"]),
        **dict.fromkeys(["manual_seed", "manual_seed_all", "set_rng_state"]),
        **dict.fromkeys(["current_stream", "default_stream"], Work()),
        "current_device": 0,
        "device_count": fake.gpus_per_node,
        "get_device_capability": (gpu.major, gpu.minor),
        "get_device_name": gpu.name,
        "get_device_properties": gpu,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    return {
        **{name: lambda *_, value=value, **__: value for name, value in constants.items()},
        **dict.fromkeys(["Stream", "Event", "CUDAGraph"], Work),
        "graph": graph,
        "stream": nullcontext,
        "synchronize": lambda *_: fake.wait("synchronize()"),
        "empty_cache": lambda: fake.wait("empty_cache()"),
        "is_current_stream_capturing": lambda: fake.capturing,
        "memory_allocated": lambda *_: fake.allocated,
        "max_memory_allocated": lambda *_: fake.peak,
        "reset_peak_memory_stats": lambda *_: setattr(fake, "peak", fake.allocated),
        "mem_get_info": lambda *_: (fake.memory - fake.allocated, fake.memory),
    }
