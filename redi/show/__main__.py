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
import sys
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.dataset import Dataset, Limits, select
from redi.data.files import read_rows, refuse_overwriting, write_aside
from redi.data.formats import FIELDS, to_example
from redi.data.store import load_store
from redi.data.tokenizer import ChatTokenizer
from redi.hub import TOKENIZER_FILES, dataset_files, model_folder
from redi.recipe import REDIConfig, SFTConfig, TrainConfig
from redi.show.facts import holds_pairs, report
from redi.show.page import draw_histograms, page
from redi.show.rows import about_template, row_as_text, stretches

NO_LIMITS = Limits(sys.maxsize, sys.maxsize, sys.maxsize)


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

    def __post_init__(self) -> None:
        require(self.row is None or self.row >= 1, "row", self.row, "at least 1")
        is_folder = self.html is not None and Path(self.html).is_dir()
        require(not is_folder, "html", f"the folder {self.html}", "a file to write")

    def training(self, paired: bool) -> TrainConfig:
        """The stage's published settings with those that are given. Raises UserError."""
        names = ("rows_per_step", "max_prompt", "max_response", "max_length", "pack_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return (REDIConfig if paired else SFTConfig)(data=self.file, **given)


def find_row(dataset: Dataset, number: int, path: str) -> int:
    """The index of the row whose number in the data, from 1, is `number`."""
    found = np.flatnonzero(dataset.store.row_numbers == number)
    if not len(found):
        usable = f"the {len(dataset):,} rows of {path} that can be trained on"
        raise UserError(f"--row {number}: not among {usable}")
    return int(found[0])


def rows_to_draw(dataset: Dataset, chosen: int) -> dict[int, str]:
    """Captions of the chosen row, the first, and those with the shortest, median and longest
    responses."""
    responses = dataset.response_lengths.reshape(len(dataset), -1).sum(axis=1)
    order = np.argsort(responses, kind="stable").tolist()
    rows = (chosen, 0, order[0], order[len(order) // 2], order[-1])
    numbers = {row: dataset.row_number(row) for row in rows}
    return {row: f"Row {n:,}, {responses[row]:,} response tokens" for row, n in numbers.items()}


def show(config: ShowConfig) -> str | None:
    """Print the report and a row. Returns the page, if one is to be written. Raises UserError."""
    from_prepare = Path(config.file).name in ("positives.jsonl", "pairs.jsonl")
    files = dataset_files(config.file, made_by="python -m redi.prepare" if from_prepare else None)
    model = model_folder(config.model, files=TOKENIZER_FILES)
    refuse_overwriting("html", config.html, [*files, *model.iterdir()])
    paired = holds_pairs(files)
    training = config.training(paired)
    chat = ChatTokenizer.from_folder(model)
    store = load_store(files, chat, paired, config.cache)
    every_row = select(store, NO_LIMITS, "drop", config.file)
    chosen = find_row(every_row, config.row, config.file) if config.row else 0

    text = report(files, every_row, training)
    learned = f"+ is made more likely{', - less' if paired else ''}"
    print(text, f"\nRow {every_row.row_number(chosen):,}: {learned}", sep="\n")
    print(row_as_text(stretches(every_row, chosen), chat))
    where, row = next(islice(read_rows(files, FIELDS), every_row.row_number(chosen) - 1, None))
    example = to_example(row, where, paired)
    named = zip(every_row.sides, example.responses)
    about = (about_template(example.prompt, response, side, chat) for side, response in named)
    for line in dict.fromkeys(chain.from_iterable(about)):
        print(f"  template: {line}")
    if config.html is None:
        return None
    picture = draw_histograms(every_row, training)
    captions = rows_to_draw(every_row, chosen)
    rows = [(caption, stretches(every_row, row)) for row, caption in captions.items()]
    return page(config.file, text, picture, rows, chat)


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
