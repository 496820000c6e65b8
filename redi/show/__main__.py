"""Look at training rows before training on them.

    python -m redi.show data/positives.jsonl                    rows for train_sft.py
    python -m redi.show data/pairs.jsonl --row 17               for train_redi.py; draws row 17
    python -m redi.show rows.parquet --html page.html

prints the rows' sources, how many tokens they have, what the texts contain, what training will do
with them, and one row with its mask and what the chat template did to its messages. The page has
the same report, and five rows token by token. The fields of the first row decide the stage,
and so the default step size and limits. Lengths come from the token store, which training reuses.
Left out: what takes a model or all texts at once (redi.prepare finds repeated problems).
"""

import contextlib
import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

from redi.batches import TrainData
from redi.config import UserError, one_line, parse, program
from redi.data.dataset import Dataset, select, table_of_lengths
from redi.data.files import read_rows, refuse_overwriting, write_aside
from redi.data.formats import FIELDS, kind_of_rows, to_example
from redi.data.store import TokenStore, load_store
from redi.data.tokenizer import ChatTokenizer
from redi.distributed import World
from redi.eval.grading.grader import extract
from redi.hub import TOKENIZER_FILES, dataset_files, model_folder
from redi.objectives import sft
from redi.recipe import REDIConfig, SFTConfig, TrainConfig
from redi.run import describe_plan
from redi.show.page import draw_histograms, page
from redi.show.rows import COLUMNS, about_template, row_as_text, stretches, visible
from redi.tables import text_table

LONGEST_NAME = 60  # of a source, in characters


