"""Rows out of data files, one at a time, each with its place; and files that are written whole.

    raw.jsonl      {"problem": "1+1", ...}          read_rows("raw.jsonl") yields
                   {"problem": "2+2", ...}              ("raw.jsonl:1", {"problem": "1+1", ...})
                                                        ("raw.jsonl:2", {"problem": "2+2", ...})

The place goes into every later error about the row. Teacher data is tens of gigabytes, so rows are
streamed: memory holds one line of a JSONL file, or one batch of a Parquet file. The exception is a
.json file that is one array: it is parsed whole, because nothing can be read from an array before
it ends; write JSON Lines instead when it does not fit. A .json file of lines streams like a .jsonl.

JSON files may be compressed, NAME.gz or NAME.zst (zstd with pyarrow); Parquet has its own.
Left out: CSV (it has no lists), and `{"data": [...]}` wrappers.
"""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from redi.config import UserError
from redi.hub import dataset_files

# A row of OpenR1-Math-Raw is up to half a megabyte of text, so a batch is at most some 30 MB.
PARQUET_BATCH_ROWS = 64

Row = dict[str, Any]


def read_rows(source: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file, a folder, a hub id or a list of them, in the files' order.

    place: "file:LINE" in a file of JSON lines, "file: row ROW" in an array or a Parquet file; both
    count from 1. Blank lines are no rows. Missing files are found before the first row is read.
    Raises UserError: a file that is missing, unreadable or without a row; a line that is not UTF-8,
    not JSON or not an object.
    """
    sources = [source] if isinstance(source, (str, Path)) else source
    return _rows([file for one in sources for file in dataset_files(one)])


def _rows(files: list[Path]) -> Iterator[tuple[str, Row]]:
    for path in files:
        empty = True
        try:
            for place, row in _reader(path):
                empty = False
                yield place, row
        except (OSError, EOFError, zlib.error) as error:  # the last two: a broken .gz
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read ({reason})") from None
        if empty:
            raise UserError(f"{path}: holds no rows")


def _reader(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if ".json" in path.suffixes and _opens_with_bracket(path):
        return _json_array(path)
    return _json_lines(path)


# ---------------------------------------------------------------- the three forms


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    # In bytes, a line ends at \n alone; decoded text would also break at a lone \r.
    with open_plain(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                place = f"{path}:{number}"
                yield place, _as_row(_parsed(line, place), place)


def _json_array(path: Path) -> Iterator[tuple[str, Row]]:
    with open_plain(path) as file:
        data = file.read()
    for number, value in enumerate(_parsed(data, str(path)), start=1):
        place = f"{path}: row {number}"
        yield place, _as_row(value, place)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Both are needed for pages to be read one by one; by default a row group is read whole.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a sound Parquet file after row {number} ({error})") from None


def open_plain(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed if its name says that it is compressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _opens_with_bracket(path: Path) -> bool:
    with open_plain(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _parsed(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))  # editors on Windows begin a file with a BOM
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if b"\n" in data.strip() else ""
        detail = f"{error.msg} at {line}column {error.colno}"
        raise UserError(f"{place}: not valid JSON ({detail})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; a number or a nesting without end
        raise UserError(f"{place}: not valid JSON in UTF-8 ({error})") from None


def _as_row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, got {json.dumps(value)[:40]}")
    return value


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold `text`: JSON may spell half of a surrogate pair, "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- files written whole


@contextlib.contextmanager
def write_aside(path: str | Path, binary: bool = False) -> Iterator[IO]:
    """A file that takes its final name only when the block ends without an exception.

    Until then it lies beside `path` as NAME.PID.part, and any exception, Ctrl-C included, removes
    it; what was under the final name stays as it was. The data is on the disk before the rename,
    so not even a power cut leaves half a file under the final name. Text is UTF-8, lines end in
    \\n.
    Raises UserError when the file cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        text = {} if binary else {"encoding": "utf-8", "newline": "\n"}
        with open(aside, "wb" if binary else "w", **text) as file:
            yield file
            to_disk(file)
        os.replace(aside, path)
    except OSError as error:
        # An error that names another file, or a closed pipe, is of something else the block does.
        elsewhere = error.filename is not None and str(error.filename) != str(aside)
        if elsewhere or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it. Raises UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror})") from None


def to_disk(file: IO) -> None:
    """Flush an open file to the disk itself, so that a power cut does not lose it."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO, wait: bool = False) -> bool:
    """Lock an open file for this process; the kernel releases it when the process ends.

    False if another process holds the lock and `wait` is off.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def hash_files(files: Iterable[Path]) -> str:
    """sha256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
