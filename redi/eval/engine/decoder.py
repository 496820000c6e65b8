"""The model's decode step: one new token for each row of the cache, on a CPU.

The layers and weights are the model's own: training, prefill and decoding run the same code, and
there is no second copy of the weights. kernel_steps.py has the decode step of CUDA.
Letters: B rows, T packed tokens, D hidden, H heads, K kv heads, d head size, R rows of a product,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from redi.eval.engine.cache import Cache
from redi.eval.engine.page_attention import PageOwners, page_attention
from redi.logprobs import accumulation_dtype
from redi.model import Transformer

# (query (T, H, d), key (T, K, d), value (T, K, d), layer) -> (T, H, d)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
# With 24 rows on one CPU core, MKL multiplies by 1,024 rows of Qwen2.5-0.5B's output weight at a
# time in two thirds of the time that it takes for all 151,936 at once.
HEAD_CHUNK = 1024


class Decoder:
    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append tokens[i] to rows[i] of the cache -> logits (B, V) of the tokens after them.

        Enough pages must be free (Cache.missing).
        """
        cache = self.cache
        cache.append(rows)
        table, lengths = cache.table[rows], cache.lengths[rows]
        owners = PageOwners.of(table, lengths, cache.keys[0])
        last = lengths - 1
        page = cache.keys[0].shape[2]
        pages = torch.from_numpy(table[np.arange(len(rows)), last // page])
        offsets = torch.from_numpy(last % page)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            cache.write(layer, pages, offsets, key, value)
            return page_attention(query, cache.keys[layer], cache.values[layer], owners)

        return self.project(self.hidden(torch.tensor(tokens), torch.from_numpy(last), attend))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (T,) at positions (T,) -> (T, D)."""
        layers = [partial(attend, layer=i) for i in range(self.model.config.num_layers)]
        return self.model.model(tokens, positions, layers)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (R, D) -> logits (R, V), in fp32 or wider."""
        weight, dtype = self.model.output_weight, accumulation_dtype(hidden)
        if not hidden.is_cuda:
            hidden = hidden.to(dtype)
            return torch.cat([hidden @ w.to(dtype).T for w in weight.split(HEAD_CHUNK)], dim=1)
        if hidden.dtype == weight.dtype != dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype)
        return hidden.to(dtype) @ weight.to(dtype).T
