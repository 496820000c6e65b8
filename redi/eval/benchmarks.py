r"""A benchmark is a list of problems with their gold answers, from the hub or from a file.

    {"problem": "What is 1+1?", "answer": "2"}      a row of any JSONL, JSON or Parquet file
    Problem(id="0", problem="What is 1+1?", answers=["2"])

Five names stand for the paper's benchmarks on the hub. Their row counts are checked, because a data
set on the hub may change under its name, and a score on other problems is another score. Published
files use different field names. An answer is text, a number, or a list of which any entry suffices;
one text may itself hold several answers, "3, 5", which the grader splits. Left out: filters and
subsets; a subset is a file of its own.
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

# The first of these names that a row has.
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
    """One problem; an answer equal to any of `answers` is right."""

    id: str
    problem: str
    answers: list[str]
    subject: str | None = None
    difficulty: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """Problems in the file's order; `name` labels the results."""

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
    """A known benchmark, or one from a file, whose name is the file's stem.

    Prints one line if a known benchmark has an unexpected number of rows. Raises UserError: no such
    name or file, no rows, a broken row, a row without problem or answer, an id that occurs twice.
    """
    name = str(name_or_path)
    if source := KNOWN.get(name):
        problems = _problems(read_rows(dataset_files(source.hub_id, source.split), FIELDS))
        if len(problems) not in source.counts:
            expected = " or ".join(map(str, source.counts))
            print(f"{name}: {source.hub_id} holds {len(problems)} problems, expected {expected}")
        return Benchmark(name, problems)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        known = ", ".join(KNOWN)
        raise UserError(f"{name}: no such benchmark or file; known benchmarks: {known}")
    return Benchmark(path.stem, _problems(read_rows(path, FIELDS)))


def load_all(names: list[str]) -> list[Benchmark]:
    """Several, as `load`. Raises UserError if two have the same name."""
    loaded = [load(name) for name in names]
    for benchmark in loaded:
        if [b.name for b in loaded].count(benchmark.name) > 1:
            raise UserError(f"--benchmark: two have the name {benchmark.name!r}; rename a file")
    return loaded


def _problems(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Problem]:
    """Problems of (where, row) pairs. The id of a row without one is its number, from 0."""
    problems: list[Problem] = []
    earlier: dict[str, str] = {}  # id -> where
    for index, (where, row) in enumerate(rows):
        id = _id(row, index, where)
        if id in earlier:
            raise UserError(f"{where}: id {id!r} is also that of {earlier[id]}")
        earlier[id] = where
        question, answers = _question(row, where), _answers(row, where)
        problems.append(Problem(id, question, answers, _subject(row), _difficulty(row)))
    return problems


def _first(row: dict[str, Any], fields: tuple[str, ...]) -> tuple[str | None, Any]:
    """The name and value of the first of these fields that the row has."""
    return next(((f, row[f]) for f in fields if row.get(f) is not None), (None, None))


def _id(row: dict[str, Any], index: int, where: str) -> str:
    field, value = _first(row, ID_FIELDS)
    if field is None:
        return str(index)
    if type(value) not in (str, int) or not str(value).strip():
        raise UserError(f"{where}: field {field!r}: expected text or a whole number, got {value!r}")
    return _encodable(str(value), field, where)


def _question(row: dict[str, Any], where: str) -> str:
    field, problem = _first(row, PROBLEM_FIELDS)
    if field is None:
        names = " or ".join(map(repr, PROBLEM_FIELDS))
        raise UserError(f"{where}: no problem; expected a field {names}")
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f"{where}: field {field!r}: expected the problem's text, got {problem!r}")
    _encodable(problem, field, where)
    # OlympiadBench has a field for what several questions share ("Let $T$ be the answer ...").
    context = row.get("context")
    return f"{context}\n{problem}" if isinstance(context, str) and context.strip() else problem


def _answers(row: dict[str, Any], where: str) -> list[str]:
    field, value = _first(row, ANSWER_FIELDS)
    if field is None:
        names = " or ".join(map(repr, ANSWER_FIELDS))
        raise UserError(f"{where}: no answer to grade against; expected a field {names}")
    entries = value if isinstance(value, list) else [value]
    answers = list(dict.fromkeys(answer_text(entry) for entry in entries))
    if not answers or "" in answers:
        raise UserError(
            f"{where}: field {field!r}: expected text, a number or a list of them, "
            f"got {str(value)[:60]!r}"
        )
    return [_encodable(answer, field, where) for answer in answers]


def _encodable(text: str, field: str, where: str) -> str:
    if not is_encodable(text):
        raise UserError(f"{where}: field {field!r}: holds half of a surrogate pair, not text")
    return text


def _subject(row: dict[str, Any]) -> str | None:
    _, subject = _first(row, SUBJECT_FIELDS)
    return subject.strip() or None if isinstance(subject, str) and is_encodable(subject) else None


def _difficulty(row: dict[str, Any]) -> float | None:
    """A number, or the first one in a text such as "Level 5"; None for anything else."""
    _, difficulty = _first(row, DIFFICULTY_FIELDS)
    found = re.search(r"\d+(?:\.\d+)?", difficulty) if isinstance(difficulty, str) else None
    number = float(found[0]) if found else difficulty
    is_number = type(number) in (int, float) and abs(number) <= sys.float_info.max
    return float(number) if is_number else None


def answer_text(answer: Any) -> str:
    """An answer as text, 142.0 as "142"; "" for anything but text or a finite number."""
    if isinstance(answer, str):
        return answer.strip()
    if type(answer) is int:
        return str(answer)
    if type(answer) is not float or not math.isfinite(answer):
        return ""
    return str(int(answer)) if answer == int(answer) else repr(answer)
