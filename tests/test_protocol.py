"""The paper's prompt, also as exported; answers that the context ends; the two presets."""

from pathlib import Path

import pytest
from small_run import read_jsonl, refusal

from redi.checkpoint.folder import open_model
from redi.config import UserError, parse
from redi.eval.benchmarks import KNOWN, Benchmark, Problem
from redi.eval.external import export_prompts
from redi.eval.protocol import PAPER_PROMPT, EvalConfig, PromptedSample, prompt_samples

RECIPES = Path(__file__).parent.parent / "recipes"
BENCHMARK = Benchmark("b", [Problem("short", "1+1?", ["2"]), Problem("long", "1+1?" * 20, ["2"])])


@pytest.fixture
def source(save_qwen2, save_tokenizer, tmp_path):
    """Of a model with a context of 512 tokens."""
    save_qwen2(tmp_path, max_position_embeddings=512)
    return open_model(save_tokenizer(tmp_path))[1]


@pytest.fixture
def prompted(source):
    """prompted(**settings): the first of two samples of each problem."""

    def prompted(**settings) -> list[PromptedSample]:
        config = EvalConfig(**{"user_prompt": "plain", "samples": 2, **settings})
        return prompt_samples([BENCHMARK], source, config)[::2]

    return prompted


def test_an_answer_may_use_what_the_context_leaves(prompted, capsys):
    """Prompts that leave less than the limit are counted in one line."""
    first, second = prompted()
    assert "context 512: answers to 2 of 2 prompts are cut at" in capsys.readouterr().out
    left = [512 - len(one.request.prompt_ids) for one in (first, second)]
    assert [one.request.max_new_tokens for one in (first, second)] == left
    for limit, shown in (
        (left[1], ""),
        (left[1] + 1, f"context 512: answers to 1 of 2 prompts are cut at {left[1]} tokens "
                      f"or more, not {left[1] + 1}\n"),
    ):  # fmt: skip
        rooms = [one.request.max_new_tokens for one in prompted(max_new_tokens=limit)]
        assert rooms == [limit, left[1]]
        assert capsys.readouterr().out == shown


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(source):
    long = Benchmark("c", [Problem("7", "1+1?" * 400, ["2"])])
    with pytest.raises(
        UserError, match=r"^c: the prompt of problem 7 is \d+ .* 512; .*-prompt plain"
    ):
        prompt_samples([long], source, EvalConfig())


@pytest.mark.parametrize(
    ("name", "values"),
    [("grade_seconds", (-1, 1e8, 1e300)), ("temperature", (-1, 1e-300)), ("cache_gib", (0, 1e300)),
     ("graders", (0,))],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_their_flag(name, values):
    for value in values:
        message = refusal(EvalConfig, **{name: value})
        assert message.startswith(f"--{name.replace('_', '-')}: expected ")
        assert message.endswith(f"got {value}")


def test_the_presets_are_the_papers_protocols():
    """What they leave out is a default: temperature, top-p, prompt."""
    tables = parse(EvalConfig, "", ["--config", str(RECIPES / "eval_tables.toml")])
    assert tables == EvalConfig(benchmark=list(KNOWN), max_new_tokens=30_720)
    assert (tables.samples, tables.grader) == (16, "both")
    tuning = parse(EvalConfig, "", ["--config", str(RECIPES / "eval_tuning.toml")])
    assert tuning == EvalConfig(benchmark=["math500"], samples=4, grader="math-verify")
    for config in (tables, tuning):
        found = config.temperature, config.top_p, config.user_prompt, config.prefix
        assert found == (0.6, 0.95, "paper", "<think>\n")


def test_the_prompt_is_the_papers_word_for_word(prompted, source):
    first, _ = prompted(user_prompt="paper", max_new_tokens=1)
    decode = source.chat.tokenizer.decode
    assert decode(first.request.prompt_ids, skip_special_tokens=False) == (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n"
        "Solve the following math problem efficiently and clearly.  The last line of your response "
        "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I "
        "hope it is correct' (without quotes) where ANSWER is just the final number or expression "
        "that solves the problem. Think step by step before answering.\n"
        "\n"
        "1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
    )


def test_exported_prompts_are_what_our_own_sampling_reads(source, tmp_path):
    path = tmp_path / "prompts.jsonl"
    config = EvalConfig(
        model=str(tmp_path), export_prompts=str(path), samples=3, max_new_tokens=100
    )
    prompted = prompt_samples([BENCHMARK], source, config)
    export_prompts(config, [BENCHMARK])
    rows = read_jsonl(path)
    requests = [one.request for one in prompted[::3]]
    assert [tuple(row.pop("prompt_token_ids")) for row in rows] == [r.prompt_ids for r in requests]
    assert rows[0].pop("prompt").endswith("<|im_start|>assistant\n<think>\n")
    assert rows[0].pop("messages") == [{"role": "user", "content": PAPER_PROMPT + "1+1?"}]
    assert rows[0] == {
        "benchmark": "b", "id": "short", "samples": 3, "temperature": 0.6, "top_p": 0.95,
        "max_tokens": 100, "stop_token_ids": source.stop_ids,
    }  # fmt: skip
    assert rows[1]["id"] == "long"
    assert source.stop_ids
