"""redi/data/files.py: every row once with its place, little memory, no half-written file."""

import errno
import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import refusal

from redi.data.files import PARQUET_BATCH_ROWS, read_rows, write_aside

ROWS = [{"n": 1, "text": "a\u2028b\r c"}, {"n": 2, "text": "é\n"}, {"n": 3, "text": ""}]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_all(source) -> list:
    return list(read_rows(source))


# ---------------------------------------------------------------- forms


def test_jsonl_rows_carry_their_line_and_blank_lines_are_no_rows(tmp_path):
    first, second, third = json_lines(ROWS).split("\n")[:3]
    path = write(tmp_path / "raw.jsonl", f"{first}\n\n{second}\n   \n{third}")
    assert read_all(path) == [(f"{path}:{line}", row) for line, row in zip((1, 3, 5), ROWS)]


@pytest.mark.parametrize("lead", ["", "\ufeff", "\n \t", "\ufeff\n" + " \n" * 5000])
def test_a_json_file_is_an_array_or_lines(tmp_path, lead):
    array = write(tmp_path / "array.json", lead + json.dumps(ROWS, indent=2))
    lines = write(tmp_path / "lines.json", lead + json_lines(ROWS))
    assert read_all(array) == [(f"{array}: row {i}", r) for i, r in enumerate(ROWS, 1)]
    assert [row for _, row in read_rows(lines)] == ROWS


def test_parquet_gives_the_rows_of_all_batches_and_row_groups(tmp_path):
    rows = [{"n": i, "lists": {"x": [True, None]}} for i in range(3 * PARQUET_BATCH_ROWS + 1)]
    path = tmp_path / "raw.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=PARQUET_BATCH_ROWS + 7)
    assert read_all(path) == [(f"{path}: row {i}", r) for i, r in enumerate(rows, 1)]


def test_a_parquet_column_that_no_program_reads_is_named_and_not_read(tmp_path):
    path = tmp_path / "raw.parquet"
    columns = {"n": [1, 2], "year 275760": pa.array([10**8, None], pa.date32())}
    pq.write_table(pa.table(columns), path)
    rows = [row for _, row in read_rows(path, ["n"])]
    assert rows == [{"n": n, "year 275760": ...} for n in (1, 2)]
    assert [list(row) for _, row in read_rows(path, ["m"])] == [list(columns)] * 2
    message = refusal(read_all, path)
    assert message.startswith(f"{path}: unreadable Parquet file after row 0 (date value out")


def test_a_folder_gives_its_files_in_name_order_and_a_list_in_its_own(tmp_path):
    b = write(tmp_path / "b.jsonl", '{"n": 2}\n')
    a = write(tmp_path / "a.json", '[{"n": 1}]')
    write(tmp_path / "notes.txt", "not data")
    assert [row["n"] for _, row in read_rows(tmp_path)] == [1, 2]
    assert [row["n"] for _, row in read_rows([b, str(a), b])] == [2, 1, 2]


# ---------------------------------------------------------------- errors


def parquet(values: list, **layout) -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": values}), file, **layout)
    return file.getvalue().to_pybytes()


def damage_the_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + b"\xff" * 64 + data[middle + 64 :]


