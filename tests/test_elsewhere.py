"""Completions made by another program: what it is asked, and what is checked of its answers."""

import json

import pytest

from redi.checkpoint.folder import open_model
from redi.config import UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.external import export_prompts, read_completions
from redi.eval.protocol import PAPER_PROMPT, EvalConfig, ask

TESTS = [Benchmark("b", [Problem("x", "1+1?", ["2"]), Problem("7", "2+2?", ["4"])])]
BOTH = [*TESTS, Benchmark("c", [Problem("x", "3+3?", ["6"])])]


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict):
        path = tmp_path / "made.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def row(id="x", sample=0, text="</think> 2", **more) -> dict:
    return {"id": id, "sample": sample, "text": text, **more}


def test_rows_in_any_order_become_completions_in_order(write):
    path = write(row("7", 1), row(7, 0, finish_reason="length"), row("x", 1, num_tokens=5), row())
    samples, found = read_completions(path, TESTS)
    assert samples == 2
    assert [c.key for c in found["b"]] == [("x", 0), ("x", 1), ("7", 0), ("7", 1)]
    assert [c.finish_reason for c in found["b"]] == ["stop", "stop", "length", "stop"]
    assert [c.num_tokens for c in found["b"]] == [None, 5, None, None]


def test_the_words_of_other_programs_for_a_finish_are_known(write):
    words = ["stop", "STOP", "end_turn", "eos_token", "length", "MAX_TOKENS", "max_tokens", "limit"]
    _, found = read_completions(
        write(*(row(id, s, finish_reason=w) for id in ("x", "7") for s, w in enumerate(words))),
        TESTS,
    )
    assert [c.finish_reason for c in found["b"][:8]] == ["stop"] * 4 + ["length"] * 4


def test_of_several_benchmarks_each_row_names_its_own(write):
    path = write(row(benchmark="b"), row("7", benchmark="b"), row(benchmark="c"))
    _, found = read_completions(path, BOTH)
    assert [len(found[name]) for name in ("b", "c")] == [2, 1]
    with pytest.raises(UserError, match=r"made\.jsonl:1: no benchmark; expected b or c"):
        read_completions(write(row()), BOTH)
    with pytest.raises(UserError, match=r"benchmark 'd'; expected b or c"):
        read_completions(write(row(benchmark="d")), BOTH)


BROKEN = [  # rows, what the one line must say
    ([row(), row("7"), row()], r"made\.jsonl:3: sample 0 of problem 'x' is also at .*:1"),
    ([row()], r"sample 0 of problem '7' is missing; expected samples 0 to 0"),
    ([row(sample=2), row("7")], r"sample 0 of problem 'x' is missing, and 3 more; .*0 to 2"),
    ([row("9")], r"made\.jsonl:1: b has no problem '9'"),
    ([{"id": "x", "sample": 0}], r"made\.jsonl:1: field 'text': expected .*, got nothing"),
    ([row(text=None)], r"field 'text'"),
    ([row(text="\ud800")], r"field 'text'"),
    ([row(sample=-1)], r"field 'sample': expected a whole number from 0, got -1"),
    ([row(sample="0")], r"field 'sample'"),
    ([row(sample=True)], r"field 'sample'"),
    ([row(id=1.5)], r"field 'id'"),
    ([row(finish_reason=3)], r"field 'finish_reason'"),
    ([row(finish_reason="abort")], r"'finish_reason': expected one of stop, .*length.*got 'abort'"),
    ([row(finish_reason="\ud800")], r"field 'finish_reason': .* got '\\ud800'"),
    ([row("\ud800")], r"made\.jsonl:1: b has no problem '\\ud800'"),
    ([row(sample=10**9), row("7")], r"sample 0 of problem 'x' is missing, and 1999999999 more"),
    ([row(num_tokens="3")], r"field 'num_tokens'"),
    ([row(num_tokens=-5)], r"field 'num_tokens': expected a whole number from 0 .*, got -5"),
    ([row(num_tokens=10**400)], r"field 'num_tokens': expected .*, got 10000"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_what_is_wrong_is_one_line_that_names_it(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read_completions(write(*rows), TESTS)
    assert "\n" not in str(caught.value)


def test_exported_prompts_are_what_our_own_sampling_reads(save_qwen2, save_tokenizer, tmp_path):
    save_qwen2(tmp_path / "model", max_position_embeddings=1024)
    save_tokenizer(tmp_path / "model")
    _, source = open_model(tmp_path / "model")
    config = EvalConfig(samples=3, max_new_tokens=100)
    path = tmp_path / "prompts.jsonl"
    assert export_prompts(path, TESTS, source, config) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = [one.request for one in ask(TESTS[0], source, config)]
    assert [tuple(row["prompt_token_ids"]) for row in rows] == [r.prompt_ids for r in own[::3]]
    assert [row["max_tokens"] for row in rows] == [100, 100]
    assert rows[0]["stop_token_ids"] == source.stop_ids != []
    assert rows[0]["messages"] == [{"role": "user", "content": PAPER_PROMPT + "1+1?"}]
    assert rows[0]["prompt"].endswith("<|im_start|>assistant\n<think>\n")
    assert (rows[1]["benchmark"], rows[1]["id"], rows[1]["samples"]) == ("b", "7", 3)
    assert (rows[1]["temperature"], rows[1]["top_p"]) == (0.6, 0.95)
