"""Completions of another program: the prompts for it, and the checks of its answers."""

import pytest
from small_run import read_jsonl, write_jsonl

from redi.checkpoint.folder import open_model
from redi.config import UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.external import export_prompts, read_completions
from redi.eval.protocol import PAPER_PROMPT, EvalConfig, prompt_samples

TESTS = [Benchmark("b", [Problem("x", "1+1?", ["2"]), Problem("7", "2+2?", ["4"])])]
BOTH = [*TESTS, Benchmark("c", [Problem("x", "3+3?", ["6"])])]


@pytest.fixture
def read(tmp_path):
    def read(*rows: dict, tests=TESTS):
        return read_completions(write_jsonl(tmp_path / "made.jsonl", list(rows)), tests)

    return read


def row(id="x", sample=0, text="</think> 2", **more) -> dict:
    return {"id": id, "sample": sample, "text": text, **more}


def test_rows_in_any_order_become_completions_in_order(read):
    rows = row("7", 1), row(7, 0, finish_reason="length"), row("x", 1, num_tokens=5), row()
    samples, found = read(*rows)
    assert samples == 2
    assert [c.key for c in found["b"]] == [("x", 0), ("x", 1), ("7", 0), ("7", 1)]
    assert [c.finish_reason for c in found["b"]] == ["stop", "stop", "length", "stop"]
    assert [c.num_tokens for c in found["b"]] == [None, 5, None, None]


def test_the_finish_reasons_of_other_programs_are_known(read):
    words = ["stop", "STOP", "end_turn", "eos_token", "length", "MAX_TOKENS", "max_tokens", "limit"]
    rows = [row(id, s, finish_reason=w) for id in ("x", "7") for s, w in enumerate(words)]
    _, found = read(*rows)
    assert [c.finish_reason for c in found["b"][:8]] == ["stop"] * 4 + ["length"] * 4


THREE = [row(benchmark="b"), row("7", benchmark="b"), row(benchmark="c")]


def test_each_row_names_its_benchmark_if_there_are_several(read):
    _, found = read(*THREE, tests=BOTH)
    assert [len(found[name]) for name in ("b", "c")] == [2, 1]
    for rows, message in (
        ([row()], r"made\.jsonl:1: no benchmark; expected b or c"),
        ([row(benchmark="d")], r"benchmark 'd'; expected b or c"),
        ([*THREE, row(sample=1, benchmark="c")], r"each benchmark, got {'b': 1, 'c': 2}"),
    ):
        with pytest.raises(UserError, match=message):
            read(*rows, tests=BOTH)


BROKEN = [  # rows, the one line of the error
    ([row(), row("7"), row()], r"made\.jsonl: b: problem 'x' has samples \[0, 0\], expected 0 to"),
    ([row()], r"problem '7' has samples \[\], expected 0 to 0"),
    ([row(sample=10**9), row("7")], r"problem 'x' has samples \[1000000000\], expected 0 to 0"),
    ([row("9")], r"made\.jsonl: b: holds no problem '9'"),
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
    ([row("\ud800")], r"made\.jsonl: b: holds no problem '\\ud800'"),
    ([row(num_tokens="3")], r"field 'num_tokens'"),
    ([row(num_tokens=-5)], r"field 'num_tokens': expected a whole number from 0 .*, got -5"),
    ([row(num_tokens=10**400)], r"field 'num_tokens': expected .*, got 10000"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(read, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read(*rows)
    assert "\n" not in str(caught.value)


def test_exported_prompts_are_what_our_own_sampling_reads(save_qwen2, save_tokenizer, tmp_path):
    save_qwen2(tmp_path, max_position_embeddings=1024)
    source = open_model(save_tokenizer(tmp_path))[1]
    config = EvalConfig(samples=3, max_new_tokens=100)
    prompted, path = prompt_samples(TESTS, source, config), tmp_path / "prompts.jsonl"
    export_prompts(path, prompted, source, config)
    rows = read_jsonl(path)
    requests = [one.request for one in prompted[::3]]
    assert [tuple(row.pop("prompt_token_ids")) for row in rows] == [r.prompt_ids for r in requests]
    assert rows[0].pop("prompt").endswith("<|im_start|>assistant\n<think>\n")
    assert rows[0].pop("messages") == [{"role": "user", "content": PAPER_PROMPT + "1+1?"}]
    assert rows[0] == {
        "benchmark": "b", "id": "x", "samples": 3, "temperature": 0.6, "top_p": 0.95,
        "max_tokens": 100, "stop_token_ids": source.stop_ids,
    }  # fmt: skip
    assert rows[1]["id"] == "7"
    assert source.stop_ids
