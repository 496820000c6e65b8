r"""Teacher data in any of four forms -> one `RawRow` a problem, streamed.

    OpenR1-Math-Raw   {"problem", "problem_is_valid", "generations": [..], "correctness": {..}}
    OpenR1-Math-220k  {"problem", "generations": [..], "correctness_math_verify": [..],
                       "correctness_llama", "is_reasoning_complete", "finish_reasons": [..] | null}
    problem, traces   {"problem", "answer", "traces": [{"text": "It is 2.", "correct": true}, ..]}
    one trace a row   {"problem": "1+1?", "response": "It is 2.", "correct": true, "answer": "2"}

A file's form is told by its fields, those of its first 100 rows together; a field that a row lacks
is null. Each form may have `answer`, `source` and an id (`uuid` or `id`) as well. Rows of one trace
each spell their fields in the ways listed below (PROBLEM, TRACE, ...), the first that is there
counts, and rows of the same problem are one, wherever they stand, in the order of first appearance.
Their texts wait in a temporary file; memory holds sixteen bytes and a place for each problem.

What the verifiers say of a trace are its votes. In OpenR1-Math-Raw both must have voted on every
trace, as in the paper. In OpenR1-Math-220k a null is a vote not given: where the list of the Llama
judge is null, as mostly, Math-Verify alone decides; where both voted, the paper's rule needs both.
(The judge was asked mainly where Math-Verify had said no, so its corrections find no majority; use
`--reject-rule both` so that they are not taken for wrong traces, or `--relabel`.) A trace without
any vote has no label. Of a one-trace row's label, booleans and 0 and 1 are votes.

Left out: `solution` as a trace's field, since in most data sets it is the problem's author's;
problems or traces that are lists of messages; several generations in fields of their own.
"""

import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows

RAW, FLAT, LISTED = "OpenR1-Math-Raw", "OpenR1-Math-220k", "problem, traces"
FIELDS = {
    RAW: ("problem", "problem_is_valid", "generations", "correctness"),
    FLAT: ("problem", "generations", "correctness_math_verify"),
    LISTED: ("problem", "traces"),
}
VERIFIERS = ("llama_verification", "math_verify_reparsed_answer")
FLAT_VERIFIERS = ("correctness_llama", "correctness_math_verify")

# One trace a row: how published sets spell a field; the first that the file has is taken.
PROBLEM = ("problem", "question", "prompt")
TRACE = ("generation", "generated_solution", "response", "trace", "output", "completion")
LABEL = ("correct", "is_correct", "label", "reward")
ANSWER = ("answer", "expected_answer", "final_answer")
SOURCE = ("source", "problem_source")
ID = ("uuid", "id")

HEAD = 100  # rows whose fields tell the form


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """A problem and the teacher's traces of it; `votes` and `complete` are aligned with `traces`.

    votes: what the verifiers said of each trace, true for correct; () where none said anything.
    complete: False where the data says that the trace was cut off.
    flaw: why nothing of the row can be used: "malformed" (a field of another type, or text that
    UTF-8 cannot hold), "labels missing" or "labels misaligned".
    """

    problem: str | None = None
    traces: Sequence[str | None] = ()
    votes: Sequence[tuple[bool, ...]] = ()
    complete: Sequence[bool] = ()
    answer: str | None = None
    source: str | None = None
    id: str | None = None
    valid: bool = True
    flaw: str | None = None


MALFORMED = RawRow(flaw="malformed")


@dataclass(frozen=True)
class Form:
    """A form of teacher data: its name, and how a row of it is read. one_trace: rows of the same
    problem are to be gathered."""

    name: str
    read: Callable[[Row], RawRow]
    one_trace: bool = False


def recognise(files: Sequence[Path]) -> Form:
    """The form that all `files` have. Raises UserError, naming the fields of a file of none."""
    forms = {file: _form_of(file) for file in files}
    first = forms[files[0]]
    for file, form in forms.items():
        if form.name != first.name:
            raise UserError(
                f"{file}: is in the form {form.name}, and {files[0]} in the form {first.name}; "
                "prepare them apart"
            )
    return first


