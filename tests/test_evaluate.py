"""evaluate.py from end to end on the toy's untrained student: killed and resumed, graded again,
completions of another program. Greedy and short, so that a run takes seconds.

python -m pytest tests/test_evaluate.py -m slow      kills an evaluation ten times
"""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, child, command, finished, main_in_this_process, torchrun, wait_until
from small_run import read_jsonl, write_jsonl

from redi import programs
from redi.checkpoint.folder import load_model
from redi.distributed import World
from redi.eval import evaluation, grade
from redi.eval.completions import Completion, read_lines
from redi.eval.engine import complete
from redi.eval.engine.generate import Request
from redi.eval.engine.sampling import Sampling
from redi.eval.protocol import PromptedSample
from redi.toy import student as toy

PROBLEMS, SAMPLES = 6, 2
FILES = ["report.json", "report.md", "report.html", "completions/benchmark.jsonl",
         "problems/benchmark.jsonl", "verdicts/math-verify/benchmark.jsonl",
         "verdicts/paper/benchmark.jsonl"]  # fmt: skip
SAMPLING = ["--model", "toy/student", "--benchmark", "toy/benchmark.jsonl", "--temperature", "0",
            "--user-prompt", "plain", "--slots", "2"]  # fmt: skip
SHORT = [*SAMPLING, "--samples", str(SAMPLES), "--max-new-tokens", "24"]
LONG = [*SAMPLING, "--samples", "40", "--max-new-tokens", "90"]
# id, text, finish_reason of another program's completions; A stands for the gold.
EXTERNAL = [
    ("0", "</think> \\boxed{A}", "stop"),
    ("1", "</think> \\boxed{A}", "length"),
    ("2", "no end of thinking \\boxed{A}", None),
    ("3", "</think> \\boxed{nothing}", None),
    ("4", "</think> \\boxed{A} then \\boxed{", None),
    ("5", "</think> \\boxed{0A}", "stop"),
]
GIVEN = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """toy/ with student/ and benchmark.jsonl; made.jsonl; whole/ and given/, two evaluations."""
    folder = tmp_path_factory.mktemp("evaluate")
    arguments = [folder / "toy", "--problems", 20, "--benchmark", PROBLEMS]
    assert main_in_this_process(toy.main, *arguments) == 0
    golds = [row["answer"] for row in read_jsonl(folder / "toy/benchmark.jsonl")]
    rows = [
        {"id": id, "sample": 0, "text": text.replace("A", gold), "finish_reason": reason}
        for (id, text, reason), gold in zip(EXTERNAL, golds)
    ]
    write_jsonl(folder / "made.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluated("whole") == 0
        assert main_in_this_process(programs.evaluate, *GIVEN) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working folder with toy/, made.jsonl and whole/."""
    for name in ("toy", "whole"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "made.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(made, here) -> Path:
    """The same with run/, the evaluation of made.jsonl."""
    shutil.copytree(made / "run", here / "run")
    return here / "run"


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(n): sampling dies when n completions exist. Returns a list of their keys."""
    generate = complete.generate

    def killed_after(count: int) -> list:
        keys = []

        def dying(*given):
            for result in generate(*given):
                if len(keys) == count:
                    raise Killed
                keys.append(result.key)
                yield result

        monkeypatch.setattr(complete, "generate", dying)
        return keys

    return killed_after


def evaluated(out: str, *more) -> int:
    return main_in_this_process(programs.evaluate, *SHORT, "--out", out, *more)


def regraded(*more) -> int:
    return main_in_this_process(grade.main, "regrade", "run", *more)


def contents(out: str) -> dict[str, bytes]:
    return {name: Path(out, name).read_bytes() for name in FILES}


def report(out: str) -> dict:
    return json.loads(Path(out, "report.json").read_text())


def verdicts(grader: str) -> list[str]:
    return [row["verdict"] for row in read_jsonl(f"run/verdicts/{grader}/benchmark.jsonl")]


def unfinished(out: str) -> list[bytes]:
    files = Path(out).glob("completions/*.unfinished-*.jsonl")
    return [line for file in files for line in file.read_bytes().splitlines()]


# ---------------------------------------------------------------- survival


def test_a_killed_evaluation_resumes_and_ends_in_the_same_bytes(
    here, killed_after, monkeypatch, capsys
):
    """Also with less memory and fewer slots, which change no answer."""
    keys = []
    for number in (3, 0, 5):
        new = killed_after(number)
        with pytest.raises(Killed):
            evaluated("run")
        keys += new
        assert len(unfinished("run")) == len(keys)
    assert regraded("--grader", "paper") == 2
    assert "completions/benchmark.jsonl: no such file" in capsys.readouterr().err
    assert not Path("run/verdicts").exists()

    with monkeypatch.context() as patch:
        patch.delattr(grade.Grader, "marks")
        new = killed_after(-1)
        with pytest.raises(AttributeError):  # it dies while grading
            evaluated("run", "--slots", "1", "--cache-gib", "0.02")
    assert len({*keys, *new}) == len([*keys, *new]) == PROBLEMS * SAMPLES  # none is sampled twice
    assert not Path("run/report.json").exists()
    killed_after(0)  # sampling anything would die
    assert evaluated("run") == 0
    assert contents("run") == contents("whole")


def test_an_evaluation_that_did_not_record_its_grader_resumes_with_math_verify(
    here, killed_after, capsys
):
    """As older versions did not."""
    killed_after(0)
    with pytest.raises(Killed):
        evaluated("run", "--grader", "math-verify")
    settings = Path("run/config.toml")
    settings.write_text(settings.read_text().replace('grader = "math-verify"\n', ""))
    assert evaluated("run") == 2
    assert "holds another run (grader was 'math-verify', now 'both')" in capsys.readouterr().err
    with pytest.raises(Killed):
        evaluated("run", "--grader", "math-verify")


COUNTED = """
import os, sys
from redi import programs
from redi.model import Layers

os.makedirs(folder := sys.argv.pop(1), exist_ok=True)
file = os.open(f"{folder}/{os.getpid()}", os.O_WRONLY | os.O_CREAT)
total, forward = 0, Layers.forward

def counted(self, tokens, *rest):
    global total
    total += tokens.numel()
    os.pwrite(file, b"%020d" % total, 0)  # first: a kill may come within the pass
    return forward(self, tokens, *rest)

Layers.forward = counted
programs.evaluate()
"""


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_by_the_clock_ends_in_the_same_bytes(here):
    """At random moments, on one rank or two. The model reads at most 1.1 times the tokens: prompts,
    and all of each answer but its last token."""
    Path("counted.py").write_text(COUNTED)

    def start(out: str, ranks: int = 1):
        program = ["counted.py", f"{out}.tokens", *LONG, "--out", out]
        return command(*program) if ranks == 1 else torchrun(ranks, *program)

    def tokens_read(out: str) -> int:
        return sum(int(file.read_text()) for file in Path(f"{out}.tokens").iterdir())

    assert start("long").wait() == 0
    export = [*LONG, "--export-prompts", "prompts.jsonl"]
    assert main_in_this_process(programs.evaluate, *export) == 0
    prompts = sum(len(row["prompt_token_ids"]) for row in read_jsonl("prompts.jsonl"))
    completions = read_jsonl("long/completions/benchmark.jsonl")
    answers = sum(row["num_tokens"] for row in completions)
    assert tokens_read("long") == prompts + answers - len(completions)

    draw = random.Random(1)
    for number, target in enumerate(sorted(draw.sample(range(len(completions) - 10), 10))):
        running = start("killed", ranks=2 if number in (3, 7) else 1)
        wait_until(lambda: len(unfinished("killed")) >= target, running, 300)  # noqa: B023
        time.sleep(draw.uniform(0, 0.05))
        for pid in [*children(running.pid), running.pid]:
            os.kill(pid, signal.SIGKILL)
        running.communicate()
        assert not Path("killed/report.json").exists()
    assert start("killed").wait() == 0
    assert contents("killed") == contents("long")
    ratio = tokens_read("killed") / tokens_read("long")
    print(f"tokens read, over those without kills: {ratio:.3f}")
    assert ratio <= 1.1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_ranks_share_the_problems_that_one_left(here, killed_after):
    killed_after(3)
    with pytest.raises(Killed):
        evaluated("two")
    running = torchrun(2, ROOT / "evaluate.py", *SHORT, "--out", "two")
    shown, errors = running.communicate(timeout=100)
    assert running.returncode == 0, errors
    assert "two holds 3 of 12 completions; the rest are sampled now" in shown
    assert shown.count("saved two/report.html") == 1
    assert contents("two") == contents("whole")


def test_ranks_take_whole_problems_of_one_list_as_their_rows_become_free(here):
    requests = [Request(key, (1 + key // 2, 2, 3), 8) for key in range(12)]
    prompted = [PromptedSample("b", str(r.key // 2), r.key % 2, r) for r in requests]
    counters = complete.shared_counters(World(0, 1, torch.device("cpu")))
    ranks = [complete.take_problems(prompted, counters) for _ in range(2)]
    first = [next(ranks[rank])[0].key for rank in (0, 1, 1)]
    assert first == [0, 2, 4]  # no problem twice
    model, _ = load_model("toy/student")
    taken, keys = [], []

    def groups():
        for group in ranks[0]:
            taken.append(group)
            yield group

    for result in complete.generate(model, requests, [], Sampling(0, 1, 0), 2, taken=groups()):
        keys.append(result.key)
        assert len(taken) == (len(keys) + 1) // 2
    assert sorted(keys) == list(range(6, 12))
    assert next(ranks[1], None) is None


def test_a_real_kill_a_second_process_and_ctrl_c(here):
    def start():
        return child(here, [*LONG, "--out", "run"], main=programs.evaluate)

    def wait_for(number: int, running) -> None:
        wait_until(lambda: len(unfinished("run")) >= number or running.process.exitcode is not None)
        assert running.process.exitcode is None, running.errors

    first = start()
    wait_for(1, first)
    second = start()
    second.ends(2)
    assert second.errors.splitlines() == ["error: --out run: another process is running there"]
    os.kill(first.process.pid, signal.SIGKILL)
    first.ends(-signal.SIGKILL)
    kept = unfinished("run")

    third = start()
    wait_for(len(kept) + 1, third)
    os.kill(third.process.pid, signal.SIGINT)
    third.ends(130)
    line = [line for line in third.errors.splitlines() if line][-1]
    number = len(unfinished("run"))
    expected = (
        f"stopped: run holds {number} of {PROBLEMS * 40} completions; the same command resumes"
    )
    assert line == expected
    assert set(kept[:-1]) <= set(unfinished("run"))


CHANGES = [  # a file of toy/, what replaces what in it, the words of the refusal
    ("student/model.safetensors", None, None, "its weights changed since run"),
    ("student/chat_template.jinja", "{%- for", "Hi {%- for", "its tokenizer changed since run"),
    ("student/config.json", '"rope_theta": 1', '"rope_theta": 2',
     "its config.json or stop tokens changed since run"),
    ("benchmark.jsonl", "modulo 10", "modulo 9", "its problems have changed since run"),
]  # fmt: skip


def change(name: str, before: str | None, after: str | None) -> None:
    """before: None flips a bit of the last byte."""
    path = Path("toy", name)
    content = path.read_bytes()
    if before is None:
        changed = content[:-1] + bytes([content[-1] ^ 1])
    else:
        changed = content.replace(before.encode(), after.encode())
    assert changed != content
    path.write_bytes(changed)


def test_ranks_compare_settings_model_and_problems(here, killed_after, monkeypatch):
    """What differs between two evaluations is what two ranks would be refused for."""
    compared = []
    monkeypatch.setattr(evaluation, "require_same", lambda values, _: compared.append(values))
    killed_after(0)
    with pytest.raises(Killed):
        evaluated("one")
    for name, before, after, _ in CHANGES:
        change(name, before, after)
    with pytest.raises(Killed):
        evaluated("two", "--seed", "1", "--slots", "3", "--graders", "1")
    differ = [[k for k in a if b[k] != a[k]] for a, b in zip(compared, compared[3:])]
    model = ["weights", "tokenizer", "config.json or stop tokens"]
    assert differ == [["out", "seed"], ["sha256 of --benchmark"], model]


def test_what_changes_under_an_evaluation_is_refused_by_name(here, killed_after, capsys):
    """Under one that has begun, and under one that is finished."""
    shutil.copytree("toy", "before")
    killed_after(2)
    with pytest.raises(Killed):
        evaluated("run")
    for count in (2, 0):
        assert len(unfinished("run")) == count
        for name, before, after, refusal in CHANGES:
            change(name, before, after)
            assert evaluated("run") == 2
            assert refusal in capsys.readouterr().err
            shutil.copy(Path("before", name), Path("toy", name))
        assert len(unfinished("run")) == count
        killed_after(-1)
        assert evaluated("run") == 0
        assert contents("run") == contents("whole")
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- grading


def test_a_gold_that_cannot_be_read_is_reported_before_sampling(here, killed_after, capsys):
    odd = {"id": "odd", "problem": "1?", "answer": "\\frac{1}{"}
    write_jsonl(Path("toy/benchmark.jsonl"), [*read_jsonl("toy/benchmark.jsonl"), odd])
    killed_after(0)
    with pytest.raises(Killed):
        evaluated("run")
    assert "benchmark: 1 gold answers cannot be read" in capsys.readouterr().out


def test_completions_of_another_program_are_graded_and_reported_like_our_own(given, capsys):
    assert verdicts("math-verify") == [
        "correct", "truncated", "no_answer", "incorrect", "correct", "correct",
    ]  # fmt: skip
    found = report("run")
    assert found["model"] == "made.jsonl"
    assert found["settings"]["samples"] == 1
    assert "temperature" not in found["settings"]  # unknown
    [score] = found["benchmarks"]
    assert score["pass_at_1"] == 0.5
    assert score["mean_tokens"] is None
    assert contents("run")
    assert main_in_this_process(programs.evaluate, *GIVEN) == 0
    assert "is finished" in capsys.readouterr().out
    rows = read_jsonl("made.jsonl")
    write_jsonl(Path("made.jsonl"), [{**rows[0], "text": "something else"}, *rows[1:]])
    assert main_in_this_process(programs.evaluate, *GIVEN) == 2
    assert "holds other completions; choose another --out" in capsys.readouterr().err
    write_jsonl(Path("made.jsonl"), rows[:-1])
    assert main_in_this_process(programs.evaluate, *GIVEN[:-1], "new") == 2
    assert "problem '5' has samples []" in capsys.readouterr().err
    assert not Path("new").exists()


def test_exported_prompts_answered_by_another_program_score_as_our_own(here):
    """The other program is our own sampling; only files go back and forth."""
    assert evaluated("unused", "--export-prompts", "prompts.jsonl") == 0
    assert not Path("unused").exists()
    own = {c.key: c for c in read_lines(Path("whole/completions/benchmark.jsonl"), Completion)}
    rows = []
    for prompt in read_jsonl("prompts.jsonl"):
        for sample in range(prompt["samples"]):
            rows.append(vars(own[prompt["id"], sample]))
    write_jsonl(Path("made.jsonl"), rows)
    assert evaluated("made", "--completions", "made.jsonl") == 0
    assert report("whole")["benchmarks"] == report("made")["benchmarks"]


def test_the_papers_grader_has_its_own_verdicts_beside_ours(given):
    before = contents("run")
    assert verdicts("paper") == [
        "correct", "correct", "no_answer", "incorrect", "no_answer", "correct",
    ]  # fmt: skip
    both = report("run")
    assert (both["grader"], both["mean_pass_at_1"]) == ("both", 3 / 6)
    graders = [score["grader"] for score in both["benchmarks"] + both["other_grader"]]
    assert graders == ["math-verify", "paper"]
    assert regraded("--grader", "paper") == 0
    assert contents("run") == before
    alone = report("run/verdicts/paper")
    assert (alone["grader"], alone["other_grader"]) == ("paper", [])
    assert alone["benchmarks"] == both["other_grader"]
    # Grading again needs neither torch nor a model.
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['grade', 'regrade', 'run']\n"
        "from redi.eval.grade import main; main()"
    )
    status, _, errors = finished("-c", code)
    assert status == 0, errors
    assert contents("run") == before


def test_a_model_that_does_not_think_is_graded_by_its_whole_responses(here):
    assert main_in_this_process(programs.evaluate, *GIVEN, "--prefix", "") == 0
    whole = ["correct", "truncated", "correct", "incorrect", "correct", "correct"]
    steps = [
        ([], "whole", "in the whole response", whole),
        (["--answer-from", "after_think"], "after_think", "after </think>",
         [*whole[:2], "no_answer", *whole[3:]]),
        ([], "whole", "in the whole response", whole),  # the rule of the run
    ]  # fmt: skip
    for number, (flags, rule, words, expected) in enumerate(steps):
        assert number == 0 or regraded(*flags) == 0
        assert verdicts("math-verify") == expected
        assert report("run")["benchmarks"][0]["answer_from"] == rule
        assert words in Path("run/report.md").read_text()
        assert (
            words.replace(">", "&gt;").replace("<", "&lt;") in Path("run/report.html").read_text()
        )


def test_grading_again_keeps_the_verdicts_where_a_completion_is_lost(given, capsys):
    before = {name: content for name, content in contents("run").items() if "comp" not in name}
    path = Path("run/completions/benchmark.jsonl")
    first, *others = path.read_text().splitlines(keepends=True)
    unknown = first.replace('"id": "0"', '"id": "none"')
    for lines, message in (
        (others, r"problem '0' has samples \[\]"),
        ([unknown, *others], "holds no problem 'none'"),
    ):
        path.write_text("".join(lines))
        assert regraded() == 2
        assert re.search(message, capsys.readouterr().err)
        assert {name: Path("run", name).read_bytes() for name in before} == before
