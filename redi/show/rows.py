"""A training row with its mask, token by token.

In a terminal, the margin says what is learned from:

      | «<|im_start|>»user             given, not learned from
      | 1+1?«<|im_end|>»
      | «<|im_start|>»assistant
    + | <think>                        a response, or a chosen one; -: a rejected one
    + | [... 3,120 tokens left out ...]
    + | \\boxed{2}«<|im_end|>»          « » a control token, not text that looks like one

Characters that do not print are shown as escapes: in a terminal they could be commands.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tokenizers.decoders import DecodeStream

from redi.data.dataset import Dataset
from redi.data.tokenizer import ChatTokenizer

COLUMNS = 100
ENDS = (120, 60)  # tokens of a stretch that are drawn, at its beginning and at its end
MARGINS = {"given": " ", "response": "+", "chosen": "+", "rejected": "-"}


@dataclass(frozen=True)
class Stretch:
    """Neighboring tokens of a row that are all learned from, or all given."""

    kind: str  # one of MARGINS
    ids: list[int]
    begin: int  # position of the first token in the sequence, from 0

    def ends(self, most: tuple[int, int]) -> list[tuple[int, list[int]]]:
        """(position, ids) of the beginning and the end, so many tokens of each, or of all."""
        head, tail = most
        if len(self.ids) <= head + tail:
            return [(self.begin, self.ids)]
        end = self.begin + len(self.ids) - tail
        return [(self.begin, self.ids[:head]), (end, self.ids[-tail:])]

    def left_out(self, most: tuple[int, int]) -> str:
        return f"[... {len(self.ids) - sum(most):,} tokens left out ...]"


def sides(dataset: Dataset) -> tuple[str, ...]:
    """The names of a row's responses."""
    return ("chosen", "rejected") if dataset.store.paired else ("response",)


def stretches(dataset: Dataset, row: int) -> list[Stretch]:
    """A row cut where its mask changes; for a pair, the prompt, the chosen, the rejected."""
    found = []
    kinds = sides(dataset)
    for side, kind in enumerate(kinds):
        sequence = dataset.sequence(len(kinds) * row + side)
        learned = np.zeros(len(sequence.tokens), dtype=bool)
        learned[sequence.supervised()] = True
        cuts = np.flatnonzero(np.diff(learned)) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(learned)]):
            if side == 0 or begin > 0:  # both sides have the same prompt
                ids = sequence.tokens[begin:end].tolist()
                found.append(Stretch(kind if learned[begin] else "given", ids, begin))
    return found


def visible(text: str) -> str:
    """Text with escapes for all characters that do not print, except line breaks."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def tokens_of(ids: list[int], chat: ChatTokenizer) -> Iterator[tuple[str, list[int], bool]]:
    """(text, its ids, whether it is a control token). Ids that share a character stay together."""
    controls = set(chat.control_ids.values())
    stream, pending = DecodeStream(skip_special_tokens=False), []
    for token, following in zip(ids, [*ids[1:], None]):
        if token in controls:
            yield chat.token(token), [token], True
            continue
        pending.append(token)
        text = stream.step(chat.tokenizer, token)
        if text is None and (following is None or following in controls):  # cut off
            text, stream = chat.decode(pending), DecodeStream(skip_special_tokens=False)
        if text is not None:
            yield text, pending, False
            pending = []


def row_as_text(row: list[Stretch], chat: ChatTokenizer) -> str:
    """The lines of the module's docstring, at most COLUMNS wide."""
    lines = []
    for stretch in row:
        ends = ("".join(_drawn(ids, chat)).removesuffix("\n") for _, ids in stretch.ends(ENDS))
        for line in f"\n{stretch.left_out(ENDS)}\n".join(ends).split("\n"):
            # textwrap would drop a line of blanks
            pieces = textwrap.wrap(line, COLUMNS - 6, drop_whitespace=False) or [""]
            lines += [f"  {MARGINS[stretch.kind]} | {piece}".rstrip() for piece in pieces]
    return "\n".join(lines)


def _drawn(ids: list[int], chat: ChatTokenizer) -> Iterator[str]:
    for text, _, control in tokens_of(ids, chat):
        yield f"«{text}»" if control else visible(text)
