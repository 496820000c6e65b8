"""Decode steps on CUDA: attention in Triton, and small steps replayed from CUDA graphs.

A step of few rows is hundreds of small kernels, which the host launches more slowly than the device
runs them. So the launches are recorded as a CUDA graph for each of a few sizes:

    3 rows to write   tokens    7  2  9  0     one copy to the inputs of size 4, then the graph of
                      rows      0  4  1  8     size 4 is replayed, and the hidden states of its
                      lengths  31  8 64  1     first 3 rows are used

A graph reads and writes fixed addresses: the weights, the pages, these inputs, and a copy of the
table of pages. A step is padded with the spare row (8 above), whose page belongs to no text.
Never recorded: steps of more than SIZES[-1] rows, whose kernels are long enough; steps of a model
in training, since FSDP gathers its weights in hooks; prefills, whose shapes never repeat.
Letters: B rows, D hidden, H heads, K kv heads, d head size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from redi.eval.engine.cache import Cache
from redi.eval.engine.decode_kernel import decode_attention
from redi.eval.engine.decoder import Decoder
from redi.model import Transformer
from redi.packing import to_device

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a recorded step


class KernelDecoder(Decoder):
    """The same steps on CUDA; the table of pages is kept on the device."""

    def __init__(self, model: Transformer, cache: Cache):
        super().__init__(model, cache)
        self.table = torch.from_numpy(cache.table.copy()).to(self.device)
        cache.changed_rows.clear()
        self.sizes = () if isinstance(model, FSDPModule) else SIZES
        self.recordings: dict[int, Callable[[Tensor], Tensor]] = {}

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.cache.lengthen(rows, 1)
        self._update_table()
        size = next((size for size in self.sizes if size >= len(rows)), None)
        if size is None:
            return self.project(self._step_hidden(self._inputs(rows, tokens, len(rows))))
        if size not in self.recordings:  # with spare rows alone, since the first run writes, too
            self.recordings[size] = recorded(self._step_hidden, self._inputs([], [], size))
        hidden = self.recordings[size](self._inputs(rows, tokens, size))
        return self.project(hidden[: len(rows)])

    def _update_table(self) -> None:
        if rows := sorted(self.cache.changed_rows):
            pages = to_device(self.cache.table[rows], self.device)
            self.table.index_copy_(0, to_device(rows, self.device), pages)
            self.cache.changed_rows.clear()

    def _inputs(self, rows: Sequence[int], tokens: Sequence[int], size: int) -> Tensor:
        """(3, size): tokens, rows, lengths; padded with the spare row."""
        inputs = np.empty((3, size), dtype=np.int64)
        inputs[:] = [[0], [self.cache.spare_row], [1]]
        inputs[:, : len(rows)] = tokens, rows, self.cache.lengths[np.asarray(rows, dtype=int)]
        return to_device(inputs, self.device)

    def _step_hidden(self, inputs: Tensor) -> Tensor:
        """(3, B) -> (B, D). Never waits for the device, so that it can be recorded."""
        tokens, rows, lengths = inputs
        last = lengths - 1
        cache, page = self.cache, self.cache.keys[0].shape[2]
        pages, offsets = self.table[rows, last // page], last % page

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            cache.write(layer, pages, offsets, key, value)
            keys, values = cache.keys[layer], cache.values[layer]
            return decode_attention(query, keys, values, self.table, rows, lengths)

        return self.hidden(tokens, last, attend)


def recorded(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The function on tensors of this shape, replayed from a CUDA graph; every call overwrites the
    last result. `inputs` becomes the graph's input buffer. The function runs on it once before the
    recording, so what it writes then must be harmless."""
    stream = torch.cuda.Stream(inputs.device)
    stream.wait_stream(torch.cuda.current_stream(inputs.device))
    with torch.cuda.stream(stream):
        function(inputs)  # compiles kernels, and lets libraries choose theirs
    torch.cuda.current_stream(inputs.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Only this thread: under torchrun another one queries the device about collectives meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(inputs)

    def replay(new: Tensor) -> Tensor:
        inputs.copy_(new)
        graph.replay()
        return output

    return replay
