r"""Responses -> verdicts: correct, incorrect, no_answer, truncated or timeout.

There are two graders, each a set of rules with a name:

    math-verify   the last balanced box; text, then algebra (`equivalence.py`). A response cut off
                  at the length limit is truncated and not correct.
    paper         the authors' rules (`paper_grader.py`): the last `\boxed{}`, two normal forms of
                  text, sympy. How generation ended does not matter, as in their tables.

Where both look for the box (the authors' code has only the first rule):

    after_think   after the first `</think>`; a response without one has no answer
    whole         in the whole response, or after `</think>` if there is one; a response with a
                  `<think>` that never closes has no answer

Equal texts and integers are decided here, all other answers by killable processes (workers.py).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from redi.config import UserError
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import AnswerFrom, Completion, Mark, Verdict
from redi.eval.grading import paper_grader
from redi.eval.grading.normalize import LONGEST_ANSWER, as_integer, text_key
from redi.eval.grading.repetition import repeats
from redi.eval.grading.workers import Pool, Question

GraderName = Literal["math-verify", "paper"]
GraderChoice = Literal["both", "math-verify", "paper"]

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def answer_rule(prefix: str) -> AnswerFrom:
    """The rule for answers that begin with `prefix`. Without a prefix, a model may never write
    `</think>`."""
    return "after_think" if prefix else "whole"


def extract(
    response: str, answer_from: AnswerFrom = "after_think", grader: GraderName = "math-verify"
) -> str | None:
    """The answer that a grader reads in a response, or None."""
    before, closed, after = response.partition("</think>")
    if not closed and (answer_from == "after_think" or "<think>" in response):
        return None
    text = after if closed else before
    return paper_grader.last_box(text) if grader == "paper" else _last_box(text)


def _last_box(text: str) -> str | None:
    r"""The content of the last balanced, non-empty `\boxed{}` or `\fbox{}`."""
    # One pass with a stack, since a looping model writes thousands of boxes that never close.
    opened, boxes = [], []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None:
                boxes.append((start, token.start()))
        elif token[0] == "{" or len(token[0]) > 2:
            opened.append(None if token[0] == "{" else token.end())
    contents = (text[start:end].strip() for start, end in sorted(boxes, reverse=True))
    return next(filter(None, contents), None)


def grader_names(choice: GraderChoice) -> list[GraderName]:
    return list(get_args(GraderName)) if choice == "both" else [choice]


@dataclass(frozen=True)
class Grader:
    """One of the graders. Graders may share a pool of workers."""

    pool: Pool
    name: GraderName = "math-verify"
    answer_from: AnswerFrom = "after_think"

    def grade_all(self, items: Iterable[tuple[str, str | list[str], str]]) -> list[Verdict]:
        """Verdicts on (response, answer, finish_reason) items, in their order.

        answer: the gold, or several, any of which suffices. finish_reason "length" means that
        generation stopped at its limit of tokens. An answer that occurs many times, as among the
        samples of one problem, is judged once. Raises UserError if a worker cannot start.
        """
        return self._settle([self._decide(*item)[1] for item in items])

    def marks(self, benchmark: Benchmark, completions: Iterable[Completion]) -> list[Mark]:
        """A mark for each completion, in their order. No text is kept."""
        answers = {problem.id: problem.answers for problem in benchmark.problems}
        marks, decided = [], []
        for c in completions:
            if c.id not in answers:
                raise UserError(f"{benchmark.name}: holds no problem {c.id!r}")
            extracted, decision = self._decide(c.text, answers[c.id], c.finish_reason)
            decided.append(decision)
            facts = {"id": c.id, "sample": c.sample, "num_tokens": c.num_tokens}
            marks.append(facts | {"extracted": extracted, "loops": repeats(c.text)})
        return [
            Mark(**facts, verdict=verdict, answer_from=self.answer_from)
            for facts, verdict in zip(marks, self._settle(decided))
        ]

    def _decide(
        self, response: str, answer: str | list[str], finish_reason: str
    ) -> tuple[str | None, Verdict | Question]:
        """The answer given, and the verdict if it needs no algebra, else the question to ask."""
        golds = [answer] if isinstance(answer, str) else answer
        if not golds:
            raise ValueError("a response cannot be graded against an empty list of answers")
        unfinished = finish_reason == "length"
        given = extract(response, self.answer_from, self.name)
        if unfinished and (given is None or self.name != "paper"):
            return given, "truncated"
        if given is None:
            return None, "no_answer"
        if given in golds:
            return given, "correct"
        if len(given) > LONGEST_ANSWER:  # prose, or a loop: reading it takes quadratic time
            return given, "incorrect"
        if self.name == "paper":
            return given, ("paper", given, *golds)
        return given, _by_text(given, golds) or ("math-verify", given, *golds)

    def _settle(self, decided: list[Verdict | Question]) -> list[Verdict]:
        replies = self.pool.ask(d for d in decided if isinstance(d, tuple))
        return [replies[d] if isinstance(d, tuple) else d for d in decided]


def _by_text(given: str, golds: list[str]) -> Verdict | None:
    """The verdict where equal text or integers decide it."""
    if text_key(given) in map(text_key, golds):
        return "correct"
    number, *numbers = map(as_integer, (given, *golds))
    if number is None or None in numbers:
        return None
    return "correct" if number in numbers else "incorrect"


def report_unreadable(pool: Pool, benchmarks: list[Benchmark]) -> None:
    """Print a line for every benchmark with golds that Math-Verify cannot read: only an answer of
    the same text will be correct. Starts a worker, so its UserError comes before sampling."""
    for benchmark in benchmarks:
        golds = [(p.id, answer) for p in benchmark.problems for answer in p.answers]
        replies = pool.ask(("readable", "", answer) for _, answer in golds)
        if found := [one for one in golds if replies["readable", "", one[1]] != "correct"]:
            named = "; ".join(f"{id}: {gold!r:.60}" for id, gold in found[:5])
            print(
                f"{benchmark.name}: {len(found)} gold answers cannot be read as mathematics, and "
                f"only the same text will be correct; the first ones: {named}"
            )
