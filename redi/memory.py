"""How much memory a training step needs, and what it buys to spend more.

The peak is where the last pack of a step turns from forward to backward. With N parameters, n ranks
on a node, e bytes a number of the compute dtype (bf16: 2), L blocks, packs of T tokens:

    12 N / n          weights and two Adam moments in fp32, sharded
    4 N               gradients in fp32, whole until that backward pass: it adds them up over ranks
    e N               whole weights to compute with, where the fp32 ones are sharded or too wide
    e L T D           every block's input
    per kept block    what autograd saves of its forward pass: measured, not looked up. Where all
                      are checkpointed: of the one that is run again
    the turn          the head or the first backward pass of a block, whichever is more

It is not 16 N / n and 4 N: a gradient's shard appears as the whole one goes. A step of a single
pack needs less, by the whole gradients of the blocks that are kept.

A checkpointed block keeps its input alone and is run again in backward, which costs a third of its
compute. So only as many blocks are checkpointed as the longest pack leaves no room for: the first
ones, so that the others' activations are gone when one is run again.

bench/ranks.py and bench/gpu.py hold the formula beside what is used. Left out: buffers of the
exchange between ranks (a block's, and gone at the peak), the caches of libraries, and what ZeRO-3
and compiled blocks save. Letters: T tokens of the longest pack, D hidden, I intermediate,
V vocabulary.
"""

import os
from functools import partial

import torch
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.distributed import World
from redi.logprobs import CHUNK_BYTES
from redi.model import Block, ModelConfig, Transformer, rotary_tables

SHARE = 0.85  # of the memory is planned with; the rest is the allocator's and other people's


def blocks_to_checkpoint(
    setting: str, model: Transformer, tokens: int, world: World, dtype: torch.dtype
) -> tuple[int, str]:
    """(how many blocks to checkpoint; why, and what a step needs) for packs of T `tokens`.

    setting: "all", "none", a number, or "auto", as few as memory allows. Raises UserError.
    """
    blocks = len(model.model.layers)
    parts = fixed_parts(model, tokens, world, dtype)
    per_block = tokens * saved_bytes_per_token(model.config, dtype)
    there = total_memory(world)
    if setting == "auto":
        free = SHARE * there - sum(parts.values())
        count, why = blocks - min(max(int(free // per_block), 0), blocks), "as few as memory allows"
    else:
        named = {"all": blocks, "none": 0}
        if setting not in named and not (setting.isdecimal() and int(setting) <= blocks):
            raise UserError(
                f"--checkpoint-blocks is {setting}: expected auto, all, none or 0 to {blocks}"
            )
        count, why = named.get(setting) if setting in named else int(setting), "as asked"
    held = blocks_held(count, blocks)
    which = (
        f"{held} kept, {_gib(per_block)} each" if count < blocks else "the one that is run again"
    )
    activations = {f"activations inside blocks: {which}": held * per_block}
    lines = [
        f"activation checkpointing: {count} of {blocks} blocks, {why}",
        f"memory of a process in GiB, for packs of {tokens:,} tokens (formula: redi/memory.py):",
        *_table(parts | activations, SHARE * there),
    ]
    return count, "\n".join(lines)


def blocks_held(checkpointed: int, blocks: int) -> int:
    """Of how many blocks all activations are there at the peak."""
    return max(blocks - checkpointed, 1)


def _table(parts: dict[str, float], planned: float) -> list[str]:
    total = sum(parts.values())
    fits = "within" if total <= planned else "more than"
    end = f"at the peak, {fits} {SHARE:.0%} of what there is, {_gib(planned)}"
    return [f"{_gib(size):>10}  {what}" for what, size in [*parts.items(), (end, total)]]


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


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


def step_bytes(
    model: Transformer, tokens: int, world: World, dtype: torch.dtype, checkpointed: int
) -> float:
    """The most a process holds in a step over packs of T `tokens`."""
    held = blocks_held(checkpointed, len(model.model.layers))
    activations = held * tokens * saved_bytes_per_token(model.config, dtype)
    return sum(fixed_parts(model, tokens, world, dtype).values()) + activations


def fixed_parts(
    model: Transformer, tokens: int, world: World, dtype: torch.dtype
) -> dict[str, int]:
    """What a step needs besides the activations inside blocks: bytes by what they are for."""
    config, ranks = model.config, world.local_world_size
    parameters = sum(p.numel() for p in model.parameters())
    wide = tokens * config.hidden_size  # numbers of a (T, D)
    over = f", over {ranks} ranks" if ranks > 1 else ""
    parts = {
        f"weights and Adam's moments, 12 bytes a parameter{over}": 12 * parameters // ranks,
        "gradients, 4 bytes a parameter, whole until a step's last backward": 4 * parameters,
    }
    if world.world_size > 1 or dtype != torch.float32:
        parts["whole weights to compute with"] = dtype.itemsize * parameters
    parts["every block's input"] = config.num_layers * wide * dtype.itemsize
    # Around the head five tensors (T, D): what the last norm saves, its output, the supervised
    # rows and their gradient.
    chunk = min(CHUNK_BYTES[world.device.type], 4 * tokens * config.vocab_size)
    weight = config.vocab_size * config.hidden_size
    head = chunk + 4 * weight + 5 * 4 * wide
    # The gradient of a tied weight waits for the embedding's; then two (T, I), which meet where
    # SwiGLU multiplies, and two (T, D).
    backward = 2 * tokens * (config.intermediate_size + config.hidden_size) + config.tied * weight
    parts["the head, or a block's backward"] = max(head, dtype.itemsize * backward)
    return parts


def total_memory(world: World) -> int:
    """Bytes of the GPU, or this process's share of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_world_size
