"""python -m redi.prepare: the files, the account of every row, and nothing by halves."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.config import UserError
from redi.eval.grade import Grader
from redi.prepare.__main__ import PrepareConfig, main, prepare

ROOT = Path(__file__).parent.parent
BOTH = [False, True, True]


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
PAIRS = ["first", "last"]


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path, out, **choices):
    """(the counts, the card) of a run with these settings."""
    counts, _, _ = prepare(PrepareConfig(raw=str(path), out=str(out), **choices))
    return counts, json.loads((out / "card.json").read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def problems(path):
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["prompt"][0]["content"] for line in lines]


def command(*arguments, cwd, **options):
    """The program as a user runs it; HF_HUB_OFFLINE keeps hub ids off the network."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "redi.prepare", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments, cwd, **options):
    """(exit status, stdout, stderr)"""
    process = command(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# ---------------------------------------------------------------- what is written


def test_the_published_run_prints_the_papers_counts_beside_its_own(tmp_path, capsys, monkeypatch):
    """A local folder of that name stands in for the dataset on the hub."""
    (tmp_path / "open-r1/OpenR1-Math-Raw").mkdir(parents=True)
    json_lines(tmp_path / "open-r1/OpenR1-Math-Raw/raw.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    paper = "the paper: 77,629 positives, and 53,175 pairs after train_redi.py's limits on length"
    for flags, printed in ([], True), (["--reject-rule", "both"], False):
        monkeypatch.setattr(sys, "argv", ["prepare", *flags])
        main()
        assert (paper in capsys.readouterr().out.splitlines()) == printed


def test_one_row_per_rule_gives_exactly_the_rows_expected_with_every_drop_counted(tmp_path):
    json_lines(tmp_path / "raw.jsonl", ROWS)
    status, out, err = run("raw.jsonl", "--out", "made", cwd=tmp_path)
    assert (status, err) == (0, "")
    made = tmp_path / "made"
    assert sorted(f.name for f in made.iterdir()) == [
        "card.json",
        "pairs.jsonl",
        "positives.jsonl",
    ]
    assert problems(made / "positives.jsonl") == POSITIVES
    assert problems(made / "pairs.jsonl") == PAIRS
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
        "positives                   5  made/positives.jsonl\n"
        "  no incorrect generation   1\n"
        "  empty rejected            1\n"
        "  chosen equals rejected    1\n"
        "pairs                       2  made/pairs.jsonl\n"
    )
    card = json.loads((made / "card.json").read_text())
    assert card["raw"] == "raw.jsonl"
    assert card["format"] == "OpenR1-Math-Raw"
    assert card["rows"] == 13 == card["positives"] + sum(card["no_positive"].values())
    assert card["positives"] == 5 == card["pairs"] + sum(card["no_pair"].values())
    assert card["sources"] == {"math": 5}
    assert card["rules"]["exclude_sources"] == ["cn_k12"]
    assert card["raw_sha256"] == {"raw.jsonl": sha256(tmp_path / "raw.jsonl")}
    assert card["sha256"] == {
        name: sha256(made / name) for name in ("positives.jsonl", "pairs.jsonl")
    }


def test_a_line_is_the_json_that_the_trainers_read(tmp_path):
    prepared(json_lines(tmp_path / "raw.jsonl", [raw("1+1?")]), tmp_path)
    row_id = hashlib.sha256("1+1?\0right — ½".encode()).hexdigest()[:16]
    assert (tmp_path / "pairs.jsonl").read_text(encoding="utf-8") == (
        '{"prompt": [{"role": "user", "content": "1+1?"}], '
        '"chosen": [{"role": "assistant", "content": "right — ½"}], '
        '"rejected": [{"role": "assistant", "content": "wrong\\n"}], '
        f'"source": "math", "id": "{row_id}"}}\n'
    )


def test_parquet_json_lines_and_a_folder_give_the_same_bytes_and_so_does_a_second_run(tmp_path):
    json_lines(tmp_path / "raw.jsonl", ROWS)
    (tmp_path / "raw.json").write_text(json.dumps(ROWS))
    unread = pa.array([10**8] * len(ROWS), pa.date32())  # days: no date that Python has
    table = pa.Table.from_pylist(ROWS).append_column("created", unread)
    pq.write_table(table, tmp_path / "raw.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    json_lines(folder / "part-0.jsonl", ROWS[:5])
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), folder / "part-1.parquet")
    written = {}
    for source in ("raw.jsonl", "raw.json", "raw.parquet", "folder", "raw.jsonl"):
        out = tmp_path / "made"
        counts, _ = prepared(tmp_path / source, out)
        files = [(out / name).read_bytes() for name in ("positives.jsonl", "pairs.jsonl")]
        written.setdefault((files[0], files[1]), []).append(counts)
    assert len(written) == 1
    (all_counts,) = written.values()
    assert all(counts == all_counts[0] for counts in all_counts)


