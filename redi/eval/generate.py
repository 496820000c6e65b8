"""Sampling many completions with a KV cache.

The model is the training one: the same weights, rotation and forward (model.py). Only the way
tokens attend is another, and is handed in: `Cache.attend` writes keys and values into a slot and
looks back over it.

    slots        0: <prompt A> x x x x .          decode: one token a live slot and step
                 1: <prompt A> x x .              a finished slot is refilled from the queue
                 2: <prompt B> x x x x x x        prefill: all admitted prompts in one pack,
                                                  one prefill for the samples of a problem

Every request draws from random numbers of its own, keyed by (seed, request key), whichever other
requests share the batch. Its logits still round a little differently with the batch's shape, so
the same text is promised for the same seed and number of slots. Temperature 0 is greedy.

Left out: paging of the cache (it grows with the longest live row), beam search, penalties.
Letters: B slots, C cached positions, T packed tokens, H heads, K kv heads, d head size, V
vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.model import ModelConfig, Transformer

GROWTH = 256  # positions that the cache grows by


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn (Section 4: temperature 0.6, top-p 0.95)."""

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 42


@dataclass(frozen=True)
class Request:
    key: int  # names the request, and seeds it
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Generated:
    key: int
    token_ids: list[int]  # without the stop token
    num_tokens: int  # with it
    finish_reason: Literal["stop", "length"]


@dataclass
class _Live:
    """A request in its slot."""

    request: Request
    uniforms: np.ndarray  # (max_new_tokens,) in [0, 1)
    token_ids: list[int] = field(default_factory=list)


# ---------------------------------------------------------------- the cache