def read(files: Sequence[Path], form: Form, folder: Path) -> Iterator[RawRow]:
    """The problems of `files`, in order. One-trace rows wait in an unnamed file in `folder`."""
    rows = (form.read(row) for _, row in read_rows(files))
    return _gathered(rows, folder) if form.one_trace else rows


def _form_of(file: Path) -> Form:
    seen: dict[str, Any] = {}  # field -> its first value that is not null
    for _, row in islice(read_rows(file), HEAD):
        for name, value in row.items():
            if seen.get(name) is None:
                seen[name] = value
    readers = {RAW: openr1_math_raw, FLAT: _openr1_math_220k, LISTED: _listed}
    for name, fields in FIELDS.items():
        if all(field in seen for field in fields):
            return Form(name, readers[name])
    texts = [name for name, value in seen.items() if isinstance(value, str)]
    names = {
        "problem": _first(PROBLEM, texts),
        "trace": _first(TRACE, texts),
        "label": _first(LABEL, [name for name, value in seen.items() if value in (0, 1)]),
        "answer": _first(ANSWER, seen),
        "source": _first(SOURCE, seen),
    }
    if names["problem"] and names["trace"]:
        read_row = functools.partial(_one_trace, names=names)
        used = ", ".join(filter(None, names.values()))
        return Form(f"one trace a row ({used})", read_row, one_trace=True)
    known = "; ".join(f"{name} ({', '.join(fields)})" for name, fields in FIELDS.items())
    raise UserError(
        f"{file}: not teacher data in a form known here; its fields are "
        f"{', '.join(list(seen)[:20]) or 'none'}; the forms are {known}; one trace a row "
        f"({_any_of(PROBLEM)}, and {_any_of(TRACE)}, as text)"
    )


# ---------------------------------------------------------------- a row of each form


def openr1_math_raw(row: Row) -> RawRow:
    correctness, traces = row.get("correctness"), row.get("generations")
    given = correctness if isinstance(correctness, dict) else {}
    columns = [given.get(verifier) for verifier in VERIFIERS]
    if not (
        _are_texts(row, "problem", "problem_is_valid", "source")
        and _is_list(traces, _is_text)
        and _is_dict(correctness)
        and all(_is_list(column, _is_vote) for column in columns)
    ):
        return MALFORMED
    traces = traces or []
    if any(column is None or None in column for column in columns):
        flaw = "labels missing"
    else:
        flaw = None if _aligned(columns, traces) else "labels misaligned"
    return RawRow(
        problem=row.get("problem"),
        traces=traces,
        votes=[()] * len(traces) if flaw else list(zip(*columns)),
        complete=[True] * len(traces),
        answer=_answer(row.get("answer")),
        source=row.get("source"),
        id=_id(row),
        valid=_is_yes(row.get("problem_is_valid")),
        flaw=flaw,
    )


def _openr1_math_220k(row: Row) -> RawRow:
    traces, whole = row.get("generations"), row.get("is_reasoning_complete")
    reasons = row.get("finish_reasons")
    columns = [row.get(name) for name in FLAT_VERIFIERS]
    if not (
        _are_texts(row, "problem", "source", "problem_is_valid")
        and _is_list(traces, _is_text)
        and _is_list(reasons, _is_text)
        and all(_is_list(column, _is_vote) for column in [whole, *columns])
    ):
        return MALFORMED
    traces = traces or []
    judged = [column for column in columns if column is not None]
    told = [column for column in (whole, reasons) if column is not None]
    if not _aligned(told, traces):
        return MALFORMED
    aligned = _aligned(judged, traces)
    votes = [tuple(v for v in given if v is not None) for given in zip(*judged)] if judged else []
    whole, reasons = whole or [None] * len(traces), reasons or [None] * len(traces)
    return RawRow(
        problem=row.get("problem"),
        traces=traces,
        votes=votes if judged and aligned else [()] * len(traces),
        complete=[w is not False and r != "length" for w, r in zip(whole, reasons)],
        answer=_answer(row.get("answer")),
        source=row.get("source"),
        id=_id(row),
        valid="problem_is_valid" not in row or _is_yes(row["problem_is_valid"]),
        flaw=None if aligned else "labels misaligned",
    )


