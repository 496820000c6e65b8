r"""Teacher data in any of four forms -> one `RawRow` per problem, streamed.

    OpenR1-Math-Raw    {"problem", "problem_is_valid", "generations": [..], "correctness": {..}}
    OpenR1-Math-220k   {"problem", "generations": [..], "correctness_math_verify": [..],
                        "correctness_llama", "is_reasoning_complete", "finish_reasons": [..] | null}
    problem, traces    {"problem", "answer", "traces": [{"text": "It is 2.", "correct": true}, ..]}
    one trace per row  {"problem": "1+1?", "response": "It is 2.", "correct": true, "answer": "2"}

The fields of a file's first 100 rows decide its form; a missing field counts as null. Each form may
also have `answer`, `source` and an id (`uuid` or `id`). Fields of one trace per row have different
names (SPELLINGS): the first one found is used. Some data sets have rows of another shape (_unfold):

    {"messages": [user's turn, assistant's turn]}, or "conversations"        one trace per row
    {"question", "deepseek_thinking_trajectory", "deepseek_attempt", "deepseek_grade": "Yes"}
    {"question", "final_answer", "r1_solution_1", "r1_solution_2", ..}       problem, traces

The verifiers' labels of a trace are its votes. In OpenR1-Math-Raw both must have voted on every
trace, as in the paper. In OpenR1-Math-220k a null is a missing vote: where the Llama judge's list
is null, as it mostly is, Math-Verify alone decides. (The judge mostly saw traces that Math-Verify
had rejected, so traces it corrected count as wrong, unless `--reject-rule both` or `--relabel` is
given.) A trace without any vote has no label.

Left out: `solution` as a trace's field, usually the author's; conversations of other turns, such as
a system message. An evaluation of redi is read by own_traces.py.
"""

import functools
import hashlib
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows
from redi.data.formats import with_thoughts
from redi.eval.benchmarks import answer_text

RAW, FLAT, LISTED = "OpenR1-Math-Raw", "OpenR1-Math-220k", "problem, traces"
EVALUATION = "evaluation of redi"  # own_traces.py
HEAD = 100  # rows of a file that decide its form
VERIFIERS = ("llama_verification", "math_verify_reparsed_answer")
FLAT_VERIFIERS = ("correctness_llama", "correctness_math_verify")

CONVERSATIONS = ("messages", "conversations")
USER_TURN, ASSISTANT_TURN = "user turn", "assistant turn"  # fields that _unfold makes of them
SOLUTIONS = [f"r1_solution_{number}" for number in range(1, 10)]  # DeepMath-103K has three

# One trace per row: how published data sets name each field.
SPELLINGS = {
    "problem": ("problem", "question", "prompt", "input", USER_TURN),
    "trace": (
        "generation", "generated_solution", "response", "llm_response", "trace", "output",
        "completion", "deepseek_attempt", ASSISTANT_TURN,
    ),
    "label": ("correct", "is_correct", "label", "reward", "score", "deepseek_grade"),
    "answer": (
        "answer", "expected_answer", "final_answer", "ground_truth", "gold_standard_solution",
        "reference_answer",
    ),
    "source": ("source", "problem_source"),
}  # fmt: skip
# Of the other fields: text, booleans, [type of the items] or {field: type}. Null is always allowed.
TYPES = {
    "problem": str, "problem_is_valid": str, "source": str, "trace": str, "finish_reason": str,
    "generations": [str], "finish_reasons": [str], "is_reasoning_complete": [bool],
    **{verifier: [bool] for verifier in FLAT_VERIFIERS},
    "correctness": {verifier: [bool] for verifier in VERIFIERS},
    "traces": [{"text": str, "correct": bool}],
}  # fmt: skip
FIELDS = {
    *TYPES, "uuid", "id", *(name for names in SPELLINGS.values() for name in names),
    *CONVERSATIONS, *SOLUTIONS, "deepseek_thinking_trajectory",
}  # fmt: skip


@dataclass
class Trace:
    """A teacher's trace. votes: the verifiers' labels, True for correct; () if there are none."""

    text: str | None
    votes: Sequence[bool] = ()
    complete: bool = True  # False where the data says that it was truncated
    answer: str | None = None  # of its own row, in data with one trace per row


@dataclass(kw_only=True)
class RawRow:
    """A problem and the teacher's traces of it. left_out: other traces of it, counted by reason.
    flaw: why the row cannot be used: "malformed", "problem not valid", "labels missing" or "labels
    misaligned"; the last two by its labels alone."""

    problem: str | None = None
    traces: Sequence[Trace] = ()
    answer: str | None = None
    source: str | None = None
    id: str | None = None
    flaw: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)


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
            return self.reader(_unfold(row))
        except _Malformed:
            return MALFORMED


