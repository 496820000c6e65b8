"""Completions on disk: appended as they come, read back after a kill, put in order at the end."""

import json
import resource

import pytest

from redi.config import RankError, UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    Store,
    completions_file,
    read_lines,
    store_inputs,
    stored_benchmarks,
    to_line,
    write_lines,
)

BENCHMARK = Benchmark(
    "b", [Problem("x", "1+1?", ["2"], "Algebra", 2.5), Problem("y", "2+2?", ["4"])]
)


def completion(id="x", sample=0, text="…", num_tokens=3) -> Completion:
    return Completion(id=id, sample=sample, text=text, num_tokens=num_tokens, finish_reason="stop")


ALL = [completion("y", 1), completion("x", 1), completion("y", 0), completion("x", 0)]


def unfinished(out, rank=0):
    return out / "completions" / f"b.unfinished-{rank}.jsonl"


def stored(out, rank=0, completions=()) -> Store:
    store = Store(out, BENCHMARK, samples=2, rank=rank)
    for c in completions:
        store.append(c)
    return store


def assert_finished(out) -> None:
    found = list(read_lines(completions_file(out, "b"), Completion))
    assert [c.key for c in found] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert [p.name for p in (out / "completions").iterdir()] == ["b.jsonl"]


def test_completions_of_all_ranks_end_in_the_order_of_problems_and_samples(tmp_path):
    stored(tmp_path, 0, ALL[:1])
    assert list(read_lines(unfinished(tmp_path), Completion)) == ALL[:1]  # when append returns
    with pytest.raises(UserError, match=r"3 of 4 completions are missing; .* an --out that all"):
        stored(tmp_path).finish()
    stored(tmp_path, 1, ALL[1:])
    left = unfinished(tmp_path, 1).read_bytes()
    everything = stored(tmp_path)
    assert everything.done == {c.key for c in ALL}
    everything.finish()
    assert_finished(tmp_path)
    unfinished(tmp_path, 1).write_bytes(left)  # a kill just before it was deleted
    again = stored(tmp_path)
    assert len(again.done) == 4
    again.finish()
    assert_finished(tmp_path)


@pytest.mark.parametrize("cut", range(1, 80))
def test_a_line_cut_short_anywhere_is_sampled_again(tmp_path, cut):
    """A kill within a write: `cut` bytes of the second line are there, or all but its end."""
    write_lines(unfinished(tmp_path), ALL[:2])
    first, second = unfinished(tmp_path).read_bytes().splitlines(keepends=True)
    unfinished(tmp_path).write_bytes(first + second[: min(cut, len(second) - 1)])
    store = stored(tmp_path)
    assert store.done == {("y", 1)}
    for c in ALL[1:]:
        store.append(c)
    store.finish()
    assert_finished(tmp_path)


def test_a_completion_survives_its_line(tmp_path):
    original = completion(text='a\n"b" π \u2028', num_tokens=None)
    write_lines(tmp_path / "x.jsonl", [original])
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 1
    assert list(read_lines(tmp_path / "x.jsonl", Completion)) == [original]


@pytest.mark.parametrize("room", [1, 40, 70])
def test_a_full_disk_is_named_and_what_was_cut_short_is_sampled_again(tmp_path, room):
    """A write that the disk takes in part: half a line must not be followed by another one."""
    first = len(to_line(vars(ALL[0])).encode())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (first + room, hard))
        with pytest.raises(RankError, match=r"-0\.jsonl: cannot be written \(File too large\)"):
            stored(tmp_path, 0, ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert unfinished(tmp_path).stat().st_size == first + room
    again = stored(tmp_path)
    assert again.done == {ALL[0].key}
    for c in ALL[1:]:
        again.append(c)
    again.finish()
    assert_finished(tmp_path)


@pytest.mark.parametrize(
    "line", ["{}", "{", "[]", "[" * 9999, json.dumps({**vars(ALL[0]), "score": 1})]
)
def test_a_broken_line_and_a_missing_file_are_named(tmp_path, line):
    write_lines(unfinished(tmp_path), ALL[:1])
    with open(unfinished(tmp_path), "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"unfinished-0\.jsonl:2: expected JSON with id, sample"):
        stored(tmp_path)
    with pytest.raises(UserError, match=r"x\.jsonl: no such file; `python evaluate\.py`"):
        list(read_lines(tmp_path / "x.jsonl", Mark))


MARK = {
    "id": "x", "sample": 0, "verdict": "correct", "extracted": "2", "num_tokens": 3, "loops": False,
    "answer_from": "whole",
}  # fmt: skip
OTHER_TYPES = [
    (Completion, vars(ALL[0]), {"text": 5}),
    (Completion, vars(ALL[0]), {"sample": "zero"}),
    (Completion, vars(ALL[0]), {"num_tokens": "x"}),
    (Mark, MARK, {"id": ["x"]}),
    (Mark, MARK, {"verdict": "bogus"}),
    (Mark, MARK, {"extracted": 5}),
    (Mark, MARK, {"loops": 1}),
    (Mark, MARK, {"answer_from": "moon"}),
]


@pytest.mark.parametrize(("kind", "row", "change"), OTHER_TYPES)
def test_a_field_of_another_type_is_named_with_its_line(tmp_path, kind, row, change):
    path, [field] = tmp_path / "x.jsonl", change
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:2: key '{field}': expected .*; got "):
        list(read_lines(path, kind))


def test_a_finished_file_that_is_cut_short_is_named_with_its_line(tmp_path):
    path = tmp_path / "b.jsonl"
    write_lines(path, ALL)
    whole = path.read_bytes()
    for lost in range(2, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-lost])
        with pytest.raises(UserError, match=r"b\.jsonl:4: .*; the file is cut short after b'{"):
            list(read_lines(path, Completion))


def test_problems_are_stored_as_a_benchmark(tmp_path):
    with pytest.raises(UserError, match="holds no evaluation"):
        stored_benchmarks(tmp_path)
    for _ in range(2):
        store_inputs(tmp_path, [BENCHMARK])
    assert stored_benchmarks(tmp_path) == [BENCHMARK]
