"""The CUDA path without a GPU, for tests and benches.

guard.cpp, guard.py   torch's C++ side believes in a CUDA device
fake.py               FakeCuda: tensors without numbers, ranks without processes
aot.py                Triton kernels compiled for a GPU that is not there
cases.py              what test_cuda_without_a_gpu.py and test_bench_gpu.py run
"""

import importlib.util
import shutil

import torch

TESTED = ("2.11", "2.13", "2.14")  # versions of torch; fake.py uses private parts of it


def why_unavailable() -> str:
    """What this machine lacks for a fake CUDA device, or ""."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in TESTED:
        return f"the fake CUDA device is tested with torch {', '.join(TESTED)}, not {version}"
    if not shutil.which("g++"):
        return "the fake CUDA device needs g++"
    if not importlib.util.find_spec("triton"):
        return "the fake CUDA device needs triton"
    return ""
