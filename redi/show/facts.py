"""The report on training rows: counted texts, token lengths, the plan of an epoch.

The texts are read once and only counts are kept; lengths come from the token store's index.
Letters: N rows.
"""

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from redi.batches import TrainData
from redi.config import UserError, one_line
from redi.data.dataset import Dataset, Limits, select, table_of_lengths
from redi.data.files import read_rows
from redi.data.formats import FIELDS, FORMATS, find_format, to_example
from redi.distributed import World
from redi.eval.grading.grader import extract
from redi.objectives import sft
from redi.recipe import TrainConfig
from redi.run import describe_plan
from redi.show.rows import COLUMNS, visible
from redi.tables import text_table

TOP_SOURCES = 10
LONGEST_NAME = 60  # of a source, in characters


def holds_pairs(files: Sequence[Path]) -> bool:
    """Whether the first row is a pair. Raises UserError for a row that neither stage trains on.
    Rows of the other stage are refused when they are read."""
    where, row = next(read_rows(files, FIELDS))
    return find_format(row, where, paired=None) in FORMATS[True]


def report(files: Sequence[Path], every_row: Dataset, config: TrainConfig) -> str:
    """What the files hold and what `config` will train on."""
    store = every_row.store
    stage = "pairs for train_redi.py" if store.paired else "rows for train_sft.py"
    sources, counts = count_texts(files, every_row)
    total = sources.total()
    size = tqdm.format_sizeof(sum(file.stat().st_size for file in files))
    about_files = [
        f"{config.data}: {total:,} {stage}, {size}B in {len(files)} file{'s' * (len(files) > 1)}",
        f"sha256 {store.data_hash}",
        *(f"left out: {count:,} {reason}" for reason, count in store.skipped.items()),
        f"prompts: {_share(counts['repeated prompts'], total)} repeat an earlier one",
    ]
    for side in every_row.sides:
        thinking, boxed = (_share(counts[what, side], total) for what in ("thinking", "boxed"))
        about_files.append(f"{side}: {thinking} with </think>, {boxed} with \\boxed{{}}")
    if store.paired:
        chosen, rejected = every_row.response_lengths.reshape(-1, 2).T
        shorter, longer = (rejected < chosen).mean(), (rejected > chosen).mean()
        about_files.append(f"rejected: {shorter:.1%} shorter than chosen, {longer:.1%} longer")
    limits = Limits(config.max_prompt, config.max_response, config.max_length)
    try:
        training = about_training(select(store, limits, "drop", config.data), config)
    except UserError as no_row_is_left:
        training = [str(no_row_is_left)]
    sections = [
        _section("File", about_files),
        table_of_sources(sources),
        table_of_lengths(every_row),
        _section("Training", training),
    ]
    return "\n\n".join(sections)


def count_texts(
    files: Sequence[Path], every_row: Dataset
) -> tuple[Counter[str], Counter[str | tuple[str, str]]]:
    """(rows of each source, counts of "repeated prompts" and of ("thinking" or "boxed", side))"""
    sources, counts = Counter(), Counter()
    prompts: set[bytes] = set()  # hashes
    rows = read_rows(files, {*FIELDS, "source"})
    for where, row in tqdm(rows, "reading", unit=" rows", disable=None, leave=False):
        source = row.get("source")
        sources[source if isinstance(source, str) else "(no source named)"] += 1
        example = to_example(row, where, every_row.store.paired)
        prompt = hashlib.sha256(json.dumps(example.prompt).encode()).digest()[:16]
        counts["repeated prompts"] += prompt in prompts
        prompts.add(prompt)
        for side, messages in zip(every_row.sides, example.responses):
            answer = messages[-1]["content"]
            counts["thinking", side] += "</think>" in answer
            counts["boxed", side] += extract(answer, "whole") is not None
    return sources, counts


def table_of_sources(sources: Counter[str]) -> str:
    top = sources.most_common(TOP_SOURCES)
    others = sources.total() - sum(count for _, count in top)
    rows = [(visible(one_line(name))[:LONGEST_NAME], count) for name, count in top]
    rows += [(f"{len(sources) - len(top):,} others", others)] if others else []
    cells = [(name, f"{count:,}", _share(count, sources.total())) for name, count in rows]
    return text_table([("Sources", "rows", "share"), *cells])


def about_training(kept: Dataset, config: TrainConfig) -> list[str]:
    """What training will do with the rows, as it prints it."""
    kind = "pairs" if kept.store.paired else "rows"
    dropped = [f"; left out: {count:,} {reason}" for reason, count in kept.dropped.items()]
    objective = config.make_objective() if kept.store.paired else sft()
    data = TrainData(kept, objective, World(0, 1, torch.device("cpu")), config.pack_tokens)
    return [
        f"{kind}: {len(kept):,} within the limits (prompt {config.max_prompt:,} tokens, response "
        f"{config.max_response:,}, both {config.max_length:,}){''.join(dropped)}",
        describe_plan(data, config),
    ]


def _section(title: str, lines: Iterable[str]) -> str:
    wrap = textwrap.TextWrapper(
        COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join([title, *(wrap.fill(visible(one_line(line))) for line in lines)])


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}"
