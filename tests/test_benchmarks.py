"""Benchmark files as people publish them, and the ways in which they are broken."""

import json
import math

import pytest

from redi.config import UserError
from redi.eval import benchmarks
from redi.eval.benchmarks import KNOWN, Benchmark, Problem, load


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="bench.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def on_hub(write, monkeypatch):
    """A hub on which every data set holds `count` rows; returns what was asked of it."""

    def on_hub(count):
        asked = []
        path = write(*({"problem": f"{k}?", "answer": k} for k in range(count)))
        monkeypatch.setattr(benchmarks, "dataset_files", lambda *a: asked.append(a) or [path])
        return asked

    return on_hub


def only(benchmark: Benchmark) -> Problem:
    (problem,) = benchmark.problems
    return problem


def test_a_file_is_named_by_its_stem_and_keeps_its_order(write):
    path = write({"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"})
    expected = [Problem("0", "1+1?", ["2"]), Problem("1", "2+2?", ["4"])]
    assert load(path) == Benchmark("bench", expected)
    assert load(str(path)) == load(path)


def test_a_difficulty_is_a_number_that_a_float_can_hold(write):
    levels = [10**400, math.inf, True, 3, "Level 5", "hard"]
    rows = ({"problem": "1+1?", "answer": "2", "level": level} for level in levels)
    found = [problem.difficulty for problem in load(write(*rows)).problems]
    assert found == [None, None, None, 3.0, 5.0, None]


def test_json_and_parquet_give_what_json_lines_give(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "a?", "answer": ["1", "2"], "idx": 7}, {"problem": "b?", "answer": ["3"]}]
    lines = load(write(*rows)).problems
    (tmp_path / "array.json").write_text(json.dumps(rows))
    unread = pyarrow.array([10**8] * 2, pyarrow.date32())  # days: no date that Python has
    table = pyarrow.Table.from_pylist(rows).append_column("created", unread)
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    assert load(tmp_path / "array.json").problems == lines
    assert load(tmp_path / "table.parquet").problems == lines
    assert [p.id for p in lines] == ["7", "1"]


@pytest.mark.parametrize("problem", ["problem", "question", "Problem"])
@pytest.mark.parametrize("answer", ["answer", "final_answer", "Answer"])
def test_published_field_names_are_known(write, problem, answer):
    assert only(load(write({problem: "1+1?", answer: "2"}))) == Problem("0", "1+1?", ["2"])


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        ("204", ["204"]),
        ("9.6\n", ["9.6"]),
        (142.0, ["142"]),
        (-4, ["-4"]),
        (0, ["0"]),
        (2.5, ["2.5"]),
        (["0.01\n", "0.02\n"], ["0.01", "0.02"]),
        (["2\n", "2"], ["2"]),
        ([3, "three"], ["3", "three"]),
        ("3, 5", ["3, 5"]),
    ],
)
def test_an_answer_is_text_a_number_or_a_list_of_alternatives(write, answer, answers):
    assert only(load(write({"problem": "?", "answer": answer}))).answers == answers


def test_a_context_stands_before_its_question(write):
    row = {"problem": "Find T.", "answer": "1", "context": "Let T = 1."}
    assert only(load(write(row))).problem == "Let T = 1.\nFind T."
    assert only(load(write({**row, "context": None}))).problem == "Find T."


def test_an_id_of_the_row_comes_before_its_number(write):
    row = {"problem": "?", "answer": "1"}
    path = write({**row, "unique_id": "test/7.json", "id": 5}, {**row, "id": 5}, row)
    assert [p.id for p in load(path).problems] == ["test/7.json", "5", "2"]


BROKEN = [  # rows, what the one line must say
    ([{"answer": "1"}], r"bench\.jsonl:1: no problem; .*'problem'"),
    ([{"problem": "?", "answer": "1"}, {"problem": "?"}], r"bench\.jsonl:2: no answer .*'answer'"),
    ([{"problem": "?", "answer": None}], r"bench\.jsonl:1: no answer"),
    ([{"problem": "?", "answer": "  "}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": "?", "answer": []}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": "?", "answer": ["1", ""]}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": "?", "answer": True}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": "?", "answer": float("nan")}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": "?", "answer": {"value": 1}}], r"bench\.jsonl:1: field 'answer'"),
    ([{"problem": " ", "answer": "1"}], r"bench\.jsonl:1: field 'problem'"),
    ([{"problem": ["?"], "answer": "1"}], r"bench\.jsonl:1: field 'problem'"),
    ([{"problem": "?", "answer": "1", "id": 1.5}], r"bench\.jsonl:1: field 'id'"),
    ([{"problem": "?", "answer": "1", "id": "\ud800"}], r"bench\.jsonl:1: field 'id': .*surrogate"),
    ([{"problem": "?", "answer": "\ud8002"}], r"bench\.jsonl:1: field 'answer': .*surrogate"),
    ([{"problem": "\ud800?", "answer": "2"}], r"bench\.jsonl:1: field 'problem': .*surrogate"),
    (
        [{"problem": "?", "answer": "1", "id": 3}, {"problem": "!", "answer": "1", "id": "3"}],
        r"bench\.jsonl:2: id '3' is also that of .*bench\.jsonl:1",
    ),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_row_is_one_line_that_names_it(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(*rows))
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_named_by_its_number(write):
    path = write({"problem": "?", "answer": "1"})
    path.write_text(path.read_text() + '{"problem": \n')
    with pytest.raises(UserError, match=r"bench\.jsonl:2"):
        load(path)


def test_an_empty_file_is_an_error(write):
    with pytest.raises(UserError, match=r"bench\.jsonl"):
        load(write())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"math5000: no such .*math500, aime24, amc, minerva, oly"):
        load("math5000")


def test_a_known_name_reads_its_split_from_the_hub(on_hub, capsys):
    asked = on_hub(30)
    benchmark = load("aime24")
    assert asked == [("HuggingFaceH4/aime_2024", "train")]
    assert (benchmark.name, len(benchmark.problems)) == ("aime24", 30)
    assert capsys.readouterr().out == ""


def test_another_number_of_problems_is_said_in_one_line(on_hub, capsys):
    on_hub(31)
    assert len(load("aime24").problems) == 31
    said = capsys.readouterr().out
    assert said == "aime24: HuggingFaceH4/aime_2024 holds 31 problems, expected 30\n"


def test_both_published_sizes_of_olympiadbench_are_expected(on_hub, capsys):
    for count in (674, 675):
        on_hub(count)
        load("olympiadbench")
    assert capsys.readouterr().out == ""


def test_the_five_names_are_the_papers():
    assert list(KNOWN) == ["math500", "aime24", "amc", "minerva", "olympiadbench"]
