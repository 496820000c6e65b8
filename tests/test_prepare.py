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

from redi.prepare import prepare

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


def test_one_row_per_rule_gives_exactly_the_rows_expected_with_every_drop_counted(tmp_path):
    json_lines(tmp_path / "raw.jsonl", ROWS)
    status, out, err = run("raw.jsonl", "--out", "made", cwd=tmp_path)
    assert (status, err) == (0, "")
    made = tmp_path / "made"
    assert sorted(f.name for f in made.iterdir()) == [
        "counts.json",
        "pairs.jsonl",
        "positives.jsonl",
    ]
    assert problems(made / "positives.jsonl") == POSITIVES
    assert problems(made / "pairs.jsonl") == PAIRS
    assert out == (
        "raw rows                   13\n"
        "  malformed                 0\n"
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
    counts = json.loads((made / "counts.json").read_text())
    assert counts["raw"] == "raw.jsonl"
    assert counts["rows"] == 13 == counts["positives"] + sum(counts["no_positive"].values())
    assert counts["positives"] == 5 == counts["pairs"] + sum(counts["no_pair"].values())
    assert counts["sha256"] == {
        name: hashlib.sha256((made / name).read_bytes()).hexdigest()
        for name in ("positives.jsonl", "pairs.jsonl")
    }


def test_a_line_is_the_json_that_the_trainers_read(tmp_path):
    prepare(str(json_lines(tmp_path / "raw.jsonl", [raw("1+1?")])), tmp_path)
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
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "raw.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    json_lines(folder / "part-0.jsonl", ROWS[:5])
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), folder / "part-1.parquet")
    written = {}
    for source in ("raw.jsonl", "raw.json", "raw.parquet", "folder", "raw.jsonl"):
        out = tmp_path / "made"
        counts = prepare(str(tmp_path / source), out)
        files = [(out / name).read_bytes() for name in ("positives.jsonl", "pairs.jsonl")]
        written.setdefault((files[0], files[1]), []).append(counts)
    assert len(written) == 1
    (all_counts,) = written.values()
    assert all(counts == all_counts[0] for counts in all_counts)


def test_half_of_a_surrogate_pair_is_counted_as_malformed(tmp_path):
    rows = [raw("good"), raw("bad \ud83d"), raw("bad", generations=["\udc00", "right", "x"])]
    counts = prepare(str(json_lines(tmp_path / "raw.jsonl", rows)), tmp_path / "made")
    assert counts.no_positive["malformed"] == 2
    assert problems(tmp_path / "made" / "positives.jsonl") == ["good"]


# ---------------------------------------------------------------- what goes wrong

GOOD = json.dumps(raw("good"))
BAD_INPUTS = [
    ("broken.jsonl", f"{GOOD}\n{GOOD[:50]}\n{GOOD}\n", "broken.jsonl:2: not valid JSON"),
    ("latin.jsonl", GOOD.encode() + b'\n{"x": "\xe9"}\n', "latin.jsonl:2: not valid JSON in UTF-8"),
    ("list.jsonl", f"{GOOD}\n[]\n", "list.jsonl:2: expected a JSON object"),
    ("empty.jsonl", "", "empty.jsonl: holds no rows"),
    ("false.parquet", "PAR1", "false.parquet: not a sound Parquet file"),
    ("other.jsonl", '{"question": "1+1?"}\n', "other.jsonl: not OpenR1-Math-Raw: expected"),
    ("table.csv", "problem\n1+1?\n", "table.csv: expected a .parquet, .jsonl or .json"),
    ("gone.jsonl", None, "gone.jsonl: no such file or folder"),
    ("org/set", None, "org/set: no such local path, and the hub does not give this dataset"),
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
    assert err.startswith(f"error: {tmp_path}/b.jsonl: not OpenR1-Math-Raw")
    assert not list((tmp_path / "made").glob("*"))


def test_a_failed_run_leaves_the_files_of_an_earlier_one(tmp_path):
    prepare(str(json_lines(tmp_path / "raw.jsonl", ROWS)), tmp_path / "made")
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
        assert err.startswith(f"error: {out}: cannot be made a folder (")
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
