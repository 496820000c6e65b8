r"""An evaluation on disk: problems, completions, and what graders decided.

    OUT/problems/NAME.jsonl              the benchmark as it was read; itself a benchmark file
    OUT/completions/NAME.jsonl           one line per completion, ordered by problem and sample
    OUT/completions/NAME.unfinished-R.jsonl   those of rank R so far, while some are missing
    OUT/verdicts/GRADER/NAME.jsonl       one line per completion: extracted answer, verdict; no text

Grading again writes a few hundred kilobytes beside gigabytes of text that never change. A
completion is appended in one write as soon as it is finished. A killed evaluation resumes from the
files of all ranks, drops a line cut short, and samples the rest. Left out: resuming a completion.
"""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar, get_type_hints

from redi.config import RankError, UserError, check_table
from redi.data.files import make_folder, whole_lines, write_aside
from redi.eval.benchmarks import UNFINISHED, Benchmark, load

Key = tuple[str, int]  # a problem's id and a sample's number
Verdict = Literal["correct", "incorrect", "no_answer", "truncated", "timeout"]
AnswerFrom = Literal["after_think", "whole"]  # where the grader looked; see grading/grader.py


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

    verdict: Verdict
    extracted: str | None  # the boxed answer
    num_tokens: int | None
    loops: bool  # the text ends in repetition (repetition.py)
    answer_from: AnswerFrom


L = TypeVar("L", Completion, Mark)


def completions_file(out: Path, name: str) -> Path:
    return out / "completions" / f"{name}.jsonl"


def marks_file(out: Path, grader: str, name: str) -> Path:
    return out / "verdicts" / grader / f"{name}.jsonl"


def read_lines(path: Path, kind: type[L], unfinished: bool = False) -> Iterator[L]:
    """The rows of a file. unfinished: leave out a last line that was cut short. Raises UserError:
    no such file, a line that is cut short or not JSON, fields that are missing, unknown or of
    another type."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python evaluate.py` makes it")
    types = get_type_hints(kind)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if unfinished and not line.endswith(b"\n"):
                return
            try:
                row = kind(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                got = "got" if line.endswith(b"\n") else "the file is cut short after"
                expected = f"expected JSON with {', '.join(types)}; {got} {line!r:.60}"
                raise UserError(f"{path}:{number}: {expected}") from None
            check_table(vars(row), types, f"{path}:{number}")
            yield row


def write_lines(path: Path, rows: Iterable[Completion | Mark]) -> None:
    make_folder(path.parent)
    with write_aside(path) as file:
        file.writelines(to_line(asdict(row)) for row in rows)


def to_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def by_problem(benchmark: Benchmark, rows: Iterable[L], where: str = "") -> list[list[L]]:
    """Each problem's completions or marks, by sample. where: the file of the rows, for the error.
    Raises UserError: an unknown problem, a sample that occurs twice or is missing, for then neither
    the SEM nor pass@k is defined."""
    name = f"{where}: {benchmark.name}" if where else benchmark.name
    found: dict[str, list[L]] = {problem.id: [] for problem in benchmark.problems}
    for row in sorted(rows, key=lambda row: row.sample):
        if row.id not in found:
            raise UserError(f"{name}: holds no problem {row.id!r}")
        found[row.id].append(row)
    n = max(1, *(len({row.sample for row in samples}) for samples in found.values()))
    for id, samples in found.items():
        numbers = [row.sample for row in samples]
        if numbers != list(range(n)):
            wrong = min(k for k in {*range(n), *numbers} if numbers.count(k) != (k < n))
            got = f"{len(samples)} samples, expected 0 to {n - 1}, once each"
            what = "the first one missing, repeated or unexpected"
            raise UserError(f"{name}: problem {id!r} has {got}; {what}: {wrong}")
    return list(found.values())


# ---------------------------------------------------------------- what an evaluation starts from


def store_inputs(
    out: Path,
    benchmarks: Sequence[Benchmark],
    completions: dict[str, list[Completion]] | None = None,
) -> None:
    """Write the problems, and another program's completions by benchmark. Raises UserError if the
    folder holds others: they have changed since the evaluation began."""
    for benchmark in benchmarks:
        path = out / "problems" / f"{benchmark.name}.jsonl"
        if not path.is_file():
            make_folder(path.parent)
            with write_aside(path) as file:
                for problem in benchmark.problems:
                    row = asdict(problem)
                    row["answer"] = row.pop("answers")
                    file.write(to_line(row))
        elif load(path).problems != benchmark.problems:
            raise UserError(
                f"--benchmark {benchmark.name}: its problems have changed since {path} was "
                "written; choose another --out"
            )
    for name, rows in (completions or {}).items():
        path = completions_file(out, name)
        if not path.is_file():
            write_lines(path, rows)
        elif list(read_lines(path, Completion)) != rows:
            raise UserError(f"{path}: holds other completions; choose another --out")


def stored_benchmarks(out: Path) -> list[Benchmark]:
    """The benchmarks of an evaluation, sorted by name. Raises UserError if there are none."""
    files = sorted((out / "problems").glob("*.jsonl"))
    if not files:
        raise UserError(f"{out}: holds no evaluation; `python evaluate.py --out {out}` makes one")
    return [load(file) for file in files]


class Store:
    """One benchmark's completions while they are sampled; `done` holds the keys of those on disk.
    Each rank appends to a file of its own."""

    def __init__(self, out: Path, benchmark: Benchmark, samples: int, rank: int = 0):
        self.path = completions_file(out, benchmark.name)
        self._expected = [(p.id, sample) for p in benchmark.problems for sample in range(samples)]
        make_folder(self.path.parent)
        is_complete = self.path.is_file()
        self.done = set(self._expected if is_complete else (c.key for c in self._unfinished()))
        part = self.path.with_name(f"{benchmark.name}{UNFINISHED}{rank}.jsonl")
        self._file = open(part, "ab", buffering=0)  # noqa: SIM115 (until `finish`)
        self._file.truncate(sum(map(len, whole_lines(part))))

    def append(self, completion: Completion) -> None:
        """Hand it to the operating system: from here on it survives a kill of this process. A full
        disk raises RankError; the next start drops the part of the line that was written."""
        left = to_line(asdict(completion)).encode()
        try:
            while left:  # a nearly full disk takes a part of it
                left = left[self._file.write(left) :]
        except OSError as error:
            message = f"cannot be written ({error.strerror}); the same command resumes"
            raise RankError(f"{self._file.name}: {message}") from None
        self.done.add(completion.key)

    def finish(self) -> None:
        """Write the completions of all ranks, in order, under the final name. Raises UserError if
        some are missing."""
        self._file.close()
        if not self.path.is_file():
            rows = {completion.key: completion for completion in self._unfinished()}
            if missing := sum(key not in rows for key in self._expected):
                raise UserError(
                    f"{self.path.parent}: {missing} of {len(self._expected)} completions are "
                    "missing; processes on several nodes need an --out that all of them see"
                )
            write_lines(self.path, (rows[key] for key in self._expected))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}{UNFINISHED}*.jsonl"))

    def _unfinished(self) -> Iterator[Completion]:
        """What all ranks have sampled so far."""
        files = (read_lines(part, Completion, unfinished=True) for part in self._parts())
        return chain.from_iterable(files)
