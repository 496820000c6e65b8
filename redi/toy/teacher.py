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
| wrong strategy | `precedence` | multiplications first; right if the order does not matter |
| rambling | `rambling` | repeats the whole chain; as often right, but longer |
| a bad verifier | `mislabelled_rejected` | a right trace among the wrong ones |

Traces are drawn until one is right. Mislabelled traces have a random generator to themselves, so a
larger share of them includes those of a smaller one, and all other traces stay the same. None is a
trace that its problem has already, so no pair is lost.
"""

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from redi.config import UserError, require

MAX_TRACES = 8  # drawn per problem, until one is right
MAX_REPEATS = 2  # of the chain, in a rambling trace
MAX_TRIES = 10_000  # for a trace whose label is to be wrong


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The teacher's, and the verifier's. Defaults: the demo's."""

    impatience: Annotated[float, "chance to jump to an answer before an operation"] = 0.25
    luck: Annotated[float, "chance that such an answer is right"] = 0.5
    slip: Annotated[float, "chance that a careful step is off by one"] = 0.01
    precedence: Annotated[float, "chance to do multiplications first in a trace"] = 0.0
    rambling: Annotated[float, "chance to go over the chain again, twice at most"] = 0.0
    mislabelled_rejected: Annotated[float, "share of the traces called wrong that are right"] = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):
                require(0 <= value <= 1, name, value, "within [0, 1]")


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
    """`count` different problems, none of them in `others`."""
    problems = {problem.text: problem for problem in others}
    first = len(problems)
    while len(problems) < first + count:
        steps = tuple((rng.choice("+-*"), rng.randint(1, 9)) for _ in range(operations))
        problem = Problem(rng.randint(1, 9), steps)
        problems.setdefault(problem.text, problem)
    return list(problems.values())[first:]


# ---------------------------------------------------------------- traces

Calculate = Callable[[int, str, int], int]  # (left, operation, right) -> the teacher's result


def left_to_right(problem: Problem, calculate: Calculate) -> int:
    value = problem.first
    for operation, operand in problem.steps:
        value = calculate(value, operation, operand)
    return value


def multiplications_first(problem: Problem, calculate: Calculate) -> int:
    """The usual precedence, which is not what the problem says."""
    terms = [("+", problem.first)]
    for operation, operand in problem.steps:
        if operation == "*":
            sign, left = terms[-1]
            terms[-1] = sign, calculate(left, "*", operand)
        else:
            terms.append((operation, operand))
    value = terms[0][1]
    for sign, term in terms[1:]:
        value = calculate(value, sign, term)
    return value


class _Impatient(Exception):
    """The teacher stops calculating and guesses."""


def draw_trace(rng: random.Random, problem: Problem, faults: Faults) -> tuple[str, bool]:
    """(trace, whether its answer is right)"""
    lines: list[str] = []

    def calculate(left: int, operation: str, right: int) -> int:
        is_last = len(lines) % len(problem.steps) == len(problem.steps) - 1
        if not is_last and rng.random() < faults.impatience:
            raise _Impatient
        result = apply(left, operation, right)
        if rng.random() < faults.slip:
            result = (result + rng.choice((-1, 1))) % 10
        lines.append(f"{left}{operation}{right}={result}\n")
        return result

    try:
        strategy = multiplications_first if happens(rng, faults.precedence) else left_to_right
        value, repeats = strategy(problem, calculate), 0
        while repeats < MAX_REPEATS and happens(rng, faults.rambling):
            value, repeats = strategy(problem, calculate), repeats + 1
    except _Impatient:
        value = problem.answer
        if rng.random() >= faults.luck:
            value = rng.choice([digit for digit in range(10) if digit != problem.answer])
    trace = f"<think>\n{''.join(lines)}</think>\n\\boxed{{{value}}}"
    return trace, value == problem.answer


def happens(rng: random.Random, chance: float) -> bool:
    """Draws no random number for a chance of 0, so a fault that is left out changes no trace."""
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
    for position, is_right in enumerate(labels):
        draw, trace_rng = verifier.random(), random.Random(verifier.getrandbits(64))
        if not is_right and draw < faults.mislabelled_rejected:
            traces[position] = another_right_trace(trace_rng, problem, faults, drawn)
    verifiers = ("llama_verification", "math_verify_answer", "math_verify_reparsed_answer")
    return {
        "problem": problem.text, "solution": "", "answer": str(problem.answer),
        "problem_type": "Algebra", "question_type": "math-word-problem",
        "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "toy", "synthetic": True,
        "generations": traces, "generations_count": len(traces),
        "correctness": dict.fromkeys(verifiers, labels),
        "reparsed_answers": [trace[trace.index("{") + 1 : -1] for trace in traces],
    }  # fmt: skip


def another_right_trace(
    rng: random.Random, problem: Problem, faults: Faults, known: Collection[str]
) -> str:
    """One that is not among the known ones. Raises UserError if this teacher never writes one."""
    for _ in range(MAX_TRIES):
        trace, is_right = draw_trace(rng, problem, faults)
        if is_right and trace not in known:
            return trace
    raise UserError(
        f"--mislabelled-rejected: this teacher writes no other right trace of {problem.text!r} in "
        f"{MAX_TRIES:,} tries; change its other faults"
    )
