"""The model's step for one new token a row: the same function, from weights laid out for it.

A copy of the weights, made once for an evaluation: (in, out) instead of (out, in), q, k and v side
by side, gate and up side by side. At 32 rows on a CPU a product then takes three quarters of its
time, and a layer is four products instead of seven. Training and prefill use model.py itself;
tests hold the two together.

Letters: B rows, D hidden, H heads, K kv heads, d head size, I intermediate, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from redi.logprobs import accumulation_dtype
from redi.model import Block, Transformer, rotary_tables

# (query (B, H, d), key (B, K, d), value (B, K, d), layer) -> (B, H, d)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor  # (D,)
    qkv: Tensor  # (D, (H + 2 K) d)
    qkv_bias: Tensor
    out: Tensor  # (H d, D)
    mlp_norm: Tensor  # (D,)
    gate_up: Tensor  # (D, 2 I)
    down: Tensor  # (I, D)

    @classmethod
    def of(cls, block: Block) -> "Layer":
        attention, mlp = block.self_attn, block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        return cls(
            block.input_layernorm.weight,
            torch.cat([p.weight.T for p in projections], dim=1).contiguous(),
            torch.cat([p.bias for p in projections]),
            attention.o_proj.weight.T.contiguous(),
            block.post_attention_layernorm.weight,
            torch.cat([mlp.gate_proj.weight.T, mlp.up_proj.weight.T], dim=1).contiguous(),
            mlp.down_proj.weight.T.contiguous(),
        )


class Decoder:
    def __init__(self, model: Transformer):
        self.config, decoder = model.config, model.model
        self.embedding, self.norm = decoder.embed_tokens.weight, decoder.norm.weight
        self.layers = [Layer.of(block) for block in decoder.layers]
        head = model.output_weight.T.contiguous()  # (D, V)
        # A CPU multiplies in fp32: widened once, not at every step.
        self.head = head if head.is_cuda else head.to(accumulation_dtype(head))
        self.buffer = self.head.new_empty(0, self.head.shape[1])
        config, weight = self.config, self.embedding
        cos, sin = rotary_tables(
            config.max_positions, config.head_dim, config.rope_theta, weight.dtype, weight.device
        )
        left, right = sin.chunk(2, dim=1)
        self.cos, self.sin = cos, torch.cat([-left, right], dim=1)  # the sign of rotate()

    def logits(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, V), at least fp32."""
        return self.project(self.hidden(tokens, positions, attend))

    def project(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V), at least fp32. It stands until the next call."""
        if hidden.is_cuda:
            return wide_logits(hidden, self.head)
        # The same memory every time: fresh pages from the system cost a tenth of the product.
        if len(self.buffer) < len(hidden):
            self.buffer = self.head.new_empty(len(hidden), self.head.shape[1])
        return torch.mm(hidden.to(self.head.dtype), self.head, out=self.buffer[: len(hidden)])

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, D)."""
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        x = self.embedding[tokens]  # (B, D)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, d)
        for number, layer in enumerate(self.layers):
            normed = self._normalise(x, layer.attention_norm)
            qkv = torch.addmm(layer.qkv_bias, normed, layer.qkv)
            qkv = qkv.view(len(x), -1, config.head_dim)  # (B, H + 2 K, d)
            turned = qkv[:, : heads + kv_heads]
            turned = torch.addcmul(turned * cos, turned.roll(config.head_dim // 2, dims=2), sin)
            query, key = turned.split([heads, kv_heads], dim=1)
            attended = attend(query, key, qkv[:, heads + kv_heads :], number)
            x = torch.addmm(x, attended.reshape(len(x), -1), layer.out)
            gate, up = (self._normalise(x, layer.mlp_norm) @ layer.gate_up).chunk(2, dim=1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down)
        return self._normalise(x, self.norm)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


class Unfused:
    """The same from the model's own weights, for evaluations between training steps."""

    def __init__(self, model: Transformer):
        self.model = model

    def logits(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, V)."""
        return self.project(self.hidden(tokens, positions, attend))

    def project(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V)."""
        return wide_logits(hidden, self.model.output_weight.T)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, D)."""
        layers = [partial(attend, layer=i) for i in range(self.model.config.num_layers)]
        return self.model.model(tokens, positions, layers)


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (R, D) times weight (D, V), the transposed output weight -> (R, V), at least fp32."""
    dtype = accumulation_dtype(hidden)
    if hidden.is_cuda and hidden.dtype == weight.dtype != dtype:
        return torch.mm(hidden, weight, out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype)
