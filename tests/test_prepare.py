"""python -m redi.prepare: the files, the account of every row, and no partial output."""

import hashlib
import json
import resource
import signal
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import command, main_in_this_process, wait_until
from small_run import read_jsonl, write_jsonl

from redi.config import UserError
from redi.eval.grading.workers import Pool
from redi.prepare.__main__ import main, prepare
from redi.prepare.traces import PrepareConfig

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


def test_the_published_run_prints_every_drop_and_the_papers_counts(capsys):
    """A local folder of its name stands in for the dataset on the hub."""
    Path("open-r1/OpenR1-Math-Raw").mkdir(parents=True)
    file = write_jsonl(Path("open-r1/OpenR1-Math-Raw/raw.jsonl"), ROWS)
    published = ("open-r1/OpenR1-Math-Raw", "--out", "made")
    assert main_in_this_process(main, *published) == 0
    out, errors = capsys.readouterr()
    assert sorted(written()) == FILES
    assert problems() == POSITIVES
    assert texts("prompt") == ["first", "last"]
    assert errors == ""
    paper = "the paper: 77,629 positives, and 53,175 pairs after train_redi.py's limits on length\n"
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
        "saved made/positives.jsonl, made/pairs.jsonl, made/card.json\n" + paper
    )
    card = json.loads(Path("made/card.json").read_text())
    assert (card["raw"], card["format"]) == ("open-r1/OpenR1-Math-Raw", "OpenR1-Math-Raw")
    assert card["sources"] == {"math": 5}
    assert card["rules"]["exclude_sources"] == ["cn_k12"]
    assert card["raw_sha256"] == {file.name: sha256(file)}
    names = ("positives.jsonl", "pairs.jsonl")
    assert card["sha256"] == {name: sha256(f"made/{name}") for name in names}
    assert main_in_this_process(main, *published, "--reject-rule", "both") == 0
    assert paper not in capsys.readouterr().out


def test_parquet_json_lines_and_a_folder_give_the_same_bytes_and_so_does_a_second_run():
    write_jsonl(Path("raw.jsonl"), ROWS)
    Path("parts").mkdir()
    write_jsonl(Path("parts/part-0.jsonl"), ROWS[:5])
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), "parts/part-1.parquet")
    results = []
    for source in ("raw.jsonl", "parts", "raw.jsonl"):
        counts, _ = prepared(source)
        results.append((vars(counts), {k: v for k, v in written().items() if k != "card.json"}))
    assert results == [results[0]] * 3


def test_the_card_has_the_license_that_the_hub_names(monkeypatch):
    assert prepared(ROWS)[1]["license"] is None
    monkeypatch.setattr("redi.prepare.__main__.dataset_license", {"raw.jsonl": "mit"}.get)
    assert prepared(ROWS)[1]["license"] == "mit"


def test_one_trace_rows_are_counted_as_problems(capsys):
    rows = [{"problem": p, "response": f"{p}{c}", "correct": c} for c in (0, 1) for p in "ab"]
    write_jsonl(Path("raw.jsonl"), rows)
    first, traces, problems, *_ = shown(capsys).splitlines()
    assert first == "format: one trace per row (problem, response, correct)"
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


def unlabelled(problem, answer, *traces):
    return listed(problem, answer, traces=[(text, None) for text in traces])


def test_traces_without_labels_are_graded_and_only_they(monkeypatch):
    monkeypatch.setattr("redi.prepare.__main__.Pool", partial(Pool, limit_s=2.0))
    plain, cut = ("So \\boxed{2}.", "So \\boxed{3}."), ("1+1 \\boxed{2}", "</think> \\boxed{2}")
    rows = [
        listed("graded"),
        listed("given", labels=True),
        listed("no answer", answer=None),
        listed("given, no answer", answer=None, labels=True),
        # After a timeout, a trace is neither correct nor incorrect.
        unlabelled(
            "endless", "\\frac{1}{2}", "</think>\\boxed{5^{5^{5^{5^5}}}}", "</think>\\boxed{.5}"
        ),
        # Traces of a teacher that does not mark its thinking are read whole.
        unlabelled("plain", "2", *plain),
        unlabelled("thinks", "2", *cut),
    ]
    counts, card = prepared(rows, workers=1)
    assert counts.no_positive["no answer to grade by"] == 1
    assert counts.no_pair["no incorrect generation"] == 1
    assert problems() == [row["problem"] for row in rows if row["problem"] != "no answer"]
    assert card["labels"] == {
        "none": {"correct": 5, "incorrect": 2, "no_answer": 3, "truncated": 0, "timeout": 1}
    }
    first = (TRACES[0][0], TRACES[1][0])
    assert dict(zip(texts("prompt"), zip(texts("chosen"), texts("rejected")))) == {
        "graded": first, "given": first, "given, no answer": first,
        "plain": plain, "thinks": cut[::-1],
    }  # fmt: skip


