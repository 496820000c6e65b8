"""Rows from data files, one at a time; files that are written completely or not at all.

    raw.jsonl      {"problem": "1+1", ...}          read_rows("raw.jsonl") yields
                   {"problem": "2+2", ...}              ("raw.jsonl:1", {"problem": "1+1", ...})
                                                        ("raw.jsonl:2", {"problem": "2+2", ...})

Every later error about a row begins with the first item. Teachers' data is tens of gigabytes, so
memory holds one line or one batch of a Parquet file; only an array in a .json file is read as a
whole. JSON may be compressed (.gz, .zst). Left out: CSV (it has no lists).
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from redi.config import UserError
from redi.hub import dataset_files

# A row of OpenR1-Math-Raw has up to half a megabyte of text, so a batch has at most 30 MB or so.
PARQUET_BATCH_ROWS = 64
BOM = b"\xef\xbb\xbf"  # editors on Windows begin a file with it

Row = dict[str, Any]


def read_rows(
    source: str | Path | Sequence[str | Path], fields: Collection[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file, a folder, a hub id or a list of them, in their order.

    fields: the columns of a Parquet file to read (default: all). Python may not be able to hold the
    others, such as a date after the year 9999; their value is `...`, so errors can still list them.
    where: "FILE:LINE" in JSON lines, "FILE: row ROW" in an array or a Parquet file; both from 1.
    Blank lines are skipped. Raises UserError: a file that is missing (before the first row of any
    file), unreadable or without a row; a line that is not UTF-8, not JSON or not an object."""
    sources = [source] if isinstance(source, (str, Path)) else source
    for path in [file for one in sources for file in dataset_files(one)]:
        parquet = path.suffix == ".parquet"
        empty = True
        try:
            for where, row in _read_parquet(path, fields) if parquet else _read_json(path):
                empty = False
                yield where, row
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if empty:
            raise UserError(f"{path}: holds no rows")


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """One row per line or, in a .json file, one array of rows."""
    with _open_decompressed(path) as file:
        # In bytes, a line ends at \n alone; decoded text would also break at a lone \r.
        numbered = enumerate(file, 1)
        lines = ((n, line) for n, line in numbered if line.removeprefix(BOM).strip())
        first, start = next(lines, (1, b""))
        if ".json" in path.suffixes and start.removeprefix(BOM).lstrip().startswith(b"["):
            array = _parse(b"\n" * (first - 1) + start + file.read(), str(path))
            values = ((f"{path}: row {number}", value) for number, value in enumerate(array, 1))
        else:
            lines = chain([(first, start)] if start else [], lines)
            values = ((f"{path}:{n}", _parse(line, f"{path}:{n}")) for n, line in lines)
        for where, value in values:
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected a JSON object, got {json.dumps(value)[:40]}")
            yield where, value


def _read_parquet(path: Path, fields: Collection[str] | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # With these two, pages are read one by one; by default a whole row group is read.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            columns = None if fields is None else [name for name in names if name in fields]
            batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}: row {number}", dict.fromkeys(names, ...) | row
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path}: unreadable Parquet file after row {number} ({error})") from None


def _open_decompressed(path: Path) -> io.BufferedReader:
    if path.suffix in (".gz", ".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path)))  # decompressed, by its suffix
    return open(path, "rb")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(BOM).decode())
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if b"\n" in data.strip() else ""
        detail = f"{error.msg} at {line}column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({detail})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; too many digits; too deeply nested
        raise UserError(f"{where}: not valid JSON in UTF-8 ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold `text`. JSON can spell half of a surrogate pair, "\\ud800"."""
    return re.search("[\ud800-\udfff]", text) is None


@contextlib.contextmanager
def write_aside(path: str | Path, binary: bool = False) -> Iterator[IO]:
    """A file that gets its name `path` only if the block ends without an exception. Until then it
    is NAME.PID.part, which any exception, Ctrl-C included, removes; an older file stays. The data
    reaches the disk before the rename, so not even a power cut leaves half a file. Text is UTF-8
    with \\n at line ends. Raises UserError if the file cannot be written."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        text = {} if binary else {"encoding": "utf-8", "newline": "\n"}
        with open(part, "wb" if binary else "w", **text) as file:
            yield file
            to_disk(file)
        os.replace(part, path)
    except OSError as error:
        # Errors of another file or a closed pipe come from something else that the block does.
        other_file = error.filename is not None and str(error.filename) != str(part)
        if other_file or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def refuse_overwriting(flag: str, out: str | Path | None, inputs: Iterable[str | Path]) -> None:
    """Raise UserError if the output `out` of a flag is one of `inputs`."""
    for path in inputs if out is not None else ():
        if os.path.realpath(path) == os.path.realpath(out):
            raise UserError(f"--{flag} {out}: would overwrite {path}; choose another file")


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that a process appends to, without a last line that a kill cut short."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def make_folder(path: str | Path) -> None:
    """Make a folder and its parents. Raises UserError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror})") from None


def to_disk(file: IO) -> None:
    """Flush an open file to the disk itself, so that it survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Flush the folder's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO, wait: bool = False) -> bool:
    """Lock an open file until the process ends. False if another one holds it and `wait` is off."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 of the bytes of all files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds the file's bytes to the digest
    return digest.hexdigest()
