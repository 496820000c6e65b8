"""One new token per row attends to its row of the paged cache: the CPU's decode attention.

Every page is multiplied by the query of the row that owns it, then the parts of a row are added up:

    row 0: pages 0 3        page    0  1  2  3          a batched product over pages 0 .. 3, where
    row 1: pages 1 2        owner   0  1  1  0          they are: no page is copied or padded

Gathering each row's pages and calling scaled_dot_product_attention takes 2 to 5 times as long.
Letters: B rows of a step, N pages of the cache, P pages looked at, M pages of the longest row,
H heads, K kv heads, G = H / K, d head size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HIDDEN = -1e30  # added to scores; infinity would give inf - inf where no token of a page is seen


@dataclass(frozen=True)
class PageOwners:
    """The pages that a decode step reads, and whose they are; the same in every layer."""

    pages: slice | Tensor  # P page numbers
    owners: Tensor  # (P,) int64: the row of each page, any row for a page that nobody sees
    bias: Tensor  # (P K, 1, PAGE): 0 for tokens that the owner sees, else HIDDEN; fp32 or wider
    table: Tensor  # (B, M) int64: which of the P pages a row owns; past its end its first again

    @classmethod
    def of(cls, table: np.ndarray, lengths: np.ndarray, like: Tensor) -> "PageOwners":
        """table (B, M): pages of each row; lengths (B,): its tokens; like: (N, K, PAGE, d)."""
        page_tokens = like.shape[2]
        counts = -(-lengths // page_tokens)
        present = np.arange(counts.max()) < counts[:, None]  # (B, M)
        row, number = np.nonzero(present)
        owned = table[:, : counts.max()][present]
        if owned.max() < 2 * len(owned):
            pages, count, places = slice(owned.max() + 1), owned.max() + 1, owned
        else:  # rows have ended, and most pages that far are nobody's: copying is less work
            pages, count, places = torch.from_numpy(owned), len(owned), np.arange(len(owned))
        owners, seen = np.zeros((2, count), dtype=np.int64)
        owners[places], seen[places] = row, lengths[row] - number * page_tokens
        place_of = np.zeros(present.shape, dtype=np.int64)
        place_of[present] = places
        place_of = np.where(present, place_of, place_of[:, :1])
        hidden = torch.from_numpy(np.arange(page_tokens) >= seen[:, None])[:, None]
        dtype = torch.promote_types(like.dtype, torch.float32)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, HIDDEN)
        bias = bias.repeat_interleave(like.shape[1], dim=0)
        return cls(pages, torch.from_numpy(owners), bias, torch.from_numpy(place_of))


def page_attention(query: Tensor, keys: Tensor, values: Tensor, step: PageOwners) -> Tensor:
    """query (B, H, d); keys, values (N, K, PAGE, d) -> (B, H, d), computed in fp32 or wider.

    Scores are scaled by d ** -0.5.
    """
    batch, heads, size = query.shape
    count, wide = len(step.owners), step.bias.dtype
    keys, values = (t[step.pages].to(wide).flatten(0, 1) for t in (keys, values))  # (P K, PAGE, d)
    grouped = query.to(wide).flatten(1).index_select(0, step.owners).view(len(keys), -1, size)
    scores = torch.baddbmm(step.bias, grouped, keys.transpose(1, 2), alpha=size**-0.5)
    # (P K, G, PAGE), from here on less the highest score of the row
    peaks = scores.amax(dim=2).view(count, heads)
    peaks = peaks[step.table].amax(dim=1)  # (B, H)
    scores.sub_(peaks.index_select(0, step.owners).view(len(keys), -1, 1)).exp_()
    # Each page's part, added to its row's.
    part = torch.bmm(scores, values).view(count, heads * size)
    summed = part.new_zeros(batch, heads * size).index_add_(0, step.owners, part)
    shares = scores.sum(dim=2).view(count, heads)
    total = shares.new_zeros(batch, heads).index_add_(0, step.owners, shares)
    return (summed.view(batch, heads, size) / total[..., None]).to(query.dtype)
