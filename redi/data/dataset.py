"""The rows of a token store (store.py) that a run trains on, and a description of them.

No row is ever cut: a row over a limit is dropped and counted, or stops the run (over_length).
Left out: shuffling and batching (packing.plan). Letters: N rows, S sequences (N or 2 N).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from redi.config import UserError
from redi.data.store import TokenStore
from redi.data.tokenizer import ChatTokenizer
from redi.packing import TokenSequence
from redi.recipe import TrainConfig
from redi.tables import text_table

QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Dataset:
    """The rows of a store that this run trains on."""

    store: TokenStore
    rows: np.ndarray  # (N,) indices into the store's rows
    dropped: dict[str, int]  # rows over a limit, by reason

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sides(self) -> dict[int, str]:  # sign of a sequence -> what its response is called
        return {1: "response"} if self.store.kind == "rows" else {1: "chosen", -1: "rejected"}

    @property
    def per_row(self) -> int:  # sequences
        return 2 if self.store.paired else 1

    @cached_property
    def stored(self) -> np.ndarray:  # (S,) sequence id -> index into the store's sequences
        return (self.rows[:, None] * self.per_row + np.arange(self.per_row)).reshape(-1)

    @cached_property
    def signs(self) -> np.ndarray:  # (S,) -1 wrong or rejected, +1 otherwise
        return np.sign(self.store.weights[self.stored]).astype(int)

    @cached_property
    def lengths(self) -> np.ndarray:  # (N,) tokens of each row, or (N, 2) of chosen and rejected
        shape = (-1, 2) if self.store.paired else -1
        return self.store.sequence_lengths[self.stored].reshape(shape)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:  # (S,)
        return self.store.prompt_lengths[self.stored]

    @cached_property
    def response_lengths(self) -> np.ndarray:  # (S,) |y|: learned tokens, with the stop token
        return self.store.response_lengths[self.stored]

    def part_lengths(self) -> dict[str, np.ndarray]:
        """Tokens of the prompts, and of the responses of each side."""
        parts = {s: self.response_lengths[self.signs == sign] for sign, s in self.sides.items()}
        return {"prompt": self.prompt_lengths.reshape(len(self), -1)[:, 0]} | parts

    def sequence(self, sequence_id: int) -> TokenSequence:
        """By the id of packing.plan: row or, of pairs, 2 * row or 2 * row + 1 (rejected)."""
        stored = self.stored[sequence_id]
        start, end = self.store.offsets[stored : stored + 2]
        tokens, prompt_length = self.store.tokens[start:end], int(self.prompt_lengths[sequence_id])
        learned = tokens[prompt_length:] >= 0  # the tokens between two answers are stored as ~id
        row = int(sequence_id) // self.per_row
        sign, weight = int(self.signs[sequence_id]), abs(float(self.store.weights[stored]))
        return TokenSequence(np.maximum(tokens, ~tokens), prompt_length, row, sign, learned, weight)

    def row_number(self, row: int) -> int:
        """The position of a row in the data, from 1."""
        return int(self.store.row_numbers[self.rows[row]])


def select(store: TokenStore, config: TrainConfig, path: str) -> Dataset:
    """The rows of `path` within the limits of `config`, in tokens; the stop token counts. Raises
    UserError if none is left, one is refused, or stage 2 has rows of one label only."""
    totals = store.sequence_lengths.reshape(len(store.row_numbers), -1)  # (N, 1), pairs (N, 2)
    prompts = store.prompt_lengths.reshape(totals.shape)
    over = {
        f"prompt over {config.max_prompt} tokens": prompts > config.max_prompt,
        f"response over {config.max_response} tokens": totals - prompts > config.max_response,
        f"prompt and response over {config.max_length} tokens": totals > config.max_length,
    }
    kept, dropped = np.ones(len(totals), dtype=bool), {}
    for reason, too_long in over.items():
        newly = np.flatnonzero(kept & too_long.any(axis=1))  # a row counts for its first reason
        if len(newly) and config.over_length == "error":
            where = f"{path}: row {store.row_numbers[newly[0]]}"
            raise UserError(f"{where}: {reason} (--over-length drop leaves such rows out)")
        if len(newly):
            dropped[reason] = len(newly)
        kept[newly] = False
    if not kept.any():
        counts = [f"{count} {reason}" for reason, count in (store.skipped | dropped).items()]
        raise UserError(f"{path}: no row is left to train on ({', '.join(counts)})")
    dataset = Dataset(store, np.flatnonzero(kept), dropped)
    if set(dataset.signs) != dataset.sides.keys():
        raise UserError(
            f"{path}: all {len(dataset)} rows have the same label; stage 2 takes right and wrong "
            "rows, train_sft.py right ones alone"
        )
    return dataset


def table_of_lengths(dataset: Dataset) -> str:
    """Tokens in each part of a row; "between" two answers only if a row has several."""
    between = dataset.lengths.reshape(-1) - dataset.prompt_lengths - dataset.response_lengths
    parts = {"between": between.reshape(len(dataset), -1).sum(axis=1)} if between.any() else {}
    rows = [("tokens", "total", *QUANTILES)]
    for name, lengths in (dataset.part_lengths() | parts).items():
        if not len(lengths):  # no row has this label
            continue
        quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
        rows.append((name, *(f"{n:,}" for n in (lengths.sum(), *quantiles))))
    return text_table(rows)


def describe(dataset: Dataset, chat: ChatTokenizer) -> str:
    """Rows, tokens, length quantiles, what was left out, and the first row with its mask."""
    left_out = dataset.store.skipped | dataset.dropped
    kind, right = dataset.store.kind, (dataset.signs > 0).sum()
    kind += f" ({right:,} right)" if kind == "labeled rows" else ""
    lines = [f"{len(dataset):,} {kind} to train on, {sum(left_out.values()):,} left out"]
    lines += [f"  left out: {count:,} {reason}" for reason, count in left_out.items()]
    lines.append(table_of_lengths(dataset))

    lines.append(f"row {dataset.row_number(0)} as the model sees it (prompts are not learned):")
    for i in range(dataset.per_row):
        sequence = dataset.sequence(i)
        side = dataset.sides[sequence.sign]
        learned = np.isin(np.arange(len(sequence.tokens)), sequence.supervised())
        stretches = np.split(sequence.tokens, np.flatnonzero(np.diff(learned)) + 1)
        parts = ["prompt", *[side, "between"] * len(stretches)]
        for name, ids in list(zip(parts, stretches))[i:]:  # both sides have the same prompt
            text = chat.decode(ids)
            shown = text if len(text) <= 240 else f"{text[:120]} [...] {text[-120:]}"
            lines.append(f"  {name:<9}| {shown!r}")
    return "\n".join(lines)
