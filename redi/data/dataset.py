"""The rows of a token store (data/store.py) that a run trains on, and what they look like.

No row is ever cut: one over a limit is left out and counted, or with over_length "error" refused.
Left out: shuffling and batching (packing.plan).
Letters: N rows, S sequences (N or 2 N), L tokens of a sequence.
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from redi.config import UserError
from redi.data.store import TokenStore
from redi.data.tokenizer import ChatTokenizer
from redi.packing import TokenSequence


@dataclass(frozen=True)
class Limits:
    """The longest a row may be, in tokens; the stop token counts."""

    prompt: int
    response: int
    total: int


@dataclass(frozen=True)
class Dataset:
    """The rows of a store that this run trains on."""

    store: TokenStore
    rows: np.ndarray  # (N,) indices into the store's rows
    dropped: dict[str, int]  # rows over a limit, by reason

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's sequence (N,), or of its chosen and rejected ones (N, 2)."""
        lengths = self.store.sequence_lengths
        return lengths.reshape(-1, 2)[self.rows] if self.store.paired else lengths[self.rows]

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """|y| of each sequence id (S,): its learned tokens, the stop token counted."""
        return self._of_sequences(self.store.response_lengths)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Of each sequence id (S,)."""
        return self._of_sequences(self.store.prompt_lengths)

    def sequence(self, sequence_id: int) -> TokenSequence:
        """The sequence that packing.plan names: row for SFT, 2 * row or 2 * row + 1 for pairs."""
        row, rejected, stored = self._locate(sequence_id)
        start, end = self.store.offsets[stored : stored + 2]
        tokens, prompt = self.store.tokens[start:end], int(self.store.prompt_lengths[stored])
        learned = None
        if self.store.response_lengths[stored] != len(tokens) - prompt:  # several turns
            learned = tokens[prompt:] >= 0
            tokens = np.where(tokens < 0, ~tokens, tokens)
        return TokenSequence(tokens, prompt, row, -1 if rejected else 1, learned)

    def read_ahead(self, sequence_ids: Iterable[int]) -> None:
        """Have the kernel bring these sequences in from disk; returns at once."""
        for sequence_id in sequence_ids:
            stored = self._locate(sequence_id)[2]
            start, end = (int(offset) * 4 for offset in self.store.offsets[stored : stored + 2])
            start -= start % mmap.PAGESIZE
            self.store.tokens.base.madvise(mmap.MADV_WILLNEED, start, end - start)

    def _of_sequences(self, stored: np.ndarray) -> np.ndarray:
        if not self.store.paired:
            return stored[self.rows]
        return stored.reshape(-1, 2)[self.rows].reshape(-1)

    def _locate(self, sequence_id: int) -> tuple[int, int, int]:
        """-> its row, 1 if it is the rejected one, its number in the store."""
        sides = 2 if self.store.paired else 1
        row, rejected = divmod(int(sequence_id), sides)
        return row, rejected, sides * int(self.rows[row]) + rejected

    def row_number(self, row: int) -> int:
        """Where a row stands in the data, from 1."""
        return int(self.store.row_numbers[self.rows[row]])


def select(store: TokenStore, limits: Limits, over_length: str, where: str) -> Dataset:
    """The rows within `limits`. Too long ones are counted, or with over_length "error" refused.

    Raises UserError if none is left.
    """
    sides = 2 if store.paired else 1
    totals = store.sequence_lengths.reshape(-1, sides)
    prompts = store.prompt_lengths.reshape(-1, sides)
    over = {
        f"prompt over {limits.prompt} tokens": prompts > limits.prompt,
        f"response over {limits.response} tokens": totals - prompts > limits.response,
        f"prompt and response over {limits.total} tokens": totals > limits.total,
    }
    kept = np.ones(len(totals), dtype=bool)
    dropped = {}
    for reason, too_long in over.items():
        newly = kept & too_long.any(axis=1)
        kept &= ~newly
        if newly.any():
            dropped[reason] = int(newly.sum())
            if over_length == "error":
                number = store.row_numbers[np.flatnonzero(newly)[0]]
                raise UserError(
                    f"{where}: row {number}: {reason} (--over-length drop leaves such rows out)"
                )
    if not kept.any():
        reasons = {**store.skipped, **dropped}
        reasons = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(f"{where}: no row is left to train on ({reasons or 'it has none'})")
    return Dataset(store, np.flatnonzero(kept), dropped)


# ---------------------------------------------------------------- looked at before training


def describe(dataset: Dataset, chat: ChatTokenizer) -> str:
    """Rows, tokens, length quantiles, what was left out, and one row with its mask."""
    store = dataset.store
    left_out = {**store.skipped, **dataset.dropped}
    kind = "pairs" if store.paired else "rows"
    lines = [f"{len(dataset):,} {kind} to train on, {sum(left_out.values()):,} left out"]
    lines += [f"  left out: {count:,} {reason}" for reason, count in left_out.items()]
    lines.append(f"{'tokens':<10}{'total':>14}" + "".join(f"{q:>9}" for q in QUANTILES))
    for name, lengths in _lengths_by_part(dataset).items():
        quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
        cells = "".join(f"{int(q):>9,}" for q in quantiles)
        lines.append(f"{name:<10}{int(lengths.sum()):>14,}{cells}")
    number = dataset.row_number(0)
    lines.append(f"row {number} as the model sees it (only the response is learned from):")
    for name, ids in _parts(dataset.sequence(0)):
        lines.append(f"  {name:<9}| {_shortened(chat.decode(ids))!r}")
    return "\n".join(lines)


QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def _lengths_by_part(dataset: Dataset) -> dict[str, np.ndarray]:
    prompts, responses = dataset.prompt_lengths, dataset.response_lengths
    between = dataset.lengths.reshape(-1) - prompts - responses
    parts = {"prompt": prompts, "response": responses}
    if dataset.store.paired:
        parts = {"prompt": prompts[0::2], "chosen": responses[0::2], "rejected": responses[1::2]}
    return {**parts, "between": between} if between.any() else parts


def _parts(sequence: TokenSequence) -> Iterator[tuple[str, np.ndarray]]:
    """(name, ids) of the prompt, the response, and what stands between answers."""
    prompt, after = np.split(sequence.tokens, [sequence.prompt_length])
    yield "prompt", prompt
    learned = np.ones(len(after), bool) if sequence.learned is None else sequence.learned
    turns = np.flatnonzero(np.diff(learned)) + 1
    for ids, mask in zip(np.split(after, turns), np.split(learned, turns)):
        yield "response" if mask[0] else "between", ids


def _shortened(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"