def test_half_of_a_surrogate_pair_is_counted_as_malformed(tmp_path):
    rows = [raw("good"), raw("bad \ud83d"), raw("bad", generations=["\udc00", "right", "x"])]
    counts, _ = prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path / "made")
    assert counts.no_positive["malformed"] == 2
    assert problems(tmp_path / "made" / "positives.jsonl") == ["good"]


# ---------------------------------------------------------------- what the paper does not do

TRACES = [
    ("<think>\n1+1</think> \\boxed{2}", True),
    ("<think>\n1+1</think> \\boxed{3}", False),
    ("<think>\n\\boxed{2}, or was it", True),  # cut off
    ("<think>\nhm</think> It is 2.", True),  # no answer to be found
    ("<think>\n</think> \\boxed{\\frac{4}{2}}", False),  # a verifier's mistake
]


def unlabelled(problem, answer="2", labels=False, texts=TRACES):
    """A row of the form "problem, traces"."""
    traces = [{"text": text, **({"correct": label} if labels else {})} for text, label in texts]
    return {"problem": problem, "answer": answer, "traces": traces}


def completions(path, side):
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)[side][0]["content"] for line in lines]


def test_traces_without_labels_are_graded_and_only_they(tmp_path):
    rows = [
        unlabelled("graded"),
        unlabelled("given", labels=True),
        unlabelled("no answer", answer=None),
        unlabelled("given, no answer", answer=None, labels=True),
    ]
    _, card = prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path / "made", workers=1)
    assert card["no_positive"]["no answer to grade by"] == 1
    assert problems(tmp_path / "made" / "positives.jsonl") == [
        "graded",
        "given",
        "given, no answer",
    ]
    assert card["labels"] == {
        "none": {"correct": 2, "incorrect": 1, "no_answer": 2, "truncated": 0, "timeout": 0}
    }


