"""Look at training rows before training on them.

    python -m redi.show data/positives.jsonl                    rows for train_sft.py
    python -m redi.show data/pairs.jsonl --row 17               for train_redi.py; draws row 17
    python -m redi.show rows.parquet --html page.html --histograms lengths.png

prints where the rows come from and which rule dropped how many, their sources and labels, how many
tokens they have, what the texts hold, what training will do with them, and one row with its mask.
The page says the same, and shows five rows token by token. Which stage the rows are for is told by
their fields, and so are the step and the limits: the published ones, unless others are given.

Lengths come from the token store, which training then finds made. Left out: what takes a model or
a look at all texts at once, such as languages; near duplicates are the matter of redi.prepare.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.dataset import Dataset, Limits, select
from redi.data.files import write_aside
from redi.data.store import TokenStore, load_store
from redi.data.tokenizer import ChatTokenizer
from redi.hub import TOKENIZER_FILES, dataset_files, model_folder
from redi.show.facts import (
    Training,
    about_card,
    about_files,
    about_sources,
    about_texts,
    about_tokens,
    about_training,
    holds_pairs,
    parts_of,
    read_card,
    read_texts,
)
from redi.show.page import (
    Section,
    as_text,
    draw_histograms,
    histograms_as_svg,
    page,
    row_as_text,
    stretches,
)
from redi.train import TrainConfig

# rows_per_step, max_prompt, max_response, max_length of the stages. Their home is train_sft.py and
# train_redi.py, which a library module cannot import; a test holds these to them.
PUBLISHED = {False: (128, 32_768, 32_768, 32_768), True: (32, 800, 19_000, 32_768)}
NO_LIMITS = Limits(sys.maxsize, sys.maxsize, sys.maxsize)


@dataclass(kw_only=True)
class ShowConfig:
    file: Annotated[str, "rows to train on: file, folder or hub id"]
    model: Annotated[str, "whose tokenizer: folder or hub id"] = "Qwen/Qwen2.5-Math-1.5B"
    row: Annotated[int | None, "row to draw, counted from 1 in the file; none: the first"] = None
    html: Annotated[str | None, "write a page: all of this, and five rows token by token"] = None
    histograms: Annotated[str | None, "write a picture of the lengths, a PNG"] = None
    rows_per_step: Annotated[int | None, "rows in an optimizer step; none: as published"] = None
    max_prompt: Annotated[int | None, "longest prompt, tokens; none: as published"] = None
    max_response: Annotated[int | None, "longest response; none: as published"] = None
    max_length: Annotated[int | None, "longest of both together; none: as published"] = None
    pack_tokens: Annotated[int, "tokens in a forward pass"] = TrainConfig.pack_tokens
    ranks: Annotated[int, "processes that share a step"] = 8
    cache: Annotated[str, "folder for tokenised data, kept"] = TrainConfig.cache

    def __post_init__(self) -> None:
        for name in ("row", "rows_per_step", "max_prompt", "pack_tokens", "ranks"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("max_response", "max_length"):
            value = getattr(self, name)
            require(value is None or value >= 2, name, value, "at least 2")
        for name in ("html", "histograms"):
            if getattr(self, name) is not None:
                check_writable(getattr(self, name))

    def training(self, paired: bool) -> Training:
        given = (self.rows_per_step, self.max_prompt, self.max_response, self.max_length)
        each, *limits = (mine or theirs for mine, theirs in zip(given, PUBLISHED[paired]))
        return Training(Limits(*limits), each, self.pack_tokens, self.ranks, TrainConfig.seed)


def check_writable(path: str) -> None:
    """Raises UserError, before the long work, where a file could not be written after it."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; expected a file to write")
    try:
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------- rows to draw


def find_row(dataset: Dataset, number: int, path: str) -> int:
    """The row that stands at `number` in the data."""
    store = dataset.store
    total = len(dataset) + sum(store.skipped.values())
    if number > total:
        raise UserError(f"--row {number}: {path} has {total:,} rows")
    found = np.flatnonzero(store.row_numbers == number)
    if not len(found):
        raise UserError(f"--row {number}: is left out ({', '.join(store.skipped)})")
    return int(found[0])


def worth_drawing(dataset: Dataset, asked: int) -> Iterator[tuple[int, str]]:
    """The row asked for, the first, and those of the shortest, median and longest responses."""
    responses = dataset.response_lengths.reshape(len(dataset), -1).sum(axis=1)
    order = np.argsort(responses, kind="stable").tolist()
    names: dict[int, list[str]] = {asked: []}
    picked = (0, order[0], order[len(order) // 2], order[-1])
    for row, name in zip(picked, ("first", "shortest", "median", "longest")):
        names.setdefault(row, []).append(f"the {name}")
    yield from ((row, ", ".join(said)) for row, said in names.items())


def caption(dataset: Dataset, row: int, said: str = "") -> str:
    lengths = ", ".join(f"{name} {int(of[row]):,}" for name, of in parts_of(dataset).items())
    return f"Row {dataset.row_number(row):,}{f', {said}' if said else ''}: {lengths} tokens"


# ---------------------------------------------------------------- the program


def findings(
    path: str, files: list[Path], store: TokenStore, everything: Dataset, training: Training
) -> list[Section]:
    texts = read_texts(files, store.paired)
    card = read_card(files, store.data_hash)
    sections = [about_files(path, files, everything, texts)]
    sections += about_card(card, store.paired) if card else []
    sections += [about_sources(texts)] if texts.sources else []
    sections += [about_tokens(everything, training.limits), about_texts(everything, texts)]
    try:
        kept = select(store, training.limits, "drop", path)
    except UserError as none_is_left:
        return [*sections, Section("Training", [("rows", str(none_is_left))])]
    return [*sections, about_training(kept, training)]


def has_colours() -> bool:
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
    everything = select(store, NO_LIMITS, "drop", config.file)
    asked = find_row(everything, config.row, config.file) if config.row else 0

    sections = findings(config.file, files, store, everything, training)
    print(as_text(sections), end="\n\n")
    print(f"{caption(everything, asked)}; + is made more likely{', - less' * paired}")
    print(row_as_text(stretches(everything, asked), chat, has_colours()))

    limits = {"prompts": training.limits.prompt, "responses": training.limits.response}
    if config.histograms:
        with write_aside(config.histograms, binary=True) as file:
            draw_histograms(parts_of(everything), limits, file)
        print(f"saved {config.histograms}")
    if config.html:
        rows = [
            (caption(everything, row, said), stretches(everything, row))
            for row, said in worth_drawing(everything, asked)
        ]
        drawing = histograms_as_svg(parts_of(everything), limits)
        with write_aside(config.html) as file:
            file.write(page(config.file, sections, drawing, rows, chat))
        print(f"saved {config.html}")


if __name__ == "__main__":
    main()
