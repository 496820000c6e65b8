"""The evaluation protocol: what a model is prompted with, and how an answer is sampled.

    Problem -> token ids of the prompt -> one request per sample -> completions (complete.py)

The paper's user prompt states the task and the form of the answer; the chat template adds the
system prompt of training. Every answer begins with the same prefix as training's traces. An answer
may have min(max_new_tokens, context - prompt) tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from redi.checkpoint.folder import Source
from redi.config import UserError, may_change, require
from redi.eval.benchmarks import KNOWN, Benchmark, Problem
from redi.eval.engine.generate import Request
from redi.eval.engine.sampling import Sampling
from redi.eval.grading.grader import GraderChoice
from redi.eval.grading.workers import MOST_SECONDS

# The paper's evaluation prompt, put before the problem. The authors' code has the two spaces too.
PAPER_PROMPT = (
    "Solve the following math problem efficiently and clearly.  The last line of your response "
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
    out: Annotated[str | None, "folder of the evaluation; none: MODEL/eval", may_change] = None
    completions: Annotated[str | None, "file: grade another program's completions"] = None
    export_prompts: Annotated[str | None, "file: write prompts for another program"] = None
    samples: Annotated[int, "completions of each problem"] = 16
    user_prompt: Annotated[Literal["paper", "plain"], "what the user asks"] = "paper"
    prefix: Annotated[str, "how every answer begins, as in training"] = "<think>\n"
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.6
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    max_new_tokens: Annotated[int, "longest answer, tokens; the authors' code: 30720"] = 32_768
    slots: Annotated[int, "most completions sampled side by side", may_change] = 256
    cache_gib: Annotated[float | None, "keys and values; none: spare memory", may_change] = None
    seed: Annotated[int, "of sampling"] = 42
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute; auto: bf16 on CUDA"] = "auto"
    grader: Annotated[GraderChoice, "whose rules decide what is correct"] = "both"
    graders: Annotated[int, "processes that compare answers", may_change] = 2
    grade_seconds: Annotated[float, "limit for one comparison, seconds"] = 10.0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "slots", "graders"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.cache_gib is not None:
            require(0 < self.cache_gib <= 1e6, "cache_gib", self.cache_gib, "above 0, at most 1e6")
        Sampling(self.temperature, self.top_p, self.seed)
        require(len(self.benchmark) >= 1, "benchmark", self.benchmark, "at least one")
        seconds = self.grade_seconds
        require(0 < seconds <= MOST_SECONDS, "grade_seconds", seconds, "above 0, at most a day")


@dataclass(frozen=True)
class PromptedSample:
    """One sample of one problem, and the request that generates it."""

    benchmark: str
    problem: Problem
    sample: int
    request: Request


def prompt_samples(
    benchmarks: Sequence[Benchmark], source: Source, config: EvalConfig
) -> list[PromptedSample]:
    """Every sample of every problem, those of a problem in a row. Prints one line if the context
    ends answers before max_new_tokens. Raises UserError if a prompt leaves no room for an answer.
    """
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; evaluation needs it")
    context, limit = source.config["max_position_embeddings"], config.max_new_tokens
    prompted, rooms = [], []
    for name, problem in ((b.name, problem) for b in benchmarks for problem in b.problems):
        prompt = tuple(source.chat.encode_prompt([user_message(problem, config)], config.prefix))
        rooms.append(min(limit, context - len(prompt)))
        if rooms[-1] < 1:
            raise UserError(
                f"{name}: the prompt of problem {problem.id} is {len(prompt)} tokens and leaves no "
                f"room for an answer in the model's context of {context}; leave the problem out or "
                "choose --user-prompt plain"
            )
        for sample in range(config.samples):
            request = Request(request_key(name, problem.id, sample), prompt, rooms[-1])
            prompted.append(PromptedSample(name, problem, sample, request))
    if shorter := [room for room in rooms if room < limit]:
        print(
            f"context {context}: answers to {len(shorter)} of {len(rooms)} prompts are cut at "
            f"{min(shorter)} tokens or more, not {limit}"
        )
    return prompted


def user_message(problem: Problem, config: EvalConfig) -> dict[str, str]:
    return {"role": "user", "content": USER_PROMPTS[config.user_prompt] + problem.problem}


def request_key(benchmark: str, id: str, sample: int) -> int:
    """63 bits that identify a sample and seed it, whatever else is sampled in the same run."""
    name = repr((benchmark, id, sample)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1
