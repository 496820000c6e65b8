"""Sampling many completions: rows of a batch that are refilled as they finish.

    rows    0: <prompt A> x x x x .          decode: one token per row and step (decoder.py)
            1: <prompt A> x x .              prefill: prompts in one pack, through the training
            2: <prompt B> x x x x x x        forward, once for all samples of a problem

The number of pages (cache.py) is fixed. A request is admitted when its prompt fits and every live
row can still get one more page. When no page is left, the row admitted last is evicted: its text
returns to the front of the queue, is prefilled again later and continues to the same end.
The samples of a prompt, adjacent in the queue, share its prefill: each copies the prompt's pages
from a live row, or takes over the row of a sample that has finished.

Left out: beam search, penalties; launching a step before the last one's tokens are read.
Letters: B rows of a step, T packed tokens, D hidden, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.eval.engine.cache import Cache, pages_for
from redi.eval.engine.decoder import Decoder
from redi.eval.engine.sampling import Sampling, sample
from redi.model import Transformer
from redi.packing import to_device

PREFILL_TOKENS = 8192  # of a pack, unless one prompt is longer


@dataclass(frozen=True)
class Request:
    key: int  # identifies the request, and seeds its random numbers
    prompt_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def limit(self) -> int:  # tokens of prompt and answer, if no stop token comes
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Generated:
    key: int
    token_ids: list[int]  # without the stop token
    num_tokens: int  # with it
    finish_reason: Literal["stop", "length"]


@dataclass
class Usage:
    """What a call of `generate` reports while it runs."""

    evictions: int = 0

    def count_step(self, rows: int, queued: bool) -> None:
        """Called when a decode step of so many rows has been launched. queued: whether requests
        wait for a row. For subclasses that measure."""


@dataclass
class _Text:
    """A request, and the tokens of its answer so far."""

    request: Request
    token_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:  # tokens of prompt and answer so far
        return len(self.request.prompt_ids) + len(self.token_ids)


@torch.inference_mode()
def generate(
    model: Transformer,
    requests: Iterable[Request],
    stop_ids: Sequence[int],
    sampling: Sampling,
    slots: int,
    cache_bytes: int | None = None,
    usage: Usage | None = None,
    groups: Iterable[Sequence[Request]] | None = None,
) -> Iterator[Generated]:
    """Complete every request, up to `slots` at once; results come as they finish, in any order.

    cache_bytes: the most that keys and values may take; None: as much as the slots can need, if the
    machine has it. groups: for ranks that share `requests`, the groups of them that this rank
    completes; it takes the next group when rows are free. None: all requests.
    Raises ValueError if a request's prompt and max_new_tokens, at least 1 each, do not fit the
    model's context, UserError if they do not fit the cache.
    """
    requests = list(requests)
    for request in requests:
        smallest = min(len(request.prompt_ids), request.max_new_tokens)
        if smallest < 1 or request.limit > model.config.max_positions:
            raise ValueError(
                f"request {request.key}: {len(request.prompt_ids)} prompt tokens and "
                f"{request.max_new_tokens} new ones; the context is {model.config.max_positions}"
            )
    if not requests:
        return
    slots = min(slots, len(requests))
    engine = _Engine(model, requests, slots, cache_bytes, usage or Usage())
    remaining = iter([requests] if groups is None else groups)
    while engine.take(remaining) or engine.live:
        engine.admit()
        logits, rows = engine.prefill() if engine.admitted else engine.decode()
        yield from engine.advance(logits, rows, sampling, set(stop_ids))


def make_decoder(model: Transformer, cache: Cache) -> Decoder:
    """The decode steps of the model's device."""
    if not cache.with_kernel:
        return Decoder(model, cache)
    from redi.eval.engine.kernel_steps import KernelDecoder  # needs triton

    return KernelDecoder(model, cache)


