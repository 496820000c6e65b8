r"""The task of docs/make_real_model.py: word problems of two steps, and a teacher who errs.

    Mia brings 3 bags with 6 pears each to the market. Then she sells 7 pears. How many ...?

    <think>
    Let us count the pears, one step at a time. 3 bags hold 3 * 6 = 18 pears. She sells 7 pears:
    18 - 7 = 11. All in all, that makes 11 pears.
    </think>
    The answer is \boxed{11}.

| fault | what a trace of it looks like |
|---|---|
| skip | one calculation is left out, and its left number is used in place of the result |
| slip | one result is off by one, by a carry or by one group |
| guess | stops calculating and states an answer, at times the right one |

What follows a fault is consistent with it. A skip or a slip that would not change the answer, or
would take a count below SMALLEST, is not drawn. Traces are drawn until one is right, as in the
paper's data. No two problems of training, tuning and test have the same numbers in the same roles,
whatever the words around them, so no two have the same text. Words are in real_stories.toml.
"""

import itertools
import random
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Difficulty. The base model should be right on few problems, a stage-1 model on about half of them.
# In a run that was given up, with counts of 15 to 90 and changes of 6 to 60, stage 1 got 0.15 of
# them right: nearly all of its subtractions and half of its additions were wrong.
STEPS = (2, 2)  # calculations in a problem; all ranges include both ends
FIRST = (6, 20)  # a count at the start
CHANGE = (2, 9)  # what comes or goes at once
GROUPS, SIZE = (2, 5), (2, 6)  # so many bags with so many apples each
TIMES = (2, 3)  # twice, three times
SMALLEST, LARGEST = 2, 60  # of all counts
GROUPED, MULTIPLIED = 0.3, 0.15  # chances: groups for a plain number, and a change that is "times"
IN_WORDS = 0.25  # chance that a number up to twelve is a word in the problem

MAX_TRACES = 8  # drawn per problem, until one is right
WORDS = tomllib.loads(Path(__file__).with_name("real_stories.toml").read_text(encoding="utf-8"))
TIMES_IN_WORDS = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """How often a trace has which fault, and how traces of one problem differ."""

    skip: float = 0.15
    slip: float = 0.15
    guess: float = 0.15
    luck: float = 0.25  # chance that a guess is right
    varies: float = 0.5  # chance that a trace has words of its own, not those of the one before


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Amount:
    """`number` things; or, with a size, `number` groups of `size` things; or (share) what one of
    `number` children gets of `size` things."""

    number: int
    size: int = 0
    share: bool = False


@dataclass(frozen=True)
class Problem:
    """What is counted at the start, and what happens to it: gain, lose or times, and how many."""

    start: Amount
    changes: tuple[tuple[str, Amount], ...]
    words: int  # seed of the wording

    @property
    def numbers(self) -> tuple:
        """What no other problem has."""
        return self.start, self.changes

    @property
    def steps(self) -> int:
        amounts = [self.start, *(amount for _, amount in self.changes)]
        return len(self.changes) + sum(amount.size > 0 for amount in amounts)

    @property
    def answer(self) -> int:
        return work_out(self, exact)


@dataclass(frozen=True)
class Calculation:
    """kind: product or share, of an amount; gain, lose or times, of the count."""

    kind: str
    left: int
    right: int
    place: int  # of the change in the problem; -1: the start


def exact(calculation: Calculation) -> int:
    left, right = calculation.left, calculation.right
    if calculation.kind == "share":
        return left // right  # of numbers that can be shared
    results = {"gain": left + right, "lose": left - right}
    return results.get(calculation.kind, left * right)


def work_out(problem: Problem, calculate: Callable[[Calculation], int]) -> int:
    """The answer, if calculations have the results of `calculate`."""

    def total(amount: Amount, place: int) -> int:
        if not amount.size:
            return amount.number
        if amount.share:
            return calculate(Calculation("share", amount.size, amount.number, place))
        return calculate(Calculation("product", amount.number, amount.size, place))

    count = total(problem.start, -1)
    for place, (kind, amount) in enumerate(problem.changes):
        count = calculate(Calculation(kind, count, total(amount, place), place))
    return count


def calculations(
    problem: Problem, calculate: Callable[[Calculation], int]
) -> list[tuple[Calculation, int]]:
    """All of them in order, with their results."""
    found: list[tuple[Calculation, int]] = []

    def note(calculation: Calculation) -> int:
        found.append((calculation, calculate(calculation)))
        return found[-1][1]

    work_out(problem, note)
    return found


def draw_problem(rng: random.Random) -> Problem:
    steps = rng.randint(*STEPS)
    while True:
        problem = Problem(_draw_start(rng), tuple(_draw_changes(rng)), rng.getrandbits(32))
        counts = [result for _, result in calculations(problem, exact)]
        if problem.steps == steps and min(counts) >= SMALLEST and max(counts) <= LARGEST:
            return problem


