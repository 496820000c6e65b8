"""python -m redi.prepare: the files, the account of every row, and no partial output."""

import hashlib
import json
import resource
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import command, finished, main_in_this_process, wait_until
from small_run import read_jsonl, write_jsonl

from redi.config import UserError
from redi.eval.grade import Grader
from redi.prepare.__main__ import PrepareConfig, main, prepare

BOTH = [False, True, True]
FILES = ["card.json", "pairs.jsonl", "positives.jsonl"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raw(problem, llama=BOTH, math_verify=BOTH, **changes):
    return {
        "problem": problem,
        "problem_is_valid": "Yes",
        "source": "math",
        "generations": ["wrong\n", "right — ½", "right too"],
        "correctness": {"llama_verification": llama, "math_verify_reparsed_answer": math_verify},
        **changes,
    }


ROWS = [
    raw("first"),
    raw("invalid", problem_is_valid="No"),
    raw("school", source="cn_k12"),
    raw("  "),
    raw("none", generations=[]),
    raw("unlabelled", llama=None),
    raw("short", llama=[True]),
    raw("all wrong", llama=[False] * 3),
    raw("blank", generations=["wrong", " ", "right"]),
    raw("all right", [True] * 3, [True] * 3),
    raw("no text", generations=["", "right", "right"]),
    raw("both ways", generations=["same", "same", "right"]),
    raw("last", generations=["wrong", "line\u2028separator", "x"]),
]
POSITIVES = ["first", "all right", "no text", "both ways", "last"]


def prepared(rows, **choices):
    """(the counts, the card) of a run with these settings, from `rows` or a path into made/."""
    path = write_jsonl(Path("raw.jsonl"), rows) if isinstance(rows, list) else rows
    counts, _, _ = prepare(PrepareConfig(raw=str(path), out="made", **choices))
    return counts, json.loads(Path("made/card.json").read_text())


def shown(capsys, *flags):
    """What the program prints."""
    assert main_in_this_process(main, "raw.jsonl", "--out", "made", *flags) == 0
    return capsys.readouterr().out


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def texts(side, file="pairs"):
    lines = Path(f"made/{file}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)[side][0]["content"] for line in lines]


def problems():
    return texts("prompt", "positives")


def written():
    return {file.name: file.read_bytes() for file in Path("made").glob("*")}


# ---------------------------------------------------------------- what is written


def test_the_published_run_prints_the_papers_counts_beside_its_counts(capsys):
    """A local folder of that name stands in for the dataset on the hub."""
    Path("open-r1/OpenR1-Math-Raw").mkdir(parents=True)
    write_jsonl(Path("open-r1/OpenR1-Math-Raw/raw.jsonl"), ROWS)
    paper = "the paper: 77,629 positives, and 53,175 pairs after train_redi.py's limits on length"
    for flags, printed in ([], True), (["--reject-rule", "both"], False):
        assert main_in_this_process(main, *flags) == 0
        assert (paper in capsys.readouterr().out.splitlines()) == printed


def test_one_row_per_rule_gives_exactly_the_rows_expected_with_every_drop_counted():
    write_jsonl(Path("raw.jsonl"), ROWS)
    status, out, errors = finished("-m", "redi.prepare", "raw.jsonl", "--out", "made")
    assert (status, errors) == (0, "")
    assert sorted(written()) == FILES
    assert problems() == POSITIVES
    assert texts("prompt") == ["first", "last"]
    assert out == (
        "format: OpenR1-Math-Raw\n"
        "raw rows                   13\n"
        "  problem not valid         1\n"
        "  source cn_k12             1\n"
        "  empty problem             1\n"
        "  no generations            1\n"
        "  labels missing            1\n"
        "  labels misaligned         1\n"
        "  no correct generation     1\n"
        "  empty chosen              1\n"
        "positives                   5\n"
        "  no incorrect generation   1\n"
        "  empty rejected            1\n"
        "  chosen equals rejected    1\n"
        "pairs                       2\n"
        "saved made/positives.jsonl, made/pairs.jsonl, made/card.json\n"
    )
    card = json.loads(Path("made/card.json").read_text())
    assert (card["raw"], card["format"]) == ("raw.jsonl", "OpenR1-Math-Raw")
    assert card["rows"] == 13 == card["positives"] + sum(card["no_positive"].values())
    assert card["positives"] == 5 == card["pairs"] + sum(card["no_pair"].values())
    assert card["sources"] == {"math": 5}
    assert card["rules"]["exclude_sources"] == ["cn_k12"]
    assert card["raw_sha256"] == {"raw.jsonl": sha256("raw.jsonl")}
    names = ("positives.jsonl", "pairs.jsonl")
    assert card["sha256"] == {name: sha256(f"made/{name}") for name in names}


def test_parquet_json_lines_and_a_folder_give_the_same_bytes_and_so_does_a_second_run():
    write_jsonl(Path("raw.jsonl"), ROWS)
    Path("raw.json").write_text(json.dumps(ROWS))
    unread = pa.array([10**8] * len(ROWS), pa.date32())  # days: no date that Python has
    table = pa.Table.from_pylist(ROWS).append_column("created", unread)
    pq.write_table(table, "raw.parquet")
    Path("parts").mkdir()
    write_jsonl(Path("parts/part-0.jsonl"), ROWS[:5])
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), "parts/part-1.parquet")
    results = []
    for source in ("raw.jsonl", "raw.json", "raw.parquet", "parts", "raw.jsonl"):
        counts, _ = prepared(source)
        results.append((counts, {k: v for k, v in written().items() if k != "card.json"}))
    assert results == [results[0]] * 5


