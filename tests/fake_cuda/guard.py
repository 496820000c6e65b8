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

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> None:
    """After this, torch's C++ code believes in a CUDA device, until the process ends.

    Raises CalledProcessError, with the compiler's message on stderr, if it does not compile."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redi-tests"
    version = hashlib.sha256(f"{torch.__version__}\n{SOURCE.read_text()}".encode()).hexdigest()[:16]
    library, torch_folder = cache / f"guard-{version}.so", Path(torch.__file__).parent
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # two may compile at once
            made = Path(folder) / library.name
            command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", made]
            command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
            command += ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            os.replace(made, library)
    ctypes.CDLL(str(library))
