r"""A benchmark is a list of problems with their gold answers, from the hub or from a file.

    {"problem": "What is 1+1?", "answer": "2"}      a row of any JSONL, JSON or Parquet file
    Problem(id="0", problem="What is 1+1?", answers=["2"])

Five names stand for the paper's benchmarks on the hub. Their row counts are checked, because a data
set on the hub may change under its name, and a score on other problems is another score. An answer
is text, a number, or a list of which any entry suffices; one text may itself hold several answers,
"3, 5", which the grader splits. Left out: filters and subsets; a subset is a file of its own.
"""

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import is_encodable, read_rows
from redi.hub import dataset_files

# The names that published files use; the first one that a row has.
FIELDS = {
    "problem": ("problem", "question", "Problem", "Question"),
    "answer": ("answer", "final_answer", "Answer"),
    "id": ("unique_id", "id", "idx"),
    "subject": ("subject", "subfield", "type"),
    "difficulty": ("difficulty", "level"),
}
UNFINISHED = ".unfinished-"  # completions.py marks files with it, so no benchmark's name holds it
COLUMNS = {"context", *chain(*FIELDS.values())}

# Name -> hub id, split, rows at the paper's size (two where published copies differ).
KNOWN = {
    "math500": ("HuggingFaceH4/MATH-500", "test", (500,)),
    "aime24": ("HuggingFaceH4/aime_2024", "train", (30,)),
    "amc": ("AI-MO/aimo-validation-amc", "train", (83,)),
    "minerva": ("math-ai/minervamath", "test", (272,)),
    "olympiadbench": ("math-ai/olympiadbench", "test", (674, 675)),
}


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


def load(name_or_path: str | Path) -> Benchmark:
    """A known benchmark, or one from a file, whose name is the file's stem.

    Prints one line if a known benchmark has an unexpected number of rows. Raises UserError: no such
    name or file, a stem that cannot name results, no rows, a broken row, a row without problem or
    answer, an id that occurs twice.
    """
    name = str(name_or_path)
    if name in KNOWN:
        hub_id, split, counts = KNOWN[name]
        problems = _problems(dataset_files(hub_id, split))
        if len(problems) not in counts:
            expected = " or ".join(map(str, counts))
            print(f"{name}: {hub_id} holds {len(problems)} problems, expected {expected}")
        return Benchmark(name, problems)
    path = Path(name).expanduser()
    if not path.exists():
        known = ", ".join(KNOWN)
        raise UserError(f"{name}: no such benchmark or file; known benchmarks: {known}")
    if not is_text(path.stem) or path.stem.startswith(".") or UNFINISHED in path.stem:
        raise UserError(f"{name}: {path.stem!r} cannot name the files of results; rename this file")
    return Benchmark(path.stem, _problems(path))


def load_all(names: list[str]) -> list[Benchmark]:
    """Several, as `load`. Raises UserError if two have the same name."""
    benchmarks = [load(name) for name in names]
    for name, count in Counter(benchmark.name for benchmark in benchmarks).items():
        if count > 1:
            raise UserError(f"--benchmark: {count} have the name {name!r}; rename a file")
    return benchmarks


def _problems(source: Path | list[Path]) -> list[Problem]:
    problems: list[Problem] = []
    earlier: dict[str, str] = {}  # id -> where
    for number, (where, row) in enumerate(read_rows(source, COLUMNS)):
        problem = _problem(row, number, where)
        if problem.id in earlier:
            raise UserError(f"{where}: id {problem.id!r} is also that of {earlier[problem.id]}")
        earlier[problem.id] = where
        problems.append(problem)
    return problems


def _problem(row: dict[str, Any], number: int, where: str) -> Problem:
    """The problem of one row. The id of a row without one is its number, from 0."""
    fields = {
        kind: next((name for name in names if row.get(name) is not None), names[0])
        for kind, names in FIELDS.items()
    }
    problem, answer, id, subject, difficulty = (row.get(field) for field in fields.values())
    answers = [answer_text(one) for one in (answer if isinstance(answer, list) else [answer])]
    are_answers = answers != [] and all(map(is_text, answers))
    names = {kind: f" ({' or '.join(FIELDS[kind])})" for kind in ("problem", "answer")}
    check_fields(
        row,
        where,
        (fields["id"], id is None or type(id) is int or is_text(id), "text or a whole number"),
        (fields["problem"], is_text(problem), f"the problem's text{names['problem']}"),
        (fields["answer"], are_answers, f"text, a number or a list of them{names['answer']}"),
    )
    # OlympiadBench has a field for what several questions share ("Let $T$ be the answer ...").
    context = row.get("context")
    return Problem(
        id=str(number if id is None else id),
        problem=f"{context}\n{problem}" if is_text(context) else problem,
        answers=list(dict.fromkeys(answers)),
        subject=subject.strip() if is_text(subject) else None,
        difficulty=_difficulty(difficulty),
    )


def is_text(value: Any) -> bool:
    """Whether it is text that UTF-8 can hold, and more than white space."""
    return isinstance(value, str) and value.strip() != "" and is_encodable(value)


def check_fields(row: dict[str, Any], where: str, *checks: tuple[str | None, bool, str]) -> None:
    """Raise a UserError for the first field that is not valid. checks: (the field's name, whether
    it is valid, what was expected)."""
    for field, is_valid, expected in checks:
        if not is_valid:
            got = ascii(row[field])[:60] if field in row else "nothing"
            raise UserError(f"{where}: field {field!r}: expected {expected}, got {got}")


def _difficulty(value: Any) -> float | None:
    """A number, or the first one in a text such as "Level 5"; None for anything else."""
    found = re.search(r"\d+(?:\.\d+)?", value) if isinstance(value, str) else None
    number = float(found[0]) if found else value
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
