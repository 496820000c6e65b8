"""Rows -> blocks of tokens, on all cores; and the folder that grows by them.

    1. rows are read and cut into blocks of a megabyte of text
    2. threads render and convert a few blocks at once; inside a block the tokenizer's own threads,
       which need no interpreter, share out the texts
    3. blocks are written in the order of the rows: tokens, then a line of the journal

A line is the SHA-256 of its rest and the block's tokens, then the block's index:

    5d41402a... {"row_numbers":[1],"lengths":[7],"prompt_lengths":[3],"response_lengths":[4]}

So a block counts if its line holds, whatever a crash left behind it. Memory holds the blocks at
work and the index, 32 bytes a sequence. Left out: worker processes. Tokenising is nine tenths of
the work and runs outside the interpreter; threads start at once, which small data notices.
"""

import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redi.data.files import to_disk
from redi.data.formats import Example
from redi.data.tokenizer import ChatTokenizer, Rendered

JOURNAL = "journal"
BLOCK_CHARS = 1 << 20  # some 40 MB while it is tokenised
THREADS = 3 + (os.cpu_count() or 1) // 8  # blocks at once
IN_FLIGHT_CHARS = (THREADS + 1) * BLOCK_CHARS  # or one row, if it is longer

Numbered = tuple[int, Example]  # where the row stands in the data, from 1


# ---------------------------------------------------------------- rows -> blocks of tokens

INDEX = ("row_numbers", "lengths", "prompt_lengths", "response_lengths")


@dataclass(frozen=True)
class Block:
    """Some rows, tokenised."""

    index: dict[str, list[int]]  # what INDEX names: of each row, then of each sequence
    tokens: bytes  # int32
    journal: bytes  # its line


def tokenize_blocks(chat: ChatTokenizer, examples: Iterable[Numbered]) -> Iterator[Block]:
    """Blocks, in the order of the rows; a few are worked on at once."""
    free = IN_FLIGHT_CHARS
    ahead: deque = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for chars, rows in _cut(examples):
            while ahead and free < chars:
                released, block = ahead.popleft()
                yield block.result()
                free += released
            ahead.append((chars, pool.submit(_tokenise, chat, rows)))
            free -= chars
        while ahead:
            yield ahead.popleft()[1].result()


def _cut(examples: Iterable[Numbered]) -> Iterator[tuple[int, list[Numbered]]]:
    """(characters, rows): a block is full with the row that takes it over BLOCK_CHARS."""
    chars, rows = 0, []
    for number, example in examples:
        rows.append((number, example))
        for messages in (example.prompt, *example.responses):
            chars += sum(len(message["content"]) for message in messages)
        if chars >= BLOCK_CHARS:
            yield chars, rows
            chars, rows = 0, []
    if rows:
        yield chars, rows


def _tokenise(chat: ChatTokenizer, rows: list[Numbered]) -> Block:
    rendered = chat.encode_rows([(e.prompt, response) for _, e in rows for response in e.responses])
    index = {
        "row_numbers": [number for number, _ in rows],
        "lengths": [len(row) for row in rendered],
        "prompt_lengths": [len(row.prompt_ids) for row in rendered],
        "response_lengths": [
            len(row.response_ids) if row.learned is None else sum(row.learned) for row in rendered
        ],
    }
    tokens = b"".join(_as_bytes(row) for row in rendered)
    text = json.dumps(index, separators=(",", ":")).encode()
    return Block(index, tokens, _sha256(text, tokens) + b" " + text + b"\n")


def _as_bytes(row: Rendered) -> bytes:
    ids = array("i", row.prompt_ids)
    if row.learned is None:
        ids.extend(row.response_ids)
    else:
        ids.extend(t if learned else ~t for t, learned in zip(row.response_ids, row.learned))
    return ids.tobytes()


def _sha256(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


# ---------------------------------------------------------------- blocks -> store


class TokenWriter:
    """A store's folder while it grows, from the blocks that are whole in it already."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = {name: array("q") for name in INDEX}
        self.sha256 = hashlib.sha256()  # of all tokens
        with ExitStack() as files:
            self.tokens, self.journal = (
                files.enter_context(open(folder / name, "a+b")) for name in ("tokens.bin", JOURNAL)
            )
            self._read_back()
            self._files = files.pop_all()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    @property
    def last_row(self) -> int:
        """Its number, 0 if there is none."""
        return self.index["row_numbers"][-1] if self.index["row_numbers"] else 0

    def add(self, block: Block) -> None:
        self._count(block.index, block.tokens)
        self.tokens.write(block.tokens)
        to_disk(self.tokens)
        self.journal.write(block.journal)
        to_disk(self.journal)

    def finish(self) -> str:
        """Write index.npz; the sha256 of tokens.bin."""
        with open(self.folder / "index.npz", "wb") as file:
            np.savez(
                file,
                offsets=np.concatenate([[0], np.cumsum(self.index["lengths"], dtype=np.int64)]),
                prompt_lengths=np.array(self.index["prompt_lengths"], dtype=np.int32),
                response_lengths=np.array(self.index["response_lengths"], dtype=np.int32),
                row_numbers=np.array(self.index["row_numbers"], dtype=np.int64),
            )
            to_disk(file)
        return self.sha256.hexdigest()

    def _count(self, index: dict[str, list[int]], tokens: bytes) -> None:
        for name in INDEX:
            self.index[name].extend(index[name])
        self.sha256.update(tokens)

    def _read_back(self) -> None:
        """Count the whole blocks, and cut off what stands behind them."""
        ends = [0, 0]
        self.tokens.seek(0)
        self.journal.seek(0)
        for line in self.journal:
            claimed, _, text = line.rstrip(b"\n").partition(b" ")
            try:
                index = json.loads(text)
                tokens = self.tokens.read(4 * sum(index["lengths"]))
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n") or _sha256(text, tokens) != claimed:
                break
            self._count(index, tokens)
            ends[0] += len(tokens)
            ends[1] += len(line)
        self.tokens.truncate(ends[0])
        self.journal.truncate(ends[1])
