"""What redi.show finds out about training rows: counted texts, token lengths, the plan of an epoch.

Everything becomes a `Table` of text, so the terminal and the page say the same. The texts are read
once and only counts are kept; lengths come from the token store's index.
Letters: N rows.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.dataset import QUANTILES, Dataset, Limits, select
from redi.data.files import read_rows
from redi.data.formats import FIELDS, FORMATS, Example, to_example
from redi.eval.grade import extract
from redi.packing import ATTENTION, plan
from redi.show.rows import Table, visible

TOP_SOURCES = 10


@dataclass(frozen=True)
class Training:
    """The settings of a training program that decide about rows, steps and packs."""

    limits: Limits
    rows_per_step: int
    pack_tokens: int
    ranks: int
    seed: int


def findings(path: str, files: list[Path], every_row: Dataset, training: Training) -> list[Table]:
    texts, paired = Texts(), every_row.store.paired
    rows = read_rows(files, {*FIELDS, "source"})
    for where, row in tqdm(rows, "reading", unit=" rows", disable=None, leave=False):
        texts.add(row.get("source"), to_example(row, where, paired))
    tables = [about_files(path, files, every_row, texts)]
    tables += [about_sources(texts)] if texts.sources else []
    tables += [about_tokens(every_row, training.limits), about_texts(every_row, texts)]
    try:
        kept = select(every_row.store, training.limits, "drop", path)
    except UserError as no_row_is_left:
        return [*tables, Table("Training", [("rows", str(no_row_is_left))])]
    return [*tables, about_training(kept, training)]


def lengths_by_part(dataset: Dataset) -> dict[str, np.ndarray]:
    """Tokens of each row's parts, (N,) each; "between" two answers only if a row has several."""
    sides = ("chosen", "rejected") if dataset.store.paired else ("response",)
    prompts = dataset.prompt_lengths.reshape(-1, len(sides))
    responses = dataset.response_lengths.reshape(-1, len(sides))
    between = (dataset.lengths.reshape(prompts.shape) - prompts - responses).sum(axis=1)
    parts = {"prompt": prompts[:, 0], **dict(zip(sides, responses.T))}
    return {**parts, "between": between} if between.any() else parts


# ---------------------------------------------------------------- what the files hold


def holds_pairs(path: str, files: list[Path]) -> bool:
    """Whether the files hold pairs, by the first row of each file.

    Raises UserError for files of neither stage, or of both.
    """
    found: dict[bool, Path] = {}
    for file in files:
        where, row = next(read_rows(file, FIELDS))
        seen = {name for name, value in row.items() if value is not None}
        stages = [paired for paired in (True, False) if any(map(seen.issuperset, FORMATS[paired]))]
        if not stages:
            formats = [*FORMATS[False], *FORMATS[True]]
            known = " or ".join("{" + ", ".join(fields) + "}" for fields in formats)
            listed = visible(", ".join(sorted(seen))[:200]) or "none"
            raise UserError(
                f"{where}: no row to train on: its fields are {listed}; expected {known}; "
                "python -m redi.prepare makes such rows of a teacher's"
            )
        found.setdefault(stages[0], file)
    if len(found) == 2:
        raise UserError(
            f"{path}: holds pairs ({found[True].name}) and rows for SFT ({found[False].name}); "
            "give one of the files"
        )
    return True in found


@dataclass
class Texts:
    """What is counted while the rows' texts are read."""

    rows: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    repeated_prompts: int = 0
    closed: Counter[int] = field(default_factory=Counter)  # with </think>, by side of the pair
    answered: Counter[int] = field(default_factory=Counter)  # with a boxed answer
    prompts: set[bytes] = field(default_factory=set)  # hashes, 16 bytes each

    def add(self, source: object, example: Example) -> None:
        self.rows += 1
        if isinstance(source, str):
            self.sources[source] += 1
        prompt = hashlib.sha256(json.dumps(example.prompt).encode()).digest()[:16]
        self.repeated_prompts += prompt in self.prompts
        self.prompts.add(prompt)
        for side, messages in enumerate(example.responses):
            answer = messages[-1]["content"]
            self.closed[side] += "</think>" in answer
            self.answered[side] += extract(answer, "whole") is not None


# ---------------------------------------------------------------- tables


def about_files(path: str, files: list[Path], every_row: Dataset, texts: Texts) -> Table:
    store = every_row.store
    kind = "pairs for train_redi.py" if store.paired else "rows for train_sft.py"
    size = sum(file.stat().st_size for file in files)
    several = f" in {len(files)} files" if len(files) > 1 else ""
    rows = [("data", f"{path}: {texts.rows:,} {kind}, {tqdm.format_sizeof(size)}B{several}")]
    rows.append(("sha256", store.data_hash))
    rows += [("left out", f"{count:,} {reason}") for reason, count in store.skipped.items()]
    return Table("File", rows)


