"""What a GPU can do at most. The MFU and `redi trace` use it.

From NVIDIA's data sheets (RTX 4090: the Ada whitepaper): dense bf16 matmuls with fp32 sums, half
the rate where a sheet states only that with 2:4 sparsity. Memory is what CUDA reports, which no
sheet states: one to seven per cent below the nominal size, not looked up.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str  # a part of the name that CUDA gives the device
    flops: float  # per second
    bandwidth: float  # bytes per second
    memory_gib: float


GPUS = (  # the first whose words all occur in a device's name is that device
    Gpu("A100 40GB", 312e12, 1.555e12, 39.4),
    Gpu("A100 PCIe", 312e12, 1.935e12, 79.2),  # 80 GB
    Gpu("A100", 312e12, 2.039e12, 79.2),  # SXM, 80 GB
    Gpu("H100 PCIe", 756e12, 2.0e12, 79.2),
    Gpu("H100 NVL", 835e12, 3.9e12, 93.1),
    Gpu("H100", 989e12, 3.35e12, 79.2),
    Gpu("H200 NVL", 835e12, 4.8e12, 139.8),
    Gpu("H200", 989e12, 4.8e12, 139.8),
    Gpu("B200", 2250e12, 7.7e12, 178.3),
    Gpu("L40S", 362e12, 0.864e12, 44.5),
    Gpu("RTX 4090", 165e12, 1.008e12, 23.6),
)
SMALLER = {"laptop", "d", "mig"}  # words that mark a slower device


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a name, "NVIDIA A100-SXM4-80GB" or "A100"; None if it is not in the table."""
    words = set(name.lower().replace("-", " ").split())
    known = (gpu for gpu in GPUS if set(gpu.name.lower().split()) <= words)
    return None if words & SMALLER else next(known, None)
