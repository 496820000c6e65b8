"""Raw teacher data -> the files that the two stages train on, with an account of every row.

    python -m redi.prepare open-r1/OpenR1-Math-Raw        # -> data/, as in the paper
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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import redi
from redi.config import UserError, parse, program, require
from redi.data.files import hash_files, make_folder, refuse_overwriting, to_disk, write_aside
from redi.eval import benchmarks
from redi.eval.grading.grader import Grader
from redi.eval.grading.workers import Pool
from redi.hub import CARD, dataset_files, is_hub_id
from redi.prepare import labels, overlap, raw, traces
from redi.prepare.raw import Form, RawRow
from redi.prepare.traces import Choice, PrepareConfig
from redi.tables import text_table

POSITIVES, PAIRS, CONTAMINATED = "positives.jsonl", "pairs.jsonl", "contaminated.jsonl"
IN_BENCHMARK = {"same text": "in a benchmark", "other numbers": "in a benchmark, other numbers"}
# Of the published source, by the default rules: the counts that they should give (Section 3).
PAPER_RAW = "open-r1/OpenR1-Math-Raw"
PAPER = "the paper: 77,629 positives, and 53,175 pairs after train_redi.py's limits on length"


class Counts:
    """rows = positives + all of no_positive; positives + further = pairs + all of no_pair.

    further: candidates for a second or later pair, with --pairs-per-problem.
    sources: of the positives. left_out: traces that the reader left out, by reason.
    """

    def __init__(self, config: PrepareConfig, form: Form) -> None:
        """Zeros, also for every reason that can occur, in the order of the checks."""
        several = config.pairs_per_problem > 1
        no_positive = {
            "malformed": True,  # a field of another type, or text that UTF-8 cannot hold
            "problem not valid": True,  # problem_is_valid is not "yes"
            **{f"source {source}": True for source in config.excluded},
            "source not asked for": config.sources,
            "empty problem": True,
            traces.NONE_LEFT: form.name == raw.EVALUATION,
            "no generations": True,
            "labels missing": True,  # a verifier's list is missing, or null for a generation
            "labels misaligned": True,  # a verifier's list is not as long as generations
            labels.NO_ANSWER: config.relabel or form.name != raw.RAW,
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
        self.no_positive = Counter({reason: 0 for reason, can in no_positive.items() if can})
        self.no_pair = Counter({reason: 0 for reason, can in no_pair.items() if can})
        self.rows = self.traces = self.positives = self.further = self.pairs = 0
        self.sources: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(self, row: RawRow, choice: Choice) -> None:
        self.rows += 1
        self.traces += len(row.traces) + sum(row.left_out.values())
        self.left_out.update(row.left_out)
        if choice.positive is None:
            self.no_positive[choice.no_positive] += 1
            return
        self.positives += 1
        self.sources[choice.positive["source"] or "none"] += 1
        self.further += len(choice.pairs) + len(choice.no_pair) - 1
        self.pairs += len(choice.pairs)
        self.no_pair.update(choice.no_pair)

    def table(self, one_trace: bool) -> str:
        """The table of the module's docstring: the reasons that occurred, indented."""
        rows = [("problems" if one_trace else "raw rows", self.rows)]
        if one_trace:
            left_out = [(f"  {reason}", n) for reason, n in self.left_out.items()]
            rows = [("traces", self.traces), *left_out, *rows]
        rows += [(f"  {reason}", n) for reason, n in self.no_positive.items() if n]
        rows += [("positives", self.positives)]
        rows += [("  more pairs to be had", self.further)] if self.further else []
        rows += [(f"  {reason}", n) for reason, n in self.no_pair.items() if n]
        rows += [("pairs", self.pairs)]
        return text_table([(name, str(n)) for name, n in rows])


