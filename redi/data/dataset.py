"""Training rows -> token arrays on disk, made once and memory-mapped.

A line of positives.jsonl, {"prompt": [messages], "completion": [message]}, becomes one sequence;
a line of pairs.jsonl, {"prompt", "chosen", "rejected"}, becomes two, the chosen one first. The
`TokenStore` holds every rendered sequence end to end in one int32 file:

    tokens.bin       p p p r r r r | p p p r r | ...        p prompt, r response, ends with stop
    index.npz        offsets (S+1,), prompt_lengths (S,), row_numbers (N,)
    store.json       what it was made from, and the rows left out by reason

The store's folder is named by a hash of the data, the tokenizer and the template, so a change of
any of them makes another one and nothing stale is ever read. Length limits are not part of it:
`Dataset` is a view of the store without the rows that are too long for this run, each counted.
No row is ever cut. Left out: shuffling and batching (packing.plan).
Letters: N rows, S sequences (N or 2 N), L tokens of a sequence.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.files import is_encodable, read_rows
from redi.data.tokenizer import ChatTokenizer, Message
from redi.packing import Sequence

FORMAT = "2"  # part of every key: raise it when the rendering or the layout changes
RESPONSE_FIELDS = {False: ("completion",), True: ("chosen", "rejected")}
ROLES = ("system", "user", "assistant", "tool")
BATCH_ROWS = 256  # rendered and encoded at a time


@dataclass(frozen=True)
class Limits:
    """The longest a row may be, in tokens; the stop token counts."""

    prompt: int
    response: int
    total: int


@dataclass(frozen=True)
class TokenStore:
    """Rendered rows on disk."""

    folder: Path
    paired: bool
    data_hash: str  # sha256 of the data files' bytes
    skipped: dict[str, int]  # rows left out while rendering, by reason
    tokens: np.ndarray  # (all tokens,) int32, memory-mapped
    offsets: np.ndarray  # (S+1,) int64
    prompt_lengths: np.ndarray  # (S,) int32
    row_numbers: np.ndarray  # (N,) int64, where the row stands in the data, from 1

    @classmethod
    def open(cls, folder: Path) -> "TokenStore | None":
        """The store in `folder`, or None if there is none or it is not whole."""
        try:
            about = json.loads((folder / "store.json").read_text())
            index = dict(np.load(folder / "index.npz"))
            tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            if hash_files([folder / "tokens.bin"]) != about["tokens_hash"]:
                return None
            known = (about["paired"], about["data_hash"], about["skipped"])
            return cls(folder, *known, tokens, **index)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return None

    @cached_property
    def sequence_lengths(self) -> np.ndarray:  # (S,)
        return np.diff(self.offsets)


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
        """|y| of each sequence id (S,), the stop token counted."""
        every = self.store.sequence_lengths - self.store.prompt_lengths
        return (
            every.reshape(-1, 2)[self.rows].reshape(-1) if self.store.paired else every[self.rows]
        )

    def sequence(self, sequence_id: int) -> Sequence:
        """The sequence that packing.plan names: row for SFT, 2 * row or 2 * row + 1 for pairs."""
        row, rejected, stored = self._locate(sequence_id)
        start, end = self.store.offsets[stored : stored + 2]
        return Sequence(
            tokens=self.store.tokens[start:end],
            prompt_length=int(self.store.prompt_lengths[stored]),
            row=row,
            sign=-1 if rejected else 1,
        )

    def read_ahead(self, sequence_ids: Iterable[int]) -> None:
        """Have the kernel bring these sequences in from disk; returns at once."""
        for sequence_id in sequence_ids:
            stored = self._locate(sequence_id)[2]
            start, end = (int(offset) * 4 for offset in self.store.offsets[stored : stored + 2])
            start -= start % mmap.PAGESIZE
            self.store.tokens.base.madvise(mmap.MADV_WILLNEED, start, end - start)

    def _locate(self, sequence_id: int) -> tuple[int, int, int]:
        """-> its row, 1 if it is the rejected one, its number in the store."""
        sides = 2 if self.store.paired else 1
        row, rejected = divmod(int(sequence_id), sides)
        return row, rejected, sides * int(self.rows[row]) + rejected

    def row_number(self, row: int) -> int:
        """Where a row stands in the data, from 1."""
        return int(self.store.row_numbers[self.rows[row]])


def load_store(
    files: list[Path], chat: ChatTokenizer, paired: bool, cache: str | Path
) -> TokenStore:
    """The token store of these files, made under `cache` if it is not there yet.

    Raises UserError naming file and line for a row that cannot be trained on.
    """
    data_hash = hash_files(files)
    made_from = json.dumps([FORMAT, data_hash, chat.fingerprint, paired])
    folder = Path(cache) / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    store = TokenStore.open(folder)
    if store is None:
        aside = folder.with_name(f"{folder.name}.making-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process with the same number
        try:
            aside.mkdir(parents=True)
            _write(aside, files, chat, paired, data_hash)
            if TokenStore.open(folder) is None:  # no other process has made it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
        except OSError as error:
            raise UserError(f"--cache {cache}: cannot write there ({error})") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        store = TokenStore.open(folder)
    if store is None:
        raise UserError(f"--cache {cache}: what was written there does not read back the same")
    return store


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


def hash_files(files: list[Path]) -> str:
    """sha256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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
    first = dataset.sequence(0)
    for name, ids in (
        ("prompt", first.tokens[: first.prompt_length]),
        ("response", first.tokens[first.prompt_length :]),
    ):
        lines.append(f"  {name:<9}| {_shortened(chat.decode(ids))!r}")
    return "\n".join(lines)


QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def _lengths_by_part(dataset: Dataset) -> dict[str, np.ndarray]:
    responses = dataset.response_lengths
    prompts = dataset.lengths.reshape(-1) - responses
    if not dataset.store.paired:
        return {"prompt": prompts, "response": responses}
    return {"prompt": prompts[0::2], "chosen": responses[0::2], "rejected": responses[1::2]}


def _shortened(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


# ---------------------------------------------------------------- rows -> store


def _write(folder: Path, files: list[Path], chat: ChatTokenizer, paired: bool, data_hash: str):
    lengths, prompt_lengths, row_numbers = [], [], []
    skipped: Counter[str] = Counter()
    digest = hashlib.sha256()
    numbered = enumerate(read_rows(files), start=1)
    progress = tqdm(numbered, desc="tokenising", unit=" rows", disable=None, leave=False)
    conversations = _conversations(progress, paired, skipped)
    with open(folder / "tokens.bin", "wb") as tokens:
        while batch := list(islice(conversations, BATCH_ROWS)):
            rendered = chat.encode_rows(
                [(p, response) for _, p, responses in batch for response in responses]
            )
            for row in rendered:
                ids = np.array(row.prompt_ids + row.response_ids, dtype=np.int32).tobytes()
                tokens.write(ids)
                digest.update(ids)
                lengths.append(len(row))
                prompt_lengths.append(len(row.prompt_ids))
            row_numbers.extend(number for number, _, _ in batch)
    if not row_numbers:
        raise UserError(f"{files[0]}: no row to train on ({dict(skipped) or 'it has none'})")
    np.savez(
        folder / "index.npz",
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
        row_numbers=np.array(row_numbers, dtype=np.int64),
    )
    about = {
        "paired": paired,
        "data_hash": data_hash,
        "skipped": dict(skipped),
        "tokens_hash": digest.hexdigest(),
    }
    (folder / "store.json").write_text(json.dumps(about, indent=1))


def _conversations(
    numbered: Iterator[tuple[int, tuple[str, dict]]], paired: bool, skipped: Counter[str]
) -> Iterator[tuple[int, list[Message], list[Message]]]:
    """(row number, prompt, responses) of every row; a pair of equal ones is counted out."""
    for number, (where, row) in numbered:
        prompt = _messages(row, "prompt", where)
        responses = [_response(row, field, where) for field in RESPONSE_FIELDS[paired]]
        if paired and responses[0]["content"] == responses[1]["content"]:
            skipped["chosen equals rejected"] += 1
            continue
        yield number, prompt, responses


def _messages(row: dict[str, Any], field: str, where: str) -> list[Message]:
    """A field that holds messages, checked."""
    if field not in row:
        raise UserError(f"{where}: the field {field!r} is missing; fields seen: {sorted(row)}")
    messages = row[field]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UserError(
            f'{where}: {field!r} must be a list of {{"role": ..., "content": text}} messages with '
            f"roles among {', '.join(ROLES)}"
        )
    return messages


def _is_message(value: Any) -> bool:
    """A role goes through the template as it is, so only known ones may."""
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
        and is_encodable(value["content"])
    )


def _response(row: dict[str, Any], field: str, where: str) -> Message:
    messages = _messages(row, field, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{where}: {field!r} must be one message of the assistant's")
    if not messages[0]["content"].strip():
        raise UserError(f"{where}: {field!r} is empty; a response needs text")
    return messages[0]