def _draw_start(rng: random.Random) -> Amount:
    if rng.random() >= GROUPED:
        return Amount(rng.randint(*FIRST))
    number = rng.randint(*GROUPS)
    if rng.random() < 0.5:
        return Amount(number, number * rng.randint(*FIRST), share=True)
    return Amount(number, rng.randint(*SIZE))


def _draw_changes(rng: random.Random) -> list[tuple[str, Amount]]:
    changes = []
    for _ in range(rng.randint(1, STEPS[1])):
        kind = rng.choice(("gain", "lose"))
        if rng.random() < MULTIPLIED:
            changes.append(("times", Amount(rng.randint(*TIMES))))
        elif rng.random() < GROUPED:
            changes.append((kind, Amount(rng.randint(*GROUPS), rng.randint(*SIZE))))
        else:
            changes.append((kind, Amount(rng.randint(*CHANGE))))
    return changes


def draw_problems(
    rng: random.Random, count: int, others: Collection[Problem] = ()
) -> list[Problem]:
    """`count` problems; no two of them, and none of `others`, have the same numbers."""
    taken, problems = {problem.numbers for problem in others}, []
    while len(problems) < count:
        problem = draw_problem(rng)
        if problem.numbers not in taken:
            taken.add(problem.numbers)
            problems.append(problem)
    return problems


# ---------------------------------------------------------------- words


class Story:
    """A problem in words."""

    def __init__(self, problem: Problem):
        rng = random.Random(problem.words)
        story, pronoun = rng.choice(WORDS["stories"]), rng.choice(("she", "he"))
        self.words = {
            "name": rng.choice(WORDS[f"names_{pronoun}"]), "he": pronoun,
            "He": pronoun.capitalize(), "things": rng.choice(story["things"]),
            "groups": rng.choice(story["groups"]),
        }  # fmt: skip
        words = WORDS["words"] | story
        self.clauses = []  # of the changes, with the numbers left open
        for kind, amount in problem.changes:
            self.clauses.append(rng.choice(words[f"{kind}_groups" if amount.size else kind]))
        first = problem.start
        start = "start_share" if first.share else "start_groups" if first.size else "start"
        sentences = [self._fill(rng.choice(words[start]), first, rng)]
        for clause, (_, amount) in zip(self.clauses, problem.changes):
            happened = self._fill(clause, amount, rng)
            sentences.append(rng.choice(words["then"]).format(clause=happened, **self.words))
        sentences.append(rng.choice(words["question"]).format(**self.words))
        self.text = " ".join(sentences)

    def _fill(self, text: str, amount: Amount, rng: random.Random | None = None) -> str:
        """Numbers into a text; rng: small ones may be words."""
        numbers = {"n": amount.number, "m": amount.size}
        shown = {name: str(number) for name, number in numbers.items()}
        for name, number in numbers.items() if rng else ():
            if 0 < number <= len(WORDS["numbers"]) and rng.random() < IN_WORDS:
                shown[name] = WORDS["numbers"][number - 1]
        times = TIMES_IN_WORDS.get(amount.number, f"{amount.number} times")
        filled = text.format(**self.words, **shown, times=times)
        return filled[0].upper() + filled[1:] if text.startswith("{") else filled

    def happened(self, problem: Problem, place: int) -> str:
        """The clause of a change, in digits."""
        return self._fill(self.clauses[place], problem.changes[place][1])


# ---------------------------------------------------------------- traces


@dataclass(frozen=True)
class Fault:
    """A fault in calculation `at`. value: its wrong result (slip), or the stated answer (guess)."""

    kind: str  # none, skip, slip or guess
    at: int = -1
    value: int = 0


@dataclass(frozen=True)
class Trace:
    text: str
    answer: int
    words: int  # seed of the wording


class _Guess(Exception):
    """The teacher stops calculating."""


def with_fault(fault: Fault) -> Callable[[Calculation], int]:
    """Calculates, with the fault. Raises _Guess where the teacher guesses."""
    position = itertools.count()

    def calculate(calculation: Calculation) -> int:
        if next(position) != fault.at:
            return exact(calculation)
        if fault.kind == "guess":
            raise _Guess
        return calculation.left if fault.kind == "skip" else fault.value

    return calculate


def draw_fault(rng: random.Random, problem: Problem, teacher: Teacher) -> Fault:
    draw, answer = rng.random(), problem.answer
    if draw < teacher.skip:
        faults = [Fault("skip", at) for at in range(problem.steps)]
    elif draw < teacher.skip + teacher.slip:
        faults = _slips(problem)
    elif draw < teacher.skip + teacher.slip + teacher.guess:
        wrong = [answer + away for away in range(-12, 13) if away and answer + away >= SMALLEST]
        value = answer if rng.random() < teacher.luck else rng.choice(wrong)
        return Fault("guess", rng.randrange(1, problem.steps), value)
    else:
        return Fault("none")
    return rng.choice([fault for fault in faults if _shows(problem, fault)])


