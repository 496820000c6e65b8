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

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten

import numpy as np
from tokenizers.decoders import DecodeStream

from redi.data.dataset import Dataset
from redi.data.formats import ROLES
from redi.data.tokenizer import ChatTokenizer, Message

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


def stretches(dataset: Dataset, row: int) -> list[Stretch]:
    """A row cut where its mask changes; for a pair, the prompt, the chosen, the rejected."""
    found = []
    for side in range(dataset.per_row):
        sequence = dataset.sequence(dataset.per_row * row + side)
        kind = dataset.sides[sequence.sign]
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


def about_template(
    prompt: list[Message], response: list[Message], side: str, chat: ChatTokenizer
) -> Iterator[str]:
    """What the template adds besides headers, and which messages it changes. side: the name of the
    response."""

    def text_of_row(messages: list[Message]) -> str:
        [row] = chat.encode_rows([(messages[: len(prompt)], messages[len(prompt) :])])
        return chat.decode(row.prompt_ids + row.response_ids)

    messages, end = [*prompt, *response], 0
    row, controls = text_of_row(messages), "|".join(map(re.escape, chat.control_ids))
    contents = "".join(message["content"] for message in messages)
    marker = next(c for c in map(chr, range(0xE0F2, 0xF8FF)) if c not in contents)  # private use
    for i, message in enumerate(messages):
        role = message["role"]
        name = role if i < len(prompt) or side == "response" else side
        ids = chat.tokenizer.encode(message["content"], add_special_tokens=False).ids
        content = chat.decode(ids)  # as the tokenizer normalizes it
        # What the template writes around a message, unless it depends on the message.
        marked = text_of_row([*messages[:i], {**message, "content": marker}, *messages[i + 1 :]])
        before, found, after = marked.partition(marker)
        is_alike = bool(found) and row.startswith(before) and row.endswith(after)
        start = len(before) if is_alike else row.find(content, end)
        if start < 0:
            yield f"message {i + 1} ({name}) is rewritten"
            continue
        for text in re.split(controls, row[end:start]):
            text = text.strip().removeprefix(role).strip()
            if text and text not in ROLES:
                yield f"adds {shorten(repr(text), 72, placeholder=' [...]')}"
        end = len(row) - len(after) if is_alike else start + len(content)
        if (written := row[start:end]) != content:
            first = content.find(written)
            last = len(content) - first - len(written)
            lost = f"loses {first:,} characters at its beginning, {last:,} at its end"
            yield f"message {i + 1} ({name}) {'is rewritten' if first < 0 else lost}"
