"""A run on GPUs that are not there: redi trace

guard.cpp, guard.py   torch's C++ side believes in a CUDA device
fake.py               FakeCuda: tensors without numbers, ranks without processes
stand_ins.py          what takes the place of torch's functions there
costs.py              FLOPs, bytes and the least time of every kernel; the rules
published.py          the published run: shape and lengths
runs.py               a step of training, and one of decoding, at their true size

Tests and benches use FakeCuda too (tests/fake_cuda).
"""

import importlib.util
import shutil

import torch

from redi.trace import guard

TESTED = ("2.11", "2.13", "2.14")  # versions of torch; fake.py uses private parts of it


def why_unavailable() -> str:
    """What this machine lacks for a fake CUDA device, or ""."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in TESTED:
        return f"the fake CUDA device is tested with torch {', '.join(TESTED)}, not {version}"
    if not guard.library().exists() and not shutil.which("g++"):
        return "the fake CUDA device needs g++; install it"
    if not importlib.util.find_spec("triton"):
        return "the fake CUDA device needs triton; pip install triton"
    return ""
