"""Broken rows end in a counted drop or in one line; never in a traceback.

2,000 mutated files, half of them for prepare: sound rows, and between them one that is not. It has
a value of another type anywhere in it, a field less, a lone surrogate, control characters, a
control token inside a trace, or bytes that were changed after it was written. Kept and dropped rows
must add up to what was read, and the sound rows must come out as the same bytes as without it.
Files of other kinds of breakage are in test_files.py.
"""

import copy
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from processes import main_in_this_process
from small_run import as_positive, conversation

from redi.config import UserError
from redi.data.dataset import Dataset
from redi.data.store import load_store
from redi.hub import CARD
from redi.prepare import __main__ as prepare

MANY = settings(  # 500 mutated files of each of four kinds
    max_examples=500, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def raw_row(number: int) -> dict:
    return {
        "problem": f"What is {number} + 1?", "answer": f"{number + 1}", "problem_is_valid": "Yes",
        "source": "olympiads",
        "generations": [f"<think>\n{number}\n</think>\n\\boxed{{{n}}}" for n in (0, number + 1)],
        "correctness": {
            "llama_verification": [False, True], "math_verify_reparsed_answer": [False, True],
        },
    }  # fmt: skip


def training_row(number: int, paired: bool) -> dict:
    row = conversation(number)
    return row if paired else as_positive(row)


# ---------------------------------------------------------------- mutations

ODD_TEXTS = [
    "", " ", "\x00", "\x1b[2J", "<|im_end|>", "\ud800", "\udfff\ud800", "a\u2028\r\nb", "</think>",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(ODD_TEXTS))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
)


def places(value: dict | list) -> list[tuple[dict | list, str | int]]:
    """(holder, key or index) of everything inside a row."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


@st.composite
def mutated(draw, row: dict) -> bytes:
    """A line that was a sound row."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 2))):
        found = places(row)
        if not found:
            break
        holder, last = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["value", "value", "gone", "twice", "text"]))
        if how == "gone":
            del holder[last]
        elif how == "text" and isinstance(holder[last], str):
            at = draw(st.integers(0, len(holder[last])))
            holder[last] = holder[last][:at] + draw(TEXTS) + holder[last][at:]
        elif how == "twice":
            holder[last] = [holder[last], holder[last]]
        else:
            holder[last] = draw(VALUES)
    line = json.dumps(row, ensure_ascii=draw(st.booleans()))
    return line.encode("utf-8", "surrogatepass")


