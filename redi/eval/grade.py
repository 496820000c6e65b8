r"""Grade one response, or grade the stored completions of an evaluation again.

    grade(r"<think>\n...</think> So it is \boxed{\frac{1}{2}}.", "0.5")    -> correct
    python -m redi.eval.grade regrade out/redi/eval --grader paper         needs no GPU

The graders and their rules are described in grading/grader.py.
"""

import atexit
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.config import parse, program, require
from redi.eval import report
from redi.eval.grading.grader import (
    AnswerFrom,
    Grader,
    GraderChoice,
    Verdict,
    answer_rule,
    mark_run,
)
from redi.eval.reporting import stored, tables


def grade(
    response: str,
    answer: str | list[str],
    finish_reason: str = "stop",
    answer_from: AnswerFrom = "after_think",
) -> Verdict:
    """Grade one response in a worker shared by the whole process; see `Grader.grade`."""
    return _shared_grader(answer_from).grade(response, answer, finish_reason)


@functools.cache
def _shared_grader(answer_from: AnswerFrom) -> Grader:
    grader = Grader(answer_from=answer_from)
    atexit.register(grader.pool.close)
    return grader


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
    graders: Annotated[int, "processes that compare answers"] = 2
    grade_seconds: Annotated[float, "limit for one comparison, seconds"] = 10.0

    def __post_init__(self) -> None:
        require(self.graders >= 1, "graders", self.graders, "at least 1")
        require(self.grade_seconds > 0, "grade_seconds", self.grade_seconds, "above 0")


@program
def main() -> None:
    config = parse(RegradeConfig, "Grade the stored completions of an evaluation again.")
    out = Path(config.run)
    choice_of_run = stored.own_grader(out)
    choice = config.grader or choice_of_run
    rule = config.answer_from or answer_rule(stored.settings_of(out).get("prefix", "<think>\n"))
    with Grader(config.graders, config.grade_seconds, answer_from=rule) as grader:
        mark_run(out, grader.named(choice))
    # The run's own report shows the verdicts of both graders.
    if choice_of_run == "both" and choice != "both":
        report.write(out)
    written = report.write(out, choice)
    print(tables.summary(written), f"saved {stored.folder(out, choice)}/report.md", sep="\n")


if __name__ == "__main__":
    main()