def recognize(files: Sequence[Path]) -> Form:
    """The form of all `files`. Raises UserError: a file in no known form, or files in two forms."""
    forms = [_find_form(file) for file in files]
    for file, form in zip(files, forms):
        if form.name != forms[0].name:
            raise UserError(
                f"{file}: is in the form {form.name}, and {files[0]} in the form {forms[0].name}; "
                "prepare them apart"
            )
    return forms[0]


def read(files: Sequence[Path], form: Form, folder: Path) -> Iterator[RawRow]:
    """The problems of `files`, in order. `folder` is for the temporary file of one-trace rows."""
    # Of OpenR1-Math-220k, `messages` would be a quarter of what is read.
    fields = FIELDS if form.one_trace else FIELDS.difference(CONVERSATIONS)
    rows = (form.read(row) for _, row in read_rows(files, fields))
    return _joined_by_problem(rows, folder) if form.one_trace else rows


def _find_form(file: Path) -> Form:
    """The form whose fields the file's first rows have. Raises UserError if there is none."""
    seen: dict[str, Any] = {}  # field -> its first value that is not null
    for _, row in itertools.islice(read_rows(file, FIELDS), HEAD):
        seen |= {name: value for name, value in _unfold(row).items() if seen.get(name) is None}
    for form in FORMS:
        if seen.keys() >= set(form.fields):
            return form
    texts = {name for name, value in seen.items() if isinstance(value, str)}
    if "instruction" in seen:  # Alpaca's input is but a part of the problem
        texts.discard("input")
    flags = [name for name, value in seen.items() if value in (0, 1)]
    usable = {"problem": texts, "trace": texts, "label": flags, "answer": seen, "source": seen}
    spellings = {
        name: next((field for field in SPELLINGS[name] if field in fields), None)
        for name, fields in usable.items()
    }
    if spellings["problem"] and spellings["trace"]:
        used = tuple(filter(None, spellings.values()))
        reader = functools.partial(_one_trace, spellings=spellings)
        return Form(f"one trace per row ({', '.join(used)})", used, reader, one_trace=True)
    known = "; ".join(f"{form.name} ({', '.join(form.fields)})" for form in FORMS)
    raise UserError(
        f"{file}: not teacher data in a form known here; its fields are "
        f"{', '.join(list(seen)[:20]) or 'none'}; the forms are {known}; one trace per row "
        f"({' or '.join(SPELLINGS['problem'])}, and {' or '.join(SPELLINGS['trace'])}, as text; or "
        f"{' or '.join(CONVERSATIONS)} of one user and one assistant turn)"
    )


# ---------------------------------------------------------------- a row of each form


def _unfold(row: Row) -> Row:
    """`row`, and what it has in another shape as fields of a form. Values of other types stay for
    the form's reader to find."""
    row = row | _turns(row.get("messages") or row.get("conversations"))
    if "deepseek_attempt" in row:  # s1K-1.1
        thought, grade = row.get("deepseek_thinking_trajectory"), row.get("deepseek_grade")
        row["deepseek_attempt"] = _after_thought(thought, row["deepseek_attempt"])
        row["deepseek_grade"] = grade == "Yes" if grade in ("Yes", "No") else grade
    if solutions := [row[name] for name in SOLUTIONS if row.get(name) is not None]:
        row["problem"], row["answer"] = row.get("question"), row.get("final_answer")
        row["traces"] = [{"text": text} for text in solutions]
    return row


def _turns(conversation: Any) -> Row:
    """A problem, its trace, and what the messages say of them; {} for other turns."""
    match conversation:
        case [
            {"role": "user", "content": str(problem), **asked},
            {"role": "assistant", "content": str(text), **answered},
        ] | [
            {"from": "human" | "user", "value": str(problem), **asked},
            {"from": "gpt" | "assistant", "value": str(text), **answered},
        ]:
            text = _after_thought(answered.get("reasoning_content"), text)
            info = asked.get("info")  # of AM-DeepSeek-R1-Distilled, where it has the answer
            names = ("reference_answer", "source") if isinstance(info, dict) else ()
            facts = {name: info[name] for name in names if name in info}
            return {USER_TURN: problem, ASSISTANT_TURN: text, **facts}
    return {}


def _after_thought(thought: Any, text: Any) -> Any:
    both = isinstance(thought, str) and isinstance(text, str)
    return with_thoughts({"reasoning_content": thought, "content": text}) if both else text


def _openr1_math_raw(row: Row) -> RawRow:
    by_verifier = _field(row, "correctness", {})
    labels = [by_verifier.get(verifier) for verifier in VERIFIERS]
    missing = any(column is None or None in column for column in labels)
    flaw = _flaw_of_problem(row) or ("labels missing" if missing else None)
    return _raw_row(row, _field(row, "generations", []), [] if missing else labels, flaw=flaw)


