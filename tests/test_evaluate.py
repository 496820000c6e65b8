"""evaluate.py from end to end on the toy's untrained student: killed and continued, graded again,
completions from elsewhere. Greedy and short, so that a run takes seconds."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from redi import programs
from redi.distributed import World
from redi.eval import evaluation, grade
from redi.eval.completions import Completion, read_lines
from redi.eval.engine import complete
from redi.eval.engine.generate import Request
from redi.eval.protocol import Asked
from redi.toy import student as toy

ROOT = Path(__file__).parent.parent
PROBLEMS, SAMPLES = 6, 2
FILES = ["report.json", "report.md", "report.html", "completions/benchmark.jsonl",
         "problems/benchmark.jsonl", "verdicts/math-verify/benchmark.jsonl",
         "verdicts/paper/benchmark.jsonl"]  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A small toy: student/, benchmark.jsonl."""
    folder = tmp_path_factory.mktemp("toy")
    assert run(toy.main, folder, "--problems", 20, "--benchmark", PROBLEMS) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(main, *arguments) -> int:
    """The exit status of a program."""
    before, sys.argv = sys.argv, ["program", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def arguments(out: str) -> list[str]:
    return [
        "--model", "toy/student", "--benchmark", "toy/benchmark.jsonl", "--samples", str(SAMPLES),
        "--temperature", "0", "--max-new-tokens", "24", "--user-prompt", "plain", "--slots", "2",
        "--out", out,
    ]  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def evaluated(out: str, *more) -> int:
    return run(programs.evaluate, *arguments(out), *more)


def contents(out: str) -> dict[str, bytes]:
    return {name: Path(out, name).read_bytes() for name in FILES}


def unfinished(out: str) -> list[bytes]:
    files = Path(out).glob("completions/*.unfinished-*.jsonl")
    return [line for file in files for line in file.read_bytes().splitlines()]


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(n): sampling dies when n completions have been made."""
    generate = complete.generate

    def killed_after(count: int) -> list:
        made = []

        def dying(*given):
            for result in generate(*given):
                if len(made) == count:
                    raise Killed
                made.append(result.key)
                yield result

        monkeypatch.setattr(complete, "generate", dying)
        return made

    return killed_after


# ---------------------------------------------------------------- survival


def test_a_killed_evaluation_goes_on_and_ends_the_same(here, killed_after):
    assert evaluated("whole") == 0
    keys = []
    for made_before_the_kill in (3, 0, 5):
        made = killed_after(made_before_the_kill)
        with pytest.raises(Killed):
            evaluated("killed")
        keys += made
        assert len(unfinished("killed")) == len(keys)
        assert not Path("killed/report.json").exists()
    keys += (made := killed_after(-1))
    assert evaluated("killed") == 0
    assert len({*keys, *made}) == len([*keys, *made]) == PROBLEMS * SAMPLES  # none is made twice
    assert contents("killed") == contents("whole")


def test_less_memory_and_fewer_slots_may_go_on(here, killed_after, capsys):
    """Who runs out of memory halfway keeps what is made: neither changes an answer. Nor does a
    setting that is missing from config.toml, as older versions did not have it."""
    own = ("--grader", "math-verify")
    assert evaluated("whole", *own) == 0
    killed_after(3)
    with pytest.raises(Killed):
        evaluated("killed", *own)
    settings = Path("killed/config.toml")
    settings.write_text(settings.read_text().replace('grader = "math-verify"\n', ""))
    assert evaluated("killed") == 2
    assert "holds another run (grader was 'math-verify', now 'both')" in capsys.readouterr().err
    made = killed_after(-1)
    assert evaluated("killed", *own, "--slots", "1", "--cache-gib", "0.02") == 0
    assert len(made) == PROBLEMS * SAMPLES - 3
    for name in set(FILES) - {"verdicts/paper/benchmark.jsonl"}:
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_kill_while_grading_costs_no_completion(here, killed_after, monkeypatch):
    assert evaluated("whole") == 0

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(grade.Grader, "marks", die)
        with pytest.raises(Killed):
            evaluated("killed")
    made = killed_after(0)  # sampling anything would die
    assert evaluated("killed") == 0
    assert made == []
    assert contents("killed") == contents("whole")


def command(*given, before=()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *before, ROOT / "evaluate.py", *map(str, given)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
             "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_two_ranks_make_what_one_makes_and_go_on_from_one(here, killed_after):
    assert evaluated("whole") == 0
    killed_after(3)
    with pytest.raises(Killed):
        evaluated("two")
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    running = command(*arguments("two"), before=ranks)
    said, errors = running.communicate(timeout=100)
    assert running.returncode == 0, errors
    assert "two holds 3 of 12 completions; the rest are made now" in said
    assert said.count("saved two/report.html") == 1
    assert contents("two") == contents("whole")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_gets_its_share_of_every_benchmark(world_size):
    asked = [
        Asked(name, str(problem), sample, Request(0, (1,) * (1 + problem * 7 % 40), 5))
        for name, problems in (("a", 40), ("b", 9))
        for problem in range(problems)
        for sample in range(3)
    ]
    device = torch.device("cpu")
    shares = [complete.deal(asked, World(r, world_size, device)) for r in range(world_size)]
    assert sorted(map(asked.index, itertools.chain(*shares))) == list(range(len(asked)))
    for share in shares:
        problems = [key for key, _ in itertools.groupby((one.benchmark, one.id) for one in share)]
        assert len(share) == 3 * len(problems)  # a problem's samples follow each other
        of_b = sum(name == "b" for name, _ in problems)
        assert 9 // world_size <= of_b <= 9 // world_size + 2
        lengths = [len(one.request.prompt_ids) for one in share]
        assert lengths == sorted(lengths, reverse=True)
    loads = [sum(math.sqrt(len(one.request.prompt_ids)) for one in share) for share in shares]
    assert max(loads) < 1.15 * sum(loads) / world_size


def wait_for_completions(out: str, running: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not unfinished(out):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "no completion came"
        time.sleep(0.01)


LONG = ["--max-new-tokens", "90", "--samples", "60"]


def test_a_real_kill_a_second_run_beside_and_ctrl_c(here):
    first = command(*arguments("run"), *LONG)
    wait_for_completions("run", first)
    beside = command(*arguments("run"), *LONG)
    _, errors = beside.communicate(timeout=60)
    assert beside.returncode == 2
    assert errors.splitlines() == ["error: --out run: another process is running there"]
    first.kill()
    first.communicate(timeout=60)
    kept = unfinished("run")

    third = command(*arguments("run"), *LONG)
    end = time.monotonic() + 60
    while len(unfinished("run")) <= len(kept):
        assert third.poll() is None, third.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    third.send_signal(signal.SIGINT)
    _, errors = third.communicate(timeout=60)
    assert third.returncode == 130
    [line] = [line for line in errors.splitlines() if line]
    made = len(unfinished("run"))
    assert line == (
        f"stopped: run holds {made} of {PROBLEMS * 60} completions; the same command goes on"
    )
    assert set(kept) - {kept[-1]} <= set(unfinished("run"))


def change_weights(student: Path) -> None:
    path = student / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_text(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


CHANGES = {  # what changes under an evaluation -> the words that refuse it
    "weights": (lambda toy: change_weights(toy / "student"), "its weights changed since run"),
    "tokenizer": (
        lambda toy: change_text(toy / "student/chat_template.jinja", "{%- for", "Hi {%- for"),
        "its tokenizer changed since run",
    ),
    "config": (
        lambda toy: change_text(toy / "student/config.json", '"rope_theta": 1', '"rope_theta": 2'),
        "its config.json or stop tokens changed since run",
    ),
    "problems": (
        lambda toy: change_text(toy / "benchmark.jsonl", "modulo 10", "modulo 9"),
        "its problems have changed since run",
    ),
}


def test_ranks_compare_settings_model_and_problems(here, monkeypatch):
    """What differs between two evaluations is what two ranks would be refused for."""
    compared = []
    monkeypatch.setattr(evaluation, "require_same", lambda values, _: compared.append(values))
    assert evaluated("one") == 0
    for change, _ in CHANGES.values():
        change(Path("toy"))
    assert evaluated("two", "--seed", "1", "--slots", "3", "--graders", "1") == 0
    differ = [[k for k in a if b[k] != a[k]] for a, b in zip(compared, compared[3:])]
    model = ["weights", "tokenizer", "config.json or stop tokens"]
    assert differ == [["out", "seed"], ["sha256 of --benchmark"], model]


def test_what_changes_under_an_evaluation_is_refused_by_name(here, killed_after, capsys):
    """Under one that has begun, and under one that is finished."""
    killed_after(2)
    with pytest.raises(Killed):
        evaluated("run")
    shutil.copytree("toy", "before")
    for finished in (False, True):
        report = Path("run/report.json").read_bytes() if finished else None
        for change, refusal in CHANGES.values():
            change(Path("toy"))
            assert evaluated("run") == 2
            assert refusal in capsys.readouterr().err
            shutil.rmtree("toy")
            shutil.copytree("before", "toy")
        if finished:
            assert Path("run/report.json").read_bytes() == report
        else:
            assert len(unfinished("run")) == 2
            killed_after(-1)
            assert evaluated("run") == 0
    assert evaluated("run") == 0
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- grading


def test_a_benchmark_whose_gold_cannot_be_read_says_so_at_the_start(here, capsys):
    path = Path("toy/benchmark.jsonl")
    row = {"id": "odd", "problem": "1?", "answer": "\\frac{1}{"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert evaluated("run") == 0
    assert "benchmark: 1 gold answers cannot be read" in capsys.readouterr().out


MADE = [
    ("0", "</think> \\boxed{A}", "stop"),  # A: the gold, put in below
    ("1", "</think> \\boxed{A}", "length"),
    ("2", "no end of thinking \\boxed{A}", None),
    ("3", "</think> \\boxed{nothing}", None),
    ("4", "</think> \\boxed{A} then \\boxed{", None),
    ("5", "</think> \\boxed{0A}", "stop"),
]


def write_made() -> list[str]:
    """made.jsonl: one sample a problem, with the golds of the toy's benchmark."""
    golds = [json.loads(line)["answer"] for line in open("toy/benchmark.jsonl")]  # noqa: SIM115
    with open("made.jsonl", "w") as file:
        for (id, text, reason), gold in zip(MADE, golds):
            row = {"id": id, "sample": 0, "text": text.replace("A", gold), "finish_reason": reason}
            file.write(json.dumps(row) + "\n")
    return golds


def verdicts(out: str, grader: str) -> list[str]:
    lines = Path(out, "verdicts", grader, "benchmark.jsonl").read_text().splitlines()
    return [json.loads(line)["verdict"] for line in lines]


def test_completions_from_elsewhere_are_graded_and_reported_like_our_own(here, capsys):
    write_made()
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl"]
    assert run(programs.evaluate, *given) == 0
    out = "out/eval/made"
    assert verdicts(out, "math-verify") == [
        "correct", "truncated", "no_answer", "incorrect", "correct", "correct",
    ]  # fmt: skip
    content = json.loads(Path(out, "report.json").read_text())
    assert content["model"] == "made.jsonl"
    assert content["settings"]["samples"] == 1
    assert "temperature" not in content["settings"]  # nobody said
    [score] = content["benchmarks"]
    assert score["pass_at_1"] == 0.5
    assert score["mean_tokens"] is None
    assert contents(out)
    capsys.readouterr()
    assert run(programs.evaluate, *given) == 0
    assert "is finished" in capsys.readouterr().out
    path = Path("made.jsonl")
    path.write_text(path.read_text().replace("nothing", "something"))
    assert run(programs.evaluate, *given) == 2
    assert "holds other completions; choose another --out" in capsys.readouterr().err


def test_the_paper_grader_gives_its_own_verdicts_beside_ours(here):
    write_made()
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    assert run(programs.evaluate, *given) == 0
    before = contents("run")
    assert run(grade.main, "regrade", "run", "--grader", "paper") == 0
    assert verdicts("run", "paper") == [
        "correct", "correct", "no_answer", "incorrect", "no_answer", "correct",
    ]  # fmt: skip
    both = json.loads(before["report.json"])
    assert (both["grader"], both["mean_pass_at_1"]) == ("both", 3 / 6)
    assert [s["grader"] for s in both["benchmarks"] + both["other_grader"]] == [
        "math-verify", "paper",
    ]  # fmt: skip
    assert contents("run") == before
    report = json.loads(Path("run/verdicts/paper/report.json").read_text())
    assert (report["grader"], report["other_grader"]) == ("paper", [])
    assert report["benchmarks"] == both["other_grader"]
    assert run(grade.main, "regrade", "run") == 0
    assert contents("run") == before


def test_a_model_that_does_not_think_is_graded_by_its_whole_responses(here):
    write_made()
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    assert run(programs.evaluate, *given, "--prefix", "") == 0
    whole = ["correct", "truncated", "correct", "incorrect", "correct", "correct"]
    assert verdicts("run", "math-verify") == whole

    def rule() -> tuple[str, bool]:
        [score] = json.loads(Path("run/report.json").read_text())["benchmarks"]
        texts = [Path("run", name).read_text() for name in ("report.md", "report.html")]
        said = {"whole": "in the whole response", "after_think": "after </think>"}
        escaped = [text.replace("\\u003c", "<").replace("\\u003e", ">") for text in texts]
        return score["answer_from"], all(said[score["answer_from"]] in text for text in escaped)

    assert rule() == ("whole", True)
    assert run(grade.main, "regrade", "run", "--answer-from", "after_think") == 0
    assert verdicts("run", "math-verify") == [*whole[:2], "no_answer", *whole[3:]]
    assert rule() == ("after_think", True)
    assert run(grade.main, "regrade", "run") == 0  # as evaluate.py did
    assert verdicts("run", "math-verify") == whole


def test_grading_again_needs_neither_torch_nor_a_model(here):
    write_made()
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    assert run(programs.evaluate, *given) == 0
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['grade', 'regrade', 'run']\n"
        "from redi.eval.grade import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unfinished_evaluation_is_not_graded_again(here, killed_after, capsys):
    killed_after(2)
    with pytest.raises(Killed):
        evaluated("run")
    assert run(grade.main, "regrade", "run", "--grader", "paper") == 2
    assert "completions/benchmark.jsonl: no such file" in capsys.readouterr().err
    assert not Path("run/verdicts").exists()


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_grading_again_leaves_good_verdicts_where_a_completion_is_lost(here, capsys, damage):
    write_made()
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    assert run(programs.evaluate, *given) == 0
    before = {name: content for name, content in contents("run").items() if "comp" not in name}
    path = Path("run/completions/benchmark.jsonl")
    first, *others = path.read_text().splitlines(keepends=True)
    unknown = first.replace('"id": "0"', '"id": "none"')
    path.write_text("".join(([unknown] if damage == "unknown" else []) + others))
    assert run(grade.main, "regrade", "run") == 2
    problem = {"missing": r"problem '0' has samples \[\]", "unknown": "holds no problem 'none'"}
    assert re.search(problem[damage], capsys.readouterr().err)
    assert {name: Path("run", name).read_bytes() for name in before} == before


def test_a_sample_that_is_missing_is_refused_and_nothing_is_written(here, capsys):
    write_made()
    Path("made.jsonl").write_text("".join(open("made.jsonl").readlines()[:-1]))  # noqa: SIM115
    given = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    assert run(programs.evaluate, *given) == 2
    assert "sample 0 of problem '5' is missing" in capsys.readouterr().err
    assert not Path("run").exists()


def test_what_is_exported_answered_elsewhere_and_read_back_scores_as_our_own(here):
    """The "elsewhere" is our own sampling, told through the files alone."""
    assert evaluated("own") == 0
    assert evaluated("unused", "--export-prompts", "prompts.jsonl") == 0
    assert not Path("unused").exists()
    rows = [json.loads(line) for line in open("prompts.jsonl")]  # noqa: SIM115
    own = {c.key: c for c in read_lines(Path("own/completions/benchmark.jsonl"), Completion)}
    with open("made.jsonl", "w") as file:
        for row in rows:
            for sample in range(row["samples"]):
                c = own[row["id"], sample]
                made = {"id": c.id, "sample": sample, "text": c.text, "num_tokens": c.num_tokens}
                file.write(json.dumps({**made, "finish_reason": c.finish_reason}) + "\n")
    assert evaluated("made", "--completions", "made.jsonl") == 0
    scores = [
        json.loads(Path(out, "report.json").read_text())["benchmarks"] for out in ("own", "made")
    ]
    assert scores[0] == scores[1]