def test_relabel_grades_every_trace_and_prints_how_far_the_labels_agree(capsys):
    write_jsonl(Path("raw.jsonl"), [listed("1+1?", labels=True)])
    assert shown(capsys, "--relabel").endswith(
        "traces graded here, by the label that the data gives them:\n"
        "our verdict  correct  incorrect\n"
        "  correct          1          1\n"
        "  incorrect        0          1\n"
        "  no_answer        2          0\n"
        "  truncated        0          0\n"
        "  timeout          0          0\n"
        "agreement on correct or not: 2 of 5, 40.0%\n"
        "saved made/positives.jsonl, made/pairs.jsonl, made/card.json\n"
    )
    assert json.loads(Path("made/card.json").read_text())["rules"]["relabel"] is True
    # OpenR1-Math-Raw without labels: dropped as in the paper, unless relabelled.
    row = raw("1+1?", llama=None, generations=["\\boxed{3}", "\\boxed{2}", "x"], answer="2")
    for relabel, missing in ((False, 1), (True, 0)):
        counts, _ = prepared([row, raw("labelled", answer="2")], relabel=relabel, workers=1)
        assert counts.no_positive["labels missing"] == missing


def test_the_bytes_are_the_same_with_any_number_of_workers():
    """Answers that take algebra, in more rows than one batch."""
    answers = ((f"\\frac{{{n}}}{{7}}", f"{2 * n}/14", f"{n}/8") for n in range(1, 71))
    rows = [unlabelled(a, a, *(f"</think>\\boxed{{{x}}}" for x in (b, c))) for a, b, c in answers]
    results = []
    for workers in (1, 3):
        counts, _ = prepared(rows, workers=workers)
        assert counts.pairs == 70
        results.append(written())
    assert results[0] == results[1]


def test_rows_of_one_problem_with_two_answers_are_each_graded_by_their_answer():
    given = [("2", "2"), ("3", "3"), ("4", "2"), ("2", None)]  # a trace's answer, its row's answer
    rows = [{"problem": "?", "response": f"\\boxed{{{x}}}", "answer": y} for x, y in given]
    _, card = prepared(rows, workers=1)
    assert card["labels"]["none"]["correct"] == 3
    assert texts("rejected") == ["\\boxed{4}"]


def test_of_problems_that_are_the_same_the_first_that_gives_a_positive_is_kept():
    same = [raw("Find $x$."), raw("Find $x$.", source="amc"), raw("find \\(x\\)")]
    counts, card = prepared([raw("Find $x$.", [False] * 3), *same, raw("Find $y$.")], dedup=True)
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
    assert {reason: n for reason, n in counts.no_positive.items() if n} == {
        "in a benchmark": 1, "in a benchmark, other numbers": 1, "no correct generation": 1,
    }  # fmt: skip
    assert card["benchmarks"] == {"walks": 1}
    found = read_jsonl("made/contaminated.jsonl")
    assert [(f["row"], f["benchmark"], f["benchmark_id"], f["kind"]) for f in found] == [
        (2, "walks", "w1", "same text"),
        (3, "walks", "w1", "other numbers"),
    ]
    assert card["sha256"]["contaminated.jsonl"] == sha256("made/contaminated.jsonl")
    prepared(rows)
    assert sorted(written()) == FILES


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("name", "value"), [("workers", 0), ("pairs_per_problem", 0), ("min_length_ratio", -0.1)]
)
def test_settings_that_make_no_sense_name_their_flag(name, value):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        PrepareConfig(raw="raw.jsonl", **{name: value})


GOOD, OTHER = json.dumps(raw("good")), '{"question": "1+1?"}'
FREE = 50_000  # bytes: no file can be longer
FAILURES = [  # {file: text}, RAW, --out, error; test_files.py has all failures of reading
    ({"a.jsonl": f"{GOOD}\n{GOOD[:50]}\n{GOOD}\n"}, "a.jsonl", "made", "a.jsonl:2: not valid JSON"),
    ({"a.jsonl": OTHER}, "a.jsonl", "made", "a.jsonl: not teacher data in a form known here"),
    # Of a folder, the wrong file in it is named.
    ({"x/a.jsonl": GOOD, "x/b.jsonl": OTHER}, "x", "made", "x/b.jsonl: not teacher data in a form"),
    (
        {"a.jsonl": json.dumps(raw("?", BOTH[:1]))}, "a.jsonl", "made",
        "a.jsonl: no row gives a positive (1 labels misaligned); nothing is written",
    ),
    (
        {"x/positives.jsonl": GOOD}, "x", "x",
        "--out x/positives.jsonl: would overwrite x/positives.jsonl; choose another file",
    ),
    ({"a.jsonl": GOOD}, "a.jsonl", "a.jsonl", "a.jsonl: cannot create this folder ("),
    ({"a.jsonl": GOOD}, "a.jsonl", "a.jsonl/made", "a.jsonl/made: cannot create this folder ("),
    # The disk fills up.
    (
        {"a.jsonl": f"{GOOD}\n" * 1000}, "a.jsonl", "made",
        "made/pairs.jsonl: cannot be written (File too large)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("files", "source", "out", "message"), FAILURES)
def test_a_bad_input_and_a_full_disk_are_one_line_and_an_earlier_runs_files_stay(
    capsys, folder, files, source, out, message
):
    def everything():
        return {file: file.is_file() and file.read_bytes() for file in folder.rglob("*")}

    prepared(ROWS)
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    before, limits = everything(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FREE, limits[1]))
    try:
        assert main_in_this_process(main, source, "--out", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert everything() == before


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
