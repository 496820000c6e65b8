"""The paper's prompt, answers that the context ends, the two presets."""

from pathlib import Path

import pytest

from redi.checkpoint.folder import open_model
from redi.config import UserError, parse
from redi.eval.benchmarks import KNOWN, Benchmark, Problem
from redi.eval.protocol import EvalConfig, PromptedSample, check_limit, prompt_samples

RECIPES = Path(__file__).parent.parent / "recipes"
TEST = Benchmark("b", [Problem("short", "1+1?", ["2"]), Problem("long", "1+1?" * 20, ["2"])])


@pytest.fixture
def prompted(save_qwen2, save_tokenizer, tmp_path):
    """prompted(**settings): a sample of each problem, for a model with a context of 512 tokens."""
    save_qwen2(tmp_path, max_position_embeddings=512)
    source = open_model(save_tokenizer(tmp_path))[1]

    def prompted(**settings) -> list[PromptedSample]:
        config = EvalConfig(**{"user_prompt": "plain", "samples": 2, **settings})
        samples = prompt_samples([TEST], source, config)
        check_limit(samples, source, config)
        return samples[::2]

    prompted.source = source
    return prompted


def test_an_answer_may_use_what_the_context_leaves(prompted, capsys):
    """Prompts that leave less than the limit are counted in one line."""
    first, second = prompted()
    assert "behind 2 of 2 prompts" in capsys.readouterr().out
    left = [512 - len(one.request.prompt_ids) for one in (first, second)]
    assert [one.request.max_new_tokens for one in (first, second)] == left
    for limit, shown in (
        (left[1], ""),
        (left[1] + 1, f"the context of 512 tokens leaves less than --max-new-tokens {left[1] + 1} "
                      f"behind 1 of 2 prompts: {left[1]} at least\n"),
    ):  # fmt: skip
        rooms = [one.request.max_new_tokens for one in prompted(max_new_tokens=limit)]
        assert rooms == [limit, left[1]]
        assert capsys.readouterr().out == shown


def test_a_limit_beyond_the_context_is_refused_unless_it_is_the_default(prompted):
    with pytest.raises(UserError, match=r"^--max-new-tokens: expected at most 512, .*; got 513$"):
        prompted(max_new_tokens=513)
    long = Benchmark("c", [Problem("7", "1+1?" * 400, ["2"])])
    for settings, hint in (({"user_prompt": "plain"}, "out$"), ({}, "out or choose --user-prompt")):
        with pytest.raises(
            UserError, match=rf"^c: the prompt of problem 7 is \d+ .* 512; .*{hint}"
        ):
            prompt_samples([long], prompted.source, EvalConfig(**settings))


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


def test_the_prompt_is_the_papers_word_for_word(prompted):
    first, _ = prompted(user_prompt="paper", max_new_tokens=1)
    decode = prompted.source.chat.tokenizer.decode
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
