"""Causal attention confined to the documents of a pack.

A pack of documents with 5, 3 and 7 tokens is 15 tokens in a row, cu_seqlens [0, 5, 8, 15]. Token 6
attends to tokens 5 and 6. One signature, two implementations that must agree:

    a GPU in bf16 / fp16   torch's variable-length flash attention, one kernel for the pack
    anywhere else          one scaled_dot_product_attention per document: the reference, and on a
                           CPU nine times faster than a block mask over the pack

Left out: a dense mask (quadratic in the pack), flex attention (no backward on a CPU).
Letters: T packed tokens, H heads, K kv heads, d head size, S segments (documents).
"""

import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, lengths: list[int]
) -> Tensor:
    """query (T, H, d), key and value (T, K, d) with H a multiple of K -> (T, H, d).

    cu_seqlens (S+1,) int32 on the tensors' device; lengths: the S document lengths, on the host so
    that reading them does not wait for the device. Scores are scaled by d ** -0.5.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, cu_seqlens, max(lengths))
    return _per_document(query, key, value, lengths)


def _per_document(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    if query.is_cuda and query.shape[1] != key.shape[1]:  # torch's fused fp32 kernels take no GQA
        key, value = _repeat_heads(query, key, value)
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    outputs = [
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in document),  # (1, heads, L, d)
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
        for document in documents
    ]
    return torch.cat(outputs)  # (T, H, d)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # 0.9 s: imported where it is used

    grouped = {}
    if query.shape[1] != key.shape[1]:
        if takes_gqa():
            grouped = {"enable_gqa": True}
        else:  # torch 2.11
            key, value = _repeat_heads(query, key, value)
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    causal = (-1, 0)  # attend to every token before, to none after
    return varlen_attn(query, key, value, *lengths, window_size=causal, **grouped)


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Key and value (T, H, d): each of the K heads repeated for the query heads that share it."""
    group = query.shape[1] // key.shape[1]
    return [t.repeat_interleave(group, dim=1) for t in (key, value)]


@cache
def takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
