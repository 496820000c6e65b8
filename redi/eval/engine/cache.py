"""Keys and values in pages, so that only the tokens of live rows take memory.

    budget   8 pages per layer, each PAGE tokens of all kv heads, allocated once
    table    row 0: pages 0 3        a row (a text being written) owns pages, in the order of its
             row 1: pages 1          tokens; it takes another when its last one is full, and gives
             row 2: pages 2 4 5      all back when it ends
    free     6 7                     the lowest number goes first

One new token per row attends to its row (`attend`): each page by itself, with the query of the row
that owns it, then the parts of a row are added up. Nothing is padded beyond a page, nothing is
copied. On CUDA a Triton kernel does the same (kernel_steps.py). Its steps are padded with a spare
row: a row of the table without a text, and a page beyond those that are handed out.

Left out: pages shared by several rows (prompts are short beside answers), pages on the host.
Letters: B rows of a step, N pages, M pages of the longest row, H heads, K kv heads, G = H / K,
d head size.
"""

import heapq
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redi.config import UserError
from redi.model import ModelConfig
from redi.packing import to_device

PAGE = 32  # tokens


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def spread(pages: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The page, and the offset in it, of each of so many tokens in these pages."""
    places = np.arange(tokens)
    return pages[places // PAGE], places % PAGE


def _spare_bytes(device: torch.device) -> int:
    """What the cache may take where nothing is said; the rest is for logits and activations."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def uses_kernel(device: torch.device) -> bool:
    """Whether a step's attention is the Triton kernel's; torch's otherwise."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Step:
    """Where the rows of one decode step lie. The torch path looks at pages 0 .. N-1 at once."""

    table: Tensor  # (B, M) int64: pages of each row; past its end its first again
    lengths: Tensor  # (B,) int64: tokens of each row, the new one among them
    pages: Tensor  # (B,) and
    offsets: Tensor  # (B,): where the new tokens go
    owners: Tensor  # (N,) the row of each page, any row for a page without one
    hidden: Tensor  # (N K, 1, PAGE): 0 for the owner's tokens, else -1e30


class Cache:
    """Pages, the same in every layer, and which row of `rows` owns which."""

    def __init__(
        self,
        config: ModelConfig,
        like: Tensor,
        wanted: int,
        budget: int | None,
        rows: int,
        longest: int,
    ):
        """As many pages as `wanted`, or as the budget holds, in bytes; None: as there is memory to
        spare. Raises UserError if a row of `longest` tokens would not fit."""
        shape = (config.num_kv_heads, PAGE, config.head_dim)
        one = 2 * config.num_layers * math.prod(shape) * like.dtype.itemsize
        budget = _spare_bytes(like.device) if budget is None else budget
        self.with_kernel = uses_kernel(like.device)
        num_pages = min(wanted, budget // one - self.with_kernel)
        if num_pages < pages_for(longest):
            raise UserError(
                f"{budget / 2**30:.3g} GiB for keys and values are too few: a request of {longest} "
                f"tokens takes {pages_for(longest) * one / 2**30:.3g} GiB"
            )
        shape = (num_pages + self.with_kernel, *shape)  # the last is the spare row's
        self.keys = [like.new_empty(shape) for _ in range(config.num_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_layers)]
        # Pages that torch may look at; those after them hold anything, NaN too.
        self.touched = len(self.keys[0]) if self.with_kernel else 0
        self.free = list(range(num_pages))  # a heap
        self.spare_row = rows
        self.table = np.full((rows + 1, pages_for(longest)), num_pages)
        self.changed: set[int] = set()  # rows whose pages are others than kernel_steps knows
        self.lengths = np.zeros(rows, dtype=np.int64)  # tokens
        self.owners = np.full(num_pages, -1)  # row of each page; -1: none
        self.starts = np.zeros(num_pages, dtype=np.int64)  # place of its first token in the row

    @property
    def used(self) -> int:
        """Pages."""
        return len(self.owners) - len(self.free)

    # ---- pages

    def lengthen(self, row: int, tokens: int) -> None:
        """Room for so many more tokens. IndexError if the pages do not suffice."""
        first, last = pages_for(self.lengths[row]), pages_for(self.lengths[row] + tokens)
        for number in range(first, last):
            page = heapq.heappop(self.free)
            self.table[row, number], self.owners[page] = page, row
            self.changed.add(row)
            self.starts[page] = number * PAGE
            if page >= self.touched:  # 0 x NaN is NaN, even for a token that nobody looks at
                for tensor in (*self.keys, *self.values):
                    tensor[self.touched : page + 1] = 0
                self.touched = page + 1
        self.lengths[row] += tokens

    def missing(self, rows: list[int]) -> int:
        """Pages that one more token in each row takes."""
        return int((self.lengths[rows] % PAGE == 0).sum())

    def pages_of(self, row: int) -> np.ndarray:
        return self.table[row, : pages_for(self.lengths[row])].copy()

    def release(self, row: int) -> None:
        for page in self.pages_of(row).tolist():
            heapq.heappush(self.free, page)
            self.owners[page] = -1
        self.lengths[row] = 0

    def rename(self, row: int, to: int) -> None:
        """What is in one row is now in another, that was empty."""
        self.table[to], self.lengths[to] = self.table[row], self.lengths[row]
        self.owners[self.pages_of(to)] = to
        self.lengths[row] = 0
        self.changed.add(to)

    def copy(self, pages: np.ndarray, to: np.ndarray) -> None:
        """The contents of pages (n,) into other pages (n,)."""
        source, target = (to_device(p, self.keys[0].device) for p in (pages, to))
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def compact(self) -> None:
        """Move the highest pages in use to the lowest free numbers."""
        high = np.flatnonzero(self.owners[self.used :] >= 0) + self.used
        low = np.flatnonzero(self.owners[: self.used] < 0)
        self.copy(high, low)
        self.owners[low], self.starts[low] = self.owners[high], self.starts[high]
        self.table[self.owners[low], self.starts[low] // PAGE] = low
        self.owners[high] = -1
        self.free = np.flatnonzero(self.owners < 0).tolist()  # in order: a heap

    # ---- a step

    def append(self, rows: list[int]) -> None:
        """Make room for one more token in each row."""
        rows = np.asarray(rows)
        full = self.lengths[rows] % PAGE == 0
        self.lengths[rows[~full]] += 1
        for row in rows[full].tolist():
            self.lengthen(row, 1)

    def step(self, rows: list[int]) -> Step:
        """Make room for one more token in each row, and say where all is."""
        if self._end() > 2 * self.used:
            self.compact()
        self.append(rows)
        rows = np.asarray(rows)
        lengths = self.lengths[rows]
        counts = -(-lengths // PAGE)
        present = np.arange(counts.max()) < counts[:, None]  # (B, M)
        table = self.table[rows, : counts.max()]
        table = np.where(present, table, table[:, :1])
        pages, offsets = table[np.arange(len(rows)), counts - 1], (lengths - 1) % PAGE
        places = [torch.from_numpy(x) for x in (table, lengths, pages, offsets)]
        end = self._end()
        number = np.zeros(len(self.lengths), dtype=np.int64)
        number[rows] = np.arange(1, len(rows) + 1)  # row of the cache -> row of this step, from 1
        owners = np.where(self.owners[:end] >= 0, number[self.owners[:end]], 0) - 1
        seen = np.where(owners >= 0, lengths[owners] - self.starts[:end], 0)
        dtype = torch.promote_types(self.keys[0].dtype, torch.float32)
        masked = torch.from_numpy(np.arange(PAGE) >= seen[:, None])
        # Not infinity: a page of which nothing is seen would give inf - inf.
        hidden = torch.zeros(masked.shape, dtype=dtype).masked_fill_(masked, -1e30)
        owners = torch.from_numpy(np.maximum(owners, 0))
        hidden = hidden.repeat_interleave(self.keys[0].shape[1], dim=0)[:, None]
        return Step(*places, owners, hidden)

    def _end(self) -> int:
        """One past the highest page in use."""
        in_use = np.flatnonzero(self.owners >= 0)
        return int(in_use[-1]) + 1 if len(in_use) else 0

    def write(self, layer: int, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value (n, K, d) into n places."""
        self.keys[layer][pages, :, offsets] = key
        self.values[layer][pages, :, offsets] = value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step) -> Tensor:
        """One new token a row: query (B, H, d), key and value (B, K, d) -> (B, H, d)."""
        keys, values = self.keys[layer], self.values[layer]
        self.write(layer, step.pages, step.offsets, key, value)
        return _attend(query, keys, values, step)


def _attend(query: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
    batch, heads, size = query.shape
    end, wide = len(step.owners), step.hidden.dtype
    keys, values = (t[:end].to(wide).flatten(0, 1) for t in (keys, values))  # (N K, PAGE, d)
    grouped = query.to(wide).flatten(1).index_select(0, step.owners).view(len(keys), -1, size)
    scores = torch.baddbmm(step.hidden, grouped, keys.transpose(1, 2), alpha=size**-0.5)
    # (N K, G, PAGE), from here on less the highest score of the row
    peaks = scores.amax(dim=2).view(end, heads)
    peaks = peaks[step.table].amax(dim=1)  # (B, H)
    scores.sub_(peaks.index_select(0, step.owners).view(len(keys), -1, 1)).exp_()
    # Each page's part, added to its row's.
    part = torch.bmm(scores, values).view(end, heads * size)
    summed = part.new_zeros(batch, heads * size).index_add_(0, step.owners, part)
    shares = scores.sum(dim=2).view(end, heads)
    total = shares.new_zeros(batch, heads).index_add_(0, step.owners, shares)
    return (summed.view(batch, heads, size) / total[..., None]).to(query.dtype)
