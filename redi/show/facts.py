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

import numpy as np
import torch
from tqdm import tqdm

from redi.batches import TrainData
from redi.config import UserError, one_line
from redi.data.dataset import Dataset, Limits, select, table_of_lengths
from redi.data.files import read_rows
from redi.data.formats import FIELDS, FORMATS, to_example
from redi.distributed import World
from redi.eval.grading.grader import extract
from redi.objectives import sft
from redi.packing import ATTENTION
from redi.recipe import TrainConfig
from redi.run import describe_plan
from redi.show.rows import COLUMNS, sides, visible
from redi.tables import text_table

TOP_SOURCES = 10
LONGEST_NAME = 60  # of a source, in characters
ENDINGS = ("</think>", "\\boxed{}")


def holds_pairs(files: Sequence[Path]) -> bool:
    """Whether the first row is a pair. Rows of the other stage are refused when they are read."""
    _, row = next(read_rows(files, FIELDS))
    present = {name for name, value in row.items() if value is not None}
    return any(present.issuperset(fields) for fields in FORMATS[True])


def report(files: Sequence[Path], every_row: Dataset, config: TrainConfig, ranks: int) -> str:
    """What the files hold and what `config` will train on, with this many processes."""
    store, names = every_row.store, sides(every_row)
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
    if store.paired:
        chosen, rejected = every_row.response_lengths.reshape(-1, 2).T
        shorter, longer = (rejected < chosen).mean(), (rejected > chosen).mean()
        about_files.append(f"rejected: {shorter:.1%} shorter than chosen, {longer:.1%} longer")
    endings = [
        (f"with {ending}", *(_share(counts[ending, side], total) for side in names))
        for ending in ENDINGS
    ]
    limits = Limits(config.max_prompt, config.max_response, config.max_length)
    try:
        training = about_training(select(store, limits, "drop", config.data), config, ranks)
    except UserError as no_row_is_left:
        training = [str(no_row_is_left)]
    sections = [
        _section("File", about_files),
        table_of_sources(sources),
        table_of_lengths(every_row),
        text_table([("Responses", *names), *endings]),
        _section("Training", training),
    ]
    return "\n\n".join(sections)


def count_texts(
    files: Sequence[Path], every_row: Dataset
) -> tuple[Counter[str], Counter[str | tuple[str, str]]]:
    """(rows of each source, counts of "repeated prompts" and of (ending, side of the pair))"""
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
        for side, messages in zip(sides(every_row), example.responses):
            answer = messages[-1]["content"]
            has = ("</think>" in answer, extract(answer, "whole") is not None)
            counts.update((ending, side) for ending, found in zip(ENDINGS, has) if found)
    return sources, counts


def table_of_sources(sources: Counter[str]) -> str:
    top = sources.most_common(TOP_SOURCES)
    others = sources.total() - sum(count for _, count in top)
    rows = [(visible(one_line(name))[:LONGEST_NAME], count) for name, count in top]
    rows += [(f"{len(sources) - len(top):,} others", others)] if others else []
    cells = [(name, f"{count:,}", _share(count, sources.total())) for name, count in rows]
    return text_table([("Sources", "rows", "share"), *cells])


def about_training(kept: Dataset, config: TrainConfig, ranks: int) -> list[str]:
    """What training will do with the rows, as it prints it, and how even the ranks' work is."""
    kind = "pairs" if kept.store.paired else "rows"
    dropped = [f"; left out: {count:,} {reason}" for reason, count in kept.dropped.items()]
    objective = config.make_objective() if kept.store.paired else sft()
    data = TrainData(kept, objective, World(0, ranks, torch.device("cpu")), config.pack_tokens)
    lengths = kept.lengths.reshape(-1)
    work = lengths + ATTENTION * lengths**2.0
    epoch = data.plan(config.rows_per_step, config.seed, epoch=0)
    works = np.array([[work[np.concatenate(packs)].sum() for packs in step] for step in epoch])
    balance = works.mean(axis=1) / works.max(axis=1)
    return [
        f"{kind}: {len(kept):,} within the limits (prompt {config.max_prompt:,} tokens, response "
        f"{config.max_response:,}, both {config.max_length:,}){''.join(dropped)}",
        describe_plan(data, config),
        f"balance of {ranks} ranks, mean over largest work: {balance.mean():.3f}, "
        f"{balance.min():.3f} in the worst step",
    ]


def _section(title: str, lines: Iterable[str]) -> str:
    wrap = textwrap.TextWrapper(
        COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join([title, *(wrap.fill(visible(one_line(line))) for line in lines)])


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}"
