"""Labels for teacher traces by the project's own grader (eval/grade.py), a batch of rows at a time.

    given votes    (True, True)   (False, True)   ()      the verifiers that came with the data
    verdict        correct        incorrect       correct
    new votes      (True,)        (False,)        (True,)

Graded are the traces that have no vote, or with `relabel` all, against the row's `answer`. What is
not correct is incorrect, an answer that is missing or cut off too, as in the paper; a comparison
that timed out is no verdict: such a trace stays without a vote, neither correct nor incorrect.

The grader reads what follows `</think>`. Where no trace of a row has a `<think>` or `</think>`, the
teacher does not think in that way, and its traces are read whole; in a row where another trace has
one, a trace without `</think>` was cut off.
Left out: rows of OpenR1-Math-Raw whose labels are missing are graded on `relabel` only, since the
paper drops them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from redi.eval.grade import Grader, Verdict, extract
from redi.prepare import traces
from redi.prepare.raw import RawRow
from redi.prepare.traces import Rules

NO_ANSWER = "no answer to grade by"
GIVEN = ("correct", "disputed", "incorrect", "none")


class Labels:
    """Grades rows, and counts verdicts beside the labels that were given.

    counts: (what the given votes said, the verdict) -> traces.
    """

    def __init__(self, grader: Grader, rules: Rules, relabel: bool) -> None:
        self.grader = grader
        self.rules = rules
        self.relabel = relabel
        self.counts: Counter[tuple[str, Verdict]] = Counter()

    def add(self, rows: Sequence[RawRow]) -> Iterator[RawRow]:
        """`rows` with votes on every trace that is to be graded, and with `complete` as the texts
        tell it, if the rules ask."""
        wanted = [self._wanted(row) for row in rows]
        items = [
            item
            for row, indices in zip(rows, wanted)
            if indices and row.answer is not None
            for item in _questions(row, indices)
        ]
        verdicts = iter(self.grader.grade_all(items))
        for row, indices in zip(rows, wanted):
            if indices and row.answer is not None:
                row = self._voted(row, indices, verdicts)
            elif indices and (self.relabel or not any(row.votes)):
                row = replace(row, flaw=NO_ANSWER)
            yield _complete(row) if self.rules.require_complete else row

    def _wanted(self, row: RawRow) -> list[int]:
        """Which traces of a row are to be graded; none of a row that is dropped anyway."""
        if traces.unusable(row, self.rules) or (row.flaw and not self.relabel):
            return []
        return [i for i, votes in enumerate(row.votes) if self.relabel or not votes]

    def _voted(self, row: RawRow, indices: list[int], verdicts: Iterator[Verdict]) -> RawRow:
        votes = list(row.votes)
        for index in indices:
            verdict = next(verdicts)
            self.counts[_said(row.votes[index]), verdict] += 1
            votes[index] = () if verdict == "timeout" else (verdict == "correct",)
        return replace(row, votes=votes, flaw=None)

    def summary(self) -> dict[str, dict[str, int]]:
        """{what was given: {verdict: traces}}, all zeros but those of the first left out."""
        rows = {said: {v: self.counts[said, v] for v in get_args(Verdict)} for said in GIVEN}
        return {said: row for said, row in rows.items() if any(row.values())}

    def table(self) -> str:
        """The verdicts beside the given labels, and how far they agree."""
        columns = self.summary()
        lines = [["graded \\ given", *columns]]
        lines += [[f"  {v}", *(str(columns[c][v]) for c in columns)] for v in get_args(Verdict)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
            )
            for line in lines
        )
        both = {k: n for k, n in self.counts.items() if k[0] != "none" and k[1] != "timeout"}
        agree = sum(n for (said, v), n in both.items() if (said == "correct") == (v == "correct"))
        total = sum(both.values())
        if total:
            text += f"\nagreement on correct or not: {agree} of {total}, {agree / total:.1%}"
        return text


def _questions(row: RawRow, indices: list[int]) -> Iterator[tuple[str, str, str]]:
    tagged = any("<think>" in trace or "</think>" in trace for trace in row.traces if trace)
    for index in indices:
        trace = row.traces[index] or ""
        reason = "stop" if row.complete[index] else "length"
        yield trace if tagged else f"</think>{trace}", row.answer, reason


def _said(votes: tuple[bool, ...]) -> str:
    if not votes:
        return "none"
    return "correct" if all(votes) else "disputed" if any(votes) else "incorrect"


def _complete(row: RawRow) -> RawRow:
    """Complete is what closes its thinking and then answers: `extract` finds nothing else."""
    whole = [
        whole and trace is not None and extract(trace) is not None
        for whole, trace in zip(row.complete, row.traces)
    ]
    return replace(row, complete=whole)
