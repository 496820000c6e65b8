"""Raw teacher data -> the files that the two stages train on, with an account of every row.

    python -m redi.prepare                 # open-r1/OpenR1-Math-Raw -> data/, as in the paper
    python -m redi.prepare raw.parquet --out small

prints, for 50 problems of which one has no correct trace and 45 have no incorrect one (reasons
that took no row are printed too, and left out here),

    format: OpenR1-Math-Raw
    raw rows                   50
      no correct generation     1
    positives                  49  small/positives.jsonl
      no incorrect generation  45
    pairs                       4  small/pairs.jsonl

Each count is the one above it less the dropped rows between them. The forms that the data may have
are those of data/raw.py, the rules those of data/traces.py; the defaults are the paper's. Beyond
the paper, on request: labels by our own grader (labels.py), no problem twice, none of a benchmark
(data/overlap.py). Traces without labels are graded in any case, except in OpenR1-Math-Raw.

card.json beside the files says what they are: the source, the rules, the counts, the SHA-256 of
what was read and written. contaminated.jsonl names the rows that were found in a benchmark.

Rows are streamed from file to file, so the size of the data does not matter, and the same rows in
the same order give the same bytes whatever format they came in and however many workers grade.
Left out: shuffling and limits on length, which are the trainers'. Nothing here is drawn by chance,
so the card's seed is null.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

from tqdm import tqdm

import redi
from redi.config import UserError, parse, positional, program, require
from redi.data.files import make_folder, write_aside
from redi.eval import benchmarks
from redi.eval.grade import Grader
from redi.hub import CARD, dataset_files
from redi.prepare import overlap, raw, traces
from redi.prepare.labels import NO_ANSWER, Labels
from redi.prepare.raw import Form, RawRow
from redi.prepare.traces import Choice, Rules

POSITIVES, PAIRS = "positives.jsonl", "pairs.jsonl"
CONTAMINATED = "contaminated.jsonl"
REPEATED = {"exact": "duplicate", "normalised": "duplicate but for its typesetting"}
OVERLAPPING = {"same text": "in a benchmark", "other numbers": "in a benchmark, other numbers"}
BATCH_ROWS = 64  # graded together; a row is up to half a megabyte


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Rules):
    raw: Annotated[str, "a hub id, a .parquet, .jsonl or .json file, or a folder", positional] = (
        "open-r1/OpenR1-Math-Raw"
    )
    out: Annotated[str, "folder for positives.jsonl, pairs.jsonl and card.json"] = "data"
    relabel: Annotated[bool, "grade every trace, whatever labels are given"] = False
    workers: Annotated[int, "processes that grade"] = 4
    dedup: Annotated[bool, "keep the first only of problems that are the same"] = False
    decontaminate: Annotated[list[str], "drop problems of these benchmarks (names or files)"] = (
        field(default_factory=list)
    )
    ngram: Annotated[int, "words that are compared at once to find a benchmark's problem"] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workers > 0, "workers", self.workers, "1 or more")
        require(self.ngram > 0, "ngram", self.ngram, "1 or more")

    def shaping(self) -> dict[str, Any]:
        """Every setting that shapes the output."""
        names = [
            f.name for f in dataclasses.fields(self) if f.name not in ("raw", "out", "workers")
        ]
        return {name: getattr(self, name) for name in names}


@dataclass
class Counts:
    """rows = positives + all of no_positive; positives + further = pairs + all of no_pair.

    further: pairs that there might have been beside a problem's first, with --pairs-per-problem.
    sources: of the positives.
    """

    no_positive: dict[str, int]
    no_pair: dict[str, int]
    rows: int = 0
    traces: int = 0
    positives: int = 0
    further: int = 0
    pairs: int = 0
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, row: RawRow, choice: Choice) -> None:
        self.rows += 1
        self.traces += len(row.traces)
        if choice.positive is None:
            self.no_positive[choice.no_positive] += 1
            return
        self.positives += 1
        self.sources[choice.positive["source"] or "none"] += 1
        self.further += len(choice.pairs) + len(choice.no_pair) - 1
        self.pairs += len(choice.pairs)
        for reason in choice.no_pair:
            self.no_pair[reason] += 1


def no_counts(config: PrepareConfig, form: Form) -> Counts:
    """Zeros, for each reason that there may be."""
    reasons = config.no_positive()
    if config.relabel or form.name != raw.RAW:
        reasons.insert(reasons.index("no correct generation"), NO_ANSWER)
    reasons += [*OVERLAPPING.values()] if config.decontaminate else []
    reasons += [*REPEATED.values()] if config.dedup else []
    return Counts(dict.fromkeys(reasons, 0), dict.fromkeys(config.no_pair(), 0))


class JsonLines:
    """Rows as JSON lines into a text file, and the SHA-256 of what was written."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, row: Any) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self.file.write(line)
        self.sha256.update(line.encode())

    def finish(self) -> str:
        """Put everything on the disk; the SHA-256 in hex."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.sha256.hexdigest()


class Overlaps:
    """Drops problems that stand elsewhere: in a benchmark, or in an earlier row."""

    def __init__(self, config: PrepareConfig) -> None:
        named = [benchmarks.load(name) for name in dict.fromkeys(config.decontaminate)]
        self.benchmarks = {test.name: len(test.problems) for test in named}
        problems = ((test.name, p.id, p.problem) for test in named for p in test.problems)
        self.index = overlap.Index(problems, config.ngram) if named else None
        self.seen = overlap.Seen() if config.dedup else None

    def check(self, number: int, row: RawRow, choice: Choice, found: JsonLines | None) -> Choice:
        """`choice`, or none if its problem stands elsewhere; matches are written to `found`."""
        if choice.positive is None:
            return choice
        matches = self.index.matches(row.problem) if self.index else []
        for match in matches:
            place = {"row": number, "id": row.id, "problem": row.problem}
            theirs = {"benchmark": match.benchmark, "benchmark_id": match.id}
            found.write(place | theirs | {"kind": match.kind, "share": round(match.share, 3)})
        if matches:
            kinds = {match.kind for match in matches}
            worst = "same text" if "same text" in kinds else "other numbers"
            return Choice(no_positive=OVERLAPPING[worst])
        repeated = self.seen and self.seen.add(row.problem)
        return Choice(no_positive=REPEATED[repeated]) if repeated else choice


def prepare(config: PrepareConfig) -> tuple[Counts, Form, Labels]:
    """Write positives.jsonl, pairs.jsonl and card.json into the folder `config.out`. card.json
    takes its name last: where it is missing, the others may not belong together."""
    files, out = dataset_files(config.raw), Path(config.out)
    names = [CARD, POSITIVES, PAIRS, *[CONTAMINATED] * bool(config.decontaminate)]
    _refuse_clash(files, [out / name for name in names])
    form, overlaps = raw.recognise(files), Overlaps(config)
    counts = no_counts(config, form)
    make_folder(out)
    with contextlib.ExitStack() as opened:
        # Renamed last to first: card.json, the seal on the others, takes its name last.
        card, *others = (opened.enter_context(write_aside(out / name)) for name in names)
        written = {name: JsonLines(file) for name, file in zip(names[1:], others)}
        grader = opened.enter_context(Grader(config.workers))
        labels = Labels(grader, config, config.relabel)
        hashes = _hashes(files)
        rows, total = _labelled(raw.read(files, form, out), labels), _number_of_rows(files, form)
        bar = tqdm(rows, desc="prepare", unit=" rows", disable=None, total=total)
        for number, row in enumerate(opened.enter_context(bar), start=1):
            choice = traces.choose(row, config)
            choice = overlaps.check(number, row, choice, written.get(CONTAMINATED))
            counts.add(row, choice)
            if choice.positive:
                written[POSITIVES].write(choice.positive)
            for pair in choice.pairs:
                written[PAIRS].write(pair)
        # Syncing gigabytes takes seconds. Done here, the renames follow one another at once, and
        # Ctrl-C does not find new pairs beside old positives.
        sha256 = {name: file.finish() for name, file in written.items()}
        facts = {
            "redi": redi.__version__,
            "raw": config.raw,
            "format": form.name,
            "rules": config.shaping(),
            "seed": None,
            "benchmarks": overlaps.benchmarks,
            **vars(counts),
            "labels": labels.summary(),
            "raw_sha256": hashes,
            "sha256": sha256,
        }
        json.dump(facts, card, indent=2)
        card.write("\n")
    if not config.decontaminate:  # that of an earlier run would tell of other files
        (out / CONTAMINATED).unlink(missing_ok=True)
    return counts, form, labels


def _refuse_clash(files: list[Path], outputs: list[Path]) -> None:
    clash = {file.resolve() for file in files} & {output.resolve() for output in outputs}
    if clash:
        raise UserError(f"{min(clash)}: both raw data and output; choose another --out")


def _labelled(rows: Iterable[RawRow], labels: Labels) -> Iterator[RawRow]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield from labels.add(batch)


def _hashes(files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its path below the folder that holds them all."""
    top = os.path.commonpath([file.parent for file in files])
    hashes = {}
    for path in tqdm(files, desc="hash", unit=" files", disable=None, leave=False):
        with open(path, "rb") as file:
            hashes[os.path.relpath(path, top)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _number_of_rows(files: list[Path], form: Form) -> int | None:
    """For the bar's end, where the files say it without being read."""
    if form.one_trace or any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def table(counts: Counts, form: Form, out: Path) -> str:
    """The account as aligned text, as in the module's docstring."""
    lines = [
        ("traces" if form.one_trace else "", counts.traces, ""),
        ("problems" if form.one_trace else "raw rows", counts.rows, ""),
        *((f"  {reason}", count, "") for reason, count in counts.no_positive.items()),
        ("positives", counts.positives, f"  {out / POSITIVES}"),
        ("  more pairs to be had" if counts.further else "", counts.further, ""),
        *((f"  {reason}", count, "") for reason, count in counts.no_pair.items()),
        ("pairs", counts.pairs, f"  {out / PAIRS}"),
    ]
    lines = [line for line in lines if line[0]]
    left = max(len(label) for label, _, _ in lines)
    right = max(len(str(count)) for _, count, _ in lines)
    return "\n".join(f"{label:<{left}}  {count:>{right}}{file}" for label, count, file in lines)


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn raw teacher traces into positives and pairs to train on.")
    try:
        counts, form, labels = prepare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was written to {config.out}") from None
    print(f"format: {form.name}")
    print(table(counts, form, Path(config.out)))
    if labels.counts:
        print(labels.table())


if __name__ == "__main__":
    main()
