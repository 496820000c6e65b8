"""Raw teacher data -> the files that the two stages train on, with an account of every row.

    python -m redi.prepare                 # open-r1/OpenR1-Math-Raw -> data/, as in the paper
    python -m redi.prepare raw.parquet --out small

prints, for 50 problems of which one has no correct trace and 45 have no incorrect one (reasons
that took no row are printed too, and left out here), and saves as counts.json,

    raw rows                   50
      no correct generation     1
    positives                  49  small/positives.jsonl
      no incorrect generation  45
    pairs                       4  small/pairs.jsonl

Each count is the one above it less the dropped rows between them. The rules are those of
data/traces.py. Rows are streamed from file to file, so the size of the data does not matter, and
the same rows in the same order give the same bytes whatever format they came in; counts.json holds
the SHA-256 of both files. Left out: shuffling and limits on length, which are the trainers'.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

from tqdm import tqdm

from redi.config import UserError, parse, positional, program
from redi.data import traces
from redi.data.files import make_folder, write_aside
from redi.hub import dataset_files


@dataclass(kw_only=True)
class PrepareConfig:
    raw: Annotated[str, "a hub id, a .parquet, .jsonl or .json file, or a folder", positional] = (
        "open-r1/OpenR1-Math-Raw"
    )
    out: Annotated[str, "folder for positives.jsonl, pairs.jsonl and counts.json"] = "data"


@dataclass
class Counts:
    """rows = positives + all of no_positive; positives = pairs + all of no_pair."""

    rows: int = 0
    positives: int = 0
    pairs: int = 0
    no_positive: dict[str, int] = field(default_factory=lambda: _zeros(traces.NO_POSITIVE))
    no_pair: dict[str, int] = field(default_factory=lambda: _zeros(traces.NO_PAIR))

    def add(self, built: traces.Built) -> None:
        positive, pair, reason = built
        self.rows += 1
        self.positives += positive is not None
        self.pairs += pair is not None
        if reason is not None:
            (self.no_pair if positive else self.no_positive)[reason] += 1


def _zeros(reasons: Iterable[str]) -> dict[str, int]:
    return dict.fromkeys(reasons, 0)


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


def prepare(raw: str, out: Path) -> Counts:
    """Write positives.jsonl, pairs.jsonl and counts.json into `out`. counts.json takes its
    name last: where it is missing, the other two may not belong together."""
    files = dataset_files(raw)
    outputs = [out / name for name in ("counts.json", "positives.jsonl", "pairs.jsonl")]
    clash = {file.resolve() for file in files} & {output.resolve() for output in outputs}
    if clash:
        raise UserError(f"{min(clash)}: both raw data and output; choose another --out")
    make_folder(out)
    rows = (row for file in files for row in traces.raw_rows(file))
    counts = Counts()
    # Renamed last to first: counts.json, the seal on the other two, takes its name last.
    with (
        write_aside(outputs[0]) as counts_file,
        write_aside(outputs[1]) as positives_file,
        write_aside(outputs[2]) as pairs_file,
        tqdm(traces.build(rows), desc="prepare", unit=" rows", disable=None) as bar,
    ):
        positives, pairs = JsonLines(positives_file), JsonLines(pairs_file)
        for built in bar:
            counts.add(built)
            positive, pair, _ = built
            if positive:
                positives.write(positive)
            if pair:
                pairs.write(pair)
        # Syncing gigabytes takes seconds. Done here, the three renames follow one another at once,
        # and Ctrl-C does not find new pairs beside old positives.
        sha256 = {"positives.jsonl": positives.finish(), "pairs.jsonl": pairs.finish()}
        json.dump({"raw": raw, **vars(counts), "sha256": sha256}, counts_file, indent=2)
        counts_file.write("\n")
    return counts


def table(counts: Counts, out: Path) -> str:
    """The account as aligned text, as in the module's docstring."""
    lines = [
        ("raw rows", counts.rows, ""),
        *((f"  {reason}", count, "") for reason, count in counts.no_positive.items()),
        ("positives", counts.positives, f"  {out / 'positives.jsonl'}"),
        *((f"  {reason}", count, "") for reason, count in counts.no_pair.items()),
        ("pairs", counts.pairs, f"  {out / 'pairs.jsonl'}"),
    ]
    left = max(len(label) for label, _, _ in lines)
    right = len(str(counts.rows))
    return "\n".join(f"{label:<{left}}  {count:>{right}}{file}" for label, count, file in lines)


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn raw teacher traces into positives and pairs to train on.")
    out = Path(config.out)
    try:
        counts = prepare(config.raw, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was written to {out}") from None
    print(table(counts, out))


if __name__ == "__main__":
    main()
