"""Floating-point operations of training, and the share of a GPU's peak that a step reached (MFU).

Model FLOPs, as the literature counts them: forward and backward of every matmul once, nothing for
what is computed again. Attention is counted by document, not by pack: a pack of sixteen 2k traces
does a sixteenth of the attention of one 32k trace, and counting packs would flatter the result.
"""

import torch

from redi.model import ModelConfig

# Dense bf16, by the makers' data sheets; looked up in the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def training_flops(config: ModelConfig, lengths: list[int], supervised: int) -> float:
    """FLOPs of forward and backward over documents of `lengths` tokens, the head over `supervised`
    rows: 6 per weight and token, and 6 * H * d * L^2 per layer for causal attention.

    Qwen2.5-Math-1.5B over one document of 8,192 tokens, all supervised: 11.4 GFLOP a token.
    """
    heads = config.num_heads * config.head_dim
    attention = config.hidden_size * 2 * (heads + config.num_kv_heads * config.head_dim)
    mlp = config.hidden_size * 3 * config.intermediate_size
    body = config.num_layers * (attention + mlp)
    head = config.vocab_size * config.hidden_size
    squares = sum(length**2 for length in lengths)
    return 6.0 * (body * sum(lengths) + head * supervised + config.num_layers * heads * squares)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