PAGES = {"compression": "gzip", "use_dictionary": False, "row_group_size": 500}
LONG = parquet([f"{i:0100}" for i in range(1000)], **PAGES)
BROKEN = [  # file, content, what the error begins with
    ("cut.jsonl", '{"n": 1}\n{"n": ', ":2: not valid JSON (Expecting value"),
    ("latin.jsonl", b'{"n": 1}\n\n{"t": "\xe9"}\n', ":3: not valid JSON in UTF-8"),
    ("list.jsonl", '{"n": 1}\n[1, 2]\n', ":2: expected a JSON object, got [1, 2]"),
    ("long.jsonl", "9" * 5000 + "\n", ":1: not valid JSON in UTF-8"),
    ("deep.jsonl", "[" * 200_000 + "\n", ":1: not valid JSON in UTF-8"),
    ("cut.json", '[\n{"n": 1},\n{"n"', ": not valid JSON (Expecting ':' delimiter at l"),
    ("mixed.json", '[{"n": 1}, "x"]', ': row 2: expected a JSON object, got "x"'),
    ("empty.jsonl", "", ": holds no rows"),
    ("blank.jsonl", "\n\n", ": holds no rows"),
    ("none.json", "[]", ": holds no rows"),
    ("none.parquet", parquet([]), ": holds no rows"),
    ("false.parquet", "PAR1 it says", ": unreadable Parquet file after row 0"),
    ("damaged.parquet", damage_the_middle(LONG), ": cannot be read (GZipCodec failed"),
    ("table.csv", "n\n1\n", ": expected a .parquet, .jsonl or .json file"),
    ("gone.jsonl", None, ": no such file or folder"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_an_error_names_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    assert refusal(read_all, path).startswith(f"{path}{message}")


def test_a_missing_file_of_a_list_is_found_before_the_first_row(tmp_path):
    there = write(tmp_path / "a.jsonl", '{"n": 1}\n')
    message = refusal(next, read_rows([there, tmp_path / "b.jsonl"]))
    assert message.startswith(f"{tmp_path}/b.jsonl: no such file")


# ---------------------------------------------------------------- memory


@contextmanager
def traced() -> Iterator[list[int]]:
    """A list that gets the peak of Python's memory in the block."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_reading_60_mb_of_json_lines_holds_a_few_lines(tmp_path):
    path = tmp_path / "raw.jsonl"
    line = json.dumps({"text": "x" * 20_000}) + "\n"
    path.write_text(line * 3000)
    with traced() as peak:
        assert sum(len(row["text"]) for _, row in read_rows(path)) == 60_000_000
    assert peak[0] < 1_000_000


def test_reading_60_mb_of_parquet_holds_a_few_batches(tmp_path):
    path = tmp_path / "raw.parquet"
    texts = pa.array([os.urandom(10_000).hex() for _ in range(3000)])  # 20 kB each
    # One row group, of pages of about a megabyte.
    layout = {"compression": "none", "use_dictionary": False, "write_batch_size": 64}
    pq.write_table(pa.table({"text": texts}), path, **layout)
    assert pq.ParquetFile(path).num_row_groups == 1
    del texts
    before, arrow_peak, characters = pa.total_allocated_bytes(), 0, 0
    with traced() as peak:
        for _, row in read_rows(path):
            characters += len(row["text"])
            arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - before)
    assert characters == 60_000_000
    assert peak[0] < 8_000_000
    assert arrow_peak < 16_000_000


# ---------------------------------------------------------------- write_aside


def write_half(path, error):
    with write_aside(path) as file:
        file.write("half")
        if error:
            raise error


def test_a_file_appears_whole_and_only_when_the_block_ends(tmp_path):
    path = tmp_path / "out.jsonl"
    with write_aside(path) as file:
        file.write("é\n")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path, raised):
    path = write(tmp_path / "out.jsonl", "before\n")
    with pytest.raises(raised):
        write_half(path, raised())
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "file", "")
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "gone" / "x", tmp_path / "taken"):
        message = refusal(write_half, path, None)
        assert message.startswith(f"{path}: cannot be written (")
    full = OSError(errno.ENOSPC, "No space left on device")
    message = refusal(write_half, tmp_path / "out.jsonl", full)
    assert message == f"{tmp_path}/out.jsonl: cannot be written (No space left on device)"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize("raised", [FileNotFoundError(2, "gone", "other"), BrokenPipeError()])
def test_an_error_of_something_else_is_not_blamed_on_the_file(tmp_path, raised):
    with pytest.raises(type(raised)):
        write_half(tmp_path / "out.jsonl", raised)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- compressed


def compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    return path


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_rows_are_those_of_the_plain_file(suffix, tmp_path):
    lines = b"".join(json.dumps({"a": "x" * n}).encode() + b"\n" for n in range(3000))
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(lines)
    packed = compressed(tmp_path / f"packed.jsonl.{suffix}", lines)
    expected = [(place.replace(str(plain), str(packed)), row) for place, row in read_rows(plain)]
    assert read_all(packed) == expected
    array = compressed(tmp_path / f"array.json.{suffix}", b' [{"a": 1}, {"a": 2}]')
    assert [row for _, row in read_rows(array)] == [{"a": 1}, {"a": 2}]
    empty = compressed(tmp_path / f"empty.jsonl.{suffix}", b"")
    assert "holds no rows" in refusal(read_all, empty)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("broken", [lambda d: d[: len(d) // 2], lambda d: b"plain" + d])
def test_a_broken_compressed_file_is_one_line(suffix, broken, tmp_path):
    packed = compressed(tmp_path / f"x.jsonl.{suffix}", b'{"a": 1}\n' * 10_000)
    packed.write_bytes(broken(packed.read_bytes()))
    assert refusal(read_all, packed).startswith(f"{packed}: cannot be read")
