"""Look at training rows before training on them.

    python -m redi.show data/positives.jsonl                    rows for train_sft.py
    python -m redi.show data/pairs.jsonl --row 17               for train_redi.py; draws row 17
    python -m redi.show rows.parquet --html page.html --histograms lengths.png

prints the rows' sources, how many tokens they have, what the texts contain, what training will do
with them, and one row with its mask. The page says the same, and shows five rows token by token.
The fields of the rows decide which stage they are for, and so the default step size and limits.

Lengths come from the token store, which training then reuses. Left out: what card.json says about
the raw data; anything that takes a model or all texts at once (redi.prepare finds near duplicates).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.dataset import Dataset, Limits, select
from redi.data.files import write_aside
from redi.data.store import load_store
from redi.data.tokenizer import ChatTokenizer
from redi.hub import TOKENIZER_FILES, dataset_files, model_folder
from redi.recipe import REDIConfig, SFTConfig, TrainConfig
from redi.show.facts import Training, findings, holds_pairs, lengths_by_part
from redi.show.page import draw_histograms, page
from redi.show.rows import row_as_text, stretches, tables_as_text

NO_LIMITS = Limits(sys.maxsize, sys.maxsize, sys.maxsize)


@dataclass(kw_only=True)
class ShowConfig:
    file: Annotated[str, "rows to train on: file, folder or hub id"]
    model: Annotated[str, "whose tokenizer: folder or hub id"] = SFTConfig.model
    row: Annotated[int | None, "row to draw, counted from 1 in the file; none: the first"] = None
    html: Annotated[str | None, "write a page: all of this, and five rows token by token"] = None
    histograms: Annotated[str | None, "write a picture of the lengths, a PNG"] = None
    rows_per_step: Annotated[int | None, "rows in an optimizer step; none: as published"] = None
    max_prompt: Annotated[int | None, "longest prompt, tokens; none: as published"] = None
    max_response: Annotated[int | None, "longest response; none: as published"] = None
    max_length: Annotated[int | None, "longest of both together; none: as published"] = None
    pack_tokens: Annotated[int, "tokens in a forward pass"] = TrainConfig.pack_tokens
    ranks: Annotated[int, "processes that share a step"] = 8
    cache: Annotated[str, "folder for tokenized data, kept"] = TrainConfig.cache

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(not isinstance(value, int) or value >= 1, name, value, "at least 1")
        for path in (self.html, self.histograms):
            if path is not None:
                check_writable(path)

    def training(self, paired: bool) -> Training:
        """The given settings; those not given are the stage's published ones."""
        published = REDIConfig if paired else SFTConfig
        names = ("rows_per_step", "max_prompt", "max_response", "max_length")
        rows, *limits = (getattr(self, name) or getattr(published, name) for name in names)
        return Training(Limits(*limits), rows, self.pack_tokens, self.ranks, TrainConfig.seed)


def check_writable(path: str) -> None:
    """Raises UserError before the long work, not after it."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; expected a file to write")
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written; expected a file in a folder that is writable")


def find_row(dataset: Dataset, number: int, path: str) -> int:
    """The index of the row whose number in the data, from 1, is `number`."""
    store = dataset.store
    total = len(dataset) + sum(store.skipped.values())
    if number > total:
        raise UserError(f"--row {number}: {path} has {total:,} rows")
    found = np.flatnonzero(store.row_numbers == number)
    if not len(found):
        raise UserError(f"--row {number}: is left out ({', '.join(store.skipped)})")
    return int(found[0])


def rows_to_draw(dataset: Dataset, chosen: int) -> dict[int, str]:
    """The chosen row, the first, and those with the shortest, median and longest responses."""
    responses = dataset.response_lengths.reshape(len(dataset), -1).sum(axis=1)
    order = np.argsort(responses, kind="stable").tolist()
    names: dict[int, list[str]] = {chosen: []}
    picked = (0, order[0], order[len(order) // 2], order[-1])
    for row, name in zip(picked, ("first", "shortest", "median", "longest")):
        names.setdefault(row, []).append(f"the {name}")
    return {row: ", ".join(of_row) for row, of_row in names.items()}


def caption(dataset: Dataset, row: int, name: str = "") -> str:
    lengths = lengths_by_part(dataset).items()
    tokens = ", ".join(f"{part} {int(of_rows[row]):,}" for part, of_rows in lengths)
    return f"Row {dataset.row_number(row):,}{f', {name}' if name else ''}: {tokens} tokens"


def has_colors() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


@program
def main() -> None:
    config = parse(ShowConfig, "Look at training rows before training on them.")
    ours = Path(config.file).name in ("positives.jsonl", "pairs.jsonl")
    files = dataset_files(config.file, made_by="python -m redi.prepare" if ours else None)
    paired = holds_pairs(config.file, files)
    training = config.training(paired)
    chat = ChatTokenizer.from_folder(model_folder(config.model, files=TOKENIZER_FILES))
    store = load_store(files, chat, paired, config.cache)
    every_row = select(store, NO_LIMITS, "drop", config.file)
    chosen = find_row(every_row, config.row, config.file) if config.row else 0

    tables = findings(config.file, files, every_row, training)
    print(tables_as_text(tables), end="\n\n")
    print(f"{caption(every_row, chosen)}; + is made more likely{', - less' if paired else ''}")
    print(row_as_text(stretches(every_row, chosen), chat, has_colors()))

    if not (config.histograms or config.html):
        return
    limits = {"prompts": training.limits.prompt, "responses": training.limits.response}
    picture = draw_histograms(lengths_by_part(every_row), limits)
    if config.histograms:
        with write_aside(config.histograms, binary=True) as file:
            file.write(picture)
        print(f"saved {config.histograms}")
    if config.html:
        rows = [
            (caption(every_row, row, name), stretches(every_row, row))
            for row, name in rows_to_draw(every_row, chosen).items()
        ]
        with write_aside(config.html) as file:
            file.write(page(config.file, tables, picture, rows, chat))
        print(f"saved {config.html}")


if __name__ == "__main__":
    main()