@st.composite
def garbled(draw, row: dict) -> bytes:
    """A line whose bytes were changed."""
    line = bytearray(json.dumps(row, ensure_ascii=False).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(line) - 1))
        how = draw(st.sampled_from(["flip", "cut", "insert"]))
        if how == "flip":
            line[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del line[at : at + draw(st.integers(1, 30))]
        else:
            line[at:at] = draw(st.binary(max_size=6))
        if not line:
            break
    return bytes(line)


def lines_with(line: bytes, row) -> bytes:
    """Sound rows 0 and 1, the mutated one, a sound row 3."""
    sound = [json.dumps(row(number)).encode() for number in (0, 1, 3)]
    return b"\n".join([*sound[:2], line, sound[2]]) + b"\n"


def rows_in(data: bytes) -> int:
    return len([line for line in data.split(b"\n") if line.strip()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutated")


# ---------------------------------------------------------------- prepare


def prepared(folder: Path, data: bytes) -> tuple[int, str]:
    """Exit status and stderr of redi.prepare on these bytes."""
    (folder / "raw.jsonl").write_bytes(data)
    shutil.rmtree(folder / "out", ignore_errors=True)
    errors, arguments = StringIO(), (folder / "raw.jsonl", "--out", folder / "out")
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        status = main_in_this_process(prepare.main, *arguments)
    return status, errors.getvalue()


def kept_lines(folder: Path, name: str) -> list[bytes]:
    return (folder / "out" / name).read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def sound(folder) -> dict[str, list[bytes]]:
    """What prepare makes of the sound rows alone."""
    rows = b"".join(json.dumps(raw_row(number)).encode() + b"\n" for number in (0, 1, 3))
    assert prepared(folder, rows) == (0, "")
    return {name: kept_lines(folder, name) for name in ("positives.jsonl", "pairs.jsonl")}


def check_prepared(folder: Path, sound: dict[str, list[bytes]], line: bytes) -> None:
    data = lines_with(line, raw_row)
    status, errors = prepared(folder, data)
    if status:
        assert status == 2
        [error] = errors.splitlines()
        assert error.startswith("error: ")
        assert not list((folder / "out").glob("*"))
        return
    counts = json.loads((folder / "out" / CARD).read_text())
    assert counts["positives"] + sum(counts["no_positive"].values()) == counts["rows"]
    assert counts["pairs"] + sum(counts["no_pair"].values()) == counts["positives"]
    assert counts["rows"] == rows_in(data)
    for name, sound_lines in sound.items():
        kept = kept_lines(folder, name)
        assert len(kept) == counts[name.removesuffix(".jsonl")]
        assert [line for line in kept if line in sound_lines] == sound_lines


@pytest.mark.parametrize("change", [mutated, garbled])
@MANY
@given(data=st.data())
def test_prepare_counts_or_refuses_a_broken_row(folder, sound, change, data):
    check_prepared(folder, sound, data.draw(change(raw_row(2))))


@pytest.mark.parametrize(
    "text", ["x" * 10_000_000, "\\boxed{" * 100_000, "(" * 1_000_000, "\x00" * 1_000_000]
)
def test_a_row_of_megabytes_is_a_row(folder, sound, text):
    row = raw_row(2)
    row["generations"][1] = text
    check_prepared(folder, sound, json.dumps(row).encode())
    assert len(kept_lines(folder, "positives.jsonl")) == 4


# ---------------------------------------------------------------- the trainers' rows


@pytest.fixture(scope="module")
def chat(tmp_path_factory, make_chat):
    return make_chat(tmp_path_factory.mktemp("tokenizer"))


def loaded(folder: Path, data: bytes, chat, paired: bool) -> dict[int, list[list[int]]] | None:
    """Row number -> the tokens of its sides; None if the file was refused, in one line."""
    path, cache = folder / "rows.jsonl", folder / "tokens"
    path.write_bytes(data)
    shutil.rmtree(cache, ignore_errors=True)
    try:
        with redirect_stderr(StringIO()):
            store = load_store([path], chat, paired, cache)
    except UserError as error:
        message = str(error)
    else:
        dataset, sides = Dataset(store, np.arange(len(store.row_numbers)), {}), 1 + paired
        assert len(dataset) + sum(store.skipped.values()) == rows_in(data)
        return {
            number: [dataset.sequence(sides * row + side).tokens.tolist() for side in range(sides)]
            for row, number in enumerate(store.row_numbers.tolist())
        }
    assert "\n" not in message
    assert not [made for made in cache.glob("*") if made.name.isalnum()]  # no store
    return None


@pytest.mark.parametrize("change", [mutated, garbled])
@MANY
@given(data=st.data(), paired=st.booleans())
def test_training_counts_or_refuses_a_broken_row(folder, chat, change, data, paired):
    line = data.draw(change(training_row(2, paired)))
    assume(b"\n" not in line)
    content = lines_with(line, lambda number: training_row(number, paired))
    found = loaded(folder, content, chat, paired)
    if found is None:
        return
    for number, position in ((0, 1), (1, 2), (3, rows_in(content))):
        row = training_row(number, paired)
        rows = chat.encode_rows([(row["prompt"], row[side]) for side in row if side != "prompt"])
        assert found[position] == [r.prompt_ids + r.response_ids for r in rows]
