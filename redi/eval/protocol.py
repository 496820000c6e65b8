"""The evaluation protocol: what is asked, how an answer is sampled, how it becomes a verdict.

    benchmark -> requests -> completions -> verdicts            evaluate.py goes through these

The paper's user prompt states the task and the form of the answer; the chat template supplies the
system prompt of training. Every answer begins with the prefix that training's traces begin with,
encoded as it was there. An answer may use what the context leaves: min(max_new_tokens, context -
prompt).
"""

import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

from redi.checkpoint import Source
from redi.config import UserError, require
from redi.eval.benchmarks import KNOWN, Benchmark, Problem
from redi.eval.generate import Generated, Request, Usage, generate
from redi.eval.grade import Grader, extract
from redi.eval.report import Completion
from redi.eval.sampling import Sampling
from redi.model import Transformer
from redi.runlog import Progress

# The paper's evaluation prompt, put before the problem.
PAPER_PROMPT = (
    "Solve the following math problem efficiently and clearly. The last line of your response "
    "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope "
    "it is correct' (without quotes) where ANSWER is just the final number or expression that "
    "solves the problem. Think step by step before answering.\n\n"
)
USER_PROMPTS = {"paper": PAPER_PROMPT, "plain": ""}


@dataclass(kw_only=True)
class EvalConfig:
    model: Annotated[str, "model to evaluate: folder or hub id"] = "out/redi"
    benchmark: Annotated[list[str], "names, or files of problems and answers"] = field(
        default_factory=lambda: list(KNOWN)
    )
    out: Annotated[str | None, "folder for completions and report; none: MODEL/eval"] = None
    samples: Annotated[int, "completions of each problem"] = 16
    user_prompt: Annotated[Literal["paper", "plain"], "what the user asks"] = "paper"
    prefix: Annotated[str, "how every answer begins, as in training"] = "<think>\n"
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.6
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    max_new_tokens: Annotated[int, "longest answer, tokens; the context may end it sooner"] = 32_768
    slots: Annotated[int, "completions written side by side, if the cache has room"] = 64
    cache_gib: Annotated[float | None, "for keys and values; none: what is to spare"] = None
    seed: Annotated[int, "of sampling"] = 42
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute; auto: bf16 on CUDA"] = "auto"
    graders: Annotated[int, "processes that compare answers"] = 2
    grade_seconds: Annotated[float, "limit for one comparison, seconds"] = 10.0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "slots", "graders"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.cache_gib is not None:
            require(self.cache_gib > 0, "cache_gib", self.cache_gib, "above 0")
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "within (0, 1]")
        require(len(self.benchmark) >= 1, "benchmark", self.benchmark, "at least one")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        require(self.grade_seconds > 0, "grade_seconds", self.grade_seconds, "above 0")


def make_requests(test: Benchmark, source: Source, config: EvalConfig) -> list[Request]:
    """`samples` requests a problem, the problem's one after another. Raises UserError if a prompt
    leaves no room in the context."""
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; evaluation needs it")
    context = source.config["max_position_embeddings"]
    requests = []
    for number, problem in enumerate(test.problems):
        text = USER_PROMPTS[config.user_prompt] + problem.problem
        prompt = source.chat.encode_prompt([{"role": "user", "content": text}], config.prefix)
        room = min(config.max_new_tokens, context - len(prompt))
        if room < 1:
            raise UserError(
                f"{test.name}: problem {problem.id} is {len(prompt)} tokens; the model's context "
                f"is {context}"
            )
        keys = range(number * config.samples, (number + 1) * config.samples)
        requests += [Request(key, tuple(prompt), room) for key in keys]
    return requests


def complete(
    model: Transformer, source: Source, requests: list[Request], name: str, config: EvalConfig
) -> list[Generated]:
    """Every request's completion, in the order of the requests."""
    sampling = Sampling(config.temperature, config.top_p, config.seed)
    cache_bytes = None if config.cache_gib is None else int(config.cache_gib * 2**30)
    usage = Usage()
    written = generate(model, requests, source.stop_ids, sampling, config.slots, cache_bytes, usage)
    done: list[Generated] = []
    tokens, loops, began = 0, 0, time.monotonic()
    with Progress(len(requests), name, unit="response") as progress:
        for result in written:
            done.append(result)
            tokens += result.num_tokens
            loops += result.period > 0
            values = {"tok/s": f"{tokens / (time.monotonic() - began):,.0f}", "loops": str(loops)}
            progress.update(values)
    if usage.evictions:
        print(f"{name}: set aside {usage.evictions} times for want of memory; see --cache-gib")
    return sorted(done, key=lambda result: result.key)


def check_grader(config: EvalConfig) -> None:
    """Raises UserError if answers could not be compared here."""
    with Grader(1, config.grade_seconds) as grader:
        grader.grade(r"</think>\boxed{y+x+1}", "x+1+y")


def graded(
    test: Benchmark, generated: list[Generated], source: Source, config: EvalConfig
) -> list[Completion]:
    """Completions with their verdicts, in the order of problems and samples."""

    def problem_of(result: Generated) -> Problem:
        return test.problems[result.key // config.samples]

    texts = [config.prefix + source.chat.decode(result.token_ids) for result in generated]
    with Grader(config.graders, config.grade_seconds) as grader:
        verdicts = grader.grade_all(
            (text, problem_of(result).answers, result.finish_reason)
            for text, result in zip(texts, generated)
        )
    return [
        Completion(
            benchmark=test.name,
            id=problem_of(result).id,
            sample=result.key % config.samples,
            text=text,
            num_tokens=result.num_tokens,
            finish_reason=result.finish_reason,
            extracted=extract(text),
            verdict=verdict,
        )
        for text, result, verdict in zip(texts, generated, verdicts)
    ]
