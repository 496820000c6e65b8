r"""An evaluation on disk: what was asked, what was answered, what graders said of it.

    OUT/problems/NAME.jsonl              the benchmark as it was read; itself a benchmark file
    OUT/completions/NAME.jsonl           one line per completion, ordered by problem and sample
    OUT/completions/NAME.unfinished-R.jsonl   those of rank R as they come, while some are missing
    OUT/verdicts/GRADER/NAME.jsonl       one line per completion: extracted answer, verdict; no text

Completions are facts and verdicts are opinions, so they have separate files: grading again writes a
few hundred kilobytes beside gigabytes of text that never change. A completion is appended in one
write as soon as it is finished. A killed evaluation reads all ranks' files back, drops a line that
was cut short, and makes the rest. Left out: keeping half a completion.
"""

import contextlib
import dataclasses
import glob
import json
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from redi.config import UserError
from redi.data.files import make_folder, write_aside
from redi.eval.benchmarks import Benchmark, load

Key = tuple[str, int]  # a problem's id and a sample's number
L = TypeVar("L", "Completion", "Mark")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response to one problem."""

    id: str  # of the problem
    sample: int  # 0 .. n-1
    text: str
    num_tokens: int | None  # None: made elsewhere, and nobody said
    finish_reason: str

    @property
    def key(self) -> Key:
        return self.id, self.sample


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What a grader said of one completion; all that a report needs of it."""

    id: str
    sample: int
    verdict: str  # correct, incorrect, no_answer, truncated or timeout
    extracted: str | None  # the boxed answer
    num_tokens: int | None
    loops: bool  # the text ends in circles (loops.py)
    answer_from: str = "after_think"  # where the answer was looked for; old files do not say

    @property
    def key(self) -> Key:
        return self.id, self.sample


# ---------------------------------------------------------------- one line


def to_line(row: Completion | Mark) -> str:
    return json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n"


def from_line(line: str | bytes, kind: type[L], place: str) -> L:
    """The row of one JSON line. Raises UserError that begins with `place`: not JSON, missing or
    unknown fields, a field of another type."""
    try:
        row = kind(**json.loads(line))
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    except TypeError:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UserError(f"{place}: expected the fields {names}; got {line!r:.60}") from None
    for field in dataclasses.fields(kind):
        value = getattr(row, field.name)
        if type(value) not in (typing.get_args(field.type) or (field.type,)):
            raise UserError(f"{place}: field {field.name!r}: got {value!r:.60}")
    return row


def read_lines(path: Path, kind: type[L]) -> Iterator[L]:
    """The rows of a file that was written whole. Raises UserError if it is not there."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield from_line(line, kind, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python evaluate.py` makes it") from None


def write_lines(path: Path, rows: Iterable[Completion | Mark]) -> None:
    make_folder(path.parent)
    with write_aside(path) as file:
        file.writelines(map(to_line, rows))


# ---------------------------------------------------------------- problems


def keep_problems(out: Path, test: Benchmark) -> None:
    """Write down what is asked. Raises UserError if other problems were asked here before: their
    completions would be graded against these answers."""
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


def asked(out: Path) -> list[Benchmark]:
    """The benchmarks of an evaluation, by name. Raises UserError if the folder holds none."""
    files = sorted((out / "problems").glob("*.jsonl"))
    if not files:
        raise UserError(f"{out}: holds no evaluation; `python evaluate.py --out {out}` makes one")
    return [load(file) for file in files]


def completions_file(out: Path, name: str) -> Path:
    return out / "completions" / f"{name}.jsonl"


def marks_file(out: Path, grader: str, name: str) -> Path:
    return out / "verdicts" / grader / f"{name}.jsonl"


def by_problem(test: Benchmark, marks: Sequence[Mark]) -> list[list[Mark]]:
    """Each problem's marks, by sample. Raises UserError: a mark of no problem of `test`, a sample
    given twice, or one that is missing, for then neither the SEM nor pass@k is defined."""
    found: dict[str, dict[int, Mark]] = {problem.id: {} for problem in test.problems}
    for mark in marks:
        samples = found.get(mark.id)
        if samples is None:
            raise UserError(f"{test.name}: holds no problem {mark.id!r}")
        if mark.sample in samples:
            raise UserError(f"{test.name}: problem {mark.id!r} has sample {mark.sample} twice")
        samples[mark.sample] = mark
    n = max(map(len, found.values()))
    for id, samples in found.items():
        if n == 0 or samples.keys() != set(range(n)):
            raise UserError(
                f"{test.name}: problem {id!r} has samples {sorted(samples)}, "
                f"expected 0 to {max(n, 1) - 1}"
            )
    return [[samples[j] for j in range(n)] for samples in found.values()]


# ---------------------------------------------------------------- completions as they come


class Store:
    """The completions of one benchmark: those that are there, and those that are appended."""

    def __init__(self, out: Path, test: Benchmark, samples: int, rank: int = 0):
        """Raises UserError: a completion that is broken or was not asked for."""
        self.path = completions_file(out, test.name)
        self._expected = [(p.id, sample) for p in test.problems for sample in range(samples)]
        self._mine = self.path.with_name(f"{test.name}.unfinished-{rank}.jsonl")
        self._file = None
        make_folder(self.path.parent)
        if self.is_complete:
            self.done = set(self._expected)
        else:
            self.done = {completion.key for completion in self._read()}

    @property
    def is_complete(self) -> bool:
        return self.path.is_file()

    def append(self, completion: Completion) -> None:
        """On disk when this returns, as far as a killed process is concerned."""
        if self._file is None:
            _cut_last_line(self._mine)
            self._file = open(self._mine, "ab", buffering=0)  # noqa: SIM115 (until `finish`)
        self._file.write(to_line(completion).encode())
        self.done.add(completion.key)

    def finish(self) -> None:
        """Put all of them, whichever rank made them, in order under the final name. Raises
        UserError if some are not there."""
        if self._file is not None:
            self._file.close()
        if not self.is_complete:
            rows = {completion.key: completion for completion in self._read()}
            if lacking := len(self._expected) - len(rows):
                raise UserError(
                    f"{self._mine.parent}: {lacking} of {len(self._expected)} completions are not "
                    "there; processes on several nodes need an --out that all of them see"
                )
            write_lines(self.path, (rows[key] for key in self._expected))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        name = self.path.name.removesuffix(".jsonl")
        return sorted(self.path.parent.glob(f"{glob.escape(name)}.unfinished-*.jsonl"))

    def _read(self) -> Iterator[Completion]:
        expected = set(self._expected)
        for part in self._parts():
            with open(part, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break  # cut short by a kill
                    completion = from_line(line, Completion, f"{part}:{number}")
                    if completion.key not in expected:
                        raise UserError(
                            f"{part}:{number}: sample {completion.sample} of problem "
                            f"{completion.id!r} was not asked for"
                        )
                    yield completion


def _cut_last_line(path: Path) -> None:
    """Drop what follows the last end of line: a kill came within a write."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
