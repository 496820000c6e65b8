"""What takes the place of torch's functions on a fake GPU: streams, graphs, process groups."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from redi.trace.fake import FakeCuda, Wait


@dataclass(frozen=True)
class Capture:
    """What a CUDA graph would hold."""

    waits: list["Wait"]  # each would be an error
    launches: int  # of Triton kernels


def replacements(fake: "FakeCuda") -> list[tuple[Any, dict[str, Any]]]:
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
        pinned = fake.mode.fake_mode.from_tensor(tensor)
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
        (JITFunction, {"run": lambda kernel, *args, **_: fake.launch(kernel.fn.__name__, args)}),
    ]


def _work(fake: "FakeCuda") -> type:
    """A class in place of streams, events and graphs."""

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

    return Work


def _cuda_functions(fake: "FakeCuda") -> dict[str, Any]:
    """Name in torch.cuda -> what takes its place."""
    Work = _work(fake)

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        waits, launches, fake.capturing = len(fake.waits), len(fake.launches), True
        try:
            yield
        finally:
            fake.capturing = False
        fake.captures.append(Capture(fake.waits[waits:], len(fake.launches) - launches))

    gpu = SimpleNamespace(
        name=fake.gpu.name, total_memory=fake.memory, major=9, minor=0, multi_processor_count=132
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
