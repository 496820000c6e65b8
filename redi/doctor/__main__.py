"""What this machine has, and whether redi works on it: redi doctor

Prints the versions of packages, devices, free memory and disk. Takes a training step, and compares
a packed batch and the log-prob kernels with float64 (checks.py). Each thing that is broken gets one
line, and the exit status is 1. This module imports no package, so it can say which is missing.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from redi import __version__
from redi.config import one_line, parse, program

REQUIRED = {  # the oldest version; as in pyproject.toml
    "torch": "2.11", "safetensors": "0.5", "tokenizers": "0.21", "numpy": "2.0", "tqdm": "4.66",
    "jinja2": "3.1", "huggingface_hub": "0.27",
}  # fmt: skip
OPTIONAL = {  # what needs it
    "pyarrow": "Parquet and compressed files, redi toy, redi prepare",
    "math-verify": "redi evaluate, and redi prepare where traces have no labels",
    "matplotlib": "redi curves, redi study, and the picture of redi show",
    "mpmath": "redi study",
    "triton": "CUDA",
}
GIB = 2**30
Finding = tuple[bool, str]  # whether all is well, and the line to print


def packages() -> Iterator[Finding]:
    """One line for each package that is missing or old, and one for the versions of the others."""
    found = []
    for name in (*REQUIRED, *OPTIONAL):
        module = name.replace("-", "_")
        try:
            importlib.import_module(module)
            version = importlib.metadata.version(name)
        except Exception as error:  # one that is installed may fail to load, for any reason
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            why = "not installed" if missing else described(error)
            use = f"; needed for {OPTIONAL[name]}" if name in OPTIONAL else ""
            yield missing and name in OPTIONAL, f"{name}: {why}{use}"
            continue
        ours, oldest = (re.findall(r"\d+", v) for v in (version, REQUIRED.get(name, "0")))
        if [*map(int, ours)] < [*map(int, oldest)]:
            yield False, f"{name} {version}: expected {REQUIRED[name]} or newer"
        found.append(f"{name} {version}")
    yield True, f"packages: {', '.join(found)}"


def described(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]


def machine() -> Iterator[Finding]:
    """Memory, disk and devices."""
    import torch

    with open("/proc/meminfo", encoding="utf-8") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    memory, disk = kib["MemAvailable"] / 2**20, shutil.disk_usage(".").free / GIB
    cores = len(os.sched_getaffinity(0))
    yield True, f"{cores} CPU cores; free: memory {memory:.1f} GiB, disk {disk:.1f} GiB"
    for number in range(torch.cuda.device_count()):
        free, total = (amount / GIB for amount in torch.cuda.mem_get_info(number))
        name = torch.cuda.get_device_name(number)
        yield True, f"cuda:{number}: {name}; free: {free:.1f} of {total:.1f} GiB"
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield True, f"no CUDA device (torch is built {built}): the CPU is used"


def numerics() -> Iterator[Finding]:
    """One line for each part of checks.py that is right, and for each number that is not."""
    import torch

    from redi.doctor import checks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for check, claim in checks.CLAIMS.items():
        try:
            wrong = [one for one in check(device) if not one.error <= one.goal]  # nan is wrong
        except Exception as error:  # whatever a kernel or its compiler raises
            yield False, f"{device.type}: {check.__name__}: {described(error)}"
            continue
        for one in wrong:
            off = f"off by {one.error:.2g} from {one.peer}, expected at most {one.goal:.2g}"
            yield False, f"{device.type}: {check.__name__}: {one.name} is {off}"
        if not wrong:
            yield True, f"{device.type}: {claim}"


@dataclass(kw_only=True)
class DoctorConfig:
    """No settings: `parse` gives --help."""


@program
def main() -> None:
    parse(DoctorConfig, "Look at this machine, and check that redi works on it.")
    print(f"redi {__version__}, Python {platform.python_version()}, {platform.platform()}")
    well = True
    for part in (packages, machine, numerics):
        for is_well, line in part():
            print("ok    " if is_well else "BROKEN", line, flush=True)
            well &= is_well
        if not well:  # the parts that follow need what is broken
            break
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