def test_one_trace_rows_are_counted_as_problems(capsys):
    rows = [{"problem": p, "response": f"{p}{c}", "correct": c} for c in (0, 1) for p in "ab"]
    write_jsonl(Path("raw.jsonl"), rows)
    first, traces, problems, *_ = shown(capsys).splitlines()
    assert first == "format: one trace a row (problem, response, correct)"
    assert (traces.split(), problems.split()) == (["traces", "4"], ["problems", "2"])
    assert sorted(written()) == FILES


# ---------------------------------------------------------------- what the paper does not do

TRACES = [
    ("<think>\n1+1</think> \\boxed{2}", True),
    ("<think>\n1+1</think> \\boxed{3}", False),
    ("<think>\n\\boxed{2}, or was it", True),  # cut off
    ("<think>\nhm</think> It is 2.", True),  # no answer to be found
    ("<think>\n</think> \\boxed{\\frac{4}{2}}", False),  # a verifier's mistake
]


def listed(problem, answer="2", labels=False, traces=TRACES):
    """A row of the form "problem, traces"."""
    entries = [{"text": text, **({"correct": label} if labels else {})} for text, label in traces]
    return {"problem": problem, "answer": answer, "traces": entries}


def test_traces_without_labels_are_graded_and_only_they():
    rows = [
        listed("graded"),
        listed("given", labels=True),
        listed("no answer", answer=None),
        listed("given, no answer", answer=None, labels=True),
    ]
    _, card = prepared(rows, workers=1)
    assert card["no_positive"]["no answer to grade by"] == 1
    assert problems() == ["graded", "given", "given, no answer"]
    assert card["labels"] == {
        "none": {"correct": 2, "incorrect": 1, "no_answer": 2, "truncated": 0, "timeout": 0}
    }


def test_relabel_grades_every_trace_and_prints_how_far_the_labels_agree(capsys):
    write_jsonl(Path("raw.jsonl"), [listed("1+1?", labels=True)])
    assert shown(capsys, "--relabel").endswith(
        "graded \\ given  correct  incorrect\n"
        "  correct             1          1\n"
        "  incorrect           0          1\n"
        "  no_answer           2          0\n"
        "  truncated           0          0\n"
        "  timeout             0          0\n"
        "agreement on correct or not: 2 of 5, 40.0%\n"
    )
    card = json.loads(Path("made/card.json").read_text())
    assert card["labels"]["correct"]["no_answer"] == 2
    assert card["rules"]["relabel"] is True


