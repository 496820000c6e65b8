"""What the kernels of a traced step cost at the least. The rules:

    time       a kernel takes the larger of FLOPs / peak and bytes / bandwidth, both of the data
               sheet (redi/gpus.py). Kernels follow each other; launches and the host take no time.
    FLOPs      2 m n k of a matmul. Attention: 2 H d L^2 for a causal document forward and 5 H d L^2
               backward, where 1 H d L^2 computes the scores again. All other kernels count none.
    bytes      a kernel reads each tensor that it is given once and writes each result once; what
               it changes in place, it reads and writes. A tensor that it is given twice counts
               once, and so does what is broadcast. Looking up or storing rows moves these rows and
               their indices only. A Triton kernel moves each of its tensor arguments once, so one
               that works in place is given the tensor twice; attention of a decode step reads the
               keys and values of the rows' tokens.
    kernels    one per operator, even if it takes a list of tensors. Views and allocations
               are none.
    ranks      exchanges overlap with computing and take no time; the copies around them count.

By these rules the sum is a lower bound of a step's time, and tokens/s an upper bound. A real kernel
can beat them where it finds its input in a cache, and streams where they overlap. `likely` is the
same sum at the share of each rate that large kernels reach (SHARES) and with at least LAUNCH
seconds for each kernel; both are assumed, never measured here.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from redi.gpus import Gpu

SHARES = {"matmul": 0.8, "attention": 0.6, "attention, backward": 0.48, "bytes": 0.9}
LAUNCH = 2e-6  # seconds

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # where the factors begin
NOTHING = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.set_, aten.resize_, aten.record_stream, aten._local_scalar_dense,
}  # fmt: skip
NOT_READ = {  # the first argument is overwritten, or gives only its shape
    aten.copy_, aten.fill_, aten.zero_, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten._foreach_copy_, aten._foreach_zero_,
}  # fmt: skip
NOT_WRITTEN = {aten._fused_adamw_: 1}  # the gradients, which its schema marks as changed
LOOKUPS = {aten.embedding, aten.index, aten.gather, aten.index_select}
STORES = {aten.index_put_: 2, aten._index_put_impl_: 2, aten.index_copy_: 3}  # where the values are
TRITON = {  # kinds
    "_row": "softmax", "_split": "attention", "_add_up": "attention", "_rotate": "elementwise",
    "_swiglu": "elementwise", "_swiglu_gradients": "elementwise",
}  # fmt: skip


@dataclass
class Cost:
    """A sum over kernels."""

    kernels: int = 0
    flops: float = 0.0
    again: float = 0.0  # of these FLOPs: computed before, and not kept
    bytes: float = 0.0
    seconds: float = 0.0
    by_bytes: float = 0.0  # of these seconds: where the bytes take longer than the FLOPs
    likely: float = 0.0  # seconds

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(value * times for value in astuple(self)))


class Costs:
    """The kernels that ran on a fake GPU: kind -> Cost."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.cached_tokens = gpu, 0
        self.kind: str | None = None  # if set, of every kernel from now on
        self.by_kind: dict[str, Cost] = defaultdict(Cost)

    def add_operator(self, operator: Any, args: tuple, kwargs: dict, results: Any) -> None:
        """Count what one operator launches."""
        packet, name = operator.overloadpacket, operator.overloadpacket.__name__
        if packet in NOTHING or operator.namespace in ("c10d", "_c10d_functional"):
            return
        read = args[1:] if packet in NOT_READ else args
        given = _distinct(read, {k: v for k, v in kwargs.items() if k != "out"})
        changed = _distinct(*_changed(operator, args))
        made = _distinct(results, kwargs.get("out"))
        changed_storages, known = ({_storage(t) for t in tensors} for tensors in (changed, given))
        made = [tensor for tensor in made if _storage(tensor) not in changed_storages]
        copies_shards = name == "all_gather_copy_in"  # into a slice of the output
        mutates = operator._schema.is_mutable or copies_shards
        if not mutates and all(_storage(tensor) in known for tensor in made):
            return  # a view, or nothing on the GPU
        moved = _bytes(given) + _bytes(made) + _bytes(changed)
        if packet in LOOKUPS:
            moved += _bytes(made) - _size(args[0])
        elif packet in STORES:
            adds = len(args) > 3 and args[3] is True  # to the rows, which are then read, too
            moved += (1 + adds) * _size(args[STORES[packet]]) - 2 * _size(args[0])
        elif copies_shards:
            moved = 2 * _bytes(_distinct(args[0]))
        kind, flops, again = "elementwise", 0.0, 0.0
        if packet in PRODUCTS:
            first, second = args[PRODUCTS[packet] :][:2]
            kind, flops = "matmul", 2.0 * first.numel() * second.shape[-1]
        elif name == "_varlen_attn":  # of equal documents
            kind, flops = "attention", 2.0 * args[0].numel() * args[5]
        elif name == "_varlen_attn_backward":
            again = float(args[1].numel() * args[8])
            kind, flops = "attention, backward", 5 * again
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and (torch.is_grad_enabled() or name == "_varlen_attn"):
            again = flops  # a forward pass inside backward: a checkpointed block
        self._add(kind, flops, again, moved)

    def add_triton(self, name: str, args: Sequence[Any]) -> None:
        """Count a Triton kernel's launch."""
        sizes = [_size(tensor) for tensor in _on_gpu(args)]
        if name == "_split":  # query, keys, values, ...
            _, kv_heads, _, size = args[1].shape
            per_token = kv_heads * size * args[1].element_size()
            sizes[1:3] = [self.cached_tokens * per_token] * 2
        self._add(TRITON[name], 0.0, 0.0, sum(sizes))

    def _add(self, kind: str, flops: float, again: float, moved: float) -> None:
        computing, moving = flops / self.gpu.flops, moved / self.gpu.bandwidth
        seconds, by_bytes = max(computing, moving), moving if moving > computing else 0.0
        reached = computing / SHARES.get(kind, 1.0), moving / SHARES["bytes"]
        kind = self.kind or kind.partition(",")[0]
        self.by_kind[kind] += Cost(1, flops, again, moved, seconds, by_bytes, max(*reached, LAUNCH))


def _on_gpu(values: Any) -> Iterator[FakeTensor]:
    return (t for t in tree_leaves(values) if isinstance(t, FakeTensor) and t.is_cuda)


def _distinct(*values: Any) -> list[FakeTensor]:
    """The tensors on the GPU; of those that begin at the same place, the largest."""
    places = {(_storage(t), t.storage_offset()): t for t in sorted(_on_gpu(values), key=_size)}
    return list(places.values())


def _changed(operator: Any, args: tuple) -> Iterator[Any]:
    """The arguments that an operator changes in place (those given as out= are results)."""
    not_written = NOT_WRITTEN.get(operator.overloadpacket)
    for number, (argument, value) in enumerate(zip(operator._schema.arguments, args)):
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if changes and number != not_written:
            yield value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; what is broadcast counts once."""
    counts = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride or not n)
    return math.prod(counts) * tensor.element_size()
