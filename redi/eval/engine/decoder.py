"""The model's step for one new token per row.

The layers and weights are the model's own: training, prefill and decoding run the same code, and
there is no second copy of the weights.
Letters: B rows, D hidden, H heads, K kv heads, d head size, V vocabulary, R rows of a product.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, mm

from redi.logprobs import accumulation_dtype
from redi.model import Transformer

# (query (B, H, d), key (B, K, d), value (B, K, d), layer) -> (B, H, d)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Decoder:
    def __init__(self, model: Transformer):
        self.model = model

    def logits(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, V), at least fp32."""
        return self.project(self.hidden(tokens, positions, attend))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (B,) at positions (B,) -> (B, D)."""
        layers = [partial(attend, layer=i) for i in range(self.model.config.num_layers)]
        return self.model.model(tokens, positions, layers)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (R, D) -> (R, V), at least fp32."""
        weight = self.model.output_weight.T
        dtype = accumulation_dtype(hidden)
        if hidden.is_cuda and hidden.dtype == weight.dtype != dtype:
            return mm(hidden, weight, out_dtype=dtype)
        return hidden.to(dtype) @ weight.to(dtype)