def test_relabel_grades_every_trace_and_prints_how_far_the_labels_agree(tmp_path):
    json_lines(tmp_path / "raw.jsonl", [unlabelled("1+1?", labels=True)])
    status, out, err = run("raw.jsonl", "--out", "made", "--relabel", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert out.endswith(
        "graded \\ given    correct  incorrect\n"
        "  correct               1          1\n"
        "  incorrect             0          1\n"
        "  no_answer             2          0\n"
        "  truncated             0          0\n"
        "  timeout               0          0\n"
        "agreement on correct or not: 2 of 5, 40.0%\n"
    )
    card = json.loads((tmp_path / "made" / "card.json").read_text())
    assert card["labels"]["correct"]["no_answer"] == 2
    assert card["rules"]["relabel"] is True


def test_the_bytes_are_the_same_however_many_workers_grade(tmp_path):
    """Answers that take algebra, in more rows than one batch."""
    rows = [
        unlabelled(
            f"{n}/7",
            f"\\frac{{{n}}}{{7}}",
            texts=[(f"</think>\\boxed{{{2 * n}/14}}", None), (f"</think>\\boxed{{{n}/8}}", None)],
        )
        for n in range(1, 100)
    ]
    json_lines(tmp_path / "raw.jsonl", rows)
    made = {}
    for workers in (1, 3):
        out = tmp_path / str(workers)
        counts, _ = prepared(tmp_path / "raw.jsonl", out, workers=workers)
        assert counts.pairs == 99
        made[workers] = {f.name: f.read_bytes() for f in out.iterdir()}
    assert made[1] == made[3]


def test_a_trace_whose_grading_times_out_is_neither_correct_nor_incorrect(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "redi.prepare.__main__.Grader", lambda workers: Grader(workers, limit_s=2.0)
    )
    hangs = "</think>\\boxed{5^{5^{5^{5^5}}}}"
    row = unlabelled("1+1?", "\\frac{1}{2}", texts=[(hangs, None), ("</think>\\boxed{.5}", None)])
    counts, card = prepared(json_lines(tmp_path / "raw.jsonl", [row]), tmp_path, workers=1)
    assert counts.no_pair["no incorrect generation"] == 1
    assert card["labels"]["none"]["timeout"] == 1


def test_traces_of_a_teacher_that_does_not_think_aloud_are_read_whole(tmp_path):
    plain = [("So \\boxed{2}.", None), ("So \\boxed{3}.", None)]
    cut = [("1+1 \\boxed{2}", None), ("1+1</think> \\boxed{2}", None)]
    rows = [unlabelled("plain", texts=plain), unlabelled("thinks", texts=cut)]
    prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path / "made", workers=1)
    made = tmp_path / "made" / "pairs.jsonl"
    assert completions(made, "chosen") == ["So \\boxed{2}.", "1+1</think> \\boxed{2}"]
    assert completions(made, "rejected") == ["So \\boxed{3}.", "1+1 \\boxed{2}"]


def test_rows_of_one_problem_with_two_answers_are_each_graded_by_their_own(tmp_path):
    given = [("2", "2"), ("3", "3"), ("4", "2"), ("2", None)]  # what a trace says, its row's answer
    rows = [{"problem": "?", "response": f"\\boxed{{{x}}}", "answer": y} for x, y in given]
    _, card = prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path / "made", workers=1)
    assert card["labels"]["none"]["correct"] == 3
    assert completions(tmp_path / "made" / "pairs.jsonl", "rejected") == ["\\boxed{4}"]


def test_openr1_math_raw_rows_without_labels_are_dropped_as_in_the_paper_unless_relabelled(
    tmp_path,
):
    row = raw("1+1?", llama=None, generations=["\\boxed{3}", "\\boxed{2}", "x"], answer="2")
    path = json_lines(tmp_path / "raw.jsonl", [row, raw("labelled", answer="2")])
    assert prepared(path, tmp_path / "made")[0].no_positive["labels missing"] == 1
    relabelled = prepared(path, tmp_path / "made", relabel=True, workers=1)[0].no_positive
    assert relabelled["labels missing"] == 0


def test_complete_is_a_closed_thought_and_an_answer(tmp_path):
    path = json_lines(tmp_path / "raw.jsonl", [unlabelled("1+1?", labels=True)])
    texts = [text for text, _ in TRACES]
    prepared(path, tmp_path / "made", pairs_per_problem=9)
    made = tmp_path / "made" / "pairs.jsonl"
    assert completions(made, "chosen") == [texts[0], texts[2]]
    prepared(path, tmp_path / "made", pairs_per_problem=9, require_complete=True)
    assert completions(made, "chosen") == [texts[0]]


def test_further_pairs_are_in_the_account(tmp_path):
    rows = [unlabelled("a", labels=True), unlabelled("b", labels=True, texts=TRACES[:1])]
    counts, _ = prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path, pairs_per_problem=2)
    assert (counts.positives, counts.further, counts.pairs) == (2, 1, 2)
    assert counts.no_pair["no incorrect generation"] == 1
    assert counts.positives + counts.further == counts.pairs + sum(counts.no_pair.values())


