r"""Grade one response, or grade the stored completions of an evaluation again.

    grade(r"<think>\n...</think> So it is \boxed{\frac{1}{2}}.", "0.5")    -> correct
    python -m redi.eval.grade regrade out/redi/eval --grader paper         needs no GPU

The graders and their rules are described in grading/grader.py.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.config import parse, program
from redi.eval import completions, report
from redi.eval.completions import AnswerFrom, Completion, Mark, Verdict
from redi.eval.grading.grader import Grader, GraderChoice, answer_rule, grader_names
from redi.eval.grading.workers import Pool
from redi.eval.reporting.stored import settings_of

_shared_pool = functools.cache(Pool)  # its worker ends when this process does


def grade(
    response: str,
    answer: str | list[str],
    finish_reason: str = "stop",
    answer_from: AnswerFrom = "after_think",
) -> Verdict:
    """Grade one response by Math-Verify's rules; see `Grader.grade_all`."""
    grader = Grader(_shared_pool(), answer_from=answer_from)
    return grader.grade_all([(response, answer, finish_reason)])[0]


def grade_evaluation(out: Path, choice: GraderChoice, answer_from: AnswerFrom, pool: Pool) -> None:
    """Grade every stored completion by one grader or both. Raises UserError if some are missing,
    before it changes any verdict on disk."""
    graded: dict[Path, list[Mark]] = {}
    stored = completions.stored_benchmarks(out)
    for benchmark, name in itertools.product(stored, grader_names(choice)):
        rows = completions.read_lines(completions.completions_file(out, benchmark.name), Completion)
        marks = Grader(pool, name, answer_from).marks(benchmark, rows)
        completions.by_problem(benchmark, marks)  # raises if one is missing
        graded[completions.marks_file(out, name, benchmark.name)] = marks
    for path, marks in graded.items():
        completions.write_lines(path, marks)


@dataclass(kw_only=True)
class RegradeConfig:
    command: Annotated[Literal["regrade"], "grade stored completions again"]
    run: Annotated[str, "folder that evaluate.py wrote"]
    grader: Annotated[GraderChoice | None, "both, math-verify or paper; none: the run's"] = None
    answer_from: Annotated[AnswerFrom | None, "after_think or whole; none: the run's"] = None


@program
def main() -> None:
    config = parse(RegradeConfig, "Grade the stored completions of an evaluation again.")
    out = Path(config.run)
    settings = settings_of(out)
    choice = config.grader or settings["grader"]
    rule = config.answer_from or answer_rule(settings["prefix"])
    with Pool(settings["graders"], settings["grade_seconds"]) as pool:
        grade_evaluation(out, choice, rule, pool)
    # The run's own report shows the verdicts of both graders.
    if settings["grader"] == "both" and choice != "both":
        report.write(out)
    print(report.write(out, choice))


if __name__ == "__main__":
    main()
