r"""How well do the graders know an answer when they see one, and what do they survive?

    python -m bench.grader FOLDER [TESTS]      FOLDER holds benchmark files, math500.jsonl and the
                                               like; TESTS is tests/ of Math-Verify's repository

Of every benchmark and grader, without a model: is each gold answer, given back as
`</think> ... \boxed{gold}`, graded correct; and is the previous row's different gold graded
incorrect? The second has no oracle for "different": texts whose keys are equal are left out, and
what is graded correct all the same is printed, to be judged by eye.
Of Math-Verify's own examples of equal and unequal answers: does our wrapper say what `verify`
called plainly says? Examples of finding an answer in prose are left out, since redi's is in a box.
Last, 500 random sums of fractions with answers that hang, eat memory or nest without end planted
among them: is every verdict there, and how many a second?
"""

import ast
import logging
import random
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.measure import result, write
from redi.config import UserError, program
from redi.eval.benchmarks import Benchmark, load
from redi.eval.grade import Grader, extract
from redi.eval.grading.normalize import text_key

WORKERS = 2
GRADERS = ("math-verify", "paper")
GOALS = {"minerva": 0.97, "olympiadbench": 0.97}  # of the other three 0.99
SUMS, LIMIT_S, SEED = 500, 3.0, 0
PLANTED = {
    "math-verify": (
        r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}",  # Math-Verify's issue 65
        r"10^{10^{9}}+1",
        r"\sqrt{" * 300 + "x" + "}" * 300,
        r"\sum_{k=1}^{10^{9}} \sin k",
    ),
    "paper": ("9**9**9**9", "10**(10**10)", "(" * 900 + "1" + ")" * 900, "factorial(10**8)"),
}
EACH = 3  # times that each of them is planted


def given_back(answer: str) -> str:
    return rf"<think>Let me see.</think> The answer is \boxed{{{answer}}}"


# ---------------------------------------------------------------- benchmarks


def ask(grader: Grader, test: Benchmark) -> tuple[float, float]:
    """(share of golds that are correct, share of previous golds that are incorrect)."""
    golds = [(a, p.answers) for p in test.problems for a in p.answers]
    verdicts = grader.grade_all((given_back(a), golds_of, "stop") for a, golds_of in golds)
    for (answer, _), verdict in zip(golds, verdicts):
        if verdict != "correct":
            print(f"  {test.name}, {grader.name}: gold {answer!r} is {verdict}")
    right = verdicts.count("correct") / len(verdicts)

    pairs = [
        (before.answers[0], problem.answers)
        for before, problem in zip(test.problems, test.problems[1:])
        if text_key(before.answers[0]) not in map(text_key, problem.answers)
    ]
    verdicts = grader.grade_all((given_back(a), golds_of, "stop") for a, golds_of in pairs)
    for (answer, others), verdict in zip(pairs, verdicts):
        if verdict != "incorrect":
            print(f"  {test.name}, {grader.name}: {answer!r} against {others} is {verdict}")
    return right, verdicts.count("incorrect") / len(verdicts)


def golds(folder: Path) -> dict[str, Any]:
    results = {}
    for path in sorted(folder.glob("*.jsonl")):
        test = load(path)
        for name in GRADERS:
            with Grader(WORKERS, name=name) as grader:
                right, wrong = ask(grader, test)
            print(f"{test.name:<14} {name:<12} gold {right:.4f}   other gold incorrect {wrong:.4f}")
            prefix = test.name if name == GRADERS[0] else f"{test.name}_{name}"
            goal = GOALS.get(test.name, 0.99)
            results[f"{prefix}_gold"] = result([right], goal, "its own gold")
            results[f"{prefix}_other"] = result([wrong], 0.995, "the previous row's gold")
        with Grader(WORKERS) as grader:
            found = grader.unreadable(test)
        print(f"{test.name:<14} golds that are no mathematics: {len(found)} {found}")
    return results


# ---------------------------------------------------------------- Math-Verify's own examples


def examples(folder: Path) -> Iterator[tuple[str, str]]:
    """(gold, answer) of parametrized tests, as their source has them."""
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "parametrize":
                continue
            if not re.match(r"gold, ?pred", ast.literal_eval(node.args[0])):
                continue
            for row in node.args[1].elts:
                try:
                    yield ast.literal_eval(row)[:2]
                except ValueError:
                    print(f"  {path.name}:{row.lineno}: is computed, left out")


