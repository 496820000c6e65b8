r"""Grade one response, or grade the stored completions of an evaluation again.

    grade(r"<think>\n...</think> So it is \boxed{\frac{1}{2}}.", "0.5")    -> correct
    python -m redi.eval.grade regrade out/redi/eval --grader paper         needs no GPU

The graders and their rules are described in grading/grader.py.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.config import parse, program
from redi.eval import report
from redi.eval.grading.grader import (
    AnswerFrom,
    Grader,
    GraderChoice,
    Verdict,
    answer_rule,
    grade_evaluation,
)
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


@dataclass(kw_only=True)
class RegradeConfig:
    command: Annotated[Literal["regrade"], "grade stored completions again"]
    run: Annotated[str, "folder that evaluate.py wrote"]
    grader: Annotated[
        GraderChoice | None, "whose rules: both, math-verify or paper; none: those of the run"
    ] = None
    answer_from: Annotated[
        AnswerFrom | None, "after_think or whole; none: whole if the run has no prefix"
    ] = None


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