class Cache:
    """Keys and values of B slots for every layer: (B, K, C, d) each."""

    def __init__(self, config: ModelConfig, slots: int, like: Tensor):
        shape = (slots, config.num_kv_heads, 0, config.head_dim)
        self.keys = [like.new_empty(shape) for _ in range(config.num_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_layers)]

    def reserve(self, positions: int) -> None:
        """Room for so many positions in every slot."""
        missing = positions - self.keys[0].shape[2]
        if missing > 0:
            extra = -(-missing // GROWTH) * GROWTH
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, extra))

    def keep(self, slots: list[int]) -> None:
        """Drop every other slot."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[slots]

    def write(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor):
        """key, value (n, K, d) into n (slot, position) places."""
        self.keys[layer][slots, :, positions] = key
        self.values[layer][slots, :, positions] = value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """One new token a slot: query (B, H, d), key and value (B, K, d) -> (B, H, d).

        positions (B,): where the token goes; mask (B, 1, 1, L): the positions it sees. The heads
        of a group are laid along the query length, so keys and values are not repeated.
        """
        batch, _, size = query.shape
        self.write(layer, torch.arange(batch, device=query.device), positions, key, value)
        seen = mask.shape[-1]
        grouped = query.view(batch, key.shape[1], -1, size)  # (B, K, H/K, d)
        keys, values = self.keys[layer][:, :, :seen], self.values[layer][:, :, :seen]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.reshape(batch, -1, size)


# ---------------------------------------------------------------- the engine


@torch.inference_mode()
def generate(
    model: Transformer,
    requests: Iterable[Request],
    stop_ids: Sequence[int],
    sampling: Sampling,
    slots: int,
) -> Iterator[Generated]:
    """Complete every request; results come as they finish, in no fixed order.

    Requests of one problem should follow each other: they share a prefill when they are admitted
    together. The prompt and max_new_tokens of a request, at least 1 each, must fit the model's
    context. Raises ValueError if they do not.
    """
    queue = deque(requests)
    for request in queue:
        asked, limit = len(request.prompt_ids), request.max_new_tokens
        if min(asked, limit) < 1 or asked + limit > model.config.max_positions:
            raise ValueError(
                f"request {request.key}: {asked} prompt tokens and {limit} new ones; "
                f"the context is {model.config.max_positions}"
            )
    engine = _Engine(model, sampling, min(slots, len(queue)))
    while queue or engine.live:
        # Prompts are admitted a few at a time: a pass over one prompt costs as much as a step.
        enough_free = len(engine.free) >= min(len(queue), max(1, engine.num_slots // 16))
        if queue and (enough_free or not engine.live):
            admitted = [queue.popleft() for _ in range(min(len(queue), len(engine.free)))]
            logits, filled = engine.prefill(admitted)
        else:
            if not queue:
                engine.shrink()
            logits, filled = engine.decode()
        yield from engine.advance(logits, filled, set(stop_ids))


class _Engine:
    """Live requests, their slots, and the cache."""

    def __init__(self, model: Transformer, sampling: Sampling, slots: int):
        self.model, self.sampling = model, sampling
        weight = model.output_weight
        self.device = weight.device
        self.cache = Cache(model.config, slots, like=weight)
        self.num_slots = slots
        self.free = list(range(slots))[::-1]
        self.live: dict[int, _Live] = {}  # slot -> request, in order of admission

    def prefill(self, requests: list[Request]) -> tuple[Tensor, list[int]]:
        """Admit requests: logits (n, V) of each one's first new token, and their slots."""
        model, prompts = self.model, list(dict.fromkeys(r.prompt_ids for r in requests))
        lengths = [len(prompt) for prompt in prompts]
        starts = np.cumsum([0, *lengths])
        first = dict(zip(prompts, starts))
        slots, positions, sources = [], [], []  # for every token of every request
        admitted = [self.free.pop() for _ in requests]
        for slot, request in zip(admitted, requests):
            length = len(request.prompt_ids)
            rng = np.random.Generator(np.random.Philox(key=[self.sampling.seed, request.key]))
            self.live[slot] = _Live(request, rng.random(request.max_new_tokens))
            slots += [slot] * length
            positions += range(length)
            sources += range(first[request.prompt_ids], first[request.prompt_ids] + length)
        self.cache.reserve(max(lengths) + 1)
        slots, positions, sources = (self._tensor(x) for x in (slots, positions, sources))

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            self.cache.write(layer, slots, positions, key[sources], value[sources])
            return packed_attention(query, key, value, cu_seqlens, lengths)

        cu_seqlens = self._tensor(starts).to(torch.int32)
        tokens = self._tensor([token for prompt in prompts for token in prompt])
        in_document = self._tensor([i for length in lengths for i in range(length)])
        hidden = model.model(tokens, in_document, self._for_layers(attend))  # (T, D)
        last = [first[r.prompt_ids] + len(r.prompt_ids) - 1 for r in requests]
        return hidden[self._tensor(last)] @ model.output_weight.T, admitted

    def decode(self) -> tuple[Tensor, list[int]]:
        """One step of every slot: logits (n, V) of the live ones, and these slots."""
        tokens, positions = [0] * self.num_slots, [0] * self.num_slots
        for slot, live in self.live.items():
            tokens[slot] = live.token_ids[-1]
            positions[slot] = len(live.request.prompt_ids) + len(live.token_ids) - 1
        longest = max(positions) + 1
        self.cache.reserve(longest)
        tokens, positions = self._tensor(tokens), self._tensor(positions)
        seen = torch.arange(longest, device=self.device) <= positions[:, None]  # (B, L)
        attend = partial(self.cache.attend, positions=positions, mask=seen[:, None, None])
        hidden = self.model.model(tokens, positions, self._for_layers(attend))  # (B, D)
        slots = list(self.live)
        return hidden[self._tensor(slots)] @ self.model.output_weight.T, slots

    def advance(self, logits: Tensor, slots: list[int], stop_ids: set[int]) -> Iterator[Generated]:
        """Draw the next token of `slots` from logits (n, V); give up the slots that are done."""
        live = [self.live[slot] for slot in slots]
        uniforms = [entry.uniforms[len(entry.token_ids)] for entry in live]
        drawn = sample(logits, self._tensor(uniforms), self.sampling)
        *drawn, sound = torch.cat([drawn, torch.isfinite(logits).all()[None]]).tolist()
        if not sound:
            raise UserError("the model's logits are not finite numbers: its weights are broken")
        for slot, entry, token in zip(slots, live, drawn):
            entry.token_ids.append(token)
            stopped = token in stop_ids
            if stopped or len(entry.token_ids) == entry.request.max_new_tokens:
                del self.live[slot]
                self.free.append(slot)
                ids, reason = entry.token_ids, "stop" if stopped else "length"
                yield Generated(entry.request.key, ids[: len(ids) - stopped], len(ids), reason)

    def shrink(self) -> None:
        """Once nothing waits: drop empty slots when they are half of all."""
        if len(self.live) <= self.num_slots // 2:
            self.cache.keep(list(self.live))
            self.live = dict(enumerate(self.live.values()))
            self.num_slots, self.free = len(self.live), []

    def _tensor(self, values) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    def _for_layers(self, attend) -> list:
        return [partial(attend, layer=i) for i in range(self.model.config.num_layers)]


# ---------------------------------------------------------------- drawing a token


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row: logits (B, V), uniforms (B,) in [0, 1) -> (B,).

    Nucleus sampling by its definition: sort by probability, keep tokens while the mass before them
    is under top_p, and invert the cumulative mass of those kept at `uniforms`.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)  # (B, V)
    cumulative = probs.cumsum(dim=-1)
    kept = (cumulative - probs < sampling.top_p).sum(dim=-1, keepdim=True)  # (B, 1)
    kept = kept.clamp(min=1)  # the first, however small top_p is in floating point
    mass = cumulative.gather(1, kept - 1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None].float() * mass, right=True)
    return order.gather(1, drawn.minimum(kept - 1))[:, 0]