class Overlaps:
    """Finds problems that also occur in a benchmark or in an earlier row."""

    def __init__(self, config: PrepareConfig) -> None:
        tests = [benchmarks.load(name) for name in dict.fromkeys(config.decontaminate)]
        self.benchmarks = {test.name: len(test.problems) for test in tests}
        self.index = overlap.Index((t.name, p.id, p.problem) for t in tests for p in t.problems)
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


def prepare(config: PrepareConfig) -> tuple[Counts, Form, labels.Graded]:
    """Write the files into `config.out`. card.json gets its name last: without it, the other files
    may not belong together. Raises UserError: bad input, or a file that cannot be written."""
    files, form, raw_rows = find(config)
    out = Path(config.out)
    names = [POSITIVES, PAIRS, *([CONTAMINATED] if config.decontaminate else [])]
    for name in (CARD, *names):
        refuse_overwriting("out", out / name, files)
    overlaps, counts, graded = Overlaps(config), Counts(config, form), labels.Graded()
    make_folder(out)
    with contextlib.ExitStack() as opened:
        # They are renamed in reverse order, so card.json last.
        card = opened.enter_context(write_aside(out / CARD))
        written = {name: opened.enter_context(write_aside(out / name)) for name in names}
        grader = Grader(opened.enter_context(Pool(config.workers)))
        top = os.path.commonpath([file.parent for file in files])
        bar = tqdm(files, desc="hash", unit=" files", disable=None, leave=False)
        hashes = {os.path.relpath(file, top): hash_files([file]) for file in bar}
        rows = labels.add_votes(raw_rows, grader, config, graded)
        total = number_of_rows(files, form)
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
            "license": dataset_license(config.raw),
            "format": form.name,
            "rules": {k: v for k, v in rules if k not in ("raw", "out", "workers")},
            "seed": None,  # nothing is random
            "benchmarks": overlaps.benchmarks,
            **vars(counts),
            "labels": labels.summary(graded),
            "raw_sha256": hashes,
            "sha256": {name: hash_files([Path(file.name)]) for name, file in written.items()},
        }
        json.dump(facts, card, indent=2)
        card.write("\n")
    if not config.decontaminate:  # the file of an earlier run would describe other files
        (out / CONTAMINATED).unlink(missing_ok=True)
    return counts, form, graded


def find(config: PrepareConfig) -> tuple[list[Path], Form, Iterator[RawRow]]:
    """The files of `config.raw`, their form, and their problems."""
    folder = Path(config.raw).expanduser()
    if (folder / "config.toml").is_file() and (folder / "problems").is_dir():
        from redi.prepare import own_traces  # here: it needs torch

        return own_traces.read(folder, config)
    for name in ("keep_truncated", "allow_benchmarks"):
        require(not getattr(config, name), name, config.raw, "an evaluation of redi")
    files = dataset_files(config.raw)
    form = raw.recognize(files)
    return files, form, raw.read(files, form, Path(config.out))


def dataset_license(path_or_hub_id: str) -> str | list[str] | None:
    """The license that a dataset's page on the hub names. None: a local path, no network, or the
    page names none."""
    hub_id = path_or_hub_id.partition(":")[0]
    if not is_hub_id(hub_id):
        return None
    from huggingface_hub import dataset_info

    try:
        card = dataset_info(hub_id, timeout=10).card_data
    except Exception:  # whatever the network raises; the files may be in the cache
        return None
    return card.get("license") if card else None


def number_of_rows(files: list[Path], form: Form) -> int | None:
    """For the progress bar: the problems, if the files say so without being read."""
    if form.one_trace or any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn raw teacher traces into positives and pairs to train on.")
    try:
        counts, form, graded = prepare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was written to {config.out}") from None
    print(f"format: {form.name}")
    print(counts.table(form.one_trace))
    if graded:
        print(labels.table(graded))
    print("saved", ", ".join(str(Path(config.out) / name) for name in (POSITIVES, PAIRS, CARD)))
    if config == PrepareConfig(raw=PAPER_RAW, out=config.out, workers=config.workers):
        print(PAPER)


if __name__ == "__main__":
    main()
