"""Completions on disk: kept as they come, read back after a kill, put in order at the end."""

import json

import pytest

from redi.config import UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    Store,
    asked,
    completions_file,
    from_line,
    keep_problems,
    read_lines,
    to_line,
)

TEST = Benchmark("b", [Problem("x", "1+1?", ["2"], "Algebra", 2.5), Problem("y", "2+2?", ["4"])])


def completion(id="x", sample=0, text="…", num_tokens=3, finish_reason="stop") -> Completion:
    return Completion(
        id=id, sample=sample, text=text, num_tokens=num_tokens, finish_reason=finish_reason
    )


def unfinished(out, rank=0):
    return out / "completions" / f"b.unfinished-{rank}.jsonl"


ALL = [completion("y", 1), completion("x", 1), completion("y", 0), completion("x", 0)]


def test_completions_in_any_order_end_in_the_order_of_problems_and_samples(tmp_path):
    store = Store(tmp_path, TEST, samples=2)
    for c in ALL:
        store.append(c)
    assert len(store.done) == 4
    store.finish()
    stored = list(read_lines(completions_file(tmp_path, "b"), Completion))
    assert [c.key for c in stored] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert [p.name for p in (tmp_path / "completions").iterdir()] == ["b.jsonl"]


def test_a_completion_is_on_disk_when_append_returns(tmp_path):
    Store(tmp_path, TEST, samples=2).append(completion())
    assert from_line(unfinished(tmp_path).read_bytes(), Completion, "") == completion()


def test_what_is_there_is_said_by_key(tmp_path):
    store = Store(tmp_path, TEST, samples=2)
    assert store.done == set()
    store.append(completion("x", 1))
    assert store.done == {ALL[1].key}
    assert Store(tmp_path, TEST, samples=2).done == {ALL[1].key}


@pytest.mark.parametrize("cut", range(1, 80))
def test_a_line_cut_short_anywhere_is_made_again(tmp_path, cut):
    """A kill within a write: of the second line `cut` bytes are there, or all but its end."""
    lines = [to_line(c).encode() for c in ALL]
    path = unfinished(tmp_path)
    path.parent.mkdir()
    path.write_bytes(lines[0] + lines[1][: min(cut, len(lines[1]) - 1)])
    store = Store(tmp_path, TEST, samples=2)
    assert store.done == {("y", 1)}
    for c in ALL[1:]:
        store.append(c)
    store.finish()
    assert len(list(read_lines(completions_file(tmp_path, "b"), Completion))) == 4


def test_each_rank_appends_to_its_own_file_and_all_are_read(tmp_path):
    first, second = (Store(tmp_path, TEST, samples=2, rank=rank) for rank in (0, 1))
    for store, c in zip((first, second, first, second), ALL):
        store.append(c)
    assert unfinished(tmp_path, 1).is_file()
    whole = Store(tmp_path, TEST, samples=2)
    assert len(whole.done) == 4
    whole.finish()
    assert [p.name for p in (tmp_path / "completions").iterdir()] == ["b.jsonl"]


def test_a_finished_benchmark_is_complete_and_finishing_it_again_changes_nothing(tmp_path):
    store = Store(tmp_path, TEST, samples=2)
    for c in ALL:
        store.append(c)
    store.finish()
    again = Store(tmp_path, TEST, samples=2)
    assert again.is_complete
    assert len(again.done) == 4
    again.finish()


def test_what_a_kill_leaves_between_the_two_last_steps_does_no_harm(tmp_path):
    """The whole file is there, and the unfinished one is not yet gone."""
    store = Store(tmp_path, TEST, samples=2)
    for c in ALL:
        store.append(c)
    left = unfinished(tmp_path).read_bytes()
    store.finish()
    unfinished(tmp_path).write_bytes(left)
    again = Store(tmp_path, TEST, samples=2)
    again.finish()
    assert len(again.done) == 4
    assert [p.name for p in (tmp_path / "completions").iterdir()] == ["b.jsonl"]


def test_a_finish_without_all_of_them_says_what_several_nodes_need(tmp_path):
    store = Store(tmp_path, TEST, samples=2, rank=0)
    store.append(ALL[0])
    Store(tmp_path, TEST, samples=2, rank=1).append(ALL[3])
    with pytest.raises(UserError, match=r"2 of 4 completions are not there; .* an --out that all"):
        store.finish()
    assert unfinished(tmp_path).is_file()


def test_a_broken_line_is_named(tmp_path):
    path = unfinished(tmp_path)
    path.parent.mkdir()
    path.write_text(to_line(ALL[0]) + "{}\n")
    with pytest.raises(UserError, match=r"unfinished-0\.jsonl:2: expected the fields"):
        Store(tmp_path, TEST, samples=2)


def test_a_completion_that_was_not_asked_for_is_named(tmp_path):
    Store(tmp_path, TEST, samples=2).append(completion("x", 1))
    with pytest.raises(UserError, match=r"sample 1 of problem 'x' was not asked for"):
        Store(tmp_path, TEST, samples=1)


# ---------------------------------------------------------------- lines and problems


def test_a_completion_survives_its_line():
    original = completion(text='a\n"b" π \u2028', num_tokens=None, finish_reason="length")
    line = to_line(original)
    assert line.count("\n") == 1
    assert from_line(line, Completion, "here") == original


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row: row.pop("text"), "here: expected the fields .*text.*; got"),
        (lambda row: row.update(score=1), "expected the fields"),
        (lambda row: row.update(text=3), "here: field 'text': got 3"),
        (lambda row: row.update(sample="x"), "here: field 'sample': got 'x'"),
        (lambda row: row.update(num_tokens=True), "here: field 'num_tokens': got True"),
    ],
)
def test_a_line_that_is_no_completion_is_an_error(edit, message):
    row = json.loads(to_line(completion()))
    edit(row)
    with pytest.raises(UserError, match=message):
        from_line(json.dumps(row), Completion, "here")


def test_half_a_line_is_an_error():
    with pytest.raises(UserError, match="not valid JSON"):
        from_line(to_line(completion())[:-5], Completion, "here")


def test_marks_of_older_files_were_read_after_the_thinking():
    line = '{"id": "x", "sample": 0, "verdict": "correct", "extracted": "2", "num_tokens": 1, '
    assert from_line(line + '"loops": false}', Mark, "here").answer_from == "after_think"


def test_a_missing_file_names_what_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"x\.jsonl: no such file; `python evaluate\.py`"):
        list(read_lines(tmp_path / "x.jsonl", Mark))


def test_problems_are_kept_and_are_a_benchmark_again(tmp_path):
    keep_problems(tmp_path, TEST)
    assert asked(tmp_path) == [TEST]
    keep_problems(tmp_path, TEST)


def test_problems_that_have_changed_are_refused(tmp_path):
    keep_problems(tmp_path, TEST)
    changed = Benchmark("b", [TEST.problems[0], Problem("y", "2+2?", ["5"])])
    with pytest.raises(UserError, match="b: its problems have changed"):
        keep_problems(tmp_path, changed)


def test_a_folder_without_an_evaluation_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no evaluation"):
        asked(tmp_path)