@dataclass(kw_only=True)
class ShowConfig:
    file: Annotated[str, "rows to train on: file, folder or hub id"]
    model: Annotated[str, "whose tokenizer: folder or hub id"] = SFTConfig.model
    row: Annotated[int | None, "row to draw, counted from 1 in the file; none: the first"] = None
    html: Annotated[str | None, "write a page: the report, and five rows token by token"] = None
    rows_per_step: Annotated[int | None, "rows in an optimizer step; none: as published"] = None
    max_prompt: Annotated[int | None, "longest prompt, tokens; none: as published"] = None
    max_response: Annotated[int | None, "longest response; none: as published"] = None
    max_length: Annotated[int | None, "longest of both together; none: as published"] = None
    pack_tokens: Annotated[int, "tokens in a forward pass"] = TrainConfig.pack_tokens
    cache: Annotated[str, "folder for tokenized data, kept"] = TrainConfig.cache

    def training(self, kind: str) -> TrainConfig:
        """The stage's published settings with those that are given. Raises UserError."""
        names = ("rows_per_step", "max_prompt", "max_response", "max_length", "pack_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return (SFTConfig if kind == "rows" else REDIConfig)(data=self.file, **given)


def show(config: ShowConfig) -> str | None:
    """Print the report and a row. Returns the page, if one is to be written. Raises UserError."""
    files = dataset_files(config.file)
    model = model_folder(config.model, files=TOKENIZER_FILES)
    refuse_overwriting("html", config.html, [*files, *model.iterdir()])
    kind = kind_of_rows(files)
    training, chat = config.training(kind), ChatTokenizer.from_folder(model)
    store = load_store(files, chat, [kind], config.cache)
    every_row = Dataset(store, np.arange(len(store.row_numbers)), dropped={})
    number = every_row.row_number(0) if config.row is None else config.row
    if number not in store.row_numbers:
        usable = f"the {len(every_row):,} rows of {config.file} that can be trained on"
        raise UserError(f"--row {number}: not among {usable}")
    chosen = store.row_numbers.tolist().index(number)

    text = report(files, every_row, training)
    learned = f"+ is made more likely{', - less' if kind != 'rows' else ''}"
    print(text, f"\nRow {number:,}: {learned}", sep="\n")
    print(row_as_text(stretches(every_row, chosen), chat))
    where, row = next(islice(read_rows(files, FIELDS), number - 1, None))
    example = to_example(row, where, kind)
    sides = [every_row.sides[-1 if weight < 0 else 1] for weight in example.weights]
    named = zip(sides, example.responses)
    about = (about_template(example.prompt, response, side, chat) for side, response in named)
    for line in dict.fromkeys(chain.from_iterable(about)):
        print(f"  template: {line}")
    if config.html is None:
        return None
    # The chosen row, the first, and those with the shortest, median and longest responses.
    responses = every_row.response_lengths.reshape(len(every_row), -1).sum(axis=1)
    order = np.argsort(responses, kind="stable").tolist()
    drawn = dict.fromkeys((chosen, 0, order[0], order[len(order) // 2], order[-1]))
    captions = (f"Row {every_row.row_number(n):,}, {responses[n]:,} response tokens" for n in drawn)
    rows = [*zip(captions, (stretches(every_row, n) for n in drawn))]
    return page(config.file, text, draw_histograms(every_row, training), rows, chat)


# ---------------------------------------------------------------- the report


def report(files: Sequence[Path], every_row: Dataset, config: TrainConfig) -> str:
    """What the files hold and what `config` will train on."""
    about_texts, sources = read_texts(files, every_row)
    kind = every_row.store.kind
    stage = f"{kind} for {'train_sft.py' if kind == 'rows' else 'train_redi.py'}"
    size = tqdm.format_sizeof(sum(file.stat().st_size for file in files))
    about_files = (
        f"{config.data}: {sources.total():,} {stage}, {size}B in {len(files)} "
        f"file{'s' * (len(files) > 1)}"
    )
    top = [(visible(one_line(name))[:LONGEST_NAME], n) for name, n in sources.most_common(10)]
    if others := sources.total() - sum(count for _, count in top):
        top.append((f"{len(sources) - len(top):,} others", others))
    rows = [(name, f"{count:,}", f"{count / sources.total():.1%}") for name, count in top]
    sections = [
        _section("File", [about_files, *about_texts]),
        text_table([("Sources", "rows", "share"), *rows]),
        table_of_lengths(every_row),
        _section("Training", about_training(every_row.store, config)),
    ]
    return "\n\n".join(sections)


def read_texts(files: Sequence[Path], every_row: Dataset) -> tuple[list[str], Counter[str]]:
    """(lines about the texts, rows of each source)"""
    store, sources, counts = every_row.store, Counter(), Counter()
    prompts: set[bytes] = set()  # hashes
    rows = read_rows(files, {*FIELDS, "source"})
    for where, row in tqdm(rows, "reading", unit=" rows", disable=None, leave=False):
        source = row.get("source")
        sources[source if isinstance(source, str) else "(no source named)"] += 1
        example = to_example(row, where, store.kind)
        prompt = hashlib.sha256(json.dumps(example.prompt).encode()).digest()[:16]
        counts["repeated prompts"] += prompt in prompts
        prompts.add(prompt)
        for weight, messages in zip(example.weights, example.responses):
            if not weight:  # the row is left out
                continue
            side, answer = every_row.sides[-1 if weight < 0 else 1], messages[-1]["content"]
            counts[side] += 1
            counts["thinking", side] += "</think>" in answer
            counts["boxed", side] += extract(answer, "whole") is not None
    lines = [
        f"sha256 {store.data_hash}",
        *(f"left out: {count:,} {reason}" for reason, count in store.skipped.items()),
        f"prompts: {counts['repeated prompts'] / sources.total():.1%} repeat an earlier one",
    ]
    for side in every_row.sides.values():
        count = counts[side]
        rows = f"{count / sources.total():.1%} of the rows, " if count < sources.total() else ""
        thinking, boxed = (counts[what, side] / max(count, 1) for what in ("thinking", "boxed"))
        lines.append(f"{side}: {rows}{thinking:.1%} with </think>, {boxed:.1%} with \\boxed{{}}")
    if store.paired:
        chosen, rejected = every_row.response_lengths.reshape(-1, 2).T
        shorter, longer = (rejected < chosen).mean(), (rejected > chosen).mean()
        lines.append(f"rejected: {shorter:.1%} shorter than chosen, {longer:.1%} longer")
    return lines, sources


def about_training(store: TokenStore, config: TrainConfig) -> list[str]:
    """What training will do with the rows, as it prints it."""
    try:
        kept = select(store, config, config.data)
    except UserError as no_row_is_left:
        return [str(no_row_is_left)]
    dropped = [f"; left out: {count:,} {reason}" for reason, count in kept.dropped.items()]
    objective = sft() if store.kind == "rows" else config.make_objective()
    data = TrainData(kept, objective, World(0, 1, torch.device("cpu")), config.pack_tokens)
    return [
        f"{store.kind}: {len(kept):,} within the limits (prompt "
        f"{config.max_prompt:,} tokens, response {config.max_response:,}, both "
        f"{config.max_length:,}){''.join(dropped)}",
        describe_plan(data, config),
    ]


def _section(title: str, lines: Iterable[str]) -> str:
    wrap = textwrap.TextWrapper(
        COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join([title, *(wrap.fill(visible(one_line(line))) for line in lines)])


@program
def main() -> None:
    config = parse(ShowConfig, "Look at training rows before training on them.")
    # An unwritable page is found before the long work.
    with write_aside(config.html) if config.html else contextlib.nullcontext() as file:
        text = show(config)
        if file:
            file.write(text)
    if config.html:
        print(f"saved {config.html}")


if __name__ == "__main__":
    main()