class _Engine:
    """The queue, the texts being written, and the cache."""

    def __init__(
        self,
        model: Transformer,
        requests: list[Request],
        slots: int,
        budget: int | None,
        usage: Usage,
    ):
        self.usage = usage
        # Enough that no text waits: the longest texts, and a spare page per row.
        wanted = sum(sorted(pages_for(r.limit) for r in requests)[-slots:]) + slots
        self.cache = Cache(model, wanted, budget, slots, max(r.limit for r in requests))
        weight = model.output_weight
        self.device = weight.device
        self.decoder = make_decoder(model, self.cache)
        self.queue: deque[_Text] = deque()
        self.least_admitted = max(1, slots // 32)  # texts that are worth a prefill
        self.live: dict[int, _Text] = {}  # row -> text, in the order of admission
        self.free_rows = list(range(slots))[::-1]
        # Rows of the next prefill -> the row whose prompt each shares; None: it runs its own text.
        self.admitted: dict[int, int | None] = {}
        self.last_prompt: tuple[int, ...] = ()  # of the last text that started
        self.last_logits = weight.new_empty(0)  # (V,) after that prompt

    # ---- which texts are in the batch

    def take(self, groups: Iterator[Sequence[Request]]) -> bool:
        """Queue further groups while rows are free for them. Whether any text is queued."""
        while self.free_rows and len(self.queue) < max(self.least_admitted, len(self.free_rows)):
            group = next(groups, None)
            if group is None:
                break
            self.queue += map(_Text, group)
        return bool(self.queue)

    def admit(self) -> None:
        """Texts start or continue. With many rows several are admitted at once, since a pass over
        one prompt costs as much as a step."""
        if self.live and len(self.free_rows) < min(len(self.queue), self.least_admitted):
            return
        tokens = 0
        while self.queue and self.free_rows:
            text, source = self.queue[0], None
            if self._starts_at_last_prompt(text):
                source = next((row for row in self.live if self._holds_last_prompt(row)), None)
            tokens += text.length if source is None else 0
            room = len(self.cache.free) >= pages_for(text.length) + len(self.live)
            if not room or (self.admitted and tokens > PREFILL_TOKENS):
                return
            row = self.free_rows.pop()
            self.cache.lengthen([row], text.length)
            self._start(row, source)

    def _starts_at_last_prompt(self, text: _Text) -> bool:
        return not text.token_ids and text.request.prompt_ids == self.last_prompt

    def _holds_last_prompt(self, row: int) -> bool:
        return self.live[row].request.prompt_ids == self.last_prompt

    def _start(self, row: int, source: int | None) -> None:
        """Move the first text of the queue to this row."""
        text = self.live[row] = self.queue.popleft()
        self.admitted[row] = source
        if not text.token_ids:
            self.last_prompt = text.request.prompt_ids

    def _finish(self, row: int) -> None:
        reusable = self._holds_last_prompt(row)
        text = self.live.pop(row)
        if reusable and self.queue and self._starts_at_last_prompt(self.queue[0]):
            self.cache.shorten(row, len(text.request.prompt_ids))
            self._start(row, source=row)
        else:
            self._release(row)

    def _evict(self) -> None:
        row, text = self.live.popitem()
        self._release(row)
        self.queue.appendleft(text)
        self.usage.evictions += 1

    def _release(self, row: int) -> None:
        self.cache.shorten(row, 0)
        self.free_rows.append(row)

    # ---- passes over the model

    def prefill(self) -> tuple[Tensor, list[int]]:
        """Logits (B, V) of the next token of the admitted rows, and these rows."""
        rows, logits = list(self.admitted), []
        fresh = [row for row in rows if self.admitted[row] is None]
        computed = iter(self._run(fresh) if fresh else ())
        for row, source in self.admitted.items():  # a prompt's first sample is before the others
            if source is None:
                logits.append(next(computed))
                if not self.live[row].token_ids:
                    self.last_logits = logits[-1].clone()
            else:
                logits.append(self.last_logits)
                if source != row:
                    self.cache.copy_prompt(source, row)
        self.admitted.clear()
        return torch.stack(logits), rows

    def _run(self, rows: list[int]) -> Tensor:
        """The texts of these rows in one pack, through the training forward -> logits (B, V)."""
        texts = [self.live[row] for row in rows]
        lengths = [text.length for text in texts]
        ids = np.concatenate([(*text.request.prompt_ids, *text.token_ids) for text in texts])
        positions = np.concatenate([np.arange(length) for length in lengths])
        pages, offsets = map(self._tensor, self.cache.locate(np.repeat(rows, lengths), positions))
        ends = np.cumsum(lengths)
        cu_seqlens = self._tensor(np.concatenate([[0], ends])).to(torch.int32)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            self.cache.write(layer, pages, offsets, key, value)
            return packed_attention(query, key, value, cu_seqlens, lengths)

        hidden = self.decoder.hidden(self._tensor(ids), self._tensor(positions), attend)  # (T, D)
        return self.decoder.project(hidden[self._tensor(ends - 1)])

    def decode(self) -> tuple[Tensor, list[int]]:
        """One more token for every row: logits (B, V), and the rows."""
        while self.cache.pages_to_append(list(self.live)) > len(self.cache.free):
            self._evict()
        rows = list(self.live)
        logits = self.decoder.step(rows, [text.token_ids[-1] for text in self.live.values()])
        self.usage.count_step(len(rows), bool(self.queue))
        return logits, rows

    def advance(
        self, logits: Tensor, rows: list[int], sampling: Sampling, stop_ids: set[int]
    ) -> Iterator[Generated]:
        """Draw the next token of `rows` from logits (B, V); yield the texts that are finished."""
        texts = [self.live[row] for row in rows]
        finite = torch.isfinite(logits.sum())
        keys = np.array([text.request.key for text in texts])
        positions = np.array([len(text.token_ids) for text in texts])
        drawn = sample(logits, keys, positions, sampling)
        *drawn, finite = torch.cat([drawn, finite[None]]).tolist()
        if not finite:
            raise UserError("the model's logits are not finite numbers: its weights are broken")
        for row, text, token in zip(rows, texts, drawn):
            text.token_ids.append(token)
            stopped, written = token in stop_ids, len(text.token_ids)
            if stopped or written == text.request.max_new_tokens:
                self._finish(row)
                reason = "stop" if stopped else "length"
                token_ids = text.token_ids[: written - stopped]
                yield Generated(text.request.key, token_ids, written, reason)

    def _tensor(self, values) -> Tensor:
        return to_device(values, self.device)
