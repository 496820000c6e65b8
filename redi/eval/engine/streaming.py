"""Answers token by token, in conversations whose keys and values stay in the cache between turns.

    speaker = Speaker(model, source)
    for token in speaker.answer(prompt_ids, key, sampling, limit): ...

    speaker = Speaker(model, source, rows=16)           many conversations side by side
    for row, token in speaker.answers([Turn(row, prompt_ids, key, limit), ...], sampling): ...

A conversation's next prompt begins with the last prompt and answer, unless the template changes
them, so only its new tokens are run. With an empty cache and one row, the tokens are those of
`generate`, on a CPU to the last bit. Prompts are run one after another, answers decoded together.
Left out: conversations that share pages, or give theirs up to others when memory is short.
Letters: V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np
import torch
from torch import Tensor

from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.eval.engine.cache import PAGE, Cache, pages_for, pages_that_fit
from redi.eval.engine.generate import make_decoder
from redi.eval.engine.sampling import Sampling, sample
from redi.model import Transformer


@dataclass(frozen=True)
class Turn:
    """What a conversation asks next."""

    row: int  # of the conversation
    prompt_ids: Sequence[int]
    key: int  # seeds the random numbers
    limit: int  # tokens of the answer, at most


class Speaker:
    """A model with a cache, whose rows keep the last prompt and answer of a conversation each."""

    def __init__(self, model: Transformer, source: Source, rows: int = 1):
        if source.chat is None:
            raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; a chat needs it")
        self.chat, self.stop_ids = source.chat, source.stop_ids
        fitting, _ = pages_that_fit(model, None)
        self.context = min(model.config.max_positions, fitting * PAGE)
        pages = rows * pages_for(self.context)
        self.cache = Cache(model, pages, None, rows, longest=self.context)
        self.decoder = make_decoder(model, self.cache)
        # By row: the tokens whose keys and values are in the cache
        self.cached_ids: list[list[int]] = [[] for _ in range(rows)]

    def answer(
        self, prompt: Sequence[int], key: int, sampling: Sampling, limit: int
    ) -> Iterator[int]:
        """The tokens of `answers` in row 0."""
        for _, token in self.answers([Turn(0, prompt, key, limit)], sampling):
            yield token

    @torch.inference_mode()
    def answers(self, turns: Sequence[Turn], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """(row, token) of one turn per row: up to `limit` tokens each; the stop token is the last,
        if one comes. Raises UserError if the logits are not finite or the cache is full."""
        for turn in turns:
            # At least one token is run, for its logits.
            pairs = zip(self.cached_ids[turn.row], turn.prompt_ids[:-1])
            known = takewhile(lambda pair: pair[0] == pair[1], pairs)
            self.cached_ids[turn.row] = [token for token, _ in known]
            self.cache.shorten(turn.row, len(self.cached_ids[turn.row]))
        logits = torch.cat([self._prefill(turn.row, turn.prompt_ids) for turn in turns])
        for position in count():
            keys = np.array([turn.key for turn in turns])
            tokens = sample(logits, keys, np.full(len(keys), position), sampling)
            going = []
            for turn, token in zip(turns, tokens):
                yield turn.row, token
                if token not in self.stop_ids and position + 1 < turn.limit:
                    going.append((turn, token))
            if not going:
                return
            turns, tokens = zip(*going)
            rows = [turn.row for turn in turns]
            self._require_pages(self.cache.pages_to_append(rows))
            logits = self.decoder.step(rows, tokens)
            for row, token in zip(rows, tokens):
                self.cached_ids[row].append(token)

    def _prefill(self, row: int, prompt: Sequence[int]) -> Tensor:
        """Append the prompt's tokens to the row, but for those it has -> logits (1, V) after it."""
        begin, length = len(self.cached_ids[row]), len(prompt)
        self._require_pages(pages_for(length) - pages_for(begin))
        self.cache.lengthen([row], length - begin)
        self.cached_ids[row] = list(prompt)
        return self.decoder.prefill([row], [prompt[begin:]])

    def _require_pages(self, number: int) -> None:
        if number > len(self.cache.free):
            rows = len(self.cached_ids)
            raise UserError(f"no memory is left for keys and values: fewer --slots than {rows}")