_WHOLE = re.compile(r"(\$+)([^$]+)\1|\\\[(.*)\\\]|\\\((.*)\\\)", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}[ .,]+(?:[a-zA-Z]{2,}|\\[\[(])")


def bare(text: str) -> str | None:
    """What stands between the dollars or in the box of a text that is nothing else; None of one
    from which an answer is to be extracted."""
    text = text.strip()
    if whole := _WHOLE.fullmatch(text):
        text = next(group for group in whole.groups()[1:] if group is not None).strip()
    boxed = extract(f"</think>{text}")
    if boxed is not None and text == rf"\boxed{{{boxed}}}":
        text = boxed
    return None if "$" in text or r"\boxed" in text or _PROSE.search(text) else text


def agreement(folder: Path) -> dict[str, Any]:
    from math_verify import parse, verify

    logging.disable()  # Math-Verify warns of what it cannot read
    known = list(dict.fromkeys(examples(folder)))
    asked = [(gold, answer, bare(gold), bare(answer)) for gold, answer in known]
    asked = [row for row in asked if None not in row]
    with Grader(WORKERS) as grader:
        ours = grader.grade_all((given_back(answer), gold, "stop") for *_, gold, answer in asked)
    same = 0
    for (gold, answer, *_), verdict in zip(asked, ours):
        plain = "correct" if verify(parse(gold), parse(answer)) else "incorrect"
        same += verdict == plain
        if verdict != plain:
            print(f"  {gold!r} and {answer!r}: verify says {plain}, we say {verdict}")
    print(f"agrees with verify on {same} of {len(asked)} examples; {len(known)} in all")
    return {"agreement": result([same / len(asked)], 0.98, "verify called plainly")}


# ---------------------------------------------------------------- hostile answers


def sums(count: int) -> list[tuple[str, str, str]]:
    """(gold, answer, verdict): sums of two fractions, and what they are, or a little more."""
    made: list[tuple[str, str, str]] = []
    while len(made) < count:
        a, b, c, d = (random.randint(2, 60) for _ in range(4))
        right = random.random() < 0.5
        total = Fraction(a, b) + Fraction(c, d) + (0 if right else Fraction(1, 61))
        if total.denominator > 1:
            answer = rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
            verdict = "correct" if right else "incorrect"
            made.append((rf"\frac{{{a}}}{{{b}}}+\frac{{{c}}}{{{d}}}", answer, verdict))
    return made


def survives(name: str) -> dict[str, Any]:
    random.seed(SEED)
    plain = sums(SUMS)
    planted = [("7-x", answer, "") for answer in PLANTED[name] for _ in range(EACH)]
    # A planted answer is asked once unless it differs, as equal questions are.
    planted = [(gold, f"{answer}+{k}", "") for k, (gold, answer, _) in enumerate(planted)]
    items = random.sample(plain + planted, len(plain) + len(planted))
    seconds = []
    for asked in (plain, items):
        with Grader(WORKERS, LIMIT_S, name) as grader:
            grader.grade(given_back("1/2"), "0.5")  # a worker is there
            began = time.monotonic()
            verdicts = grader.grade_all((given_back(a), g, "stop") for g, a, _ in asked)
            seconds.append(time.monotonic() - began)
    assert len(verdicts) == len(items)
    wrong = [row for row, verdict in zip(items, verdicts) if row[2] not in ("", verdict)]
    hostile = [verdict for row, verdict in zip(items, verdicts) if row[2] == ""]
    print(
        f"{name}: {SUMS} sums in {seconds[0]:.1f} s, {SUMS / seconds[0]:.0f} a second; with "
        f"{len(planted)} planted answers {seconds[1]:.1f} s: {hostile.count('timeout')} time out, "
        f"{hostile.count('incorrect')} are incorrect; {len(wrong)} sums judged wrongly {wrong[:3]}"
    )
    return {
        f"{name}_sums_a_second": result([SUMS / seconds[0]], None, f"{WORKERS} workers"),
        f"{name}_sums_misjudged": result([len(wrong)], 0, "the sums' own values"),
        f"{name}_planted_correct": result([hostile.count("correct")], 0, "planted answers"),
    }


@program
def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if len(folders) not in (1, 2) or not all(folder.is_dir() for folder in folders):
        raise UserError(
            "usage: python -m bench.grader FOLDER [TESTS]: of benchmark files, of tests"
        )
    results = golds(folders[0])
    if len(folders) == 2:
        results |= agreement(folders[1])
    for name in GRADERS:
        results |= survives(name)
    write("grader", results)


if __name__ == "__main__":
    main()
