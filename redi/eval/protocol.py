"""The evaluation protocol: what is asked, and how an answer is sampled.

    benchmark -> requests -> completions on disk                evaluate.py goes through these

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
from redi.eval.completions import Completion, Store
from redi.eval.generate import Request, Sampling, generate
from redi.eval.grade import GraderName
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
    completions: Annotated[str | None, "grade these, made elsewhere, instead of sampling"] = None
    export_prompts: Annotated[str | None, "write what to ask elsewhere to this file, stop"] = None
    samples: Annotated[int, "completions of each problem"] = 16
    user_prompt: Annotated[Literal["paper", "plain"], "what the user asks"] = "paper"
    prefix: Annotated[str, "how every answer begins, as in training"] = "<think>\n"
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.6
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    max_new_tokens: Annotated[int, "longest answer, tokens; the context may end it sooner"] = 32_768
    slots: Annotated[int, "completions written side by side; memory grows with it"] = 64
    seed: Annotated[int, "of sampling"] = 42
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute; auto: bf16 on CUDA"] = "auto"
    grader: Annotated[GraderName, "whose rules decide what is correct"] = "math-verify"
    graders: Annotated[int, "processes that compare answers"] = 2
    grade_seconds: Annotated[float, "limit for one comparison, seconds"] = 10.0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "slots", "graders"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "within (0, 1]")
        require(len(self.benchmark) >= 1, "benchmark", self.benchmark, "at least one")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        require(self.grade_seconds > 0, "grade_seconds", self.grade_seconds, "above 0")


def make_requests(test: Benchmark, source: Source, config: EvalConfig) -> list[Request]:
    """`samples` requests a problem, the problem's one after another. Raises UserError if a prompt
    leaves no room in the context."""
    requests = []
    for number, problem in enumerate(test.problems):
        prompt, room = make_prompt(test, problem, source, config)
        keys = range(number * config.samples, (number + 1) * config.samples)
        requests += [Request(key, tuple(prompt), room) for key in keys]
    return requests


def make_prompt(
    test: Benchmark, problem: Problem, source: Source, config: EvalConfig
) -> tuple[list[int], int]:
    """(token ids up to and with the prefix of the answer, how long the answer may be)."""
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; evaluation needs it")
    context = source.config["max_position_embeddings"]
    prompt = source.chat.encode_prompt([user_message(problem, config)], config.prefix)
    room = min(config.max_new_tokens, context - len(prompt))
    if room < 1:
        raise UserError(
            f"{test.name}: problem {problem.id} is {len(prompt)} tokens; the model's context "
            f"is {context}"
        )
    return prompt, room


def user_message(problem: Problem, config: EvalConfig) -> dict[str, str]:
    return {"role": "user", "content": USER_PROMPTS[config.user_prompt] + problem.problem}


def complete(
    model: Transformer,
    source: Source,
    test: Benchmark,
    requests: list[Request],
    store: Store,
    config: EvalConfig,
) -> None:
    """Sample what the store lacks of `requests`; every completion is on disk as it is finished."""
    sampling = Sampling(config.temperature, config.top_p, config.seed)
    left = [requests[place] for place in store.missing]
    tokens, began = 0, time.monotonic()
    done = len(requests) - len(left)
    with Progress(len(requests), test.name, unit="response", done=done) as progress:
        for result in generate(model, left, source.stop_ids, sampling, config.slots):
            number, sample = divmod(result.key, config.samples)
            store.append(
                Completion(
                    id=test.problems[number].id,
                    sample=sample,
                    text=config.prefix + source.chat.decode(result.token_ids),
                    num_tokens=result.num_tokens,
                    finish_reason=result.finish_reason,
                )
            )
            tokens += result.num_tokens
            progress.update({"tok/s": f"{tokens / (time.monotonic() - began):,.0f}"})
    store.finish()
