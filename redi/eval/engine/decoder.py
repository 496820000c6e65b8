"""Passes of the model over rows of the cache: prefills, and the decode step of a CPU.

A prefill appends texts to rows, in one pack through the training forward. A decode step appends one
token per row. In decode attention every page is multiplied by the query of the row that owns it,
then the parts of a row are added up:

    row 0: pages 0 3        page    0  1  2  3          a batched product over pages 0 .. 3, where
    row 1: pages 1 2        owner   0  1  1  0          they are: no page is copied or padded

Gathering each row's pages and calling scaled_dot_product_attention takes 2 to 5 times as long.
kernel_steps.py has the decode step of CUDA.
Letters: B rows of a step, T packed tokens, N pages of the cache, P pages read, R rows of a product,
D hidden, H heads, K kv heads, G = H / K, d head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redi.attention import packed_attention
from redi.eval.engine.cache import Cache, pages_for
from redi.logprobs import accumulation_dtype
from redi.model import Transformer
from redi.packing import to_device

# (query (T, H, d), key (T, K, d), value (T, K, d), layer) -> (T, H, d)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
# With 24 rows on one CPU core, MKL multiplies by 1,024 rows of Qwen2.5-0.5B's output weight at a
# time in two thirds of the time that it takes for all 151,936 at once.
HEAD_CHUNK = 1024
MASKED = -1e30  # added to scores; infinity would give inf - inf where all tokens are masked


class Decoder:
    """The model's passes over the pages of a cache."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache
        self.device = model.output_weight.device

    def prefill(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
        """texts[i] become the last tokens of rows[i], which have room for them (Cache.lengthen) ->
        logits (B, V) of the tokens after them. A row that holds tokens before them is run alone."""
        cache, lengths = self.cache, [len(text) for text in texts]
        begins, ends = cache.lengths[rows] - lengths, np.cumsum(lengths)
        ids = np.concatenate(texts)
        positions = np.concatenate([b + np.arange(n) for b, n in zip(begins, lengths)])
        arrays = ids, positions, *cache.locate(np.repeat(rows, lengths), positions)
        tokens, places, pages, offsets = (to_device(array, self.device) for array in arrays)
        if continued := begins.any():
            [row], [begin], [length] = rows, begins, lengths
            owned = to_device(cache.row_pages(row), self.device)
            seen = torch.ones(length, begin + length, dtype=torch.bool, device=self.device)
            seen = seen.tril(begin)
        else:
            cu_seqlens = to_device([0, *ends], self.device).to(torch.int32)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            cache.write(layer, pages, offsets, key, value)
            if not continued:
                return packed_attention(query, key, value, cu_seqlens, lengths)
            key, value = (
                pool[layer][owned].transpose(1, 2).flatten(0, 1)[: begin + length]  # (L, K, d)
                for pool in (cache.keys, cache.values)
            )
            query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
            grouped = query.shape[1] != key.shape[1]
            found = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=grouped)
            return found[0].transpose(0, 1)

        hidden = self.hidden(tokens, places, attend)  # (T, D)
        return self.project(hidden[to_device(ends - 1, self.device)])

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append tokens[i] to rows[i] of the cache -> logits (B, V) of the tokens after them.

        Enough pages must be free (Cache.pages_to_append).
        """
        cache = self.cache
        cache.lengthen(rows, 1)
        last = cache.lengths[rows] - 1
        pages, offsets = map(torch.from_numpy, cache.locate(rows, last))
        owned = page_owners(cache, rows)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            cache.write(layer, pages, offsets, key, value)
            return page_attention(query, cache.keys[layer], cache.values[layer], owned)

        return self.project(self.hidden(torch.tensor(tokens), torch.from_numpy(last), attend))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (T,) at positions (T,) -> (T, D)."""
        layers = [partial(attend, layer=i) for i in range(self.model.config.num_layers)]
        return self.model.model(tokens, positions, layers)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (R, D) -> logits (R, V), in fp32 or wider."""
        weight, dtype = self.model.output_weight, accumulation_dtype(hidden)
        if hidden.is_cuda and hidden.dtype == weight.dtype != dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype)
        hidden = hidden.to(dtype)
        return torch.cat([hidden @ w.to(dtype).T for w in weight.split(HEAD_CHUNK)], dim=1)


@dataclass(frozen=True)
class PageOwners:
    """The pages that a decode step reads, and the rows that own them; the same in every layer."""

    pages: slice | Tensor  # P page numbers
    owners: Tensor  # (P,) int64; any row for a page that no row owns
    bias: Tensor  # (P K, 1, PAGE): 0 for tokens of the owner, else MASKED; fp32 or wider


def page_owners(cache: Cache, rows: Sequence[int]) -> PageOwners:
    """What a decode step of these rows reads, at their present lengths."""
    _, kv_heads, page_tokens, _ = cache.keys[0].shape
    lengths = cache.lengths[rows]
    counts = pages_for(lengths)
    # One entry per owned page: its row, as an index into `rows`, and its number within that row.
    owner, number = np.nonzero(np.arange(counts.max()) < counts[:, None])
    owned = cache.table[rows][owner, number]
    if owned.max() < 2 * len(owned):
        count, index = owned.max() + 1, owned
        pages = slice(count)  # a view; a copy would make the step 1.1 to 5 times as long
    else:  # rows have ended, and most pages up to the last are free: copying is less work
        count, index = len(owned), np.arange(len(owned))
        pages = torch.from_numpy(owned)
    owners, filled = np.zeros((2, count), dtype=np.int64)
    owners[index], filled[index] = owner, lengths[owner] - number * page_tokens
    masked = torch.from_numpy(np.arange(page_tokens) >= filled[:, None])[:, None]
    dtype = torch.promote_types(cache.keys[0].dtype, torch.float32)
    bias = torch.zeros(masked.shape, dtype=dtype).masked_fill_(masked, MASKED)
    return PageOwners(pages, torch.from_numpy(owners), bias.repeat_interleave(kv_heads, dim=0))


def page_attention(query: Tensor, keys: Tensor, values: Tensor, owned: PageOwners) -> Tensor:
    """query (B, H, d); keys, values (N, K, PAGE, d) -> (B, H, d), computed in fp32 or wider.

    Scores are scaled by d ** -0.5.
    """
    batch, heads, size = query.shape
    owners, wide = owned.owners, owned.bias.dtype
    keys, values = (t[owned.pages].to(wide).flatten(0, 1) for t in (keys, values))
    # keys, values (P K, PAGE, d)
    grouped = query.to(wide).flatten(1).index_select(0, owners).view(len(keys), -1, size)
    scores = torch.baddbmm(owned.bias, grouped, keys.transpose(1, 2), alpha=size**-0.5)
    # (P K, G, PAGE), from here on less the highest score of the row
    peaks = scores.amax(dim=2).view(-1, heads)
    highest = peaks.new_full((batch, heads), MASKED)
    highest.scatter_reduce_(0, owners[:, None].expand_as(peaks), peaks, "amax")
    scores.sub_(highest.index_select(0, owners).view(len(keys), -1, 1)).exp_()
    # The parts of the pages, added to those of their rows
    part = torch.bmm(scores, values).view(-1, heads * size)
    summed = part.new_zeros(batch, heads * size).index_add_(0, owners, part)
    shares = scores.sum(dim=2).view(-1, heads)
    total = shares.new_zeros(batch, heads).index_add_(0, owners, shares)
    return (summed.view(batch, heads, size) / total[..., None]).to(query.dtype)