def _openr1_math_220k(row: Row) -> RawRow:
    texts = _field(row, "generations", [])
    fields = ("is_reasoning_complete", "finish_reasons", *FLAT_VERIFIERS)
    closed, reasons, *labels = (_field(row, name, [None] * len(texts)) for name in fields)
    if not len(closed) == len(reasons) == len(texts):
        raise _Malformed
    complete = [c is not False and reason != "length" for c, reason in zip(closed, reasons)]
    flaw = _flaw_of_problem(row) if "problem_is_valid" in row else None
    return _raw_row(row, texts, labels, complete, flaw)


def _listed(row: Row) -> RawRow:
    entries = _field(row, "traces", [])
    if None in entries:
        raise _Malformed
    labels = [entry.get("correct") for entry in entries]
    return _raw_row(row, [entry.get("text") for entry in entries], [labels])


def _one_trace(row: Row, spellings: dict[str, str | None]) -> RawRow:
    if ASSISTANT_TURN in spellings.values() and ASSISTANT_TURN not in row:
        raise _Malformed  # other turns
    row = row | {name: row.get(spelling) for name, spelling in spellings.items()}
    label, complete = row["label"], _field(row, "finish_reason") != "length"
    if label not in (None, 0, 1):  # True and False are 1 and 0
        raise _Malformed
    labels = [None if label is None else bool(label)]
    return _raw_row(row, [_field(row, "trace")], [labels], [complete])


def _raw_row(
    row: Row,
    texts: list[str | None],
    labels: list[list[bool | None]],
    complete: Iterable[bool] = itertools.repeat(True),
    flaw: str | None = None,
) -> RawRow:
    """Adds the fields that all forms share. labels: a list per verifier, aligned with the texts."""
    if any(len(column) != len(texts) for column in labels):
        flaw, labels = flaw or "labels misaligned", []
    answer, identity = answer_text(row.get("answer")) or None, row.get("uuid", row.get("id"))
    return RawRow(
        problem=_field(row, "problem"),
        traces=[
            Trace(text, tuple(vote for vote in votes if vote is not None), is_complete, answer)
            for text, is_complete, *votes in zip(texts, complete, *labels)
        ],
        answer=answer,
        source=_field(row, "source"),
        id=identity if isinstance(identity, str) and is_encodable(identity) else None,
        flaw=flaw,
    )


def _flaw_of_problem(row: Row) -> str | None:
    is_valid = _field(row, "problem_is_valid", "").strip().lower() == "yes"
    return None if is_valid else "problem not valid"


def _field(row: Row, name: str, default: Any = None) -> Any:
    """The value, or `default` for null. Raises _Malformed if its type is not that in TYPES."""
    _check_type(row.get(name), TYPES[name])
    return default if row.get(name) is None else row[name]


def _check_type(value: Any, expected: Any) -> None:
    """expected: as in TYPES. Null has any type. Raises _Malformed."""
    if value is None:
        return
    kind = expected if isinstance(expected, type) else type(expected)
    if not isinstance(value, kind) or (kind is str and not is_encodable(value)):
        raise _Malformed
    if kind is list:
        for item in value:
            _check_type(item, expected[0])
    elif kind is dict:
        for name, of_field in expected.items():
            _check_type(value.get(name), of_field)


FORMS = (
    Form(RAW, ("problem", "problem_is_valid", "generations", "correctness"), _openr1_math_raw),
    Form(FLAT, ("problem", "generations", "correctness_math_verify"), _openr1_math_220k),
    Form(LISTED, ("problem", "traces"), _listed),
)


# ---------------------------------------------------------------- one trace per row, joined


def _joined_by_problem(rows: Iterable[RawRow], folder: Path) -> Iterator[RawRow]:
    """Rows of one trace -> rows of one problem, in order of first appearance. The problem's other
    fields are those of the first row that has them. Malformed rows come last. The rows wait in a
    temporary file; memory holds an offset per row."""
    malformed, offsets = 0, defaultdict(list)  # the problem's hash -> where its rows are stored
    with tempfile.TemporaryFile(dir=folder) as spool:
        for row in rows:
            if row.flaw:
                malformed += 1
                continue
            offsets[hashlib.sha256((row.problem or "").encode()).digest()].append(spool.tell())
            spool.write(json.dumps(asdict(row)).encode() + b"\n")
        for of_problem in offsets.values():
            traces, fields = [], {}
            for offset in of_problem:
                spool.seek(offset)
                stored = json.loads(spool.readline())
                traces += [Trace(**trace) for trace in stored.pop("traces")]
                fields = stored | {k: value for k, value in fields.items() if value is not None}
            yield RawRow(traces=traces, **fields)
    yield from [MALFORMED] * malformed
