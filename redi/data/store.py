"""Training rows -> token arrays on disk, made once and memory-mapped.

A row for SFT becomes one sequence, a pair two, the chosen one first (data/formats.py). The
`TokenStore` holds every rendered sequence end to end in one int32 file:

    tokens.bin       p p p r r r r | p p p r r | ...     p prompt, r response, ends with stop
    index.npz        offsets (S+1,), prompt_lengths (S,), response_lengths (S,), row_numbers (N,)
    store.json       what it was made from, and the rows left out by reason

response_lengths counts learned tokens. Tokens between two answers are not learned; they are stored
as ~id, which is negative, so a mask costs nothing where there is none.

The store's folder is named by a hash of the data, the tokenizer and the template, so a change of
any of them makes another one and nothing stale is ever read. It grows in KEY.making, by one
process at a time, block by block (data/blocks.py), and gets its name when it is whole. After a kill
or Ctrl-C the same command goes on behind the last whole block, and the store is the same to the
byte. Rows before are read again, which takes a fiftieth of tokenising them. A row that cannot be
trained on ends it for good: what was made goes.

Left out: limits on length (data/dataset.py).
Letters: N rows, S sequences (N or 2 N), L tokens of a sequence.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.blocks import JOURNAL, TokenWriter, tokenize_blocks
from redi.data.files import hash_files, to_disk
from redi.data.formats import read_examples
from redi.data.tokenizer import ChatTokenizer

FORMAT = "3"  # part of every key: raise it when the rendering or the layout changes


@dataclass(frozen=True)
class TokenStore:
    """Rendered rows on disk."""

    folder: Path
    paired: bool
    data_hash: str  # sha256 of the data files' bytes
    skipped: dict[str, int]  # rows left out while rendering, by reason
    tokens: np.ndarray  # (all tokens,) int32, memory-mapped; ~id where it is not learned
    offsets: np.ndarray  # (S+1,) int64
    prompt_lengths: np.ndarray  # (S,) int32
    response_lengths: np.ndarray  # (S,) int32, learned tokens
    row_numbers: np.ndarray  # (N,) int64, where the row stands in the data, from 1

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "TokenStore | None":
        """The store in `folder`, or None if there is none or it is not whole.

        verify: read all of it and compare its sha256; else its size has to fit.
        """
        try:
            about = json.loads((folder / "store.json").read_text())
            index = dict(np.load(folder / "index.npz"))
            tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            if len(tokens) != index["offsets"][-1]:
                return None
            if verify and hash_files([folder / "tokens.bin"]) != about["tokens_hash"]:
                return None
            known = (about["paired"], about["data_hash"], about["skipped"])
            return cls(folder, *known, tokens, **index)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return None

    @cached_property
    def sequence_lengths(self) -> np.ndarray:  # (S,)
        return np.diff(self.offsets)


def load_store(
    files: list[Path], chat: ChatTokenizer, paired: bool, cache: str | Path, verify: bool = True
) -> TokenStore:
    """The token store of these files, made under `cache` if it is not there yet.

    verify: compare a store that is there with its sha256, which reads all of it; one process of a
    machine is enough. Raises UserError naming file and line for a row that cannot be trained on.
    """
    data_hash = hash_files(files)
    made_from = json.dumps([FORMAT, data_hash, chat.fingerprint, paired])
    folder = Path(cache) / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    store = TokenStore.open(folder, verify)
    if store is None:
        try:
            _make(folder, files, chat, paired, data_hash)
        except OSError as error:
            raise UserError(f"--cache {cache}: cannot write there ({error})") from None
        store = TokenStore.open(folder)
    if store is None:
        raise UserError(f"--cache {cache}: what was written there does not read back the same")
    return store


# ---------------------------------------------------------------- one process makes it


def _make(folder: Path, files: list[Path], chat: ChatTokenizer, paired: bool, data_hash: str):
    """Make the store `folder`, unless another process does meanwhile."""
    aside = folder.with_name(f"{folder.name}.making")
    with _alone_in(aside):
        if TokenStore.open(folder) is not None:  # another process's
            shutil.rmtree(aside, ignore_errors=True)
            return
        try:
            about = _write(aside, files, chat, paired)
        except UserError:  # these files never make a store
            shutil.rmtree(aside, ignore_errors=True)
            raise
        with open(aside / "store.json", "w") as file:
            json.dump({"paired": paired, "data_hash": data_hash, **about}, file, indent=1)
            to_disk(file)
        shutil.rmtree(folder, ignore_errors=True)  # not whole
        aside.rename(folder)
        for name in (JOURNAL, "lock"):
            (folder / name).unlink()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone; others wait here, on all machines that
    share the disk. The kernel frees the lock of a process that was killed."""
    while (lock := _locked(folder)) is None:
        pass
    with lock:
        yield


def _locked(folder: Path) -> IO | None:
    """A locked file in the folder, or None if the folder has got its final name meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with suppress(FileNotFoundError), ExitStack() as unless_returned:
        lock = unless_returned.enter_context(open(path, "ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is making it; waiting", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            unless_returned.pop_all()
            return lock
    return None


def _write(folder: Path, files: list[Path], chat: ChatTokenizer, paired: bool) -> dict[str, Any]:
    """tokens.bin and index.npz; returns what store.json says of them."""
    skipped: Counter[str] = Counter()
    with TokenWriter(folder) as making:
        begin = making.last_row
        if begin:
            print(f"{folder}: goes on after row {begin:,}", flush=True)
        examples = (e for e in read_examples(files, paired, skipped) if e[0] > begin)
        total = _count_rows(files)
        try:
            with tqdm(
                desc="tokenising",
                unit=" rows",
                total=total,
                initial=begin,
                disable=None,
                leave=False,
            ) as bar:
                began, tokens = time.monotonic(), 0
                for block in tokenize_blocks(chat, examples):
                    making.add(block)
                    tokens += len(block.tokens) // 4
                    speed = tokens / (time.monotonic() - began)
                    bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                    bar.update(making.last_row - bar.n)
        except KeyboardInterrupt:
            where = f"while tokenising; the same command goes on after row {making.last_row:,}"
            raise KeyboardInterrupt(where) from None
        if not making.last_row:
            raise UserError(f"{files[0]}: no row to train on ({dict(skipped) or 'it has none'})")
        return {"skipped": dict(skipped), "tokens_hash": making.finish()}


def _count_rows(files: list[Path]) -> int | None:
    """For the progress bar: None where only reading the rows would tell."""
    total = 0
    for file in files:
        if file.suffix == ".jsonl":
            with open(file, "rb") as stream:
                total += sum(part.count(b"\n") for part in iter(partial(stream.read, 1 << 20), b""))
        elif file.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            with suppress(pyarrow.ArrowException):  # whoever reads it says so
                total += pyarrow.parquet.read_metadata(file).num_rows
        else:
            return None
    return total