def test_of_problems_that_are_the_same_the_first_that_gives_a_positive_is_kept(tmp_path):
    rows = [
        raw("Find $x$.", [False] * 3),
        raw("Find $x$."),
        raw("Find $x$.", source="amc"),
        raw("find \\(x\\)"),
        raw("Find $y$."),
    ]
    counts, card = prepared(json_lines(tmp_path / "raw.jsonl", rows), tmp_path, dedup=True)
    assert problems(tmp_path / "positives.jsonl") == ["Find $x$.", "Find $y$."]
    assert counts.no_positive["duplicate"] == 1
    assert counts.no_positive["duplicate but for its typesetting"] == 1
    assert card["sources"] == {"math": 2}


CANAL = (
    "Ruth walks along a canal at $4$ kilometers per hour and stops for $t$ minutes at a lock. If "
    "she had walked at $6$ kilometers per hour, she would have come home $25$ minutes earlier."
)


def test_problems_of_a_benchmark_are_dropped_counted_and_named(tmp_path):
    rows = [raw("first"), raw(CANAL), raw(CANAL.replace("25", "26")), raw(CANAL, [False] * 3)]
    json_lines(tmp_path / "raw.jsonl", rows)
    json_lines(tmp_path / "walks.jsonl", [{"id": "w1", "problem": CANAL, "answer": "20"}])
    made = tmp_path / "made"
    choices = {"decontaminate": [str(tmp_path / "walks.jsonl")]}
    counts, card = prepared(tmp_path / "raw.jsonl", made, **choices)
    assert problems(made / "positives.jsonl") == ["first"]
    assert counts.no_positive["in a benchmark"] == 1
    assert counts.no_positive["in a benchmark, other numbers"] == 1
    assert counts.no_positive["no correct generation"] == 1
    assert card["benchmarks"] == {"walks": 1}
    found = [json.loads(line) for line in (made / "contaminated.jsonl").read_text().splitlines()]
    assert [(f["row"], f["benchmark"], f["benchmark_id"], f["kind"]) for f in found] == [
        (2, "walks", "w1", "same text"),
        (3, "walks", "w1", "other numbers"),
    ]
    assert card["sha256"]["contaminated.jsonl"] == sha256(made / "contaminated.jsonl")
    prepared(tmp_path / "raw.jsonl", made)
    assert not (made / "contaminated.jsonl").exists()


def test_one_trace_rows_are_counted_as_problems(tmp_path):
    rows = [{"problem": p, "response": f"{p}{c}", "correct": c} for c in (0, 1) for p in "ab"]
    json_lines(tmp_path / "raw.jsonl", rows)
    status, out, _ = run("raw.jsonl", "--out", "made", cwd=tmp_path)
    assert status == 0
    assert out.startswith("format: one trace a row (problem, response, correct)\ntraces  ")
    assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["4", "2"]
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == [
        "card.json",
        "pairs.jsonl",
        "positives.jsonl",
    ]


def test_source_filters_are_flags(tmp_path):
    json_lines(
        tmp_path / "raw.jsonl", [raw("a"), raw("b", source="amc"), raw("c", source="cn_k12")]
    )
    made = tmp_path / "made" / "positives.jsonl"
    for flags, kept in [
        (["--exclude-sources", "none"], ["a", "b", "c"]),
        (["--exclude-sources", "amc", "math"], ["c"]),
        (["--sources", "amc", "cn_k12"], ["b"]),
    ]:
        assert run("raw.jsonl", "--out", "made", *flags, cwd=tmp_path)[0] == 0
        assert problems(made) == kept


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"ngram": 0}, {"pairs_per_problem": 0}])
def test_settings_that_make_no_sense_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        PrepareConfig(**wrong)


# ---------------------------------------------------------------- what goes wrong

