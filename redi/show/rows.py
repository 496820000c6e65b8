"""Training rows and tables as text for a terminal.

A row is drawn with its mask. The margin says what is learned from, and so does the color, if the
terminal has colors:

      | «<|im_start|>»user             given, not learned from: dim
      | 1+1?«<|im_end|>»
      | «<|im_start|>»assistant
    + | <think>                        a response, chosen: green. Rejected: -, red
    + | [... 3,120 tokens left out ...]
    + | \\boxed{2}«<|im_end|>»          « » a control token, not text that looks like one

Characters that do not print are shown as escapes: in a terminal they could be commands.
Tokens are decoded one at a time, which fits byte-level tokenizers (Qwen2's).
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from redi.data.dataset import Dataset
from redi.data.tokenizer import ChatTokenizer

COLUMNS = 100
ENDS = (120, 60)  # tokens of a stretch that are drawn, at its beginning and at its end
LONGEST_CHARACTER = 8  # tokens that may share one character
MARGINS = {"given": " ", "response": "+", "chosen": "+", "rejected": "-"}
ANSI = {"given": "2", "response": "32", "chosen": "32", "rejected": "31"}


@dataclass(frozen=True)
class Table:
    """Without a header, the rows are names and values, and a value may be long."""

    title: str
    rows: list[tuple[str, ...]]
    header: tuple[str, ...] = ()


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
    kinds = ("chosen", "rejected") if dataset.store.paired else ("response",)
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
    while ids:
        control = ids[0] in controls
        end = 1 if control else _end_of_character(ids, chat)
        yield chat.token(ids[0]) if control else chat.decode(ids[:end]), ids[:end], control
        ids = ids[end:]


def _end_of_character(ids: list[int], chat: ChatTokenizer) -> int:
    """How many of the first ids to decode together, so that no character is split."""
    for end in range(1, min(LONGEST_CHARACTER, len(ids)) + 1):
        text = chat.decode(ids[:end])
        if not text.endswith("\ufffd"):
            return end
        # Part of a character decodes to "\ufffd", which does not encode to that part again.
        if chat.tokenizer.encode(text, add_special_tokens=False).ids == ids[:end]:
            return end
    return 1  # cut off, or ids that no text is encoded as


# ---------------------------------------------------------------- tables


def tables_as_text(tables: list[Table]) -> str:
    """Tables of at most 100 columns, separated by empty lines."""
    return "\n\n".join("\n".join(_columns(t) if t.header else _values(t)) for t in tables)


def _columns(table: Table) -> list[str]:
    cells = [[_flat(cell) for cell in row] for row in ((table.title, *table.header), *table.rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells))
    first = min(first, COLUMNS - sum(widths) - 2 * len(widths))
    lines = []
    for name, *values in cells:
        right = "".join(f"  {value:>{width}}" for value, width in zip(values, widths))
        lines.append(f"{name[:first]:<{first}}{right}".rstrip())
    return lines


def _values(table: Table) -> list[str]:
    named = [(_flat(name)[:30], _flat(value)) for name, value in table.rows]
    width = max(len(name) for name, _ in named) + 2
    lines = []
    for name, value in named:
        indents = {"initial_indent": name.ljust(width), "subsequent_indent": " " * width}
        lines += textwrap.wrap(value, COLUMNS, break_on_hyphens=False, **indents)
    return lines


def _flat(text: str) -> str:
    return visible(text).replace("\n", " ")


# ---------------------------------------------------------------- a row

# Mark control tokens while lines are wrapped. Private-use characters do not print, so a text after
# `visible` never has them.
_OPEN, _CLOSE = "\ue000", "\ue001"


def row_as_text(row: list[Stretch], chat: ChatTokenizer, colors: bool) -> str:
    wrapper = textwrap.TextWrapper(
        COLUMNS - 6, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False
    )
    lines = []
    for stretch in row:
        ends = (_tokens_as_text(ids, chat) for _, ids in stretch.ends(ENDS))
        for line in f"\n{stretch.left_out(ENDS)}\n".join(ends).split("\n"):
            for piece in wrapper.wrap(line) or [""]:
                lines.append(_with_margin(piece, stretch.kind, colors))
    return "\n".join(lines)


def _tokens_as_text(ids: list[int], chat: ChatTokenizer) -> str:
    return "".join(
        f"{_OPEN}{text}{_CLOSE}" if control else visible(text)
        for text, _, control in tokens_of(ids, chat)
    ).removesuffix("\n")


def _with_margin(line: str, kind: str, colors: bool) -> str:
    margin = f"  {MARGINS[kind]} | "
    if not colors:
        return (margin + line.replace(_OPEN, "«").replace(_CLOSE, "»")).rstrip()
    line = line.replace(_OPEN, "\x1b[7m«").replace(_CLOSE, "»\x1b[27m")
    return f"\x1b[{ANSI[kind]}m{margin}{line}\x1b[0m"
