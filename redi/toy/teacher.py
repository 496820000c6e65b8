"""The toy's teacher: problems, traces, and the faults that a teacher can have.

    Compute modulo 10 from left to right: 6-1-9*7=?        <think>
                                                           6-1=5
                                                           5-9=6
                                                           6*7=2
                                                           </think>
                                                           \\boxed{2}

| fault | flag | what a trace of it looks like |
|---|---|---|
| impatience | `impatience`, `luck` | stops before an operation and states an answer, a guess |
| slips | `slip` | one line is off by one, and all after it follow from that |
| systematic slips | `weak_steps` | every `*7`, say, comes out one too high: no luck helps |
| wrong strategy | `precedence` | multiplications first; right if the order does not matter |
| rambling | `rambling` | goes over the whole chain again; no less often right, but longer |
| a bad verifier | `mislabelled_*` | a right trace among the wrong ones, or the other way round |

Traces are drawn until one is right, and the first wrong one is kept beside it: the shape of the
paper's data. The verifier's faults use their own random numbers: a larger share of them includes
those of a smaller one, and problems and all other traces stay the same. A trace that replaces
another one is new, so no pair is lost: beside a careful right trace, of which there is one, it is
a lucky guess.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from redi.config import UserError, require

MAX_TRACES = 8  # drawn per problem, until one is right
MAX_RETURNS = 2  # times that a rambling trace goes over the chain again
MAX_TRIES = 10_000  # for a trace whose label is to be wrong


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Of the teacher and of the verifier that labels its traces. The defaults are the demo's."""

    impatience: Annotated[float, "chance to jump to an answer before an operation"] = 0.25
    luck: Annotated[float, "chance that such an answer is right"] = 0.5
    slip: Annotated[float, "chance that a careful step is off by one"] = 0.01
    weak_steps: Annotated[list[str], "steps that come out one too high, such as *7, - or 3"] = (
        field(default_factory=list)
    )
    precedence: Annotated[float, "chance to do multiplications first in a trace"] = 0.0
    rambling: Annotated[float, "chance to go over the chain again, twice at most"] = 0.0
    mislabelled_rejected: Annotated[float, "share of the traces called wrong that are right"] = 0.0
    mislabelled_chosen: Annotated[float, "share of the traces called right that are wrong"] = 0.0

    def __post_init__(self) -> None:
        for name in (
            "impatience", "luck", "slip", "precedence", "rambling", "mislabelled_rejected",
            "mislabelled_chosen",
        ):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "within [0, 1]")
        known = {o + d for o in ("+", "-", "*", "") for d in ("", *"123456789")} - {""}
        for step in self.weak_steps:
            require(step in known, "weak_steps", step, "an operation, a digit of 1-9, or both")


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    first: int
    steps: tuple[tuple[str, int], ...]  # (operation, operand)

    @property
    def text(self) -> str:
        chain = "".join(f"{operation}{operand}" for operation, operand in self.steps)
        return f"Compute modulo 10 from left to right: {self.first}{chain}=?"

    @property
    def answer(self) -> int:
        return left_to_right(self, apply)


def apply(left: int, operation: str, right: int) -> int:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operation] % 10


def draw_problems(
    rng: random.Random, count: int, operations: int, others: Iterable[Problem] = ()
) -> list[Problem]:
    """`count` problems, no two alike, and none of `others` among them."""
    problems = {problem.text: problem for problem in others}
    first = len(problems)
    while len(problems) < first + count:
        steps = tuple((rng.choice("+-*"), rng.randint(1, 9)) for _ in range(operations))
        problem = Problem(rng.randint(1, 9), steps)
        problems.setdefault(problem.text, problem)
    return list(problems.values())[first:]


# ---------------------------------------------------------------- traces

Step = Callable[[int, str, int], int]  # (left, operation, right) -> what the teacher makes of it


def left_to_right(problem: Problem, step: Step) -> int:
    value = problem.first
    for operation, operand in problem.steps:
        value = step(value, operation, operand)
    return value


