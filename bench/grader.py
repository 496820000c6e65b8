r"""How well does the grader know an answer when it sees one?

    python -m bench.grader FOLDER          FOLDER holds benchmark files, math500.jsonl and the like

Two questions of every benchmark, without a model: is each gold answer, given back as
`</think> ... \boxed{gold}`, graded correct; and is the previous row's different gold graded
incorrect? The second has no oracle for "different": texts whose keys are equal are left out, and
what is graded correct all the same is printed, to be judged by eye. Last, the expression of
Math-Verify's issue 65, which runs for ever, must end as a timeout, and the next answer be graded.
"""

import sys
import time
from pathlib import Path

from bench.measure import result, write
from redi.config import UserError, program
from redi.eval.benchmarks import Benchmark, load
from redi.eval.equivalence import text_key
from redi.eval.grade import Grader

HANGING = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"


def given_back(answer: str) -> str:
    return rf"<think>Let me see.</think> The answer is \boxed{{{answer}}}"


def ask(grader: Grader, test: Benchmark) -> tuple[float, float]:
    """(share of golds that are correct, share of previous golds that are incorrect)."""
    golds = [(a, p.answers) for p in test.problems for a in p.answers]
    verdicts = grader.grade_all((given_back(a), golds_of, "stop") for a, golds_of in golds)
    for (answer, _), verdict in zip(golds, verdicts):
        if verdict != "correct":
            print(f"  {test.name}: gold {answer!r} is {verdict}")
    right = verdicts.count("correct") / len(verdicts)

    pairs = [
        (before.answers[0], problem.answers)
        for before, problem in zip(test.problems, test.problems[1:])
        if text_key(before.answers[0]) not in map(text_key, problem.answers)
    ]
    verdicts = grader.grade_all((given_back(a), golds_of, "stop") for a, golds_of in pairs)
    for (answer, others), verdict in zip(pairs, verdicts):
        if verdict != "incorrect":
            print(f"  {test.name}: {answer!r} against {others} is {verdict}")
    return right, verdicts.count("incorrect") / len(verdicts)


@program
def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise UserError("usage: python -m bench.grader FOLDER, a folder of benchmark files")
    results = {}
    with Grader(workers=2) as grader:
        for path in sorted(Path(sys.argv[1]).glob("*.jsonl")):
            test = load(path)
            goal = 0.99 if test.name in ("math500", "aime24", "amc") else 0.97
            right, wrong = ask(grader, test)
            print(f"{test.name:<14} gold correct {right:.4f}   other gold incorrect {wrong:.4f}")
            results[f"{test.name}_gold"] = result([right], goal, "its own gold")
            results[f"{test.name}_other"] = result([wrong], 0.995, "the previous row's gold")
        began = time.monotonic()
        verdict = grader.grade(given_back(HANGING), "1")
        print(f"Math-Verify #65: {verdict} after {time.monotonic() - began:.1f} s; then ", end="")
        print(f"2/4 against 0.5: {grader.grade(given_back('2/4'), '0.5')}")
    write("grader", results)


if __name__ == "__main__":
    main()
