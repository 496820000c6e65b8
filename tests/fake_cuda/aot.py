"""Triton kernels compiled to machine code for a GPU that is not there.

    with FakeCuda(), compiled_for(90) as compiled:
        kernels.softmax_gradient_(...)          the project's own launch code, on fake tensors
    compiled[0].registers, compiled[0].spilled_bytes

Triton needs a device only to launch. With a driver that names a target, and launches turned into
warm-ups, all else is as on a GPU: how arguments are specialized (pointers aligned to 16 bytes,
integers that are 1 or multiples of 16), the compiler, ptxas. TRITON_INTERPRET must not be set.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

TOOLS = Path(compiler.__file__).parent / "bin"
run = JITFunction.run  # before FakeCuda replaces it


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, in numbers."""

    name: str
    shared_bytes: int  # of a block
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: registers that did not fit
    wide_loads: int  # instructions that load 16 bytes of global memory


class _Pointer(MockTensor):
    """A fake tensor as an argument, with an address as if its storage began at 0."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.dtype, list(tensor.shape))
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles its kernel and adds it to the list, instead of running it.

    capability: 90 for sm_90."""
    compiled: list[Compiled] = []

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
        args = [_Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
        binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_measure(kernel.fn.__name__, binary))

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # each target keeps its own compiled kernels
        get_current_stream=lambda device: 0,
    )
    driver.set_active(target)
    with mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def _measure(name: str, binary: Any) -> Compiled:
    def tool(name: str, *arguments: str) -> str:
        command = [TOOLS / name, *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    size = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    spilled = size["STACK"] + size["LOCAL"]
    wide_loads = len(re.findall(r"\bLDG\.E\S*\.128", code))
    return Compiled(name, binary.metadata.shared, size["REG"], spilled, wide_loads)
