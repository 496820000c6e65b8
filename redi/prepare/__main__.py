"""Raw teacher data -> the files that the two stages train on, with an account of every row.

    python -m redi.prepare                 # open-r1/OpenR1-Math-Raw -> data/, as in the paper
    python -m redi.prepare raw.parquet --out small

prints, for 50 problems of which one has no correct trace and 45 have no incorrect one,

    format: OpenR1-Math-Raw
    raw rows                   50
      no correct generation     1
    positives                  49
      no incorrect generation  45
    pairs                       4
    saved small/positives.jsonl, small/pairs.jsonl, small/card.json

Each total is the one above it minus the rows dropped between them. The defaults are the paper's.
Not in the paper: labels from our grader (labels.py), and dropping repeated problems and problems of
a benchmark (overlap.py). The same rows in the same order give the same bytes, whatever their form
and the number of workers. Left out: shuffling and limits on length, which belong to the trainers.
"""

import contextlib
import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

from tqdm import tqdm

import redi
from redi.config import UserError, parse, positional, program, require
from redi.data.files import hash_files, make_folder, to_disk, write_aside
from redi.eval import benchmarks
from redi.eval.grading.grader import Grader
from redi.eval.grading.workers import Pool
from redi.hub import CARD, dataset_files
from redi.prepare import overlap, raw, traces
from redi.prepare.labels import NO_ANSWER, Labels
from redi.prepare.raw import Form, RawRow
from redi.prepare.traces import Choice, Rules
from redi.tables import text_table

POSITIVES, PAIRS, CONTAMINATED = "positives.jsonl", "pairs.jsonl", "contaminated.jsonl"
IN_BENCHMARK = {"same text": "in a benchmark", "other numbers": "in a benchmark, other numbers"}
# With the published source and rules: the counts that these rules should give (Section 3).
PAPER = "the paper: 77,629 positives, and 53,175 pairs after train_redi.py's limits on length"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Rules):
    raw: Annotated[str, "a hub id, a .parquet, .jsonl or .json file, or a folder", positional] = (
        "open-r1/OpenR1-Math-Raw"
    )
    out: Annotated[str, "folder for positives.jsonl, pairs.jsonl and card.json"] = "data"
    relabel: Annotated[bool, "grade every trace, whatever labels are given"] = False
    workers: Annotated[int, "processes that grade"] = 4
    dedup: Annotated[bool, "keep only the first of problems that are the same"] = False
    decontaminate: Annotated[list[str], "drop problems of these benchmarks (names or files)"] = (
        field(default_factory=list)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workers > 0, "workers", self.workers, "1 or more")


@dataclass
class Counts:
    """rows = positives + all of no_positive; positives + further = pairs + all of no_pair.

    further: candidates for a second or later pair, with --pairs-per-problem.
    sources: of the positives.
    """

    no_positive: Counter[str]
    no_pair: Counter[str]
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
        self.no_pair.update(choice.no_pair)


def no_counts(config: PrepareConfig, form: Form) -> Counts:
    """Zeros for every reason that can occur with these settings, in the order of the checks."""
    several = config.pairs_per_problem > 1
    no_positive = {
        "malformed": True,  # a field of another type, or text that UTF-8 cannot hold
        "problem not valid": True,  # problem_is_valid is not "yes"
        **{f"source {source}": True for source in config.excluded},
        "source not asked for": config.sources,
        "empty problem": True,
        "no generations": True,
        "labels missing": True,  # a verifier's list is missing, or null for a generation
        "labels misaligned": True,  # a verifier's list is not as long as generations
        NO_ANSWER: config.relabel or form.name != raw.RAW,
        "no correct generation": True,
        "no complete correct one": config.require_complete,
        "empty chosen": True,  # the first correct generation is null or blank
        **dict.fromkeys(IN_BENCHMARK.values(), config.decontaminate),
        **dict.fromkeys(overlap.REPEATED, config.dedup),
    }
    no_pair = {
        "no incorrect generation": True,
        "none that both reject": config.reject_rule == "both",
        "no complete incorrect one": config.require_complete,
        "empty further chosen": several,
        "empty rejected": True,  # the first incorrect generation is null or blank
        "chosen equals rejected": True,  # the same text was judged both ways
        "rejected too short": config.min_length_ratio > 0,
        "same as another pair": several,
    }
    possible = ([name for name, can in table.items() if can] for table in (no_positive, no_pair))
    return Counts(*(Counter(dict.fromkeys(reasons, 0)) for reasons in possible))