def _listed(row: Row) -> RawRow:
    entries = row.get("traces")
    if not (
        _are_texts(row, "problem", "source")
        and _is_list(entries, lambda entry: entry is not None and _is_dict(entry))
        and all(_is_text(entry.get("text")) for entry in entries or [])
        and all(_is_vote(entry.get("correct")) for entry in entries or [])
    ):
        return MALFORMED
    labels = [entry.get("correct") for entry in entries or []]
    return RawRow(
        problem=row.get("problem"),
        traces=[entry.get("text") for entry in entries or []],
        votes=[() if label is None else (label,) for label in labels],
        complete=[True] * len(labels),
        answer=_answer(row.get("answer")),
        source=row.get("source"),
        id=_id(row),
    )


def _one_trace(row: Row, names: dict[str, str | None]) -> RawRow:
    problem, trace, label, answer, source = (names[n] and row.get(names[n]) for n in names)
    if label is not None and label not in (0, 1):  # True and False are 1 and 0
        return MALFORMED
    if not all(map(_is_text, (problem, trace, source, row.get("finish_reason")))):
        return MALFORMED
    return RawRow(
        problem=problem,
        traces=[trace],
        votes=[() if label is None else (bool(label),)],
        complete=[row.get("finish_reason") != "length"],
        answer=_answer(answer),
        source=source,
        id=_id(row),
    )


# ---------------------------------------------------------------- one trace a row, gathered


def _gathered(rows: Iterable[RawRow], folder: Path) -> Iterator[RawRow]:
    """Rows of one trace -> rows of one problem; the malformed ones, which have none, come last.

    Each row is kept behind the place of the one before it of the same problem, so that a problem's
    rows are found backwards from its last.
    """
    malformed, last = 0, {}  # the problem's hash -> the place of its last row
    try:
        with tempfile.TemporaryFile(dir=folder) as spool:
            for row in rows:
                if row.flaw:
                    malformed += 1
                    continue
                key = hashlib.sha256((row.problem or "").encode()).digest()[:16]
                record = json.dumps([last.get(key), vars(row)]).encode() + b"\n"
                last[key] = spool.tell()
                spool.write(record)
            for place in last.values():
                parts = []
                while place is not None:
                    spool.seek(place)
                    place, part = json.loads(spool.readline())
                    parts.append(part)
                yield _joined(parts[::-1])
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(
            f"{folder}: no room for a copy of the traces while they are gathered by problem "
            f"({error.strerror or error})"
        ) from None
    yield from [MALFORMED] * malformed


def _joined(parts: list[dict[str, Any]]) -> RawRow:
    """One problem's rows as one. What is said once of a problem is what its first row says."""
    once = {
        name: next((part[name] for part in parts if part[name] is not None), None)
        for name in ("problem", "answer", "source", "id")
    }
    return RawRow(
        traces=[trace for part in parts for trace in part["traces"]],
        votes=[tuple(vote) for part in parts for vote in part["votes"]],
        complete=[whole for part in parts for whole in part["complete"]],
        **once,
    )


# ---------------------------------------------------------------- types; null passes everywhere


def _are_texts(row: Row, *names: str) -> bool:
    return all(_is_text(row.get(name)) for name in names)


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_encodable(value))


def _is_vote(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_dict(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_item, value)))


def _aligned(columns: Iterable[Sequence], traces: Sequence) -> bool:
    return all(len(column) == len(traces) for column in columns)


def _is_yes(text: str | None) -> bool:
    return (text or "").strip().lower() == "yes"


def _answer(value: Any) -> str | None:
    """The gold answer as text, 142.0 as "142"; None if it is neither text nor a number."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).strip() or None


def _id(row: Row) -> str | None:
    value = row.get(_first(ID, row) or "")
    return value if isinstance(value, str) and is_encodable(value) else None


def _first(names: Iterable[str], present: Iterable[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
