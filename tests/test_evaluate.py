"""evaluate.py from end to end on the toy's untrained student: killed and resumed, graded again,
completions of another program. Greedy and short, so that a run takes seconds.

python -m pytest tests/test_evaluate.py -m slow      kills an evaluation ten times
"""

import html
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
from processes import (
    Child,
    child,
    main_in_this_process,
    ranks,
    run_command,
    run_ranks,
    wait_until,
)
from small_run import files_in, read_jsonl, write_jsonl

from redi import programs, toy
from redi.checkpoint.folder import load_model
from redi.data.files import whole_lines
from redi.distributed import World
from redi.eval import evaluation, grade, report
from redi.eval.benchmarks import Problem
from redi.eval.engine import complete, generate
from redi.eval.engine.generate import Request
from redi.eval.engine.sampling import Sampling
from redi.eval.protocol import PromptedSample

PROBLEMS = 6
SAMPLING = ["--model", "toy/student", "--benchmark", "toy/benchmark.jsonl", "--temperature", "0",
            "--user-prompt", "plain", "--slots", "2"]  # fmt: skip
SHORT = [*SAMPLING, "--samples", "2", "--max-new-tokens", "24"]
LONG = [*SAMPLING, "--samples", "40", "--max-new-tokens", "90"]
EXTERNAL = [  # text and finish_reason of another program's completions; A stands for the gold
    ("</think> \\boxed{A}", "stop"),
    ("</think> \\boxed{A}", "length"),
    ("no end of thinking \\boxed{A}", None),
    ("</think> \\boxed{nothing}", None),
    ("</think> \\boxed{A} then \\boxed{", None),
    ("</think> \\boxed{0A}", "stop"),
]
GIVEN = ["--completions", "made.jsonl", "--benchmark", "toy/benchmark.jsonl", "--out", "given"]


def evaluated(out: str, *more) -> int:
    return main_in_this_process(programs.evaluate, *SHORT, "--out", out, *more)


def graded(*more) -> int:
    """made.jsonl, in given/."""
    return main_in_this_process(programs.evaluate, *GIVEN, *more)


def regraded(out: str, *more) -> int:
    return main_in_this_process(grade.main, "regrade", out, *more)


def contents(out: str) -> dict[str, bytes]:
    """Problems, completions, verdicts and reports: what a kill and a resumption do not change."""
    files = {str(path.relative_to(out)): content for path, content in files_in(out).items()}
    return {name: files[name] for name in files.keys() - {"config.toml", "metrics.jsonl"}}


def report_json(out: str) -> dict:
    return json.loads(Path(out, "report.json").read_text())


def verdicts(grader: str) -> str:
    """The initials of those on made.jsonl: correct, incorrect, no_answer, truncated."""
    rows = read_jsonl(f"given/verdicts/{grader}/benchmark.jsonl")
    return " ".join(row["verdict"][0] for row in rows)