GOOD = json.dumps(raw("good"))
BAD_INPUTS = [
    ("broken.jsonl", f"{GOOD}\n{GOOD[:50]}\n{GOOD}\n", "broken.jsonl:2: not valid JSON"),
    ("latin.jsonl", GOOD.encode() + b'\n{"x": "\xe9"}\n', "latin.jsonl:2: not valid JSON in UTF-8"),
    ("list.jsonl", f"{GOOD}\n[]\n", "list.jsonl:2: expected a JSON object"),
    ("empty.jsonl", "", "empty.jsonl: holds no rows"),
    ("false.parquet", "PAR1", "false.parquet: unreadable Parquet file"),
    ("other.jsonl", '{"question": "1+1?"}\n', "other.jsonl: not teacher data in a form known here"),
    (
        "wrong.jsonl",
        json.dumps(raw("?", BOTH[:1])),
        "wrong.jsonl: no row gives a positive (1 labels",
    ),
    ("table.csv", "problem\n1+1?\n", "table.csv: expected a .parquet, .jsonl or .json"),
    ("gone.jsonl", None, "gone.jsonl: no such file or folder"),
    ("org/set", None, "org/set: no such local path, and downloading this dataset"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_INPUTS)
def test_a_bad_input_is_one_line_that_names_it_and_nothing_is_written(
    tmp_path, name, content, said
):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = run(name, "--out", "made", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert not list((tmp_path / "made").glob("*"))


def test_a_foreign_file_in_a_folder_is_named(tmp_path):
    json_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"question": "1+1?"}\n')
    status, _, err = run(tmp_path, "--out", "made", cwd=tmp_path)
    assert status == 2
    assert err.startswith(f"error: {tmp_path}/b.jsonl: not teacher data")
    assert not list((tmp_path / "made").glob("*"))


def test_a_failed_run_leaves_the_files_of_an_earlier_one(tmp_path):
    prepared(json_lines(tmp_path / "raw.jsonl", ROWS), tmp_path / "made")
    before = {f.name: f.read_bytes() for f in (tmp_path / "made").iterdir()}
    (tmp_path / "broken.jsonl").write_text(f"{GOOD}\n{{\n")
    assert run("broken.jsonl", "--out", "made", cwd=tmp_path)[0] == 2
    assert {f.name: f.read_bytes() for f in (tmp_path / "made").iterdir()} == before


def test_an_output_that_is_also_input_is_refused(tmp_path):
    json_lines(tmp_path / "positives.jsonl", ROWS)
    status, _, err = run(".", "--out", ".", cwd=tmp_path)
    assert status == 2
    assert "positives.jsonl: both raw data and output; choose another --out" in err
    assert [f.name for f in tmp_path.iterdir()] == ["positives.jsonl"]


def test_an_output_folder_under_a_file_is_one_line(tmp_path):
    json_lines(tmp_path / "raw.jsonl", ROWS)
    for out in ("raw.jsonl", "raw.jsonl/made"):
        status, _, err = run("raw.jsonl", "--out", out, cwd=tmp_path)
        assert status == 2
        assert err.startswith(f"error: {out}: cannot create this folder (")
        assert err.count("\n") == 1


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    json_lines(tmp_path / "raw.jsonl", ROWS * 500)

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    status, _, err = run("raw.jsonl", "--out", "made", cwd=tmp_path, preexec_fn=limit_file_size)
    assert status == 2
    assert err.startswith("error: made/p")
    assert "cannot be written (File too large)" in err
    assert err.count("\n") == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_ctrl_c_halfway_is_one_line_and_leaves_nothing(tmp_path):
    line = json.dumps(raw("x" * 20_000)) + "\n"
    (tmp_path / "raw.jsonl").write_text(line * 6000)  # 120 MB: a second's work at least
    process = command("raw.jsonl", "--out", "made", cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not any(f.stat().st_size for f in (tmp_path / "made").glob("*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "stopped: nothing was written to made"
    assert list((tmp_path / "made").iterdir()) == []
