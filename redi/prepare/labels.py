"""Labels for teacher traces by our grader (redi/eval/grading/grader.py), a batch of rows at a time.

    given votes    (True, True)   (False, True)   ()      the verifiers that came with the data
    verdict        correct        incorrect       correct
    new votes      (True,)        (False,)        (True,)

Traces without a vote are graded against their row's `answer`; with `relabel`, all traces are. A
trace that is not correct is incorrect, as in the paper, even if its answer is missing or truncated.
After a timeout the trace has no vote and is neither.

The grader reads what follows `</think>`. If no trace of a row has `<think>` or `</think>`, the
teacher does not mark its thinking, and its traces are read whole; otherwise a trace without
`</think>` was truncated. Left out: without `relabel`, rows of OpenR1-Math-Raw that have no labels
are dropped, as in the paper.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import get_args

from redi.eval.grading.grader import Grader, Verdict, extract
from redi.prepare.raw import RawRow, Trace
from redi.prepare.traces import PrepareConfig, unusable
from redi.tables import text_table

NO_ANSWER = "no answer to grade by"
GIVEN = ("correct", "disputed", "incorrect", "none")
BATCH_ROWS = 64  # graded together; a row is up to half a megabyte


Graded = Counter[tuple[str, Verdict]]  # (label by the given votes, our verdict) -> traces


def add_votes(
    rows: Iterable[RawRow], grader: Grader, config: PrepareConfig, counts: Graded
) -> Iterator[RawRow]:
    """`rows`, with our votes, which are counted. With require_complete, the texts also decide
    `complete`."""
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        asked = [(row, *each) for row in batch for each in _questions(row, config)]
        verdicts = grader.grade_all([question for *_, question in asked])
        for (row, trace, _), verdict in zip(asked, verdicts):
            some, every = any(trace.votes), all(trace.votes)
            given = "correct" if every else "disputed" if some else "incorrect"
            counts[given if trace.votes else "none", verdict] += 1
            trace.votes = () if verdict == "timeout" else (verdict == "correct",)
            row.flaw = None
        for trace in (t for row in batch for t in row.traces if config.require_complete):
            trace.complete &= extract(trace.text or "") is not None
        yield from batch


def _questions(row: RawRow, config: PrepareConfig) -> Iterator[tuple[Trace, tuple[str, str, str]]]:
    """The traces that get our vote, none if the row is dropped anyway, and for the grader
    (response, answer, finish_reason). A row that has neither labels nor an answer is flawed."""
    if unusable(row, config) or (row.flaw and not config.relabel):
        return
    to_grade = [trace for trace in row.traces if config.relabel or not trace.votes]
    if row.answer is None:
        row.flaw = NO_ANSWER if len(to_grade) == len(row.traces) else None
        return
    texts = [trace.text or "" for trace in row.traces]
    opened = "" if any("<think>" in t or "</think>" in t for t in texts) else "</think>"
    for trace in to_grade:
        finish_reason = "stop" if trace.complete else "length"
        yield trace, (opened + (trace.text or ""), trace.answer or row.answer, finish_reason)


def summary(counts: Graded) -> dict[str, dict[str, int]]:
    """{label: {verdict: number of traces}}, without labels that do not occur."""
    columns = {given: {v: counts[given, v] for v in get_args(Verdict)} for given in GIVEN}
    return {given: column for given, column in columns.items() if any(column.values())}


def table(counts: Graded) -> str:
    """The verdicts by the given labels, and how far the two agree."""
    columns = summary(counts)
    rows = [("our verdict", *columns)]
    for verdict in get_args(Verdict):
        rows.append((f"  {verdict}", *(str(column[verdict]) for column in columns.values())))
    both = {k: n for k, n in counts.items() if k[0] != "none" and k[1] != "timeout"}
    agree = sum(n for (given, v), n in both.items() if (given == "correct") == (v == "correct"))
    total = sum(both.values())
    line = f"\nagreement on correct or not: {agree} of {total}, {agree / max(total, 1):.1%}"
    title = "traces graded here, by the label that the data gives them:\n"
    return title + text_table(rows) + (line if total else "")