def unfinished(out: str) -> list[bytes]:
    files = Path(out).glob("completions/*.unfinished-*.jsonl")
    return [line for file in files for line in whole_lines(file)]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """toy/ with student/ and benchmark.jsonl; made.jsonl; whole/ and given/, evaluations."""
    folder = tmp_path_factory.mktemp("evaluate")
    arguments = [folder / "toy", "--problems", 20, "--benchmark", PROBLEMS]
    assert main_in_this_process(toy.main, *arguments) == 0
    golds = [row["answer"] for row in read_jsonl(folder / "toy/benchmark.jsonl")]
    rows = [
        {"id": id, "sample": 0, "text": text.replace("A", gold), "finish_reason": reason}
        for id, ((text, reason), gold) in enumerate(zip(EXTERNAL, golds))
    ]
    write_jsonl(folder / "made.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluated("whole") == graded() == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working folder with all of these."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(n, flags): evaluate into run/ until n completions exist, then die. Returns the
    keys of these. What is evaluated later is not killed."""

    def killed_after(count: int, *flags: str, out: str = "run") -> list:
        keys, generating = [], complete.generate

        def dying(*given, **settings):
            for result in generating(*given, **settings):
                if len(keys) == count:
                    raise Killed
                keys.append(result.key)
                yield result

        with monkeypatch.context() as patch:
            patch.setattr(complete, "generate", dying)
            with pytest.raises(Killed):
                evaluated(out, *flags)
        return keys

    return killed_after


# ---------------------------------------------------------------- survival


def test_a_killed_evaluation_resumes_and_ends_in_the_same_bytes(
    here, killed_after, monkeypatch, capsys
):
    """Also with less memory and fewer slots, which change no answer."""
    keys = []
    for number in (3, 0, 5):
        keys += killed_after(number)
        assert len(unfinished("run")) == len(keys)
    assert regraded("run", "--grader", "paper") == 2
    assert "completions/benchmark.jsonl: no such file" in capsys.readouterr().err
    assert not Path("run/verdicts").exists()

    with monkeypatch.context() as patch:
        patch.delattr(grade.Grader, "marks")
        with pytest.raises(AttributeError):  # it dies while grading
            evaluated("run", "--slots", "1", "--cache-gib", "0.02")
    assert "run holds 8 of 12 completions" in capsys.readouterr().out
    assert len(set(keys)) == 8  # none is sampled twice
    assert not Path("run/report.json").exists()
    monkeypatch.setattr(complete, "generate", lambda *_, **__: iter(()))  # samples nothing
    assert evaluated("run") == 0
    assert contents("run") == contents("whole")
    assert len(contents("run")) == 7  # no file of unfinished completions is left


def count_tokens() -> None:
    """In a child: a character per token drawn is appended to tokens.txt."""
    sample = generate.sample

    def counted(logits, *given):
        with open("tokens.txt", "a") as file:
            file.write("." * len(logits))
        return sample(logits, *given)

    generate.sample = counted


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_by_the_clock_ends_in_the_same_bytes(here):
    """At random moments, on one rank or two. What is on disk is never sampled again: a kill costs
    the answers that were being written, and ten of them less than a tenth of all tokens."""

    def start(out: str, num_ranks: int = 1) -> list[Child]:
        faults = [count_tokens] * num_ranks
        return ranks(here, [*LONG, "--out", out], *faults, main=programs.evaluate)

    start("long")[0].ends(0, 300)
    undisturbed_tokens = Path("tokens.txt").stat().st_size
    Path("tokens.txt").unlink()
    draw, kept = random.Random(1), []
    for number, target in enumerate(sorted(draw.sample(range(PROBLEMS * 40 - 10), 10))):
        running = start("run", num_ranks=2 if number in (3, 7) else 1)
        wait_until(lambda: len(unfinished("run")) >= target, seconds=300)  # noqa: B023
        time.sleep(draw.uniform(0, 0.05))
        for rank in running:
            os.kill(rank.process.pid, signal.SIGKILL)
        for rank in running:
            rank.ends(-signal.SIGKILL)
        assert not Path("run/report.json").exists()
        sampled = [(row["id"], row["sample"]) for row in map(json.loads, unfinished("run"))]
        assert len(set(sampled)) == len(sampled)
        assert set(kept) <= set(sampled)
        kept = sampled
    start("run")[0].ends(0, 300)
    assert contents("run") == contents("long")
    tokens = Path("tokens.txt").stat().st_size
    print(f"ten kills: {tokens / undisturbed_tokens:.3f} times the tokens")
    assert undisturbed_tokens < tokens <= 1.1 * undisturbed_tokens


def test_two_ranks_share_the_problems_that_one_left(here, killed_after):
    killed_after(3)
    first, second = run_ranks(here, [*SHORT, "--out", "run"], main=programs.evaluate)
    assert "run holds 3 of 12 completions; the rest are sampled now" in first.shown
    assert (first.shown + second.shown).count("saved run/report.html") == 1
    assert contents("run") == contents("whole")


def test_ranks_take_whole_problems_as_their_rows_become_free(here):
    """Two ranks with one list, in turns: no problem is taken twice, none before a row is free."""
    problems = [Problem(str(number), "?", ["1"]) for number in range(6)]
    requests = [Request(key, (1 + key // 2, 2, 3), 8) for key in range(12)]
    prompted = [PromptedSample("b", problems[r.key // 2], r.key % 2, r) for r in requests]
    counters = complete.shared_counters(World(0, 1, torch.device("cpu")))
    lists = [complete.take_problems(prompted, counters) for _ in range(2)]
    assert [next(lists[rank])[0].key for rank in (0, 1, 1)] == [0, 2, 4]
    model, _ = load_model("toy/student")
    results = complete.generate(model, requests, [], Sampling(0, 1, 0), 2, groups=lists[0])
    done = [next(results).key]
    assert next(lists[1])[0].key == 8  # the first rank has not taken it
    done += [result.key for result in results]
    assert sorted(done) == [6, 7, 10, 11]


def test_a_second_process_is_refused_and_ctrl_c_says_how_to_resume(here):
    running = child(here, [*LONG, "--out", "run"], main=programs.evaluate)
    wait_until(lambda: unfinished("run"))
    second = child(here, [*LONG, "--out", "run"], main=programs.evaluate)
    second.ends(2)
    assert second.errors.splitlines() == ["error: --out run: another process is running there"]
    os.kill(running.process.pid, signal.SIGINT)
    running.ends(130)
    assert unfinished("run")
    held = "run holds what is done; the same command resumes"
    assert running.errors.rstrip().endswith(f"\nstopped: {held}")


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
    killed_after(0, out="one")
    for name, before, after, _ in CHANGES:
        change(name, before, after)
    killed_after(0, "--seed", "1", "--slots", "3", "--graders", "1", out="two")
    differ = [[k for k in a if b[k] != a[k]] for a, b in zip(compared, compared[3:])]
    model = ["weights", "tokenizer", "config.json or stop tokens"]
    assert differ == [["out", "seed"], ["sha256 of --benchmark"], model]


def test_what_changes_under_an_evaluation_is_refused_by_name(here, killed_after, capsys):
    """Under one that has begun, and under one that is finished."""
    shutil.copytree("toy", "before")
    killed_after(2)
    for count in (2, 0):
        assert len(unfinished("run")) == count
        for name, before, after, refusal in CHANGES:
            change(name, before, after)
            assert evaluated("run") == 2
            assert refusal in capsys.readouterr().err
            shutil.copy(Path("before", name), Path("toy", name))
        assert len(unfinished("run")) == count
        settings = Path("run/config.toml").read_text()
        Path("run/config.toml").write_text("# a note of mine\n" + settings)  # holds no fact
        assert evaluated("run") == 0
        assert contents("run") == contents("whole")
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- grading


def test_a_gold_that_cannot_be_read_is_reported_before_sampling(here, killed_after, capsys):
    odd = {"id": "odd", "problem": "1?", "answer": "\\frac{1}{"}
    write_jsonl(Path("toy/benchmark.jsonl"), [*read_jsonl("toy/benchmark.jsonl"), odd])
    killed_after(0)
    assert "benchmark: 1 gold answers cannot be read" in capsys.readouterr().out


def test_completions_of_another_program_are_graded_and_reported_like_our_own(here, capsys):
    assert verdicts("math-verify") == "c t n i c c"
    found = report_json("given")
    assert found["model"] == "made.jsonl"
    assert found["settings"]["samples"] == 1
    assert "temperature" not in found["settings"]  # unknown
    [score] = found["benchmarks"]
    assert (score["pass_at_1"], score["mean_tokens"]) == (0.5, None)
    assert contents("given")
    assert graded() == 0
    assert "is finished" in capsys.readouterr().out
    rows = read_jsonl("made.jsonl")
    write_jsonl(Path("made.jsonl"), [{**rows[0], "text": "something else"}, *rows[1:]])
    assert graded() == 2
    assert "holds other completions; choose another --out" in capsys.readouterr().err
    write_jsonl(Path("made.jsonl"), rows[:-1])
    assert graded("--out", "new") == 2
    assert "problem '5' has 0 samples, expected 0 to 0, once each" in capsys.readouterr().err
    assert not Path("new").exists()


def test_exported_prompts_answered_by_another_program_score_as_our_own(here, capsys):
    """The other program is our own sampling; only files go back and forth."""
    assert evaluated("unused", "--export-prompts", "prompts.jsonl") == 0
    assert not Path("unused").exists()
    benchmark = Path("toy/benchmark.jsonl").read_bytes()
    for path in ("./toy/benchmark.jsonl", "toy/student/config.json"):
        assert evaluated("unused", "--export-prompts", path) == 2
        assert f"--export-prompts {path}: would overwrite" in capsys.readouterr().err
    assert Path("toy/benchmark.jsonl").read_bytes() == benchmark
    own = {(c["id"], c["sample"]): c for c in read_jsonl("whole/completions/benchmark.jsonl")}
    prompts = read_jsonl("prompts.jsonl")
    answers = [own[prompt["id"], k] for prompt in prompts for k in range(prompt["samples"])]
    write_jsonl(Path("made.jsonl"), answers)
    assert evaluated("made", "--completions", "made.jsonl", "--samples", "3") == 2
    assert "--samples: expected 2, as in made.jsonl; got 3" in capsys.readouterr().err
    assert evaluated("made", "--completions", "made.jsonl") == 0
    assert report_json("whole")["benchmarks"] == report_json("made")["benchmarks"]


def test_the_papers_grader_has_its_own_verdicts_beside_ours(here):
    before = contents("given")
    assert verdicts("paper") == "c c n i n c"
    both = report_json("given")
    assert (both["grader"], both["mean_pass_at_1"]) == ("both", 3 / 6)
    graders = [score["grader"] for score in both["benchmarks"] + both["other_grader"]]
    assert graders == ["math-verify", "paper"]
    assert regraded("given", "--grader", "paper") == 0
    assert contents("given").items() >= before.items()
    alone = report_json("given/verdicts/paper")
    assert (alone["grader"], alone["other_grader"]) == ("paper", [])
    assert alone["benchmarks"] == both["other_grader"]
    # Grading again needs neither torch nor a model.
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['grade', 'regrade', 'given']\n"
        "from redi.eval.grade import main; main()"
    )
    status, _, errors = run_command("-c", code)
    assert status == 0, errors
    assert contents("given").items() >= before.items()


def test_a_model_that_does_not_think_is_graded_by_its_whole_responses(here):
    shutil.rmtree("given")
    assert graded("--prefix", "") == 0
    for flags, rule, words, expected in (
        (None, "whole", "in the whole response", "c t c i c c"),
        (["--answer-from", "after_think"], "after_think", "after </think>", "c t n i c c"),
        ([], "whole", "in the whole response", "c t c i c c"),  # the rule of the run
    ):
        assert flags is None or regraded("given", *flags) == 0
        assert verdicts("math-verify") == expected
        assert report_json("given")["benchmarks"][0]["answer_from"] == rule
        for name in ("report.md", "report.html"):
            assert words in html.unescape(Path("given", name).read_text())


def test_grading_again_keeps_the_verdicts_where_a_completion_is_lost(here, capsys):
    before = {name: content for name, content in contents("given").items() if "comp" not in name}
    path = Path("given/completions/benchmark.jsonl")
    first, *others = path.read_text().splitlines(keepends=True)
    unknown = first.replace('"id": "0"', '"id": "none"')
    for lines, message in (
        (others, "problem '0' has 0 samples, expected 0 to 0, once each; .* unexpected: 0$"),
        ([unknown, *others], "holds no problem 'none'"),
        ([*others, first[:-9]], r"benchmark\.jsonl:6: .*; the file is cut short after b'"),
    ):
        path.write_text("".join(lines))
        assert regraded("given") == 2
        assert re.search(message, capsys.readouterr().err, re.MULTILINE)
        assert contents("given").items() >= before.items()


def test_a_setting_of_the_wrong_type_is_named_with_its_file(here, capsys):
    path = Path("given/config.toml")
    path.write_text(re.sub("(?m)^benchmark = .*", "benchmark = 3", path.read_text()))
    assert regraded("given") == main_in_this_process(report.main, "given") == 2
    line = "error: given/config.toml: key 'benchmark': expected a list; got 3"
    assert capsys.readouterr().err.splitlines() == [line, line]
