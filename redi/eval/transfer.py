"""Numbers of the host on their way to the device."""

import torch
from torch import Tensor


def to_device(values, device: torch.device) -> Tensor:
    """Numbers, an array or a CPU tensor as a tensor on the device. CUDA does not wait for it: a
    copy from ordinary memory would hold the host until all is done that was launched before."""
    tensor = torch.as_tensor(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
