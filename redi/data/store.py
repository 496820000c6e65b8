"""Training rows -> token arrays on disk, tokenized once and then memory-mapped.

A row for SFT becomes one sequence, a pair two, the chosen one first. A store is a folder that holds
the sequences of all rows end to end:

    tokens.bin       p p p r r r r | p p p r r | ...     int32: prompt, response with its stop token
    index.npz        offsets (S+1,), prompt_lengths (S,), response_lengths (S,), row_numbers (N,)
    store.json       whether rows are pairs, skipped rows by reason, sha256 of data and tokens

Tokens between two answers are not learned from; they are stored as ~id, which is negative.

The folder's name, KEY, is a hash of the data, the tokenizer, the template and FORMAT: a change of
one makes another folder. It is written as KEY.part; a store whose sha256 is wrong is written again.
Letters: N rows, S sequences (N or 2 N), T tokens of all sequences.
"""

import fileinput
import hashlib
import json
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.files import hash_files, lock, read_rows
from redi.data.formats import FIELDS, Example, read_examples
from redi.data.tokenizer import ChatTokenizer, TokenizedRow

FORMAT = "6"  # part of KEY: raise it when the token ids or the files change
BLOCK_CHARS = 1 << 22  # takes about 160 MB while it is tokenized

NumberedExample = tuple[int, Example]  # the number is the row's position in the data, from 1


@dataclass(frozen=True)
class TokenStore:
    """Tokenized rows on disk."""

    folder: Path
    paired: bool
    data_hash: str  # sha256 of the data files' bytes
    skipped: dict[str, int]  # rows left out before tokenizing, by reason
    tokens: np.ndarray  # (T,) int32, memory-mapped; ~id where not learned from
    offsets: np.ndarray  # (S+1,) int64
    prompt_lengths: np.ndarray  # (S,) int32
    response_lengths: np.ndarray  # (S,) int32, learned tokens
    row_numbers: np.ndarray  # (N,) int64, position of the row in the data, from 1

    @classmethod
    def open(cls, folder: Path) -> "TokenStore | None":
        """The store in `folder`, or None if it is missing or damaged."""
        try:
            about = json.loads((folder / "store.json").read_text())
            index = dict(np.load(folder / "index.npz", allow_pickle=False))
            tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            if hash_files([folder / "tokens.bin"]) != about["tokens_hash"]:
                return None
            fields = {name: about[name] for name in ("paired", "data_hash", "skipped")}
            store = cls(folder, tokens=tokens, **fields, **index)
            sequences = len(store.row_numbers) * (2 if store.paired else 1)
            per_sequence = store.offsets[1:], store.prompt_lengths, store.response_lengths
            kinds = [bool, str, *[int] * len(store.skipped)]
            values = store.paired, store.data_hash, *store.skipped.values()
            is_valid = [*map(type, values)] == kinds and store.offsets[-1] == len(tokens)
            return store if is_valid and {*map(len, per_sequence)} == {sequences} else None
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, BadZipFile):
            return None

    @cached_property
    def sequence_lengths(self) -> np.ndarray:  # (S,)
        return np.diff(self.offsets)


def load_store(
    files: list[Path], chat: ChatTokenizer, paired: bool, cache: str | Path
) -> TokenStore:
    """The token store of these files; they are tokenized if `cache` has no valid store of them.
    Raises UserError: a row that cannot be trained on, no row to train on, an unwritable cache."""
    data_hash = hash_files(files)
    key = json.dumps([FORMAT, data_hash, chat.fingerprint, paired])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
    store = TokenStore.open(folder)
    if store is None:
        try:
            _write_once(folder, files, chat, paired, data_hash)
        except OSError as error:
            raise UserError(f"--cache {cache}: cannot write there ({error})") from None
        store = TokenStore.open(folder)
    if store is None:
        raise UserError(f"--cache {cache}: the tokens read back differ from those written")
    return store


def _write_once(
    folder: Path, files: list[Path], chat: ChatTokenizer, paired: bool, data_hash: str
) -> None:
    """Write the store's folder, unless another process does: then wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "ab") as lock_file:
        if not lock(lock_file):
            print(f"{folder}: another process is tokenizing; waiting", file=sys.stderr, flush=True)
            lock(lock_file, wait=True)
        if TokenStore.open(folder) is not None:  # from the process that had the lock
            return
        print(f"tokenizing {files[0]}{', ...' * (len(files) > 1)} into {folder}", flush=True)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # from a process that was killed
        part.mkdir()
        try:
            _write_store(part, files, chat, paired, data_hash)
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            part.rename(folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("while tokenizing; no tokens were kept") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write_store(
    folder: Path, files: list[Path], chat: ChatTokenizer, paired: bool, data_hash: str
) -> None:
    """Tokenize the files into an empty folder, with a progress bar."""
    skipped: Counter[str] = Counter()
    sha256 = hashlib.sha256()
    row_numbers, offsets = array("q"), array("q", [0])
    prompt_lengths, response_lengths = array("i"), array("i")
    total = None  # only lines can be counted without parsing
    if all(path.suffix == ".jsonl" for path in files):
        with fileinput.FileInput(files, mode="rb") as lines:
            total = sum(1 for _ in lines)
    rows = read_rows(files, FIELDS)
    bar = tqdm(rows, "tokenizing", total, leave=False, disable=None, unit=" rows")
    with open(folder / "tokens.bin", "wb") as file, bar as rows:
        for number, sequences in tokenize_rows(chat, read_examples(rows, paired, skipped)):
            row_numbers.append(number)
            for sequence in sequences:
                ids, learned = sequence.response_ids, sequence.learned
                if learned is not None:
                    ids = [id if is_learned else ~id for id, is_learned in zip(ids, learned)]
                tokens = array("i", sequence.prompt_ids + ids)
                file.write(tokens)
                sha256.update(tokens)
                offsets.append(offsets[-1] + len(tokens))
                prompt_lengths.append(len(sequence.prompt_ids))
                response_lengths.append(sum(learned) if learned else len(ids))
    if not row_numbers:
        raise UserError(f"{files[0]}: no row to train on ({dict(skipped)})")

    np.savez(
        folder / "index.npz",
        offsets=offsets,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        row_numbers=row_numbers,
    )
    about = {"paired": paired, "data_hash": data_hash, "skipped": skipped}
    with open(folder / "store.json", "w") as file:
        json.dump({**about, "tokens_hash": sha256.hexdigest()}, file, indent=1)


def tokenize_rows(
    chat: ChatTokenizer, examples: Iterable[NumberedExample]
) -> Iterator[tuple[int, list[TokenizedRow]]]:
    """(row number, example) -> (row number, its sequences). One call tokenizes a block of rows,
    because the tokenizer spreads the texts of a call over all cores."""
    for block in _split_blocks(examples):
        rows = iter(chat.encode_rows([(e.prompt, r) for _, e in block for r in e.responses]))
        for number, example in block:
            yield number, [next(rows) for _ in example.responses]


def _split_blocks(examples: Iterable[NumberedExample]) -> Iterator[list[NumberedExample]]:
    """Lists of rows; each ends with the row that takes it to BLOCK_CHARS characters."""
    block, chars = [], 0
    for number, example in examples:
        block.append((number, example))
        for messages in (example.prompt, *example.responses):
            chars += sum(len(message["content"]) for message in messages)
        if chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    yield block