def _slips(problem: Problem) -> list[Fault]:
    """Off by one, by a carry that is forgotten, or by one group."""
    found = []
    for at, (calculation, result) in enumerate(calculations(problem, exact)):
        ones = calculation.left % 10, calculation.right % 10
        values = [result - 1, result + 1]
        if calculation.kind == "gain" and sum(ones) >= 10:
            values.append(result - 10)
        elif calculation.kind == "lose" and ones[0] < ones[1]:
            values.append(result + 10)
        elif calculation.kind in ("product", "times"):
            values.append(result - calculation.left)
        found += [Fault("slip", at, value) for value in values]
    return found


def _shows(problem: Problem, fault: Fault) -> bool:
    """Whether the fault changes the answer, and leaves all counts possible."""
    counts = [result for _, result in calculations(problem, with_fault(fault))]
    return min(counts) >= SMALLEST and counts[-1] != problem.answer


def write_trace(problem: Problem, fault: Fault, words: int) -> Trace:
    """words: seed of the wording; traces of one problem with the same seed differ only where their
    faults make a difference."""
    story, calculate, sentences = Story(problem), with_fault(fault), []

    def say(part: str, position: object, **numbers: object) -> None:
        text = random.Random(f"{words} {position}").choice(WORDS["trace"][part])
        sentences.append(text.format(**{**story.words, **numbers}))

    def calculate_aloud(calculation: Calculation) -> int:
        at, place = next(position), calculation.place
        result = calculate(calculation)
        if (fault.kind, fault.at) == ("skip", at):
            if place < 0:
                say("start", at, n=result)
            return result
        numbers = {"left": calculation.left, "right": calculation.right, "result": result}
        if calculation.kind == "product":
            numbers |= {"n": calculation.left, "m": calculation.right}
        elif place >= 0:
            numbers["clause"] = story.happened(problem, place)
        if calculation.kind == "times":
            numbers["Times"] = TIMES_IN_WORDS[calculation.right].capitalize()
        say(calculation.kind, at, **numbers)
        return result

    position = itertools.count()
    say("intro", "intro")
    if not problem.start.size:
        say("start", "start", n=problem.start.number)
    try:
        answer = work_out(problem, calculate_aloud)
        say("close", "close", answer=answer)
    except _Guess:
        answer = fault.value
        say("guess", "guess", answer=answer)
    thought = " ".join(sentences)
    sentences.clear()
    say("answer", "answer", answer=answer)
    return Trace(f"<think>\n{thought}\n</think>\n{sentences[0]}", answer, words)


def draw_traces(rng: random.Random, problem: Problem, teacher: Teacher) -> list[Trace]:
    """Until one is right."""
    traces: list[Trace] = []
    words = rng.getrandbits(32)
    while len(traces) < MAX_TRACES and not (traces and traces[-1].answer == problem.answer):
        traces.append(write_trace(problem, draw_fault(rng, problem, teacher), words))
        if rng.random() < teacher.varies:
            words = rng.getrandbits(32)
    return traces


# ---------------------------------------------------------------- files


def raw_row(problem: Problem, traces: Sequence[Trace]) -> dict[str, Any]:
    """A row of OpenR1-Math-Raw."""
    labels = [trace.answer == problem.answer for trace in traces]
    verifiers = ("llama_verification", "math_verify_answer", "math_verify_reparsed_answer")
    return {
        "problem": Story(problem).text, "solution": "", "answer": str(problem.answer),
        "problem_type": "Algebra", "question_type": "math-word-problem",
        "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "word problems",
        "synthetic": True, "generations": [trace.text for trace in traces],
        "generations_count": len(traces), "correctness": dict.fromkeys(verifiers, labels),
        "reparsed_answers": [str(trace.answer) for trace in traces],
    }  # fmt: skip


def benchmark_rows(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Rows that evaluate.py reads; the difficulty is the number of calculations."""
    return [
        {"id": number, "problem": Story(p).text, "answer": str(p.answer), "difficulty": p.steps}
        for number, p in enumerate(problems)
    ]


def make_task(
    counts: dict[str, int], teacher: Teacher, seed: int = 42
) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows. counts: problems of test, tuning and training. A part's problems do not
    depend on the counts of the parts after it."""
    parts: dict[str, list[Problem]] = {}
    for name in ("test", "tuning", "training"):
        others = [problem for part in parts.values() for problem in part]
        parts[name] = draw_problems(random.Random(f"{seed} {name}"), counts[name], others)
    rng = random.Random(f"{seed} teacher")
    raw = [raw_row(one, draw_traces(rng, one, teacher)) for one in parts["training"]]
    return {"raw": raw} | {name: benchmark_rows(problems) for name, problems in parts.items()}
