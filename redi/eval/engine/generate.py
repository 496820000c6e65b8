"""Sampling many completions: rows of a batch that are refilled as they finish.

    rows    0: <prompt A> x x x x .          decode: one token per row and step (decoder.py)
            1: <prompt A> x x .              prefill: prompts in one pack, once for all samples
            2: <prompt B> x x x x x x        of a problem

The number of pages (cache.py) is fixed. A request is admitted when its prompt fits and every live
row can still get one more page. When no page is left, the row admitted last is evicted: its text
returns to the front of the queue, is prefilled again later and continues to the same end.
The samples of a prompt, adjacent in the queue, share its prefill: each copies the prompt's pages
from a live row, or takes over the row of a sample that has finished.

Left out: beam search, penalties; launching a step before the last one's tokens are read.
Letters: B rows of a step, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from redi.eval.engine.cache import Cache, pages_for
from redi.eval.engine.decoder import Decoder
from redi.eval.engine.sampling import Sampling, sample
from redi.model import Transformer

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
    request: Request
    ids: list[int]  # of the prompt, and of the answer so far

    @property
    def written(self) -> int:  # tokens of the answer so far
        return len(self.ids) - len(self.request.prompt_ids)


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
            raise ValueError(f"request {request.key} is empty or does not fit the model's context")
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
        self.decoder = make_decoder(model, self.cache)
        self.queue: deque[_Text] = deque()
        self.least_admitted = max(1, slots // 32)  # texts that are worth a prefill
        self.live: dict[int, _Text] = {}  # row -> text, in the order of admission
        self.free_rows = list(range(slots))[::-1]
        # Rows of the next prefill -> the row whose prompt each shares; None: it runs its own text.
        self.admitted: dict[int, int | None] = {}
        self.last_prompt: tuple[int, ...] = ()  # of the last text that started
        self.last_logits: Tensor | None = None  # (V,) after that prompt

    # ---- which texts are in the batch

    def take(self, groups: Iterator[Sequence[Request]]) -> bool:
        """Queue further groups while rows are free for them. Whether any text is queued."""
        while self.free_rows and len(self.queue) < max(self.least_admitted, len(self.free_rows)):
            group = next(groups, None)
            if group is None:
                break
            self.queue += (_Text(r, list(r.prompt_ids)) for r in group)
        return bool(self.queue)

    def admit(self) -> None:
        """Texts start or continue. With many rows several are admitted at once, since a pass over
        one prompt costs as much as a step."""
        if self.live and len(self.free_rows) < min(len(self.queue), self.least_admitted):
            return
        tokens = 0
        while self.queue and self.free_rows:
            text = self.queue[0]
            source = next((row for row in self.live if self._next_shares_prompt(row)), None)
            tokens += len(text.ids) if source is None else 0
            room = len(self.cache.free) >= pages_for(len(text.ids)) + len(self.live)
            if not room or (self.admitted and tokens > PREFILL_TOKENS):
                return
            row = self.free_rows.pop()
            self.cache.lengthen([row], len(text.ids))
            self._start(row, source)

    def _next_shares_prompt(self, row: int) -> bool:
        """Whether the next text begins with this row's prompt, whose logits are at hand."""
        prompt = self.live[row].request.prompt_ids
        starts = bool(self.queue) and not self.queue[0].written
        return starts and self.queue[0].request.prompt_ids == prompt == self.last_prompt

    def _start(self, row: int, source: int | None) -> None:
        """Move the first text of the queue to this row."""
        text = self.live[row] = self.queue.popleft()
        self.admitted[row] = source
        if not text.written:
            self.last_prompt = text.request.prompt_ids

    def _finish(self, row: int) -> None:
        is_shared = self._next_shares_prompt(row)
        prompt = self.live.pop(row).request.prompt_ids
        if is_shared:
            self.cache.shorten(row, len(prompt))
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
        texts = [self.live[row].ids for row in fresh]
        computed = iter(self.decoder.prefill(fresh, texts) if fresh else ())
        for row, source in self.admitted.items():  # a prompt's first sample is before the others
            if source is None:
                logits.append(next(computed))
                if not self.live[row].written:
                    self.last_logits = logits[-1].clone()
            else:
                logits.append(self.last_logits)
                if source != row:
                    self.cache.copy_prompt(source, row)
        self.admitted.clear()
        return torch.stack(logits), rows

    def decode(self) -> tuple[Tensor, list[int]]:
        """One more token for every row: logits (B, V), and the rows."""
        while self.cache.pages_to_append(list(self.live)) > len(self.cache.free):
            self._evict()
        rows = list(self.live)
        logits = self.decoder.step(rows, [text.ids[-1] for text in self.live.values()])
        self.usage.count_step(len(rows), bool(self.queue))
        return logits, rows

    def advance(
        self, logits: Tensor, rows: list[int], sampling: Sampling, stop_ids: set[int]
    ) -> Iterator[Generated]:
        """Draw the next token of `rows` from logits (B, V); yield the texts that are finished."""
        texts = [self.live[row] for row in rows]
        keys = np.array([text.request.key for text in texts])
        positions = np.array([text.written for text in texts])
        for row, text, token in zip(rows, texts, sample(logits, keys, positions, sampling)):
            text.ids.append(token)
            stopped, written = token in stop_ids, text.written
            if stopped or written == text.request.max_new_tokens:
                self._finish(row)
                reason = "stop" if stopped else "length"
                token_ids = text.ids[len(text.request.prompt_ids) : len(text.ids) - stopped]
                yield Generated(text.request.key, token_ids, written, reason)
