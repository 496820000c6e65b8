"""The paper's prompt, answers that the context ends, the two presets."""

from pathlib import Path

import pytest

from redi.checkpoint.folder import open_model
from redi.config import UserError, parse
from redi.eval.benchmarks import KNOWN, Benchmark, Problem
from redi.eval.external import export_prompts
from redi.eval.protocol import EvalConfig, check_limit, make_prompt, prompt_samples

RECIPES = Path(__file__).parent.parent / "recipes"
TEST = Benchmark("b", [Problem("short", "1+1?", ["2"]), Problem("long", "1+1?" * 20, ["2"])])


@pytest.fixture(scope="module")
def source(save_qwen2, save_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_qwen2(folder, max_position_embeddings=512)
    save_tokenizer(folder)
    return open_model(folder)[1]


def settings(**changes) -> EvalConfig:
    return EvalConfig(user_prompt="plain", samples=2, **changes)


def rooms(source, config: EvalConfig) -> list[int]:
    return [one.request.max_new_tokens for one in prompt_samples(TEST, source, config)[::2]]


def test_an_answer_may_use_what_the_context_leaves(source):
    lengths = [len(make_prompt(TEST, p, source, settings())[0]) for p in TEST.problems]
    assert rooms(source, settings()) == [512 - length for length in lengths]
    between = 512 - sum(lengths) // 2  # fits behind the short prompt alone
    assert rooms(source, settings(max_new_tokens=between)) == [between, 512 - lengths[1]]


def test_a_limit_beyond_the_context_is_refused_unless_it_is_the_default(source, tmp_path, capsys):
    config = settings(max_new_tokens=513)
    with pytest.raises(UserError, match=r"^--max-new-tokens: expected at most 512, .*; got 513$"):
        check_limit(rooms(source, config), source, config)
    with pytest.raises(UserError, match="got 513"):
        export_prompts(tmp_path / "prompts.jsonl", [TEST], source, config)
    assert not any(tmp_path.iterdir())
    check_limit(rooms(source, settings()), source, settings())
    assert "behind 2 of 2 prompts" in capsys.readouterr().out


def test_prompts_that_leave_less_than_the_limit_are_counted_in_one_line(source, capsys):
    longest = 512 - len(make_prompt(TEST, TEST.problems[1], source, settings())[0])
    for limit in (longest, longest + 1):
        assert capsys.readouterr().out == ""
        config = settings(max_new_tokens=limit)
        check_limit(rooms(source, config), source, config)
    assert capsys.readouterr().out == (
        f"the context of 512 tokens leaves less than --max-new-tokens {longest + 1} behind "
        f"1 of 2 prompts: {longest} at least\n"
    )


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


def test_the_prompt_is_the_papers_word_for_word(source):
    problem = Benchmark("b", [Problem("0", "What is $1+1$?", ["2"])])
    prompt, _ = make_prompt(problem, problem.problems[0], source, EvalConfig(max_new_tokens=1))
    assert source.chat.tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n"
        "Solve the following math problem efficiently and clearly.  The last line of your response "
        "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I "
        "hope it is correct' (without quotes) where ANSWER is just the final number or expression "
        "that solves the problem. Think step by step before answering.\n"
        "\n"
        "What is $1+1$?<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
    )
