"""Benchmark files as people publish them, and the ways in which they are broken."""

import json
import math

import pytest
from small_run import write_jsonl

from redi.config import UserError
from redi.eval import benchmarks
from redi.eval.benchmarks import KNOWN, Problem, load

ROW = {"problem": "?", "answer": "1"}


@pytest.fixture
def write(tmp_path):
    return lambda *rows: write_jsonl(tmp_path / "bench.jsonl", list(rows))


@pytest.fixture
def on_hub(write, monkeypatch):
    """A hub on which every data set holds `count` rows; returns the requests to it."""

    def on_hub(count):
        requests = []
        path = write(*({"problem": f"{k}?", "answer": k} for k in range(count)))
        monkeypatch.setattr(benchmarks, "dataset_files", lambda *a: requests.append(a) or [path])
        return requests

    return on_hub


def test_a_benchmark_has_the_name_of_its_file_and_its_order_and_ids(write):
    path = write(ROW, {**ROW, "id": 5}, {**ROW, "unique_id": "test/7.json", "id": 5}, ROW)
    assert load(path).name == "bench"
    assert [problem.id for problem in load(str(path)).problems] == ["0", "5", "test/7.json", "3"]


def test_a_difficulty_is_a_number_that_a_float_can_hold(write):
    levels = [10**400, math.inf, True, 3, "Level 5", "hard"]
    found = [p.difficulty for p in load(write(*({**ROW, "level": x} for x in levels))).problems]
    assert found == [None, None, None, 3.0, 5.0, None]


def test_json_and_parquet_give_what_json_lines_give(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "a?", "answer": ["1", "2"], "idx": 7}, {"problem": "b?", "answer": ["3"]}]
    lines = load(write(*rows)).problems
    (tmp_path / "array.json").write_text(json.dumps(rows))
    unread = pyarrow.array([10**8] * 2, pyarrow.date32())  # days: not a date that Python has
    table = pyarrow.Table.from_pylist(rows).append_column("created", unread)
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    assert load(tmp_path / "array.json").problems == lines
    assert load(tmp_path / "table.parquet").problems == lines
    assert [p.id for p in lines] == ["7", "1"]


@pytest.mark.parametrize("problem", ["problem", "question", "Problem"])
@pytest.mark.parametrize("answer", ["answer", "final_answer", "Answer"])
def test_published_field_names_are_known(write, problem, answer):
    assert load(write({problem: "1+1?", answer: "2"})).problems == [Problem("0", "1+1?", ["2"])]


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
    assert load(write({"problem": "?", "answer": answer})).problems[0].answers == answers


def test_a_context_comes_before_its_question(write):
    row = {"problem": "Find T.", "answer": "1", "context": "Let T = 1."}
    first, second = load(write(row, {**row, "context": None})).problems
    assert (first.problem, second.problem) == ("Let T = 1.\nFind T.", "Find T.")


BROKEN = [  # rows, the one line of the error
    ([{"answer": "1"}], r"bench\.jsonl:1: no problem; .*'problem'"),
    ([ROW, {"problem": "?"}], r"bench\.jsonl:2: no answer .*'answer'"),
    ([{**ROW, "answer": None}], r"bench\.jsonl:1: no answer"),
    ([{**ROW, "answer": "  "}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "answer": []}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "answer": ["1", ""]}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "answer": True}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "answer": float("nan")}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "answer": {"value": 1}}], r"bench\.jsonl:1: field 'answer'"),
    ([{**ROW, "problem": " "}], r"bench\.jsonl:1: field 'problem'"),
    ([{**ROW, "problem": ["?"]}], r"bench\.jsonl:1: field 'problem'"),
    ([{**ROW, "id": 1.5}], r"bench\.jsonl:1: field 'id'"),
    ([{**ROW, "id": "\ud800"}], r"bench\.jsonl:1: field 'id': .*surrogate"),
    ([{**ROW, "answer": "\ud8002"}], r"bench\.jsonl:1: field 'answer': .*surrogate"),
    ([{**ROW, "problem": "\ud800?"}], r"bench\.jsonl:1: field 'problem': .*surrogate"),
    ([{**ROW, "id": 3}, {**ROW, "id": "3"}], r"\.jsonl:2: id '3' is also that of .*\.jsonl:1"),
    ([], r"bench\.jsonl"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(*rows))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones_which_are_the_papers():
    assert list(KNOWN) == ["math500", "aime24", "amc", "minerva", "olympiadbench"]
    with pytest.raises(UserError, match=r"math5000: no such .*math500, aime24, amc, minerva, oly"):
        load("math5000")


def test_a_known_name_reads_its_split_from_the_hub(on_hub, capsys):
    requests = on_hub(30)
    benchmark = load("aime24")
    assert requests == [("HuggingFaceH4/aime_2024", "train")]
    assert (benchmark.name, len(benchmark.problems)) == ("aime24", 30)
    for count in (674, 675):  # both sizes are published
        on_hub(count)
        load("olympiadbench")
    assert capsys.readouterr().out == ""


def test_an_unexpected_number_of_problems_is_reported_in_one_line(on_hub, capsys):
    on_hub(31)
    assert len(load("aime24").problems) == 31
    expected = "aime24: HuggingFaceH4/aime_2024 holds 31 problems, expected 30\n"
    assert capsys.readouterr().out == expected
