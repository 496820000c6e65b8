"""Compile guard.cpp and load it into this process.

The library is cached per user, by torch's version and by the source, so it is compiled once (6 s).
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from redi.config import UserError

SOURCE = Path(__file__).with_name("guard.cpp")


def library() -> Path:
    """The compiled library's place; it may not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redi"
    version = hashlib.sha256(f"{torch.__version__}\n{SOURCE.read_text()}".encode()).hexdigest()[:16]
    return cache / f"guard-{version}.so"


def load() -> None:
    """After this, torch's C++ code believes in a CUDA device, until the process ends. Raises
    UserError if the library does not compile."""
    path, torch_folder = library(), Path(torch.__file__).parent
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # two may compile at once
            made = Path(folder) / path.name
            command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", made]
            command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
            command += ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = next((line for line in done.stderr.splitlines() if "error" in line), "")
                raise UserError(f"g++ cannot compile {SOURCE.name} (C++20, torch's headers): {why}")
            os.replace(made, path)
    ctypes.CDLL(str(path))