def test_the_bytes_are_the_same_with_any_number_of_workers():
    """Answers that take algebra, in more rows than one batch."""
    rows = []
    for n in range(1, 71):
        traces = [(f"</think>\\boxed{{{answer}}}", None) for answer in (f"{2 * n}/14", f"{n}/8")]
        rows.append(listed(f"{n}/7", f"\\frac{{{n}}}{{7}}", traces=traces))
    results = []
    for workers in (1, 3):
        counts, _ = prepared(rows, workers=workers)
        assert counts.pairs == 70
        results.append(written())
    assert results[0] == results[1]


def test_a_trace_whose_grading_times_out_is_neither_correct_nor_incorrect(monkeypatch):
    monkeypatch.setattr(
        "redi.prepare.__main__.Grader", lambda workers: Grader(workers, limit_s=2.0)
    )
    answers = ("\\boxed{5^{5^{5^{5^5}}}}", "\\boxed{.5}")  # the first takes forever
    traces = [(f"</think>{answer}", None) for answer in answers]
    counts, card = prepared([listed("1+1?", "\\frac{1}{2}", traces=traces)], workers=1)
    assert counts.no_pair["no incorrect generation"] == 1
    assert card["labels"]["none"]["timeout"] == 1


def test_traces_of_a_teacher_that_does_not_mark_its_thinking_are_read_whole():
    plain = [("So \\boxed{2}.", None), ("So \\boxed{3}.", None)]
    cut = [("1+1 \\boxed{2}", None), ("1+1</think> \\boxed{2}", None)]
    prepared([listed("plain", traces=plain), listed("thinks", traces=cut)], workers=1)
    assert texts("chosen") == ["So \\boxed{2}.", "1+1</think> \\boxed{2}"]
    assert texts("rejected") == ["So \\boxed{3}.", "1+1 \\boxed{2}"]


def test_rows_of_one_problem_with_two_answers_are_each_graded_by_their_answer():
    given = [("2", "2"), ("3", "3"), ("4", "2"), ("2", None)]  # a trace's answer, its row's answer
    rows = [{"problem": "?", "response": f"\\boxed{{{x}}}", "answer": y} for x, y in given]
    _, card = prepared(rows, workers=1)
    assert card["labels"]["none"]["correct"] == 3
    assert texts("rejected") == ["\\boxed{4}"]


def test_openr1_math_raw_rows_without_labels_are_dropped_as_in_the_paper_unless_relabelled():
    row = raw("1+1?", llama=None, generations=["\\boxed{3}", "\\boxed{2}", "x"], answer="2")
    rows = [row, raw("labelled", answer="2")]
    for relabel, missing in ((False, 1), (True, 0)):
        counts, _ = prepared(rows, relabel=relabel, workers=1)
        assert counts.no_positive["labels missing"] == missing


def test_a_complete_trace_ends_its_thinking_and_answers():
    rows = [listed("1+1?", labels=True)]
    complete, cut = TRACES[0][0], TRACES[2][0]
    for require, chosen in ((False, [complete, cut]), (True, [complete])):
        prepared(rows, pairs_per_problem=9, require_complete=require)
        assert texts("chosen") == chosen


def test_further_pairs_are_in_the_account():
    rows = [listed("a", labels=True), listed("b", labels=True, traces=TRACES[:1])]
    counts, _ = prepared(rows, pairs_per_problem=2)
    assert (counts.positives, counts.further, counts.pairs) == (2, 1, 2)
    assert counts.no_pair["no incorrect generation"] == 1
    assert counts.positives + counts.further == counts.pairs + counts.no_pair.total()


def test_of_problems_that_are_the_same_the_first_that_gives_a_positive_is_kept():
    rows = [
        raw("Find $x$.", [False] * 3),
        raw("Find $x$."),
        raw("Find $x$.", source="amc"),
        raw("find \\(x\\)"),
        raw("Find $y$."),
    ]
    counts, card = prepared(rows, dedup=True)
    assert problems() == ["Find $x$.", "Find $y$."]
    assert counts.no_positive["duplicate"] == 1
    assert counts.no_positive["duplicate but for its typesetting"] == 1
    assert card["sources"] == {"math": 2}


