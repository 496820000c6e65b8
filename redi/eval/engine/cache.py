"""Keys and values in pages, so that only the tokens of live rows take memory.

    pages    8 per layer, each holds PAGE tokens of all kv heads, allocated once
    table    row 0: pages 0 3        a row (one text) owns pages, in the order of its tokens; it
             row 1: pages 1          takes another when its last page is full, and returns all of
             row 2: pages 2 4 5      them when it ends
    free     6 7                     the lowest number is taken first

Decoding reads the pages where they are: decoder.py on a CPU, decode_kernel.py on CUDA, whose steps
are padded with a spare row: a row of the table without a text, on a page of its own.

Left out: pages shared by several rows (prompts are short beside answers), pages on the host.
"""

import heapq
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redi.config import UserError
from redi.model import Transformer
from redi.packing import to_device

PAGE = 32  # tokens


def pages_for(tokens: int | np.ndarray) -> int | np.ndarray:
    """How many pages so many tokens take; of a number or an array of numbers."""
    return -(-tokens // PAGE)


def uses_kernel(device: torch.device) -> bool:
    """Whether decoding attends with the Triton kernel, rather than with torch."""
    return device.type == "cuda"


def _allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.is_cuda:
        return like.new_empty(shape)
    # A CPU multiplies the ends of pages by 0, and 0 x NaN is NaN, so pages start as zeros. NumPy's
    # zeros take no memory until a page is written.
    count = math.prod(shape) * like.dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(shape)


def pages_that_fit(model: Transformer, budget: int | None) -> tuple[int, int]:
    """How many pages fit `budget` bytes (None: the memory to spare), and the bytes of one."""
    config, like = model.config, model.output_weight
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    page_bytes = per_token * PAGE * like.dtype.itemsize
    if budget is None:  # the rest of the memory is for logits and activations
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if like.is_cuda:
            budget = int(0.8 * torch.cuda.mem_get_info(like.device)[0])
    return budget // page_bytes - uses_kernel(like.device), page_bytes


class Cache:
    """The pages of every layer, and the table of which row owns which pages."""

    def __init__(
        self, model: Transformer, wanted: int, budget: int | None, rows: int, longest: int
    ):
        """Allocates `wanted` pages, or as many as fit `budget` bytes (None: the memory to spare).
        Raises UserError if a row of `longest` tokens would not fit."""
        config, like = model.config, model.output_weight
        fitting, page_bytes = pages_that_fit(model, budget)
        self.with_kernel = uses_kernel(like.device)
        num_pages = min(wanted, fitting)
        if num_pages < pages_for(longest):
            have, need = (n * page_bytes / 2**30 for n in (fitting, pages_for(longest)))
            raise UserError(
                f"{have:.3g} GiB for keys and values are too few: a request of {longest} tokens "
                f"takes {need:.3g} GiB"
            )
        # The last page is the spare row's.
        shape = (num_pages + self.with_kernel, config.num_kv_heads, PAGE, config.head_dim)
        self.keys = [_allocate(shape, like) for _ in range(config.num_layers)]
        self.values = [_allocate(shape, like) for _ in range(config.num_layers)]
        self.spare_row = rows
        self.free = list(range(num_pages))  # a heap
        self.table = np.full((rows + 1, pages_for(longest)), num_pages)
        self.changed_rows: set[int] = set()  # whose new pages kernel_steps.py has not copied yet
        self.lengths = np.zeros(rows, dtype=np.int64)  # tokens

    def row_pages(self, row: int) -> np.ndarray:
        """The numbers of the row's pages, in the order of its tokens."""
        return self.table[row, : pages_for(self.lengths[row])]

    def locate(self, rows: Sequence[int], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The page of the token at positions[i] of rows[i], and its offset in that page."""
        return self.table[rows, positions // PAGE], positions % PAGE

    def lengthen(self, rows: Sequence[int], tokens: int) -> None:
        """Make room for that many more tokens in each row. IndexError if too few pages are free."""
        lengths = self.lengths[rows]
        first, last = pages_for(lengths), pages_for(lengths + tokens)
        for i in np.flatnonzero(first < last):
            for number in range(first[i], last[i]):
                self.table[rows[i], number] = heapq.heappop(self.free)
            self.changed_rows.add(rows[i])
        self.lengths[rows] += tokens

    def shorten(self, row: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of the row, and free the pages after them."""
        for page in self.row_pages(row)[pages_for(tokens) :].tolist():
            heapq.heappush(self.free, page)
        self.lengths[row] = tokens

    def pages_to_append(self, rows: list[int]) -> int:
        """How many free pages it takes to append one token to each row."""
        return int((self.lengths[rows] % PAGE == 0).sum())

    def copy_prompt(self, source: int, target: int) -> None:
        """Fill all pages of the row `target` with the first keys and values of the row `source`."""
        target_pages = self.row_pages(target)
        source_pages = self.table[source, : len(target_pages)]
        device = self.keys[0].device
        source_pages, target_pages = (to_device(p, device) for p in (source_pages, target_pages))
        for tensor in (*self.keys, *self.values):
            tensor[target_pages] = tensor[source_pages]

    def write(self, layer: int, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value (n, K, d) of n tokens at (pages[i], offsets[i])."""
        self.keys[layer][pages, :, offsets] = key
        self.values[layer][pages, :, offsets] = value
