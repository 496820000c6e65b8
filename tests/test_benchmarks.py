"""Benchmark files as people publish them, and the ways in which they are broken."""

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
def loaded(write):
    return lambda *rows: load(write(*rows)).problems


def test_a_benchmark_has_the_name_of_its_file_and_its_order_and_ids(write):
    path = write(ROW, {**ROW, "id": 5}, {**ROW, "unique_id": "test/7.json", "id": 5}, ROW)
    assert load(path).name == "bench"
    assert [problem.id for problem in load(str(path)).problems] == ["0", "5", "test/7.json", "3"]


def test_parquet_gives_what_json_lines_give(loaded, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "a?", "answer": ["1", "2"], "idx": 7}, {"problem": "b?", "answer": ["3"]}]
    unread = pyarrow.array([10**8] * 2, pyarrow.date32())  # days: not a date that Python has
    table = pyarrow.Table.from_pylist(rows).append_column("created", unread)
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    assert load(tmp_path / "table.parquet").problems == loaded(*rows)
    assert [p.id for p in loaded(*rows)] == ["7", "1"]


@pytest.mark.parametrize("problem", ["problem", "question", "Problem"])
@pytest.mark.parametrize("answer", ["answer", "final_answer", "Answer"])
def test_published_field_names_are_known(loaded, problem, answer):
    assert loaded({problem: "1+1?", answer: "2"}) == [Problem("0", "1+1?", ["2"])]


VALUES = [  # fields of a row, the problem's attribute, its value
    ({"answer": "204"}, "answers", ["204"]),
    ({"answer": "9.6\n"}, "answers", ["9.6"]),
    ({"answer": 142.0}, "answers", ["142"]),
    ({"answer": -4}, "answers", ["-4"]),
    ({"answer": 0}, "answers", ["0"]),
    ({"answer": 2.5}, "answers", ["2.5"]),
    ({"answer": ["0.01\n", "0.02\n"]}, "answers", ["0.01", "0.02"]),
    ({"answer": ["2\n", "2"]}, "answers", ["2"]),
    ({"answer": [3, "three"]}, "answers", ["3", "three"]),
    ({"answer": "3, 5"}, "answers", ["3, 5"]),
    ({"context": "Let T = 1."}, "problem", "Let T = 1.\n?"),
    ({"context": None}, "problem", "?"),
    ({"subfield": " Algebra\n"}, "subject", "Algebra"),
    ({"type": 3}, "subject", None),
    ({"level": 10**400}, "difficulty", None),
    ({"level": math.inf}, "difficulty", None),
    ({"level": True}, "difficulty", None),
    ({"level": 3}, "difficulty", 3.0),
    ({"level": "Level 5"}, "difficulty", 5.0),
    ({"level": "hard"}, "difficulty", None),
]


@pytest.mark.parametrize(("fields", "name", "value"), VALUES)
def test_values_are_read_as_people_write_them(loaded, fields, name, value):
    assert getattr(loaded({**ROW, **fields})[0], name) == value


BROKEN = [  # rows, the one line of the error
    ([{"answer": "1"}], r"jsonl:1: field 'problem': expected .*\(problem or q.*, got nothing"),
    ([ROW, {"problem": "?"}], r"bench\.jsonl:2: field 'answer': .*final_answer.*, got nothing"),
    ([{**ROW, "answer": None}], r"bench\.jsonl:1: field 'answer': .*, got None"),
    *(
        ([{**ROW, "answer": answer}], r"bench\.jsonl:1: field 'answer': expected text, a number")
        for answer in ("  ", [], ["1", ""], True, math.nan, {"value": 1}, "\ud8002")
    ),
    ([{**ROW, "problem": " "}], r"bench\.jsonl:1: field 'problem'"),
    ([{**ROW, "problem": ["?"]}], r"bench\.jsonl:1: field 'problem'"),
    ([{**ROW, "problem": "\ud800?"}], r"bench\.jsonl:1: field 'problem': .*, got '\\ud800\?'"),
    ([{**ROW, "id": 1.5}], r"bench\.jsonl:1: field 'id'"),
    ([{**ROW, "id": "\ud800"}], r"bench\.jsonl:1: field 'id': .*, got '\\ud800'"),
    ([{**ROW, "id": 3}, {**ROW, "id": "3"}], r"\.jsonl:2: id '3' is also that of .*\.jsonl:1"),
    ([], r"bench\.jsonl"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(*rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".", "..", ".b.jsonl", "a.unfinished-0.jsonl", "n\udcffx.jsonl"])
def test_a_name_that_no_result_could_have_is_refused(tmp_path, monkeypatch, name):
    """It would be an empty or hidden file, one that holds unfinished completions, or not text."""
    monkeypatch.chdir(tmp_path)
    if name.strip("."):
        write_jsonl(tmp_path / name, [ROW])
    with pytest.raises(UserError, match="cannot name the files of results; rename"):
        load(name)


def test_an_unknown_name_lists_the_known_ones_which_are_the_papers():
    assert list(KNOWN) == ["math500", "aime24", "amc", "minerva", "olympiadbench"]
    with pytest.raises(UserError, match=r"math5000: no such .*math500, aime24, amc, minerva, oly"):
        load("math5000")


@pytest.mark.parametrize(
    ("name", "count", "shown"),
    [
        ("aime24", 30, ""),
        ("olympiadbench", 674, ""),
        ("olympiadbench", 675, ""),
        ("aime24", 31, "aime24: HuggingFaceH4/aime_2024 holds 31 problems, expected 30\n"),
    ],
)
def test_a_known_name_reads_its_split_and_reports_an_unexpected_size(
    write, monkeypatch, capsys, name, count, shown
):
    path = write(*({"problem": f"{k}?", "answer": k} for k in range(count)))
    hub_files = {("HuggingFaceH4/aime_2024", "train"): [path],
                 ("math-ai/olympiadbench", "test"): [path]}  # fmt: skip
    monkeypatch.setattr(benchmarks, "dataset_files", lambda *request: hub_files[request])
    benchmark = load(name)
    assert (benchmark.name, len(benchmark.problems)) == (name, count)
    assert capsys.readouterr().out == shown