CANAL = (
    "Ruth walks along a canal at $4$ kilometers per hour and stops for $t$ minutes at a lock. If "
    "she had walked at $6$ kilometers per hour, she would have come home $25$ minutes earlier."
)


def test_problems_of_a_benchmark_are_dropped_counted_and_named():
    rows = [raw("first"), raw(CANAL), raw(CANAL.replace("25", "26")), raw(CANAL, [False] * 3)]
    write_jsonl(Path("walks.jsonl"), [{"id": "w1", "problem": CANAL, "answer": "20"}])
    counts, card = prepared(rows, decontaminate=["walks.jsonl"])
    assert problems() == ["first"]
    assert counts.no_positive["in a benchmark"] == 1
    assert counts.no_positive["in a benchmark, other numbers"] == 1
    assert counts.no_positive["no correct generation"] == 1
    assert card["benchmarks"] == {"walks": 1}
    found = read_jsonl("made/contaminated.jsonl")
    assert [(f["row"], f["benchmark"], f["benchmark_id"], f["kind"]) for f in found] == [
        (2, "walks", "w1", "same text"),
        (3, "walks", "w1", "other numbers"),
    ]
    assert card["sha256"]["contaminated.jsonl"] == sha256("made/contaminated.jsonl")
    prepared(rows)
    assert sorted(written()) == FILES


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 0), ("ngram", 0), ("pairs_per_problem", 0), ("min_length_ratio", -0.1)],
)
def test_settings_that_make_no_sense_name_their_flag(name, value):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        PrepareConfig(**{name: value})


# ---------------------------------------------------------------- what goes wrong

GOOD = json.dumps(raw("good"))
BAD_INPUTS = {  # test_files.py has all the ways in which a file cannot be read
    "broken.jsonl": (f"{GOOD}\n{GOOD[:50]}\n{GOOD}\n", "broken.jsonl:2: not valid JSON"),
    "other.jsonl": ('{"question": "1+1?"}', "other.jsonl: not teacher data in a form known here"),
    "parts/b.jsonl": ('{"question": "1+1?"}', "parts/b.jsonl: not teacher data in a form known"),
    "wrong.jsonl": (json.dumps(raw("?", BOTH[:1])), "wrong.jsonl: no row gives a positive (1 lab"),
}


def failed(capsys, source, out="made"):
    """The one line on stderr of a run that fails."""
    assert main_in_this_process(main, source, "--out", out) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("error: ")


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_one_line_that_names_it_and_an_earlier_runs_files_stay(capsys, name):
    content, message = BAD_INPUTS[name]
    prepared(ROWS)
    before, path = written(), Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    if path.parent.name == "parts":  # of a folder, the wrong file in it is named
        path = write_jsonl(path.with_name("a.jsonl"), ROWS).parent
    assert failed(capsys, path).startswith(message)
    assert written() == before


def test_an_output_that_is_also_input_is_refused(capsys, folder):
    write_jsonl(Path("positives.jsonl"), ROWS)
    message = "positives.jsonl: both raw data and output; choose another --out"
    assert message in failed(capsys, ".", ".")
    assert [f.name for f in folder.iterdir()] == ["positives.jsonl"]


@pytest.mark.parametrize("out", ["raw.jsonl", "raw.jsonl/made"])
def test_an_output_folder_under_a_file_is_one_line(capsys, out):
    write_jsonl(Path("raw.jsonl"), ROWS)
    assert failed(capsys, "raw.jsonl", out).startswith(f"{out}: cannot create this folder (")


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(capsys):
    write_jsonl(Path("raw.jsonl"), ROWS * 500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        errors = failed(capsys, "raw.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert errors.startswith("made/p")
    assert "cannot be written (File too large)" in errors
    assert written() == {}


def test_ctrl_c_halfway_is_one_line_and_leaves_nothing():
    line = json.dumps(raw("x" * 20_000)) + "\n"
    Path("raw.jsonl").write_text(line * 6000)  # 120 MB: a second's work at least
    process = command("-m", "redi.prepare", "raw.jsonl", "--out", "made")
    wait_until(lambda: any(f.stat().st_size for f in Path("made").glob("*.part")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "stopped: nothing was written to made"
    assert written() == {}
