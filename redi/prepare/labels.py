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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import get_args

from redi.eval.grading.grader import Grader, Verdict, extract
from redi.prepare.raw import RawRow, Trace
from redi.prepare.traces import Rules, unusable
from redi.tables import text_table

NO_ANSWER = "no answer to grade by"
GIVEN = ("correct", "disputed", "incorrect", "none")
BATCH_ROWS = 64  # graded together; a row is up to half a megabyte


class Labels:
    """Grades rows. counts: (label by the given votes, our verdict) -> number of traces."""

    def __init__(self, grader: Grader, rules: Rules, relabel: bool) -> None:
        self.grader = grader
        self.rules = rules
        self.relabel = relabel
        self.counts: Counter[tuple[str, Verdict]] = Counter()

    def add(self, rows: Iterable[RawRow]) -> Iterator[RawRow]:
        """`rows` with our votes. With require_complete, the texts also decide `complete`."""
        rows = iter(rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            to_grade = [self._to_grade(row) for row in batch]
            questions = [q for row, traces in zip(batch, to_grade) for q in _questions(row, traces)]
            verdicts = iter(self.grader.grade_all(questions))
            for row, traces in zip(batch, to_grade):
                if traces and row.answer is not None:
                    row = self._with_votes(row, verdicts)
                elif traces and (self.relabel or not any(trace.votes for trace in row.traces)):
                    row = replace(row, flaw=NO_ANSWER)
                yield _with_complete(row) if self.rules.require_complete else row

    def _to_grade(self, row: RawRow) -> list[Trace]:
        """The row's traces that get our vote: none if the row is dropped anyway."""
        if unusable(row, self.rules) or (row.flaw and not self.relabel):
            return []
        return [trace for trace in row.traces if self.relabel or not trace.votes]

    def _with_votes(self, row: RawRow, verdicts: Iterator[Verdict]) -> RawRow:
        """The row with votes for its `_to_grade` traces, whose verdicts come next."""
        traces = list(row.traces)
        for index, trace in enumerate(traces):
            if self.relabel or not trace.votes:
                verdict = next(verdicts)
                self.counts[_label_of(trace.votes), verdict] += 1
                votes = () if verdict == "timeout" else (verdict == "correct",)
                traces[index] = replace(trace, votes=votes)
        return replace(row, traces=traces, flaw=None)

    def summary(self) -> dict[str, dict[str, int]]:
        """{label: {verdict: number of traces}}, without labels that do not occur."""
        columns = {given: {v: self.counts[given, v] for v in get_args(Verdict)} for given in GIVEN}
        return {given: column for given, column in columns.items() if any(column.values())}

    def table(self) -> str:
        """The verdicts by the given labels, and how far the two agree."""
        columns = self.summary()
        rows = [("our verdict", *columns)]
        for verdict in get_args(Verdict):
            rows.append((f"  {verdict}", *(str(column[verdict]) for column in columns.values())))
        both = {k: n for k, n in self.counts.items() if k[0] != "none" and k[1] != "timeout"}
        agree = sum(n for (given, v), n in both.items() if (given == "correct") == (v == "correct"))
        total = sum(both.values())
        line = f"\nagreement on correct or not: {agree} of {total}, {agree / max(total, 1):.1%}"
        title = "traces graded here, by the label that the data gives them:\n"
        return title + text_table(rows) + (line if total else "")


def _questions(row: RawRow, traces: list[Trace]) -> Iterator[tuple[str, str, str]]:
    """(response, answer, finish_reason) of the traces, for the grader."""
    if row.answer is None:
        return
    texts = [trace.text or "" for trace in row.traces]
    tagged = any("<think>" in text or "</think>" in text for text in texts)
    for trace in traces:
        response = f"{'' if tagged else '</think>'}{trace.text or ''}"
        yield response, trace.answer or row.answer, "stop" if trace.complete else "length"


def _label_of(votes: Sequence[bool]) -> str:
    """One of GIVEN."""
    if not votes:
        return "none"
    return "correct" if all(votes) else "disputed" if any(votes) else "incorrect"


def _with_complete(row: RawRow) -> RawRow:
    """A trace is complete if it closes its thinking and then gives an answer."""

    def is_complete(trace: Trace) -> bool:
        return trace.complete and trace.text is not None and extract(trace.text) is not None

    return replace(row, traces=[replace(t, complete=is_complete(t)) for t in row.traces])