class Overlaps:
    """Finds problems that also occur in a benchmark or in an earlier row."""

    def __init__(self, config: PrepareConfig) -> None:
        tests = [benchmarks.load(name) for name in dict.fromkeys(config.decontaminate)]
        self.benchmarks = {test.name: len(test.problems) for test in tests}
        problems = ((test.name, p.id, p.problem) for test in tests for p in test.problems)
        self.index = overlap.Index(problems)
        self.seen: set[bytes] | None = set() if config.dedup else None

    def reason_to_drop(self, number: int, row: RawRow, found: IO | None) -> str | None:
        """Where else the problem occurs, or None. Matches with a benchmark go to `found`."""
        matches = self.index.matches(row.problem) if found else []
        for match in matches:
            ours = {"row": number, "id": row.id, "problem": row.problem}
            write(found, ours | dataclasses.asdict(match))
        kinds = {match.kind for match in matches}
        for kind, reason in IN_BENCHMARK.items():
            if kind in kinds:
                return reason
        return None if self.seen is None else overlap.repeats(row.problem, self.seen)


def write(file: IO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepare(config: PrepareConfig) -> tuple[Counts, Form, Labels]:
    """Write the files into `config.out`. card.json gets its name last: without it, the other files
    may not belong together. Raises UserError: bad input, or a file that cannot be written."""
    files, out = dataset_files(config.raw), Path(config.out)
    names = [POSITIVES, PAIRS, *([CONTAMINATED] if config.decontaminate else [])]
    clash = {file.resolve() for file in files} & {(out / name).resolve() for name in (CARD, *names)}
    if clash:
        raise UserError(f"{min(clash)}: both raw data and output; choose another --out")
    form, overlaps = raw.recognize(files), Overlaps(config)
    counts = no_counts(config, form)
    make_folder(out)
    with contextlib.ExitStack() as opened:
        # They are renamed in reverse order, so card.json last.
        card = opened.enter_context(write_aside(out / CARD))
        written = {name: opened.enter_context(write_aside(out / name)) for name in names}
        grader = Grader(opened.enter_context(Pool(config.workers)))
        labels = Labels(grader, config, config.relabel)
        hashes = _hashes(files)
        rows, total = labels.add(raw.read(files, form, out)), _number_of_rows(files, form)
        bar = tqdm(rows, desc="prepare", unit=" rows", disable=None, total=total)
        for number, row in enumerate(opened.enter_context(bar), start=1):
            choice, found = traces.choose(row, config), written.get(CONTAMINATED)
            if choice.positive and (reason := overlaps.reason_to_drop(number, row, found)):
                choice = Choice(no_positive=reason)
            counts.add(row, choice)
            if choice.positive:
                write(written[POSITIVES], choice.positive)
            for pair in choice.pairs:
                write(written[PAIRS], pair)
        if not counts.positives:
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts.no_positive.items() if n)
            raise UserError(
                f"{config.raw}: no row gives a positive ({reasons}); nothing is written"
            )
        # Syncing gigabytes takes seconds. Done before the first rename, it leaves Ctrl-C no time to
        # put new pairs beside old positives.
        for file in written.values():
            to_disk(file)
        rules = dataclasses.asdict(config).items()
        facts = {
            "redi": redi.__version__,
            "raw": config.raw,
            "format": form.name,
            "rules": {k: v for k, v in rules if k not in ("raw", "out", "workers")},
            "seed": None,  # nothing is random
            "benchmarks": overlaps.benchmarks,
            **vars(counts),
            "labels": labels.summary(),
            "raw_sha256": hashes,
            "sha256": {name: hash_files([Path(file.name)]) for name, file in written.items()},
        }
        json.dump(facts, card, indent=2)
        card.write("\n")
    if not config.decontaminate:  # the file of an earlier run would describe other files
        (out / CONTAMINATED).unlink(missing_ok=True)
    return counts, form, labels


def _hashes(files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its path relative to the folder that holds them all."""
    top = os.path.commonpath([file.parent for file in files])
    bar = tqdm(files, desc="hash", unit=" files", disable=None, leave=False)
    return {os.path.relpath(path, top): hash_files([path]) for path in bar}


def _number_of_rows(files: list[Path], form: Form) -> int | None:
    """For the progress bar: the problems, if the files say so without being read."""
    if form.one_trace or any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def account(counts: Counts, form: Form) -> str:
    """The table of the module's docstring: the reasons that occurred, indented."""
    rows = [("problems" if form.one_trace else "raw rows", counts.rows)]
    rows += [(f"  {reason}", n) for reason, n in counts.no_positive.items() if n]
    rows += [("positives", counts.positives)]
    rows += [("  more pairs to be had", counts.further)] if counts.further else []
    rows += [(f"  {reason}", n) for reason, n in counts.no_pair.items() if n]
    rows += [("pairs", counts.pairs)]
    traces = [("traces", counts.traces)] if form.one_trace else []
    return text_table([(name, str(n)) for name, n in traces + rows])


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn raw teacher traces into positives and pairs to train on.")
    try:
        counts, form, labels = prepare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was written to {config.out}") from None
    print(f"format: {form.name}")
    print(account(counts, form))
    if labels.counts:
        print(labels.table())
    print("saved", ", ".join(str(Path(config.out) / name) for name in (POSITIVES, PAIRS, CARD)))
    if config == dataclasses.replace(PrepareConfig(), out=config.out, workers=config.workers):
        print(PAPER)


if __name__ == "__main__":
    main()