def multiplications_first(problem: Problem, step: Step) -> int:
    """What everybody learned at school, and not what is asked."""
    terms = [("+", problem.first)]
    for operation, operand in problem.steps:
        if operation == "*":
            sign, left = terms[-1]
            terms[-1] = sign, step(left, "*", operand)
        else:
            terms.append((operation, operand))
    value = terms[0][1]
    for sign, term in terms[1:]:
        value = step(value, sign, term)
    return value


class _Impatient(Exception):
    """The teacher has had enough of this trace."""


def draw_trace(rng: random.Random, problem: Problem, faults: Faults) -> tuple[str, bool]:
    """A trace of the teacher's, and whether its answer is right."""
    lines: list[str] = []

    def step(left: int, operation: str, right: int) -> int:
        is_last = len(lines) % len(problem.steps) == len(problem.steps) - 1
        if not is_last and rng.random() < faults.impatience:
            raise _Impatient
        result = apply(left, operation, right)
        if not {operation, str(right), f"{operation}{right}"}.isdisjoint(faults.weak_steps):
            result = (result + 1) % 10
        if rng.random() < faults.slip:
            result = (result + rng.choice((-1, 1))) % 10
        lines.append(f"{left}{operation}{right}={result}\n")
        return result

    try:
        wrong_way = happens(rng, faults.precedence)
        strategy = multiplications_first if wrong_way else left_to_right
        value, returns = strategy(problem, step), 0
        while returns < MAX_RETURNS and happens(rng, faults.rambling):
            value, returns = strategy(problem, step), returns + 1
    except _Impatient:
        value = problem.answer
        if rng.random() >= faults.luck:
            value = rng.choice([digit for digit in range(10) if digit != problem.answer])
    trace = f"<think>\n{''.join(lines)}</think>\n\\boxed{{{value}}}"
    return trace, value == problem.answer


def happens(rng: random.Random, chance: float) -> bool:
    """Takes no random number for what never happens: a fault left out changes no trace."""
    return chance > 0 and rng.random() < chance


# ---------------------------------------------------------------- rows


def raw_row(
    rng: random.Random, verifier: random.Random, problem: Problem, faults: Faults
) -> dict[str, Any]:
    """Traces drawn until one is called right, as a row of OpenR1-Math-Raw."""
    traces: list[str] = []
    labels: list[bool] = []
    while len(traces) < MAX_TRACES and True not in labels:
        trace, is_right = draw_trace(rng, problem, faults)
        traces.append(trace)
        labels.append(is_right)
    drawn = tuple(traces)
    for place, label in enumerate(labels):
        share = faults.mislabelled_chosen if label else faults.mislabelled_rejected
        draw, own = verifier.random(), random.Random(verifier.getrandbits(64))
        if draw < share:
            traces[place] = another_trace(not label, own, problem, faults, drawn)
    return {
        "problem": problem.text,
        "solution": "",
        "answer": str(problem.answer),
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "toy",
        "synthetic": True,
        "generations": traces,
        "generations_count": len(traces),
        "correctness": {
            "llama_verification": labels,
            "math_verify_answer": labels,
            "math_verify_reparsed_answer": labels,
        },
        "reparsed_answers": [trace[trace.index("{") + 1 : -1] for trace in traces],
    }


def another_trace(
    right: bool, rng: random.Random, problem: Problem, faults: Faults, known: Sequence[str]
) -> str:
    """One that is right, or wrong, and none of those known. Raises UserError if this teacher never
    writes such a trace."""
    for _ in range(MAX_TRIES):
        trace, is_right = draw_trace(rng, problem, faults)
        if is_right == right and trace not in known:
            return trace
    flag, kind = ("rejected", "right") if right else ("chosen", "wrong")
    raise UserError(
        f"--mislabelled-{flag}: this teacher writes no other {kind} trace of {problem.text!r} in "
        f"{MAX_TRIES:,} tries; change its other faults"
    )
