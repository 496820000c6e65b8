"""Sampling many completions: rows of a batch that are refilled as they finish.

    rows    0: <prompt A> x x x x .          decode: one token a row and step (decoder.py), over
            1: <prompt A> x x .              keys and values in pages (cache.py)
            2: <prompt B> x x x x x x        prefill: prompts in one pack, through the training
                                             forward, once for all the samples of a problem

The number of pages is fixed. A request is admitted when its prompt fits and every live row can
still get one more page. When no page is left, the row admitted last gives its pages back and goes
to the front of the queue with what it has written; later its text is prefilled again, and it
continues to the same end.

Every request has its own random numbers, keyed by (seed, request key, position), so the other
requests of the batch do not matter (sampling.py). Temperature 0 is greedy. A completion that
repeats itself until its limit is reported (loops.py), never stopped.

Left out: beam search, penalties; launching a step before the last one's tokens are read.
Letters: B rows of a step, T packed tokens, D hidden, V vocabulary.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from redi.attention import packed_attention
from redi.config import UserError
from redi.eval.engine.cache import Cache, pages_for, spread
from redi.eval.engine.decoder import Decoder
from redi.eval.engine.sampling import Draws, Sampling, sample
from redi.model import Transformer
from redi.packing import to_device

PREFILL_TOKENS = 8192  # of a pack, unless one prompt is longer


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
class Usage:
    """What a call of `generate` has cost so far; updated while results come."""

    prefilled_tokens: int = 0
    steps: int = 0  # of decoding
    row_steps: int = 0  # tokens written by those steps
    full_steps: int = 0  # the steps while requests were still queued
    full_row_steps: int = 0  # tokens written by those
    evictions: int = 0

    def count_step(self, rows: int, full: bool) -> None:
        self.steps += 1
        self.row_steps += rows
        self.full_steps += full
        self.full_row_steps += rows if full else 0


@dataclass
class _Text:
    """A request, and what is written of it."""

    request: Request
    token_ids: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[int, ...]:  # what a prefill must read
        return (*self.request.prompt_ids, *self.token_ids)

    @property
    def longest(self) -> int:  # tokens of prompt and answer, if nothing stops it
        return len(self.request.prompt_ids) + self.request.max_new_tokens


@dataclass
class _Held:
    """A prompt in the cache that more samples wait for."""

    row: int
    logits: Tensor | None = None  # (V,) after it; None until the prefill has run


@dataclass
class _Pack:
    """What is admitted together."""

    rows: list[int] = field(default_factory=list)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)  # what each row begins with
    fresh: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)  # to run -> its pages
    logits: list[Tensor | None] = field(default_factory=list)  # (V,) after them, where known
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # pages, afterwards


@torch.inference_mode()
def generate(
    model: Transformer,
    requests: Iterable[Request],
    stop_ids: Sequence[int],
    sampling: Sampling,
    slots: int,
    cache_bytes: int | None = None,
    usage: Usage | None = None,
) -> Iterator[Generated]:
    """Complete every request, up to `slots` at once; results come as they finish, in no fixed
    order.

    Requests of one problem should follow each other: they share a prefill. cache_bytes: the most
    that keys and values may take; None: as much as the slots can need, if the machine has it.
    Raises ValueError if a request's prompt and max_new_tokens, at least 1 each, do not fit the
    model's context, UserError if they do not fit the cache.
    """
    texts = [_Text(request) for request in requests]
    for request in (text.request for text in texts):
        asked, limit = len(request.prompt_ids), request.max_new_tokens
        if min(asked, limit) < 1 or asked + limit > model.config.max_positions:
            raise ValueError(
                f"request {request.key}: {asked} prompt tokens and {limit} new ones; "
                f"the context is {model.config.max_positions}"
            )
    if not texts:
        return
    slots = min(slots, len(texts))
    engine = _Engine(model, sampling, texts, slots, cache_bytes, usage or Usage())
    while engine.queue or engine.live:
        pack = engine.admit()
        logits, rows = engine.prefill(pack) if pack.rows else engine.decode()
        yield from engine.advance(logits, rows, set(stop_ids))


class _Engine:
    """The queue, the texts being written, and the cache.

    Rows 0 .. slots - 1 of the cache are written to, the others hold prompts.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        texts: list[_Text],
        slots: int,
        cache_bytes: int | None,
        usage: Usage,
    ):
        self.model, self.decoder, self.sampling = model, Decoder(model), sampling
        self.slots, self.usage = slots, usage
        weight = model.output_weight
        self.device = weight.device
        longest = max(text.longest for text in texts)
        pages = _pages_needed(texts, slots)
        self.cache = Cache(model.config, weight, pages, cache_bytes, 2 * slots, longest)
        self.kernel_steps = None
        if self.cache.with_kernel:
            from redi.eval.engine.kernel_steps import KernelSteps  # needs triton

            self.kernel_steps = KernelSteps(self.cache, self.decoder)
        self.free = list(range(slots))[::-1]
        self.free_holders = list(range(slots, 2 * slots))[::-1]
        self.live: dict[int, _Text] = {}  # row -> text, in the order of admission
        self.queue = deque(texts)
        self.waiting = Counter(text.prefix for text in texts)  # of the queue
        self.held: dict[tuple[int, ...], _Held] = {}

    # ---- who is in the batch

    def admit(self) -> _Pack:
        """Texts that start or continue. With many rows several are admitted at once, since a pass
        over one prompt costs as much as a step."""
        pack = _Pack()
        few = len(self.free) < min(len(self.queue), max(1, self.slots // 32))
        if few and self.live:
            return pack
        tokens = 0
        while self.queue and self.free:
            prefix = self.queue[0].prefix
            tokens += len(prefix) if prefix not in self.held else 0
            too_long = pack.rows and tokens > PREFILL_TOKENS
            if too_long or (prefix in pack.fresh and prefix not in self.held):
                break  # in the next pack
            if not self._make_room_for(prefix, pack):
                break
            row, self.live[row] = self.free.pop(), self.queue.popleft()
            self._place(row, prefix, pack)
        return pack

    def _make_room_for(self, prefix: tuple[int, ...], pack: _Pack) -> bool:
        """Whether a text fits, and a page more for every row; held prompts are let go for it."""
        while True:
            last = prefix in self.held and self.waiting[prefix] == 1  # it takes the held pages
            needed = 0 if last else pages_for(len(prefix))
            if len(self.cache.free) >= needed + len(self.live):
                return True
            # Its own prompt is let go only where nothing else can make room.
            own = [prefix] if not self.live else []
            if not self._let_go([p for p in self.held if p != prefix] + own, pack):
                return False

    def _let_go(self, prefixes: list[tuple[int, ...]], pack: _Pack) -> bool:
        """Give back the pages of one held prompt of these, if one can be spared."""
        for prefix in prefixes:
            if prefix in self.held and prefix not in pack.fresh:
                held = self.held.pop(prefix)
                self.cache.release(held.row)
                self.free_holders.append(held.row)
                return True
        return False

    def _place(self, row: int, prefix: tuple[int, ...], pack: _Pack) -> None:
        """Pages for the prefix, and what is to be done for what stands in them."""
        cache = self.cache
        self.waiting[prefix] -= 1
        more = self.waiting[prefix] > 0
        room = len(cache.free) >= 2 * pages_for(len(prefix)) + len(self.live)
        if prefix not in self.held:
            holder = self.free_holders.pop() if more and room and self.free_holders else row
            cache.lengthen(holder, len(prefix))
            pack.fresh[prefix] = cache.pages_of(holder)
            if holder != row:
                self.held[prefix] = _Held(holder)
        held = self.held.get(prefix)
        pack.rows.append(row)
        pack.prefixes.append(prefix)
        pack.logits.append(held.logits if held else None)
        if held and more:
            cache.lengthen(row, len(prefix))
            pages = cache.pages_of(held.row), cache.pages_of(row)
            if held.logits is None:
                pack.copies.append(pages)
            else:
                cache.copy(*pages)
        elif held:
            cache.rename(held.row, row)
            self.free_holders.append(self.held.pop(prefix).row)

    def _set_aside(self) -> None:
        """Free a page for the rows: a held prompt's, or else those of the row admitted last."""
        if self._let_go(list(self.held), _Pack()):
            return
        row, text = self.live.popitem()
        self._give_back(row)
        self.queue.appendleft(text)
        self.waiting[text.prefix] += 1
        self.usage.evictions += 1

    def _give_back(self, row: int) -> None:
        self.cache.release(row)
        self.free.append(row)

    # ---- passes over the model

    def prefill(self, pack: _Pack) -> tuple[Tensor, list[int]]:
        """Logits (n, V) of the next token of the pack's rows, and these rows."""
        if pack.fresh:
            computed = dict(zip(pack.fresh, self._run(pack.fresh)))
            for prefix, logits in computed.items():
                if prefix in self.held:
                    self.held[prefix].logits = logits
            for source, target in pack.copies:
                self.cache.copy(source, target)
        logits = [
            computed[prefix] if known is None else known
            for prefix, known in zip(pack.prefixes, pack.logits)
        ]
        return torch.stack(logits), pack.rows

    def _run(self, fresh: dict[tuple[int, ...], np.ndarray]) -> Tensor:
        """Prefixes in one pack through the training forward: logits (len(fresh), V) after each."""
        lengths = [len(prefix) for prefix in fresh]
        places = [spread(pages, length) for pages, length in zip(fresh.values(), lengths)]
        pages, offsets = (self._tensor(np.concatenate(part)) for part in zip(*places))
        positions = self._tensor(np.concatenate([np.arange(length) for length in lengths]))
        ends = np.cumsum(lengths)
        last = self._tensor(ends - 1)
        cu_seqlens = self._tensor(np.concatenate([[0], ends])).to(torch.int32)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            self.cache.write(layer, pages, offsets, key, value)
            return packed_attention(query, key, value, cu_seqlens, lengths)

        tokens = self._tensor(list(itertools.chain.from_iterable(fresh)))
        layers = [partial(attend, layer=i) for i in range(self.model.config.num_layers)]
        hidden = self.model.model(tokens, positions, layers)  # (T, D)
        self.usage.prefilled_tokens += len(tokens)
        return self.decoder.project(hidden[last])

    def decode(self) -> tuple[Tensor, list[int]]:
        """One more token for every row: logits (B, V), and the rows."""
        while self.cache.missing(list(self.live)) > len(self.cache.free):
            self._set_aside()
        rows = list(self.live)
        tokens = [text.token_ids[-1] for text in self.live.values()]
        if self.kernel_steps:
            logits = self.kernel_steps.logits(rows, tokens)
        else:
            step = self.cache.step(rows)
            attend = partial(self.cache.attend, step=step)
            logits = self.decoder.logits(torch.tensor(tokens), step.lengths - 1, attend)
        self.usage.count_step(len(rows), bool(self.queue))
        return logits, rows

    def advance(self, logits: Tensor, rows: list[int], stop_ids: set[int]) -> Iterator[Generated]:
        """Draw the next token of `rows` from logits (n, V); give up the rows that are done."""
        texts = [self.live[row] for row in rows]
        sound = torch.isfinite(logits.sum())
        keys = np.array([text.request.key for text in texts])
        positions = np.array([len(text.token_ids) for text in texts])
        drawn = sample(logits, Draws(self.sampling.seed, keys, positions), self.sampling)
        *drawn, sound = torch.cat([drawn, sound[None]]).tolist()
        if not sound:
            raise UserError("the model's logits are not finite numbers: its weights are broken")
        for row, text, token in zip(rows, texts, drawn):
            text.token_ids.append(token)
            stopped, written = token in stop_ids, len(text.token_ids)
            if stopped or written == text.request.max_new_tokens:
                del self.live[row]
                self._give_back(row)
                reason = "stop" if stopped else "length"
                token_ids = text.token_ids[: written - stopped]
                yield Generated(text.request.key, token_ids, written, reason)

    def _tensor(self, values) -> Tensor:
        return to_device(values, self.device)


def _pages_needed(texts: list[_Text], slots: int) -> int:
    """Enough that no text ever waits: longest rows, longest held prompts, a spare page per row."""
    whole = sorted(pages_for(text.longest) for text in texts)
    prompts = sorted(pages_for(len(text.request.prompt_ids)) for text in texts)
    return sum(whole[-slots:]) + sum(prompts[-slots:]) + slots