def about_sources(texts: Texts) -> Table:
    top = texts.sources.most_common(TOP_SOURCES)
    others = texts.sources.total() - sum(count for _, count in top)
    unnamed = texts.rows - texts.sources.total()
    rows = [*top, (f"{len(texts.sources) - len(top):,} others", others)]
    rows.append(("no source named", unnamed))
    cells = [(name, f"{count:,}", _share(count, texts.rows)) for name, count in rows if count]
    return Table("Sources", cells, ("rows", "share"))


def about_tokens(every_row: Dataset, limits: Limits) -> Table:
    lengths, prompts = every_row.lengths.reshape(-1), every_row.prompt_lengths
    sides = ("chosen", "rejected") if every_row.store.paired else ("response",)
    parts = {**lengths_by_part(every_row), "together": lengths}
    limited = {"prompt": (parts["prompt"], limits.prompt), "together": (lengths, limits.total)}
    # The limit of a response is on everything after the prompt.
    for side, after_prompt in zip(sides, (lengths - prompts).reshape(-1, len(sides)).T):
        limited[side] = after_prompt, limits.response
    rows = []
    for name, of in parts.items():
        quantiles = np.quantile(of, list(QUANTILES.values()), method="inverted_cdf")
        cells = [f"{int(number):,}" for number in (of.sum(), *quantiles)]
        limited_lengths, limit = limited.get(name, (of, None))
        over = "" if limit is None else f"{(limited_lengths > limit).sum():,}"
        rows.append((name, *cells, "" if limit is None else f"{limit:,}", over))
    return Table("Tokens", rows, ("in all", *QUANTILES, "limit", "over it"))


def about_texts(every_row: Dataset, texts: Texts) -> Table:
    paired = every_row.store.paired
    sides = ("chosen", "rejected") if paired else ("the responses",)
    rows = []
    for name, counts in (("</think>", texts.closed), ("\\boxed{}", texts.answered)):
        shares = [f"{_share(counts[i], texts.rows)} of {side}" for i, side in enumerate(sides)]
        rows.append((name, " and ".join(shares)))
    if paired:
        chosen, rejected = every_row.response_lengths.reshape(-1, 2).T
        shorter, longer = int((rejected < chosen).sum()), int((rejected > chosen).sum())
        text = f"shorter than chosen in {_share(shorter, len(chosen))} of the pairs, longer in "
        rows.append(("rejected", text + _share(longer, len(chosen))))
    rows.append(("prompts", f"{_share(texts.repeated_prompts, texts.rows)} repeat an earlier one"))
    return Table("Texts", rows)


def about_training(kept: Dataset, training: Training) -> Table:
    """The plan of the first epoch, as training makes it."""
    ranks, size = training.ranks, training.pack_tokens
    kind = "pairs" if kept.store.paired else "rows"
    epoch = plan(kept.lengths, training.rows_per_step, size, ranks, training.seed)
    lengths = kept.lengths.reshape(-1).astype(np.float64)
    work = lengths + ATTENTION * lengths**2
    by_rank = [[np.concatenate(packs) for packs in step] for step in epoch]
    tokens = np.array([sum(lengths[ids].sum() for ids in step) for step in by_rank])
    works = np.array([[work[ids].sum() for ids in step] for step in by_rank])
    balance = works.mean(axis=1) / works.max(axis=1)
    low, median, high = tokens.min(), np.median(tokens), tokens.max()
    per_rank = np.mean([len(step[0]) for step in epoch])
    packs = sum(len(ids) > 0 for step in epoch for packs in step for ids in packs)
    dealt = "" if ranks == 1 else f" on each of {ranks} ranks"
    full = f"{100 * lengths.sum() / (size * packs):.0f} % full"
    dropped = [f"{count:,} {reason}" for reason, count in kept.dropped.items()]
    over = f"; left out: {', '.join(dropped)}" if dropped else ""
    mean, worst = f"{balance.mean():.3f}", f"{balance.min():.3f} in the worst step"
    rows = [
        (kind, f"{len(kept):,} within the limits{over}"),
        ("steps", f"{len(epoch):,} per epoch, of {training.rows_per_step:,} {kind}"),
        ("tokens", f"per step: median {median:,.0f}, {low:,.0f} to {high:,.0f}"),
        ("packs", f"of {size:,} tokens: {per_rank:.1f} per step{dealt}, {full}"),
    ]
    if ranks > 1:
        rows.append(("balance", f"of {ranks} ranks, mean over largest work: {mean}, {worst}"))
    return Table("Training", rows)


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"
