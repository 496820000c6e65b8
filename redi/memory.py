"""How much memory a training step needs, and what it buys to spend more.

    always there      weights, gradients and two Adam moments in fp32, 16 bytes a parameter; the
                      copy that bf16 computes with; the head's chunk; every block's input
    per block kept    what autograd saves of its forward pass: measured, not looked up

A checkpointed block keeps its input alone and is run again in backward, which costs a third of its
compute. So only as many blocks are checkpointed as the longest pack leaves no room for.
Letters: T tokens of the longest pack.
"""

import os
from functools import partial

import torch
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.distributed import Place
from redi.logprobs import CHUNK_BYTES
from redi.model import Block, ModelConfig, Transformer, rotary_tables

SHARE = 0.85  # of the memory is planned with; the rest is the allocator's and other people's


def blocks_to_checkpoint(
    setting: str, model: Transformer, tokens: int, place: Place, dtype: torch.dtype
) -> tuple[int, str]:
    """(how many blocks to checkpoint, a line that says so and why) for packs of T `tokens`.

    setting: "all", "none", a number, or "auto", as few as memory allows. Raises UserError.
    """
    blocks = len(model.model.layers)
    if setting != "auto":
        named = {"all": blocks, "none": 0}
        if setting not in named and not (setting.isdecimal() and int(setting) <= blocks):
            raise UserError(
                f"--checkpoint-blocks is {setting}: expected auto, all, none or 0 to {blocks}"
            )
        count = named.get(setting) if setting in named else int(setting)
        return count, f"activation checkpointing: {count} of {blocks} blocks, as asked"
    per_block = tokens * saved_bytes_per_token(model.config, dtype)
    free = SHARE * total_memory(place) - fixed_bytes(model, tokens, dtype, place)
    count = 0
    if free < blocks * per_block:
        # While a block is run again, its activations and their gradients are there as well.
        kept = int((free - 2 * per_block) // per_block)
        count = blocks - max(kept, 0)
    return count, (
        f"activation checkpointing: {count} of {blocks} blocks; a pack of {tokens:,} tokens takes "
        f"{per_block / 2**30:.2f} GiB a block, and {max(free, 0) / 2**30:.1f} GiB are left for it"
    )


def saved_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> float:
    """What autograd keeps of one block's forward pass, measured on a block of this size."""
    tokens, sizes, kept = 16, {}, []
    block = Block(config).to(dtype)
    x = torch.zeros(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    angles = tokens, config.head_dim, config.rope_theta
    cos, sin = rotary_tables(*angles, dtype, torch.device("cpu"))
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), cos, sin)}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)  # alive, so that no other tensor gets its address
        if storage.data_ptr() not in shared:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    attend = partial(packed_attention, cu_seqlens=None, lengths=[tokens])
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        block(x, cos, sin, attend)
    return sum(sizes.values()) / tokens


def fixed_bytes(model: Transformer, tokens: int, dtype: torch.dtype, place: Place) -> int:
    """What a step needs besides the activations inside blocks."""
    config = model.config
    sharded = place.world_size > 1 or dtype != torch.float32
    parameters = sum(p.numel() for p in model.parameters())
    weights = 16 * parameters // place.node_size
    if sharded:  # whole weights to compute with, and their gradients until the ranks add them up
        weights += (dtype.itemsize + 4) * parameters
    head = 2 * CHUNK_BYTES[place.device.type] + 4 * config.vocab_size * config.hidden_size
    inputs = (config.num_layers + 4) * tokens * config.hidden_size * dtype.itemsize
    return weights + head + inputs


def total_memory(place: Place) -> int:
    """Bytes of the GPU, or this process's share of the machine."""
    if place.device.type == "cuda":
        return torch.cuda.get_device_properties(place.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // place.node_size
