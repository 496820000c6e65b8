"""redi prepare on an evaluation: prompts, traces and votes of the student's own, each counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import main_in_this_process
from small_run import read_jsonl, refusal

from redi.config import to_toml
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    completions_file,
    marks_file,
    store_inputs,
    write_lines,
)
from redi.eval.protocol import PAPER_PROMPT, EvalConfig
from redi.prepare.__main__ import main, prepare
from redi.prepare.traces import PrepareConfig

RIGHT, WRONG, NONE = "\\boxed{2}", "\\boxed{3}", "hm"
VERDICTS = {RIGHT: "correct", WRONG: "incorrect", NONE: "no_answer", "slow": "timeout"}
SAMPLES = [  # by problem, in their order; "cut" is cut off at the limit
    ["cut", WRONG, RIGHT, NONE],
    ["cut", "slow", RIGHT, RIGHT],
    ["cut", "slow", "cut", "cut"],
    [WRONG, WRONG, NONE, NONE],
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def completion(id: int, sample: int, body: str) -> Completion:
    text, reason = f"<think>\n{id}.{sample}</think>\n{body}", "stop"
    if body == "cut":
        text, reason = f"<think>\n{id}.{sample}", "length"
    return Completion(id=str(id), sample=sample, text=text, num_tokens=5, finish_reason=reason)


def mark(one: Completion, body: str) -> Mark:
    facts = {"extracted": None, "loops": False, "answer_from": "after_think", "num_tokens": 5}
    verdict = VERDICTS.get(body, "truncated")
    return Mark(id=one.id, sample=one.sample, verdict=verdict, **facts)


def evaluation(name: str = "taught", samples: list[list[str]] = SAMPLES, **settings) -> Path:
    """An evaluation that redi evaluate would have left in out/NAME."""
    out, n = Path("out", name), len(samples[0])
    problems = [Problem(str(id), f"1+1? ({id})", ["2", "two"]) for id in range(len(samples))]
    store_inputs(out, [Benchmark(name, problems)])
    given = {"user_prompt": "plain", "grader": "math-verify", "samples": n, **settings}
    (out / "config.toml").write_text(to_toml(EvalConfig(benchmark=[f"x/{name}.jsonl"], **given)))
    rows = [(completion(i, s, b), b) for i, row in enumerate(samples) for s, b in enumerate(row)]
    write_lines(completions_file(out, name), [one for one, _ in rows])
    write_lines(marks_file(out, "math-verify", name), [mark(one, body) for one, body in rows])
    return out


def prepared(out: Path, **choices) -> dict:
    """The card."""
    prepare(PrepareConfig(raw=str(out), out="made", **choices))
    return json.loads(Path("made/card.json").read_text())


def pairs() -> list[tuple[str, str]]:
    sides = ([row[side][0]["content"] for side in ("chosen", "rejected")] for row in made())
    return [tuple(texts) for texts in sides]


def made(name: str = "pairs") -> list[dict]:
    return read_jsonl(f"made/{name}.jsonl")


def text(id: int, sample: int) -> str:
    return completion(id, sample, SAMPLES[id][sample]).text


# ---------------------------------------------------------------- what an evaluation becomes


def test_right_and_wrong_samples_become_pairs_and_every_trace_is_counted(capsys):
    flags = ("--out", "made", "--pairs-per-problem", "4")
    assert main_in_this_process(main, evaluation(), *flags) == 0
    assert capsys.readouterr().out == (
        "format: evaluation of redi\n"
        "traces                     16\n"
        "  truncated                 5\n"
        "  grading timed out         2\n"
        "problems                    4\n"
        "  all traces left out       1\n"
        "  no correct generation     1\n"
        "positives                   2\n"
        "  no incorrect generation   1\n"
        "pairs                       1\n"
        "saved made/positives.jsonl, made/pairs.jsonl, made/card.json\n"
    )
    assert pairs() == [(text(0, 2), text(0, 1))]
    first, second = made("positives")
    assert first["prompt"] == [{"role": "user", "content": "1+1? (0)"}]
    assert (first["source"], second["completion"][0]["content"]) == ("taught", text(1, 2))
    card = json.loads(Path("made/card.json").read_text())
    assert card["left_out"] == {"truncated": 5, "grading timed out": 2}
    assert list(card["raw_sha256"]) == [
        "config.toml", "problems/taught.jsonl", "completions/taught.jsonl",
        "verdicts/math-verify/taught.jsonl",
    ]  # fmt: skip


def test_truncated_answers_are_wrong_traces_if_they_are_kept():
    card = prepared(evaluation(), keep_truncated=True)
    assert card["left_out"] == {"grading timed out": 2}
    assert pairs() == [(text(0, 2), text(0, 0)), (text(1, 2), text(1, 0))]
    prepared(evaluation(), keep_truncated=True, require_complete=True)
    assert pairs() == [(text(0, 2), text(0, 1))]


def test_the_prompt_is_the_one_that_the_evaluation_asked():
    prepared(evaluation(user_prompt="paper"))
    assert made()[0]["prompt"][0]["content"] == PAPER_PROMPT + "1+1? (0)"


@pytest.mark.parametrize(
    ("prefix", "given", "trained"),
    [
        ("<think>\n", "<think>\nso</think> 2", "<think>\nso</think> 2"),
        ("<think>\n", "<think>so</think> 2", "<think>so</think> 2"),  # the model wrote it itself
        ("<think>\n", "so</think> 2", "<think>\nso</think> 2"),  # of another program
        ("", "so 2", "so 2"),
    ],
)
def test_a_trace_begins_with_the_evaluations_prefix_once(prefix, given, trained):
    out = evaluation(samples=[[RIGHT, WRONG]], prefix=prefix)
    right, wrong = (completion(0, sample, "") for sample in (0, 1))
    write_lines(completions_file(out, "taught"), [replace(right, text=given), wrong])
    prepared(out)
    assert pairs()[0][0] == trained


def test_several_problem_files_of_an_evaluation_are_read_in_its_order():
    out = evaluation()
    other = Benchmark("more", [Problem("0", "2+0?", ["2"])])
    store_inputs(out, [other])
    names = ["x/taught.jsonl", "x/more.jsonl"]
    settings = EvalConfig(benchmark=names, user_prompt="plain", grader="math-verify")
    (out / "config.toml").write_text(to_toml(settings))
    rows = [(completion(0, s, b), b) for s, b in enumerate((RIGHT, WRONG))]
    write_lines(completions_file(out, "more"), [one for one, _ in rows])
    write_lines(marks_file(out, "math-verify", "more"), [mark(*row) for row in rows])
    assert prepared(out)["sources"] == {"taught": 2, "more": 1}
    assert prepared(out, sources=["more"])["pairs"] == 1


# ---------------------------------------------------------------- what goes wrong


def test_problems_of_a_known_benchmark_are_refused_unless_they_are_allowed():
    out = evaluation("math500", grader="paper")
    marks_file(out, "math-verify", "math500").parent.rename(out / "verdicts/paper")
    message = refusal(prepared, out)
    assert message.startswith("out/math500: math500 is a benchmark, and training on its problems")
    assert "--allow-benchmarks" in message
    assert not Path("made").exists()
    assert prepared(out, allow_benchmarks=True)["pairs"] == 1


def unfinished(out: Path) -> None:
    file = completions_file(out, "taught")
    file.rename(file.with_name("taught.unfinished-0.jsonl"))


def not_graded(out: Path) -> None:
    marks_file(out, "math-verify", "taught").unlink()


def another_sample(out: Path) -> None:
    rows = read_jsonl(str(completions_file(out, "taught")))
    more = [*rows, {**rows[-1], "sample": 4}]
    write_lines(completions_file(out, "taught"), [Completion(**row) for row in more])


def a_sample_less(out: Path) -> None:
    rows = read_jsonl(str(completions_file(out, "taught")))
    write_lines(completions_file(out, "taught"), [Completion(**row) for row in rows[:-1]])


def other_settings(out: Path) -> None:
    (out / "config.toml").write_text((out / "config.toml").read_text().replace('"plain"', '"mine"'))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (unfinished, "taught is not finished; `redi evaluate --config out/taught/config.toml`"),
        (not_graded, "taught is not graded by math-verify; `python -m redi.eval.grade regrade out"),
        (another_sample, "holds other samples than were graded; `redi regrade out/taught` first"),
        (a_sample_less, "holds other samples than were graded; `redi regrade out/taught` first"),
        (other_settings, "out/taught/config.toml: key 'user_prompt': expected one of paper, plain"),
    ],
)
def test_an_evaluation_that_is_not_whole_is_one_line_that_says_what_to_do(capsys, breaks, message):
    out = evaluation()
    breaks(out)
    assert main_in_this_process(main, out, "--out", "made") == 2
    _, errors = capsys.readouterr()
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(Path().glob("made/*"))


def test_flags_that_mean_nothing_for_the_data_are_refused():
    assert "`redi regrade` makes new ones" in refusal(prepared, evaluation(), relabel=True)
    Path("raw.jsonl").write_text('{"problem": "?", "response": "2", "correct": true}\n')
    for flag in ("keep_truncated", "allow_benchmarks"):
        message = refusal(prepared, Path("raw.jsonl"), **{flag: True})
        assert message.startswith(f"--{flag.replace('_', '-')}: expected an evaluation of redi")
