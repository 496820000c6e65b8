"""Completions of another program: what is read, and the checks of it."""

import pytest
from small_run import write_jsonl

from redi.config import UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.external import read_completions

ONE = [Benchmark("b", [Problem("x", "1+1?", ["2"]), Problem("7", "2+2?", ["4"])])]
BOTH = [*ONE, Benchmark("c", [Problem("x", "3+3?", ["6"])])]


@pytest.fixture
def read(tmp_path):
    def read(*rows: dict, benchmarks=ONE):
        return read_completions(write_jsonl(tmp_path / "made.jsonl", list(rows)), benchmarks)

    return read


def row(id="x", sample=0, text="</think> 2", **more) -> dict:
    return {"id": id, "sample": sample, "text": text, **more}


def test_rows_in_any_order_become_completions_in_order(read):
    rows = row("7", 1), row(7, 0, finish_reason="length"), row("x", 1, num_tokens=5), row()
    samples, found = read(*rows)
    assert samples == 2
    assert [c.key for c in found["b"]] == [("x", 0), ("x", 1), ("7", 0), ("7", 1)]
    assert [c.finish_reason for c in found["b"]] == ["stop", "stop", "length", "stop"]
    assert [c.num_tokens for c in found["b"]] == [None, 5, None, None]


def test_the_finish_reasons_of_other_programs_are_known(read):
    words = ["stop", "STOP", "end_turn", "eos_token", "length", "MAX_TOKENS", "max_tokens", "limit"]
    rows = [row(id, s, finish_reason=w) for id in ("x", "7") for s, w in enumerate(words)]
    _, found = read(*rows)
    assert [c.finish_reason for c in found["b"][:8]] == ["stop"] * 4 + ["length"] * 4


THREE = [row(benchmark="b"), row("7", benchmark="b"), row(benchmark="c")]


def test_each_row_names_its_benchmark_if_there_are_several(read):
    _, found = read(*THREE, benchmarks=BOTH)
    assert [len(found[name]) for name in ("b", "c")] == [2, 1]
    for rows, message in (
        ([row()], r"made\.jsonl:1: field 'benchmark': expected b or c, got nothing"),
        ([row(benchmark="d")], r"field 'benchmark': expected b or c, got 'd'"),
        ([row(benchmark=["b"])], r"field 'benchmark': expected b or c, got \['b'\]"),
        ([*THREE, row(sample=1, benchmark="c")], r"each benchmark, got {'b': 1, 'c': 2}"),
    ):
        with pytest.raises(UserError, match=message):
            read(*rows, benchmarks=BOTH)


MANY = [row(id, sample) for id in ("x", "7") for sample in range(16)]
BROKEN = [  # rows, the one line of the error
    (
        [row(), row("7"), row()],
        r"made\.jsonl:3: field 'sample': expected a number .*, got 0$",
    ),
    ([row()], r"made\.jsonl: b: problem '7' has 0 samples, expected 0 to 0, .* unexpected: 0$"),
    (
        [row(sample=10**9), row("7")],
        r"problem 'x' has 1 samples, expected 0 to 0, .* unexpected: 0$",
    ),
    (MANY[:18], "problem '7' has 2 samples, expected 0 to 15, once each; .* unexpected: 2$"),
    ([row("9")], r"made\.jsonl:1: field 'id': expected a problem of b, got '9'"),
    ([{"id": "x", "sample": 0}], r"made\.jsonl:1: field 'text': expected .*, got nothing"),
    ([row(text=None)], r"field 'text'"),
    ([row(text="\ud800")], r"field 'text'"),
    ([row(sample=-1)], r"field 'sample': expected a whole number from 0, got -1"),
    ([row(sample="0")], r"field 'sample'"),
    ([row(sample=True)], r"field 'sample'"),
    ([row(id=1.5)], r"field 'id'"),
    ([row(finish_reason=3)], r"field 'finish_reason'"),
    ([row(finish_reason="abort")], r"'finish_reason': expected one of stop, .*length.*got 'abort'"),
    ([row(finish_reason="\ud800")], r"field 'finish_reason': .* got '\\ud800'"),
    ([row("\ud800")], r"field 'id': expected a problem of b, got '\\ud800'"),
    ([row(num_tokens="3")], r"field 'num_tokens'"),
    ([row(num_tokens=-5)], r"field 'num_tokens': expected a whole number from 0 .*, got -5"),
    ([row(num_tokens=10**400)], r"field 'num_tokens': expected .*, got 10000"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(read, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read(*rows)
    assert "\n" not in str(caught.value)
