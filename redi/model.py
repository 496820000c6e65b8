"""Qwen2, Qwen3 and Llama, with their checkpoints' parameter names and without a batch dimension.

How this differs from the textbook transformer:
- a pack of T tokens in one row, each with its position in its own document: no padding, no mask
- fewer key/value heads than query heads (GQA)
- the families differ in three facts of ModelConfig: q, k and v have biases (Qwen2), the query and
  key of every head are normalized before the rotation (Qwen3), low rotary frequencies are scaled
  down (Llama 3.1 and later)
- RMSNorm before each half of a block, rotary positions (half-split), SwiGLU
- the embedding is also the output weight where the checkpoint ties them
- `forward` runs a head inside the model, on the supervised rows only: the logits of a pack never
  exist (see logprobs.py), and sharded parameters are gathered while the head needs them
- how tokens attend to each other is an argument: training passes attention within the documents of
  a pack, generation passes a KV cache

Left out: dropout (0 in the published configuration), sliding windows, other rotary scalings; a
configuration that asks for them is refused by name (checkpoint/config_json.py). Letters: T packed
tokens, D hidden, H heads, K kv heads, d head size, R supervised rows, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from redi.attention import packed_attention
from redi.fused import rotate, swiglu
from redi.packing import PackedBatch

Output = TypeVar("Output")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, H, d), k, v (T, K, d) -> (T, H, d)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary scaling (`rope_type` llama3). A frequency that makes fewer than
    low_freq_factor turns over the original context is divided by factor; one that makes more than
    high_freq_factor turns is unchanged; those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, frequencies: Tensor) -> Tensor:
        """Angles per position -> scaled angles per position."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that shape the network."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool
    max_positions: int  # the context: prompt and response together
    qkv_bias: bool = True  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: RopeScaling | None = None  # Llama 3.1 and later


# ---------------------------------------------------------------- the network, leaves first


@lru_cache(maxsize=4)
def rotary_tables(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (max_positions, d/2) of the angles position * theta^(-2i/d). Computed in fp32,
    and cached: packs and models of the same sizes share them."""
    with torch.inference_mode(False):  # inference tensors could not be used in training later
        exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_scaling is not None:
            frequencies = config.rope_scaling.apply(frequencies)
        positions = torch.arange(config.max_positions, device=device).float()
        angles = positions[:, None] * frequencies  # (max_positions, d/2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """The projections around attention; which tokens attend to which is the caller's choice."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity  # no parameters
        self.q_norm = norm(self.head_dim, config.norm_eps)
        self.k_norm = norm(self.head_dim, config.norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split_heads = (len(x), -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(split_heads))  # (T, H, d)
        key = self.k_norm(self.k_proj(x).view(split_heads))  # (T, K, d)
        value = self.v_proj(x).view(split_heads)  # (T, K, d)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        attended = attend(*self.self_attn.project(self.input_layernorm(x), cos, sin))  # (T, H, d)
        x = x + self.self_attn.o_proj(attended.reshape(len(x), -1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.Module):
    """Tokens -> hidden states. Named `model` in checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attends: Iterable[Attend]) -> Tensor:
        x = self.embed_tokens(tokens)  # (T, D)
        cos, sin = (t[positions] for t in rotary_tables(self.config, x.dtype, x.device))
        for block, attend in zip(self.layers, attends):
            x = block(x, cos, sin, attend)
        return self.norm(x)


class Transformer(nn.Module):
    """The layers and the output weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Layers(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:  # (V, D)
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, batch: PackedBatch, head: Callable[[Tensor, Tensor], Output]) -> Output:
        """head(hidden (R, D), output weight (V, D)) over the pack's supervised rows."""
        attend = partial(packed_attention, cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
        hidden = self.model(batch.tokens, batch.positions, itertools.repeat(attend))  # (T, D)
        return head(hidden[batch.rows], self.output_weight)
