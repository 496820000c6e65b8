r"""An evaluation on disk: problems, completions, and what graders decided.

    OUT/problems/NAME.jsonl              the benchmark as it was read; itself a benchmark file
    OUT/completions/NAME.jsonl           one line per completion, ordered by problem and sample
    OUT/completions/NAME.unfinished-R.jsonl   those of rank R so far, while some are missing
    OUT/verdicts/GRADER/NAME.jsonl       one line per completion: extracted answer, verdict; no text

Completions are facts and verdicts are opinions, so they have separate files: grading again writes a
few hundred kilobytes beside gigabytes of text that never change. A completion is appended in one
write as soon as it is finished. A killed evaluation resumes from the files of all ranks, drops a
line that was cut short, and samples the rest. Left out: resuming within a completion; checks of
the types of fields, since only redi writes these files.
"""

import dataclasses
import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from redi.config import UserError
from redi.data.files import make_folder, whole_lines, write_aside
from redi.eval.benchmarks import Benchmark, load

Key = tuple[str, int]  # a problem's id and a sample's number


@dataclass(frozen=True, kw_only=True)
class _Sample:
    id: str  # of the problem
    sample: int  # 0 .. n-1

    @property
    def key(self) -> Key:
        return self.id, self.sample


@dataclass(frozen=True, kw_only=True)
class Completion(_Sample):
    """One sampled response to one problem."""

    text: str
    num_tokens: int | None  # None: another program's completion, of unknown length
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Mark(_Sample):
    """A grader's verdict on one completion, and what else a report needs of it."""

    verdict: str  # correct, incorrect, no_answer, truncated or timeout
    extracted: str | None  # the boxed answer
    num_tokens: int | None
    loops: bool  # the text ends in repetition (repetition.py)
    answer_from: str = "after_think"  # where the grader looked; missing in older files


L = TypeVar("L", Completion, Mark)


# ---------------------------------------------------------------- lines


def read_lines(path: Path, kind: type[L]) -> Iterator[L]:
    """The rows of a file, without a last line that was cut short. Raises UserError: no such file, a
    line that is not JSON, missing or unknown fields."""
    number = 0
    try:
        for line in whole_lines(path):
            number += 1
            yield kind(**json.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python evaluate.py` makes it") from None
    except (ValueError, TypeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UserError(f"{path}:{number}: expected JSON with {fields}; got {error}") from None


def write_lines(path: Path, rows: Iterable[Completion | Mark]) -> None:
    make_folder(path.parent)
    with write_aside(path) as file:
        file.writelines(map(_to_line, rows))


def _to_line(row: Completion | Mark) -> str:
    return json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n"


def completions_file(out: Path, name: str) -> Path:
    return out / "completions" / f"{name}.jsonl"


def marks_file(out: Path, grader: str, name: str) -> Path:
    return out / "verdicts" / grader / f"{name}.jsonl"


# ---------------------------------------------------------------- problems


def store_problems(out: Path, test: Benchmark) -> None:
    """Write the problems of an evaluation. Raises UserError if the folder holds other problems of
    that name: their completions would be graded against these answers."""
    path = out / "problems" / f"{test.name}.jsonl"
    if path.is_file():
        if load(path).problems != test.problems:
            raise UserError(
                f"--benchmark {test.name}: its problems have changed since {path} was written; "
                "choose another --out"
            )
        return
    make_folder(path.parent)
    with write_aside(path) as file:
        for problem in test.problems:
            row = dataclasses.asdict(problem)
            row["answer"] = row.pop("answers")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def stored_benchmarks(out: Path) -> list[Benchmark]:
    """The benchmarks of an evaluation, sorted by name. Raises UserError if the folder has none."""
    files = sorted((out / "problems").glob("*.jsonl"))
    if not files:
        raise UserError(f"{out}: holds no evaluation; `python evaluate.py --out {out}` makes one")
    return [load(file) for file in files]


def by_problem(test: Benchmark, rows: Sequence[L]) -> list[list[L]]:
    """Each problem's completions or marks, by sample. Raises UserError: an unknown problem, a
    sample that occurs twice or is missing, for then neither the SEM nor pass@k is defined."""
    found: dict[str, dict[int, L]] = {problem.id: {} for problem in test.problems}
    for row in rows:
        samples = found.get(row.id)
        if samples is None:
            raise UserError(f"{test.name}: holds no problem {row.id!r}")
        if row.sample in samples:
            raise UserError(f"{test.name}: problem {row.id!r} has sample {row.sample} twice")
        samples[row.sample] = row
    n = max(1, *map(len, found.values()))
    for id, samples in found.items():
        if samples.keys() != set(range(n)):
            raise UserError(
                f"{test.name}: problem {id!r} has samples {sorted(samples)}, expected 0 to {n - 1}"
            )
    return [[samples[j] for j in range(n)] for samples in found.values()]


# ---------------------------------------------------------------- completions while sampling


class Store:
    """One benchmark's completions on disk; `done` holds the keys of those that exist."""

    def __init__(self, out: Path, test: Benchmark, samples: int, rank: int = 0):
        """Raises UserError: a broken line, a completion outside the evaluation."""
        self.path = completions_file(out, test.name)
        self._expected = [(p.id, sample) for p in test.problems for sample in range(samples)]
        self._part = self.path.with_name(f"{test.name}.unfinished-{rank}.jsonl")
        self._file = None
        make_folder(self.path.parent)
        complete = self.path.is_file()
        self.done = set(self._expected if complete else (c.key for c in self._read()))

    def append(self, completion: Completion) -> None:
        """Hand it to the operating system: from here on it survives a kill of this process."""
        if self._file is None:
            self._file = open(self._part, "ab", buffering=0)  # noqa: SIM115 (until `finish`)
            self._file.truncate(sum(map(len, whole_lines(self._part))))
        self._file.write(_to_line(completion).encode())
        self.done.add(completion.key)

    def finish(self) -> None:
        """Write the completions of all ranks, in order, under the final name. Raises UserError if
        some are missing."""
        if self._file is not None:
            self._file.close()
        if not self.path.is_file():
            rows = {completion.key: completion for completion in self._read()}
            if missing := len(self._expected) - len(rows):
                raise UserError(
                    f"{self.path.parent}: {missing} of {len(self._expected)} completions are "
                    "missing; processes on several nodes need an --out that all of them see"
                )
            write_lines(self.path, (rows[key] for key in self._expected))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.unfinished-*.jsonl"))

    def _read(self) -> Iterator[Completion]:
        expected = set(self._expected)
        for part in self._parts():
            for completion in read_lines(part, Completion):
                if completion.key not in expected:
                    raise UserError(
                        f"{part}: sample {completion.sample} of problem {completion.id!r} is not "
                        "part of this evaluation; choose another --out"
                    )
                yield completion
