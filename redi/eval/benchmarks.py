r"""A benchmark is a list of problems with their gold answers, from the hub or from a file.

    {"problem": "What is 1+1?", "answer": "2"}      a row of any JSONL, JSON or Parquet file
    Problem(id="0", problem="What is 1+1?", answers=["2"])

Five names stand for the paper's benchmarks on the hub; their row counts are checked, because a data
set on the hub may change under its name and a score over other problems is another score. Published
files spell the fields differently; an answer is text, a number, or a list of which
any entry suffices. One text may itself hold several answers, "3, 5": the grader's matter.
Left out: filters and subsets. A subset is a file of its own.
"""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import is_encodable, read_rows
from redi.hub import dataset_files

# The first name that a row has is taken.
PROBLEM_FIELDS = ("problem", "question", "Problem", "Question")
ANSWER_FIELDS = ("answer", "final_answer", "Answer")
ID_FIELDS = ("unique_id", "id", "idx")
SUBJECT_FIELDS = ("subject", "subfield", "type")
DIFFICULTY_FIELDS = ("difficulty", "level")
FIELDS = {
    *PROBLEM_FIELDS, *ANSWER_FIELDS, *ID_FIELDS, *SUBJECT_FIELDS, *DIFFICULTY_FIELDS, "context",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One problem; equal to any of `answers` is right."""

    id: str
    problem: str
    answers: list[str]
    subject: str | None = None
    difficulty: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """Problems in the file's order; `name` is how results are labelled."""

    name: str
    problems: list[Problem]


@dataclass(frozen=True)
class _Source:
    hub_id: str
    split: str
    counts: tuple[int, ...]  # rows at the paper's size; two where published copies differ


KNOWN = {
    "math500": _Source("HuggingFaceH4/MATH-500", "test", (500,)),
    "aime24": _Source("HuggingFaceH4/aime_2024", "train", (30,)),
    "amc": _Source("AI-MO/aimo-validation-amc", "train", (83,)),
    "minerva": _Source("math-ai/minervamath", "test", (272,)),
    "olympiadbench": _Source("math-ai/olympiadbench", "test", (674, 675)),
}


def load(name_or_path: str | Path) -> Benchmark:
    """The benchmark of a known name, or of a file, which is called by its stem.

    Prints one line if a known benchmark's row count is not the expected one. Raises UserError: no
    such name or file, no rows, a broken row, a row without problem or answer, an id given twice.
    """
    source = KNOWN.get(str(name_or_path))
    if source is None:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise UserError(
                f"{name_or_path}: no such benchmark or file; known benchmarks: {', '.join(KNOWN)}"
            )
        return Benchmark(path.stem, _problems(read_rows(path, FIELDS)))

    name = str(name_or_path)
    problems = _problems(read_rows(dataset_files(source.hub_id, source.split), FIELDS))
    if len(problems) not in source.counts:
        expected = " or ".join(map(str, source.counts))
        print(f"{name}: {source.hub_id} holds {len(problems)} problems, expected {expected}")
    return Benchmark(name, problems)


def load_all(names: list[str]) -> list[Benchmark]:
    """Several, as `load` has them. Raises UserError if two would be called the same."""
    loaded = [load(name) for name in names]
    for benchmark in loaded:
        if [b.name for b in loaded].count(benchmark.name) > 1:
            raise UserError(f"--benchmark: two are called {benchmark.name!r}; rename a file")
    return loaded


def _problems(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Problem]:
    """Problems of (place, row) pairs. Rows without an id of their own are numbered from 0."""
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for index, (place, row) in enumerate(rows):
        identity = _identity(row, index, place)
        if identity in places:
            raise UserError(f"{place}: id {identity!r} is also that of {places[identity]}")
        places[identity] = place
        question, answers = _question(row, place), _answers(row, place)
        problems.append(Problem(identity, question, answers, _subject(row), _difficulty(row)))
    return problems


def _field(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _identity(row: dict[str, Any], index: int, place: str) -> str:
    field = _field(row, ID_FIELDS)
    if field is None:
        return str(index)
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise UserError(f"{place}: field {field!r}: expected text or a whole number, got {value!r}")
    return _encodable(str(value), field, place)


def _question(row: dict[str, Any], place: str) -> str:
    field = _field(row, PROBLEM_FIELDS)
    if field is None:
        raise UserError(
            f"{place}: no problem; expected a field {' or '.join(map(repr, PROBLEM_FIELDS))}"
        )
    problem, context = row[field], row.get("context")
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f"{place}: field {field!r}: expected the problem's text, got {problem!r}")
    _encodable(problem, field, place)
    # OlympiadBench keeps what several questions share ("Let $T$ be the answer ...") apart.
    return f"{context}\n{problem}" if isinstance(context, str) and context.strip() else problem


def _answers(row: dict[str, Any], place: str) -> list[str]:
    field = _field(row, ANSWER_FIELDS)
    if field is None:
        names = " or ".join(map(repr, ANSWER_FIELDS))
        raise UserError(f"{place}: no answer to grade against; expected a field {names}")
    entries = row[field] if isinstance(row[field], list) else [row[field]]
    answers = list(dict.fromkeys(answer_text(entry) for entry in entries))
    if not answers or "" in answers:
        raise UserError(
            f"{place}: field {field!r}: expected text, a number or a list of them, "
            f"got {str(row[field])[:60]!r}"
        )
    return [_encodable(answer, field, place) for answer in answers]


def _encodable(text: str, field: str, place: str) -> str:
    if not is_encodable(text):
        raise UserError(f"{place}: field {field!r}: holds half of a surrogate pair, not text")
    return text


def _subject(row: dict[str, Any]) -> str | None:
    subject = row.get(_field(row, SUBJECT_FIELDS) or "")
    return subject.strip() or None if isinstance(subject, str) and is_encodable(subject) else None


def _difficulty(row: dict[str, Any]) -> float | None:
    """A number, or the first one of a text such as "Level 5"; anything else says nothing here."""
    difficulty = row.get(_field(row, DIFFICULTY_FIELDS) or "")
    found = re.search(r"\d+(?:\.\d+)?", difficulty) if isinstance(difficulty, str) else None
    number = float(found[0]) if found else difficulty
    known = isinstance(number, (int, float)) and not isinstance(number, bool)
    return float(number) if known and abs(number) <= sys.float_info.max else None


def answer_text(answer: Any) -> str:
    """An answer as text, 142.0 as "142"; "" if it is none."""
    if isinstance(answer, str):
        return answer.strip()
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return ""
    if isinstance(answer, int):
        return str(answer)
    if not math.isfinite(answer):
        return ""
    return str(int(answer)) if answer == int(answer) else repr(answer)
