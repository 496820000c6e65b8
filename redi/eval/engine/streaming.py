"""One text at a time, token by token, with what it has in common with the last one in the cache.

    speaker = Speaker(model, source)
    for token in speaker.answer(prompt_ids, key, sampling, limit): ...

A conversation's next prompt begins with the last prompt and answer, unless the template changes
them, so only its new tokens are run. With an empty cache, the tokens are those of `generate`, to
the last bit. Letters: L tokens of the row, H heads, K kv heads, d head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redi.attention import packed_attention
from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.eval.engine.cache import Cache, pages_for
from redi.eval.engine.generate import make_decoder
from redi.eval.engine.sampling import Sampling, sample
from redi.model import Transformer
from redi.packing import to_device


class Speaker:
    """A model with a cache of one row, which keeps the last prompt and answer."""

    def __init__(self, model: Transformer, source: Source):
        if source.chat is None:
            raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; a chat needs it")
        self.chat, self.stop_ids = source.chat, source.stop_ids
        self.context = model.config.max_positions
        self.cache = Cache(model, pages_for(self.context), None, rows=1, longest=self.context)
        self.decoder = make_decoder(model, self.cache)
        self.ids: list[int] = []  # whose keys and values are in the cache

    @torch.inference_mode()
    def answer(
        self, prompt: Sequence[int], key: int, sampling: Sampling, limit: int
    ) -> Iterator[int]:
        """Up to `limit` tokens; the stop token is the last, if one comes. Raises UserError if the
        logits are not finite."""
        known = takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt[:-1]))
        self.ids = [token for token, _ in known]
        self.cache.shorten(0, len(self.ids))
        logits = self._prefill(prompt[len(self.ids) :])
        for position in range(limit):
            if not torch.isfinite(logits.sum()):
                raise UserError("the model's logits are not finite numbers: its weights are broken")
            [token] = sample(logits, np.array([key]), np.array([position]), sampling).tolist()
            yield token
            if token in self.stop_ids or position == limit - 1:
                return
            logits = self.decoder.step([0], [token])
            self.ids.append(token)

    def _prefill(self, ids: Sequence[int]) -> Tensor:
        """Append these tokens to the row -> logits (1, V) after them."""
        begin, length = len(self.ids), len(self.ids) + len(ids)
        cache, device = self.cache, self.cache.keys[0].device
        cache.lengthen([0], len(ids))
        positions = np.arange(begin, length)
        places = cache.locate(np.zeros_like(positions), positions)
        pages, offsets = (to_device(place, device) for place in places)
        owned, cu_seqlens = (to_device(x, device) for x in (cache.row_pages(0), [0, length]))
        cu_seqlens = cu_seqlens.to(torch.int32)
        seen = torch.ones(len(ids), length if begin else 0, dtype=torch.bool, device=device)
        seen = seen.tril(begin)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            cache.write(layer, pages, offsets, key, value)
            if not begin:  # as the engine does, to the last bit
                return packed_attention(query, key, value, cu_seqlens, [length])
            key, value = (
                pool[layer][owned].transpose(1, 2).flatten(0, 1)[:length]  # (L, K, d)
                for pool in (cache.keys, cache.values)
            )
            query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
            grouped = query.shape[1] != key.shape[1]
            found = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=grouped)
            return found[0].transpose(0, 1)

        hidden = self.decoder.hidden(to_device(ids, device), to_device(positions, device), attend)
        self.ids += ids
        return self.decoder.project(hidden[-1:])
