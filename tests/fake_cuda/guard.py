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
    library = cache / f"guard-{version}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(library)
    ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # two may compile at once
        made = Path(folder) / library.name
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{include}", f"-L{libraries}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(made, library)
