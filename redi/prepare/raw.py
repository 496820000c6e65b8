r"""Teacher data in any of four forms -> one `RawRow` per problem, streamed.

    OpenR1-Math-Raw   {"problem", "problem_is_valid", "generations": [..], "correctness": {..}}
    OpenR1-Math-220k  {"problem", "generations": [..], "correctness_math_verify": [..],
                       "correctness_llama", "is_reasoning_complete", "finish_reasons": [..] | null}
    problem, traces   {"problem", "answer", "traces": [{"text": "It is 2.", "correct": true}, ..]}
    one trace a row   {"problem": "1+1?", "response": "It is 2.", "correct": true, "answer": "2"}

The fields of a file's first 100 rows decide its form; a missing field counts as null. Each form may
also have `answer`, `source` and an id (`uuid` or `id`). Files with one trace per row spell their
fields in the ways listed below (PROBLEM, TRACE, ...); the first spelling found is used. Their rows
are grouped by problem, in order of first appearance. The texts wait in a temporary file; memory
holds sixteen bytes and an offset per problem.

The verifiers' labels of a trace are its votes. In OpenR1-Math-Raw both must have voted on every
trace, as in the paper. In OpenR1-Math-220k a null is a missing vote: where the Llama judge's list
is null, as it mostly is, Math-Verify alone decides; where both voted, the paper's rule needs both.
(The judge was asked mainly where Math-Verify had said no, so traces it corrected count as wrong,
unless `--reject-rule both` or `--relabel` is given.) A trace without any vote has no label. In
files with one trace per row, booleans and 0 and 1 are votes.

Left out: `solution` as a trace's field, usually the author's; problems or traces that are lists of
messages; several generations in fields of their own.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows
from redi.eval.benchmarks import answer_text

RAW, FLAT, LISTED = "OpenR1-Math-Raw", "OpenR1-Math-220k", "problem, traces"
VERIFIERS = ("llama_verification", "math_verify_reparsed_answer")
FLAT_VERIFIERS = ("correctness_llama", "correctness_math_verify")

# One trace per row: how published data sets spell each field.
PROBLEM = ("problem", "question", "prompt")
TRACE = ("generation", "generated_solution", "response", "trace", "output", "completion")
LABEL = ("correct", "is_correct", "label", "reward")
ANSWER = ("answer", "expected_answer", "final_answer")
SOURCE = ("source", "problem_source")
ID = ("uuid", "id")
FIELDS = {
    "problem_is_valid", "generations", "correctness", *FLAT_VERIFIERS, "is_reasoning_complete",
    "finish_reasons", "finish_reason", "traces", *PROBLEM, *TRACE, *LABEL, *ANSWER, *SOURCE, *ID,
}  # fmt: skip

HEAD = 100  # rows of a file that decide its form


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """A problem and the teacher's traces of it; `votes` and `complete` are aligned with `traces`.

    votes: what the verifiers said of each trace, true for correct; () if none said anything.
    complete: False where the data says that the trace was truncated.
    answers: one per trace, if a problem's rows of one trace disagree; otherwise (), see `answer`.
    flaw: why the row cannot be used: "malformed", "labels missing" or "labels misaligned".
    """

    problem: str | None = None
    traces: Sequence[str | None] = ()
    votes: Sequence[tuple[bool, ...]] = ()
    complete: Sequence[bool] = ()
    answer: str | None = None
    answers: Sequence[str] = ()
    source: str | None = None
    id: str | None = None
    valid: bool = True
    flaw: str | None = None


MALFORMED = RawRow(flaw="malformed")


class _Malformed(Exception):
    """A field of another type, or text that UTF-8 cannot hold."""


@dataclass(frozen=True)
class Form:
    """A form of teacher data: its name, the fields that identify it, and its reader."""

    name: str
    fields: tuple[str, ...]
    reader: Callable[[Row], RawRow]
    one_trace: bool = False  # rows of the same problem must be joined

    def read(self, row: Row) -> RawRow:
        try:
            return self.reader(row)
        except _Malformed:
            return MALFORMED


def recognize(files: Sequence[Path]) -> Form:
    """The form of all `files`. Raises UserError: a file in no known form, or files in two forms."""
    first, *others = (_form_of(file) for file in files)
    for file, form in zip(files[1:], others):
        if form.name != first.name:
            raise UserError(
                f"{file}: is in the form {form.name}, and {files[0]} in the form {first.name}; "
                "prepare them apart"
            )
    return first


def read(files: Sequence[Path], form: Form, folder: Path) -> Iterator[RawRow]:
    """The problems of `files`, in order. `folder` is for the temporary file of one-trace rows."""
    rows = (form.read(row) for _, row in read_rows(files, FIELDS))
    return _joined_by_problem(rows, folder) if form.one_trace else rows


def _form_of(file: Path) -> Form:
    seen: dict[str, Any] = {}  # field -> its first value that is not null
    for _, row in islice(read_rows(file, FIELDS), HEAD):
        for name, value in row.items():
            if seen.get(name) is None:
                seen[name] = value
    for form in FORMS:
        if seen.keys() >= set(form.fields):
            return form
    texts = [name for name, value in seen.items() if isinstance(value, str)]
    spellings = {
        "problem": _first(PROBLEM, texts),
        "trace": _first(TRACE, texts),
        "label": _first(LABEL, [name for name, value in seen.items() if value in (0, 1)]),
        "answer": _first(ANSWER, seen),
        "source": _first(SOURCE, seen),
    }
    if spellings["problem"] and spellings["trace"]:
        used = tuple(filter(None, spellings.values()))
        reader = functools.partial(_one_trace, spellings=spellings)
        return Form(f"one trace a row ({', '.join(used)})", used, reader, one_trace=True)
    known = "; ".join(f"{form.name} ({', '.join(form.fields)})" for form in FORMS)
    raise UserError(
        f"{file}: not teacher data in a form known here; its fields are "
        f"{', '.join(list(seen)[:20]) or 'none'}; the forms are {known}; one trace a row "
        f"({' or '.join(PROBLEM)}, and {' or '.join(TRACE)}, as text)"
    )


# ---------------------------------------------------------------- a row of each form


def _openr1_math_raw(row: Row) -> RawRow:
    traces = _list(row.get("generations"), _text, [])
    labels = _typed(row.get("correctness"), dict) or {}
    columns = [_list(labels.get(verifier), _vote) for verifier in VERIFIERS]
    if any(column is None or None in column for column in columns):
        flaw = "labels missing"
    else:
        flaw = None if _aligned(columns, traces) else "labels misaligned"
    votes = [()] * len(traces) if flaw else list(zip(*columns))
    valid = _is_yes(row.get("problem_is_valid"))
    return _raw_row(row, traces, votes=votes, valid=valid, flaw=flaw)


def _openr1_math_220k(row: Row) -> RawRow:
    traces = _list(row.get("generations"), _text, [])
    nothing = [None] * len(traces)
    closed = _list(row.get("is_reasoning_complete"), _vote, nothing)
    reasons = _list(row.get("finish_reasons"), _text, nothing)
    if not _aligned([closed, reasons], traces):
        raise _Malformed
    complete = [c is not False and reason != "length" for c, reason in zip(closed, reasons)]
    columns = [_list(row.get(verifier), _vote, nothing) for verifier in FLAT_VERIFIERS]
    flaw = None if _aligned(columns, traces) else "labels misaligned"
    votes = [()] * len(traces)
    if not flaw:
        votes = [tuple(vote for vote in given if vote is not None) for given in zip(*columns)]
    valid = _is_yes(row.get("problem_is_valid")) or "problem_is_valid" not in row
    return _raw_row(row, traces, votes=votes, complete=complete, valid=valid, flaw=flaw)


def _listed(row: Row) -> RawRow:
    entries = [_typed(entry, dict) for entry in _typed(row.get("traces"), list) or []]
    if None in entries:
        raise _Malformed
    labels = [_vote(entry.get("correct")) for entry in entries]
    votes = [() if label is None else (label,) for label in labels]
    return _raw_row(row, [_text(entry.get("text")) for entry in entries], votes=votes)


def _one_trace(row: Row, spellings: dict[str, str | None]) -> RawRow:
    fields = {name: row.get(spelling) for name, spelling in spellings.items()}
    label, is_complete = fields["label"], _text(row.get("finish_reason")) != "length"
    if label not in (None, 0, 1):  # True and False are 1 and 0
        raise _Malformed
    votes = [() if label is None else (bool(label),)]
    trace = _text(fields["trace"])
    return _raw_row(row | fields, [trace], votes=votes, complete=[is_complete])


def _raw_row(row: Row, traces: list[str | None], **fields: Any) -> RawRow:
    """`traces` and `fields`, with the fields that all forms share."""
    identity = row.get(_first(ID, row))
    is_id = isinstance(identity, str) and is_encodable(identity)
    return RawRow(
        problem=_text(row.get("problem")),
        traces=traces,
        answer=answer_text(row.get("answer")) or None,
        source=_text(row.get("source")),
        id=identity if is_id else None,
        **{"complete": [True] * len(traces), **fields},
    )


FORMS = (
    Form(RAW, ("problem", "problem_is_valid", "generations", "correctness"), _openr1_math_raw),
    Form(FLAT, ("problem", "generations", "correctness_math_verify"), _openr1_math_220k),
    Form(LISTED, ("problem", "traces"), _listed),
)


# ---------------------------------------------------------------- one trace per row, joined


def _joined_by_problem(rows: Iterable[RawRow], folder: Path) -> Iterator[RawRow]:
    """Rows of one trace -> rows of one problem; malformed ones belong to none and come last.

    Each row is stored with the offset of the previous row of the same problem, so a problem's rows
    are found by going back from its last one.
    """
    malformed, last = 0, {}  # the problem's hash -> the offset of its last row
    with tempfile.TemporaryFile(dir=folder) as spool:
        for row in rows:
            if row.flaw:
                malformed += 1
                continue
            key = hashlib.sha256((row.problem or "").encode()).digest()[:16]
            record = json.dumps([last.get(key), vars(row)]).encode() + b"\n"
            last[key] = spool.tell()
            spool.write(record)
        for offset in last.values():
            parts = []
            while offset is not None:
                spool.seek(offset)
                offset, part = json.loads(spool.readline())
                parts.append(part)
            yield _joined(parts[::-1])
    yield from [MALFORMED] * malformed


def _joined(parts: list[dict[str, Any]]) -> RawRow:
    """One problem's rows as one. Its other fields are those of the first row that has them, but a
    trace whose own row has another answer keeps that one."""
    once = {
        name: next((part[name] for part in parts if part[name] is not None), None)
        for name in ("problem", "answer", "source", "id")
    }
    answers = [part["answer"] or once["answer"] for part in parts]
    return RawRow(
        answers=answers if len(set(answers)) > 1 else (),
        traces=[trace for part in parts for trace in part["traces"]],
        votes=[tuple(vote) for part in parts for vote in part["votes"]],
        complete=[complete for part in parts for complete in part["complete"]],
        **once,
    )


# ---------------------------------------------------------------- fields; null is always allowed


def _typed(value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise _Malformed
    return value


def _text(value: Any) -> str | None:
    if not is_encodable(_typed(value, str) or ""):
        raise _Malformed
    return value


def _vote(value: Any) -> bool | None:
    return _typed(value, bool)


def _list(value: Any, item: Callable[[Any], Any], default: list | None = None) -> list | None:
    return default if _typed(value, list) is None else [item(element) for element in value]


def _aligned(columns: Iterable[Sequence], traces: Sequence) -> bool:
    return all(len(column) == len(traces) for column in columns)


def _is_yes(value: Any) -> bool:
    return (_text(value) or "").strip().lower() == "yes"


def _first(names: Iterable[str], present: Iterable[str]) -> str | None:
    return next((name for name in names if name in present), None)
