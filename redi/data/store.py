"""Training rows -> token arrays on disk, tokenized once and then memory-mapped.

A row becomes one sequence, a pair two, the chosen one first. A store is a folder that holds the
sequences of all rows end to end:

    tokens.bin       p p p r r r r | p p p r r | ...     int32: prompt, response with its stop token
    index.npz        the fields of TokenStore that are listed in INDEX
    store.json       kind of rows, skipped rows by reason, sha256 of the data
    sha256           of the three files

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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.files import hash_files, lock, read_rows
from redi.data.formats import FIELDS, Example, kind_of_rows, read_examples
from redi.data.tokenizer import ChatTokenizer

INDEX = {  # name -> type code of `array`
    "offsets": "q", "prompt_lengths": "i", "response_lengths": "i", "weights": "d",
    "row_numbers": "q",
}  # fmt: skip
FILES = ("tokens.bin", "index.npz", "store.json")
FORMAT = "7"  # part of KEY: raise it when the token ids or the files change
BLOCK_CHARS = 1 << 22  # takes about 160 MB while it is tokenized


@dataclass(frozen=True)
class TokenStore:
    """Tokenized rows on disk."""

    folder: Path
    kind: str  # one of FORMATS
    data_hash: str  # sha256 of the data files' bytes
    skipped: dict[str, int]  # rows left out before tokenizing, by reason
    tokens: np.ndarray  # (T,) int32, memory-mapped; ~id where not learned from
    offsets: np.ndarray  # (S+1,) int64
    prompt_lengths: np.ndarray  # (S,) int32
    response_lengths: np.ndarray  # (S,) int32, learned tokens
    weights: np.ndarray  # (S,) float64; below 0 if the response is wrong or rejected
    row_numbers: np.ndarray  # (N,) int64, position of the row in the data, from 1

    @classmethod
    def open(cls, folder: Path) -> "TokenStore | None":
        """The store in `folder`, or None if it is missing or damaged."""
        try:
            if hash_files(folder / name for name in FILES) != (folder / "sha256").read_text():
                return None
            about = json.loads((folder / "store.json").read_text())
            index = np.load(folder / "index.npz", allow_pickle=False)
            tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            return cls(folder, tokens=tokens, **about, **index)
        except (OSError, ValueError):
            return None

    @property
    def paired(self) -> bool:
        return self.kind == "pairs"

    @cached_property
    def sequence_lengths(self) -> np.ndarray:  # (S,)
        return np.diff(self.offsets)


def load_store(
    files: list[Path], chat: ChatTokenizer, kinds: Collection[str], cache: str | Path
) -> TokenStore:
    """The token store of these files, whose rows are all of one of these kinds; they are tokenized
    if `cache` has no valid store of them. Raises UserError: a row that cannot be trained on, no row
    to train on, an unwritable cache."""
    data_hash, kind = hash_files(files), kind_of_rows(files, kinds)
    key = json.dumps([FORMAT, data_hash, chat.fingerprint, kind])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
    store = TokenStore.open(folder)
    if store is None:
        try:
            _write_once(folder, files, chat, kind, data_hash)
        except OSError as error:
            raise UserError(f"--cache {cache}: cannot write there ({error})") from None
        store = TokenStore.open(folder)
    if store is None:
        raise UserError(f"--cache {cache}: the tokens written there cannot be read back")
    return store


def _write_once(
    folder: Path, files: list[Path], chat: ChatTokenizer, kind: str, data_hash: str
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
            _write_store(part, files, chat, kind, data_hash)
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            part.rename(folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("while tokenizing; no tokens were kept") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write_store(
    folder: Path, files: list[Path], chat: ChatTokenizer, kind: str, data_hash: str
) -> None:
    """Tokenize the files into an empty folder, with a progress bar."""
    skipped: Counter[str] = Counter()
    index = {name: array(code) for name, code in INDEX.items()}
    index["offsets"].append(0)
    total = None  # only lines can be counted without parsing
    if all(path.suffix == ".jsonl" for path in files):
        with fileinput.FileInput(files, mode="rb") as lines:
            total = sum(1 for _ in lines)
    rows = read_rows(files, FIELDS)
    bar = tqdm(rows, "tokenizing", total, leave=False, disable=None, unit=" rows")
    with open(folder / "tokens.bin", "wb") as file, bar as rows:
        for block in _split_blocks(read_examples(rows, kind, skipped)):
            index["row_numbers"].extend(number for number, _ in block)
            index["weights"].extend(weight for _, e in block for weight in e.weights)
            # The tokenizer spreads the texts of a call over all cores.
            responses = [(e.prompt, response) for _, e in block for response in e.responses]
            for sequence in chat.encode_rows(responses):
                ids, learned = sequence.response_ids, sequence.learned
                if learned is not None:
                    ids = [id if is_learned else ~id for id, is_learned in zip(ids, learned)]
                tokens = array("i", sequence.prompt_ids + ids)
                file.write(tokens)
                index["offsets"].append(index["offsets"][-1] + len(tokens))
                index["prompt_lengths"].append(len(sequence.prompt_ids))
                index["response_lengths"].append(sum(learned) if learned else len(ids))
    if not index["row_numbers"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(f"{files[0]}: no row to train on ({counts})")

    np.savez(folder / "index.npz", **index)
    with open(folder / "store.json", "w") as file:
        json.dump({"kind": kind, "data_hash": data_hash, "skipped": skipped}, file, indent=1)
    (folder / "sha256").write_text(hash_files(folder / name for name in FILES))


def _split_blocks(examples: Iterable[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
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
