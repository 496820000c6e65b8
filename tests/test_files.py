"""redi/data/files.py: every row once with its place, little memory, no half-written file."""

import errno
import gzip
import json
import os
import tracemalloc
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import refusal

from redi.data.files import PARQUET_BATCH_ROWS, read_rows, write_aside

ROWS = [{"n": 1, "text": "a\u2028b\r c"}, {"n": 2, "text": "é\n"}, {"n": 3, "text": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


COMPRESSED = {
    "": bytes, ".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True),
}  # fmt: skip


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_all(source) -> list:
    return list(read_rows(source))


# ---------------------------------------------------------------- forms


def test_jsonl_rows_carry_their_line_and_blank_lines_are_no_rows(tmp_path):
    first, second, third = LINES.split("\n")[:3]
    path = write(tmp_path / "raw.jsonl", f"{first}\n\n{second}\n   \n{third}")
    assert read_all(path) == [(f"{path}:{line}", row) for line, row in zip((1, 3, 5), ROWS)]


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("lead", ["", "\ufeff", "\n \t", "\ufeff\n" + " \n" * 5000])
def test_a_json_file_is_an_array_or_lines_and_may_be_compressed(tmp_path, lead, suffix):
    def saved(name: str, text: str) -> Path:
        return write(tmp_path / f"{name}{suffix}", COMPRESSED[suffix]((lead + text).encode()))

    array = saved("array.json", json.dumps(ROWS, indent=2))
    assert read_all(array) == [(f"{array}: row {i}", r) for i, r in enumerate(ROWS, 1)]
    for path in (saved("lines.json", LINES * 1000), saved("lines.jsonl", LINES * 1000)):
        numbers = range(1 + lead.count("\n"), 10**6)
        assert read_all(path) == [(f"{path}:{n}", r) for n, r in zip(numbers, ROWS * 1000)]


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
    # A missing file is found before the first row.
    assert "gone.jsonl: no such file" in refusal(next, read_rows([a, tmp_path / "gone.jsonl"]))


# ---------------------------------------------------------------- errors


def parquet(values: list, **layout) -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": values}), file, **layout)
    return file.getvalue().to_pybytes()


def damage_the_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + b"\xff" * 64 + data[middle + 64 :]


LONG = parquet(
    [f"{i:0100}" for i in range(1000)],
    compression="gzip", use_dictionary=False, row_group_size=500,
)  # fmt: skip
GZIP, ZSTD = (COMPRESSED[suffix](b'{"a": 1}\n' * 10_000) for suffix in (".gz", ".zst"))
BROKEN = [  # file, content, what the error begins with
    ("cut.jsonl", '{"n": 1}\n{"n": ', ":2: not valid JSON (Expecting value"),
    ("latin.jsonl", b'{"n": 1}\n\n{"t": "\xe9"}\n', ":3: not valid JSON in UTF-8"),
    ("list.jsonl", '{"n": 1}\n[1, 2]\n', ":2: expected a JSON object, got [1, 2]"),
    ("long.jsonl", "9" * 5000 + "\n", ":1: not valid JSON in UTF-8"),
    ("deep.jsonl", "[" * 200_000 + "\n", ":1: not valid JSON in UTF-8"),
    ("cut.json", '[\n{"n": 1},\n{"n"', ": not valid JSON (Expecting ':' delimiter at l"),
    ("mixed.json", '[{"n": 1}, "x"]', ': row 2: expected a JSON object, got "x"'),
    ("empty.jsonl", "", ": holds no rows"),
    ("empty.jsonl.gz", gzip.compress(b""), ": holds no rows"),
    ("blank.jsonl", "\n\n", ": holds no rows"),
    ("none.json", "[]", ": holds no rows"),
    ("none.parquet", parquet([]), ": holds no rows"),
    ("false.parquet", "PAR1 it says", ": unreadable Parquet file after row 0"),
    ("damaged.parquet", damage_the_middle(LONG), ": cannot be read (GZipCodec failed"),
    ("half.jsonl.gz", GZIP[: len(GZIP) // 2], ": cannot be read"),
    ("half.jsonl.zst", ZSTD[: len(ZSTD) // 2], ": cannot be read"),
    ("plain.jsonl.gz", b"plain" + GZIP, ": cannot be read"),
    ("plain.jsonl.zst", b"plain" + ZSTD, ": cannot be read"),
    ("table.csv", "n\n1\n", ": expected a .parquet, .jsonl or .json file"),
    ("gone.jsonl", None, ": no such file or folder"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_an_error_names_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    assert refusal(read_all, path).startswith(f"{path}{message}")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "most", "most_in_arrow"),
    [("raw.jsonl", 1_000_000, 0), ("raw.parquet", 8_000_000, 16_000_000)],
)
def test_reading_60_mb_holds_a_few_lines_or_batches(tmp_path, name, most, most_in_arrow):
    path, rows = tmp_path / name, ({"text": os.urandom(10_000).hex()} for _ in range(3000))
    if name == "raw.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:  # one row group, of pages of about a megabyte
        layout = {"compression": "none", "use_dictionary": False, "write_batch_size": 64}
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **layout)
        assert pq.ParquetFile(path).num_row_groups == 1
    before, in_arrow, characters = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        for _, row in read_rows(path):
            characters += len(row["text"])
            in_arrow = max(in_arrow, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert characters == 60_000_000
    assert peak < most
    assert in_arrow <= most_in_arrow


# ---------------------------------------------------------------- write_aside


def write_half(path: Path, error: BaseException | None) -> None:
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


@pytest.mark.parametrize(
    "error",
    [
        ValueError(), KeyboardInterrupt(), SystemExit(),
        FileNotFoundError(2, "gone", "other"), BrokenPipeError(),  # not this file's
    ],
)  # fmt: skip
def test_an_exception_is_raised_as_it_is_and_leaves_what_was_there(tmp_path, error):
    path = write(tmp_path / "out.jsonl", "before\n")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "file", "")
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "gone" / "x", tmp_path / "taken"):
        assert refusal(write_half, path, None).startswith(f"{path}: cannot be written (")
    full = OSError(errno.ENOSPC, "No space left on device")
    message = refusal(write_half, tmp_path / "out.jsonl", full)
    assert message == f"{tmp_path}/out.jsonl: cannot be written (No space left on device)"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "taken"]
