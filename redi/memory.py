"""How much memory a training step needs, and how many blocks to checkpoint so that it fits.

The peak is where the last pack of a step turns from forward to backward. `step_memory` adds up what
is held then. Of the activations that a block saves, those of one block are held even if all blocks
are checkpointed: the one that is being recomputed.

Sharded gradients add nothing: each is created as the whole one is freed. A checkpointed block is
recomputed in backward, which adds a third to its compute. The first blocks are checkpointed: by the
time they are recomputed, the activations of all later blocks have been freed.

bench/ranks.py and bench/gpu.py compare the formula with measured peaks. Left out: buffers of the
exchange between ranks, caches of libraries, and what ZeRO-3 or a single pack spares.
"""

import os
from dataclasses import dataclass

import torch

from redi.attention import takes_gqa
from redi.distributed import World
from redi.logprobs import CHUNK_BYTES
from redi.model import ModelConfig, Transformer

SHARE = 0.85  # of the memory that a step may use; the allocator and other processes need the rest


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one process holds at the peak of a step."""

    tokens: int  # T
    blocks: int
    fixed: dict[str, int]  # by purpose: all but the activations inside blocks
    per_block: float  # activations of one block
    planned: float  # what a step may use
    host: int  # bytes in host memory, with offload

    def total(self, checkpointed: int) -> float:
        """The peak, with so many blocks checkpointed."""
        return sum(self.fixed.values()) + self._kept(checkpointed) * self.per_block

    def _kept(self, checkpointed: int) -> int:
        return max(self.blocks - checkpointed, 1)

    def describe(self, checkpointed: int) -> str:
        """The lines of --dry-run, in GiB."""
        kept, total = self._kept(checkpointed), self.total(checkpointed)
        fits = "within" if total <= self.planned else "more than"
        rows = {
            **self.fixed,
            f"activations inside {kept} of {self.blocks} blocks": kept * self.per_block,
            f"at the peak, {fits} {self.planned / 2**30:.3f} GiB ({SHARE:.0%} of memory)": total,
        }
        if self.host:
            rows["in host memory: weights, gradients and Adam's moments"] = self.host
        table = "".join(f"\n{size / 2**30:>10.3f}  {purpose}" for purpose, size in rows.items())
        return (
            f"activation checkpointing: {checkpointed} of {self.blocks} blocks\n"
            f"GiB per process for packs of at most {self.tokens:,} tokens, beside Python and its "
            f"libraries (redi/memory.py):{table}"
        )


def step_memory(
    model: Transformer, tokens: int, world: World, dtype: torch.dtype, offload: bool = False
) -> StepMemory:
    """What a step over packs of T `tokens` needs. dtype: of the compute."""
    config, ranks = model.config, world.world_size
    parameters = sum(p.numel() for p in model.parameters())
    hidden = tokens * config.hidden_size  # numbers in a (T, D)
    shared = f", over {ranks} ranks" if ranks > 1 else ""
    fixed, host = {}, 0
    if offload and world.device.type == "cuda":  # weights and gradients: pinned, in powers of two
        pinned = sum(1 << (4 * p.numel() // ranks - 1).bit_length() for p in model.parameters())
        host = 2 * pinned + 8 * parameters // ranks
    else:
        purpose = f"weights and Adam's moments, 12 bytes per parameter{shared}"
        fixed[purpose] = 12 * parameters // ranks
    fixed["gradients, 4 bytes per parameter, whole until the last backward"] = 4 * parameters
    if world.world_size > 1 or dtype != torch.float32 or offload:
        fixed["whole weights in the compute dtype"] = dtype.itemsize * parameters
    fixed["input of every block"] = config.num_layers * hidden * dtype.itemsize
    # The head holds a chunk of logits, its fp32 weight gradient and five fp32 (T, D): what the last
    # norm saves, its output, the supervised rows and their gradient.
    chunk = min(CHUNK_BYTES[world.device.type], 4 * tokens * config.vocab_size)
    weight = config.vocab_size * config.hidden_size
    head = chunk + 4 * weight + 5 * 4 * hidden
    # A block's backward holds two (T, D), and two (T, intermediate_size) where SwiGLU multiplies.
    # The gradient of a tied head weight waits for that of the embedding.
    backward = 2 * tokens * (config.intermediate_size + config.hidden_size) + config.tied * weight
    fixed["the head, or a block's backward"] = max(head, dtype.itemsize * backward)
    per_block = tokens * saved_bytes_per_token(config, dtype, world.device.type)
    planned = SHARE * total_memory(world)
    return StepMemory(tokens, config.num_layers, fixed, per_block, planned, host)


def blocks_to_checkpoint(setting: int | str, memory: StepMemory) -> int:
    """How many blocks to checkpoint. A number above the model's means all; auto, the fewest that
    fit the planned memory."""
    if isinstance(setting, int):
        return min(setting, memory.blocks)
    fitting = (n for n in range(memory.blocks + 1) if memory.total(n) <= memory.planned)
    return {"all": memory.blocks, "none": 0, "auto": next(fitting, memory.blocks)}[setting]


def saved_bytes_per_token(config: ModelConfig, dtype: torch.dtype, device: str) -> int:
    """What autograd saves of a block's forward pass, beside its input. device: cpu or cuda."""
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    norms = 2 * config.hidden_size + config.qk_norm * (heads + kv_heads)
    # What both norms return, and query and key before theirs; what the second norm is given; query,
    # key, value and what attention returns; gate, up and SwiGLU's product.
    saved = norms + config.hidden_size + 2 * (heads + kv_heads) + 3 * config.intermediate_size
    if device == "cpu":  # what norms multiply by their weight (in fp32), and silu(gate)
        saved += norms + config.intermediate_size
    if device == "cpu" or not takes_gqa():
        saved += 2 * (heads - kv_heads)  # key and value, repeated for the query heads
    return dtype.itemsize * saved


def total_memory(world: World) -> int:
    """Bytes of the GPU, or this process's share of the machine's memory."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_world_size
