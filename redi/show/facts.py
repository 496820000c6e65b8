"""What redi.show finds out about training rows: counted texts, token lengths, the plan of an epoch.

Everything ends in `Section`s, tables of text, so that the terminal and the page say the same. Texts
pass by once and only counts stay; lengths come from the token store's index.
Letters: N rows.
"""

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from redi.config import UserError
from redi.data.dataset import QUANTILES, Dataset, Limits
from redi.data.files import Row, read_rows
from redi.data.formats import FORMATS, Example, to_example
from redi.eval.grade import extract
from redi.hub import CARD
from redi.packing import ATTENTION, plan
from redi.show.page import Section, visible

TOP_SOURCES = 10
FEW = 12  # a field of at most so many values is taken for a label
PADDED_ROWS = 8  # in the batches that padding is reckoned with


@dataclass(frozen=True)
class Training:
    """What a training program is told of rows, steps and packs."""

    limits: Limits
    rows_per_step: int
    pack_tokens: int
    ranks: int
    seed: int


def name_of(paired: bool) -> str:
    return "pairs" if paired else "rows"


def parts_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """Tokens of each row's parts, (N,) each. "between" two answers: only if a row has several."""
    sides = ("chosen", "rejected") if dataset.store.paired else ("response",)
    prompts = dataset.prompt_lengths.reshape(-1, len(sides))
    responses = dataset.response_lengths.reshape(-1, len(sides))
    between = (dataset.lengths.reshape(prompts.shape) - prompts - responses).sum(axis=1)
    parts = {"prompt": prompts[:, 0], **dict(zip(sides, responses.T))}
    return {**parts, "between": between} if between.any() else parts


# ---------------------------------------------------------------- what the files hold


def holds_pairs(path: str, files: list[Path]) -> bool:
    """Whether the files hold pairs; told by the first row of each.

    Raises UserError for files of neither stage, or of both.
    """
    found: dict[bool, Path] = {}
    for file in files:
        where, row = next(read_rows(file))
        seen = {name for name, value in row.items() if value is not None}
        stages = [stage for stage in (True, False) if any(map(seen.issuperset, FORMATS[stage]))]
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
                f"{path}: holds pairs ({found[True].name}) and rows for SFT "
                f"({found[False].name}); give one of the files"
            )
    return True in found


@dataclass
class Texts:
    """What is counted while the rows' texts pass by."""

    rows: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)  # field -> value -> rows
    prompts_again: int = 0
    thought: list[int] = field(default_factory=lambda: [0, 0])  # chosen, rejected
    answered: list[int] = field(default_factory=lambda: [0, 0])
    no_labels: set[str] = field(default_factory=set)  # other fields
    prompts: set[bytes] = field(default_factory=set)  # hashes, 16 bytes each

    def add(self, row: Row, example: Example) -> None:
        self.rows += 1
        if isinstance(row.get("source"), str):
            self.sources[row["source"]] += 1
        for name in row.keys() - self.no_labels:
            self._add_label(name, row[name])
        prompt = hashlib.sha256(json.dumps(example.prompt).encode()).digest()[:16]
        self.prompts_again += prompt in self.prompts
        self.prompts.add(prompt)
        for side, messages in enumerate(example.responses):
            answer = messages[-1]["content"]
            thought = "</think>" in answer
            self.thought[side] += thought
            # As redi.eval reads it; where nothing was thought, the answer is all of the text.
            self.answered[side] += extract(answer if thought else f"</think>{answer}") is not None

    def _add_label(self, name: str, value: Any) -> None:
        values = self.labels.setdefault(name, Counter())
        if isinstance(value, (bool, int, str, type(None))) and len(str(value)) <= 40:
            values[value if isinstance(value, str) else json.dumps(value)] += 1
        if not values or len(values) > FEW:
            del self.labels[name]
            self.no_labels.add(name)


def read_texts(files: list[Path], paired: bool) -> Texts:
    texts = Texts(no_labels={"source", "id", "uuid", *chain(*FORMATS[paired])})
    for where, row in tqdm(read_rows(files), "reading", unit=" rows", disable=None, leave=False):
        texts.add(row, to_example(row, where, paired))
    return texts


def read_card(files: list[Path], data_hash: str) -> dict[str, Any] | None:
    """What redi.prepare wrote about this file, if it lies beside it and is about these bytes."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        card = json.loads((files[0].parent / CARD).read_text(encoding="utf-8"))
        if len(files) == 1 and card["sha256"][files[0].name] == data_hash:
            return card
    return None


# ---------------------------------------------------------------- sections


def about_files(path: str, files: list[Path], everything: Dataset, texts: Texts) -> Section:
    store = everything.store
    program = "train_redi.py" if store.paired else "train_sft.py"
    size = sum(file.stat().st_size for file in files)
    several = f" in {len(files)} files" if len(files) > 1 else ""
    told = f"{texts.rows:,} {name_of(store.paired)} for {program}, {_bytes(size)}{several}"
    rows = [("data", f"{path}: {told}"), ("sha256", store.data_hash)]
    rows += [("left out", f"{count:,} {reason}") for reason, count in store.skipped.items()]
    return Section("File", rows)


def about_card(card: dict[str, Any], paired: bool) -> list[Section]:
    """Where the rows come from, and the share of each rule, as redi.prepare noted it."""
    try:
        total = card["rows"]
        steps = [(f"  {reason}", n) for reason, n in card["no_positive"].items()]
        steps.append(("positives", card["positives"]))
        if paired:
            steps.append(("  more pairs to be had", card["further"]))
            steps += [(f"  {reason}", n) for reason, n in card["no_pair"].items()]
            steps.append(("pairs", card["pairs"]))
        rows = [(name, f"{n:,}", _share(n, total)) for name, n in steps if n or name[0] != " "]
        rules = ", ".join(f"{name} {_plain(value)}" for name, value in card["rules"].items())
        made = f"{card['raw']} ({card['format']}), by redi {card['redi']}"
        labels = [
            f"{n:,} given as {said} are {verdict}"
            for said, verdicts in card["labels"].items()
            for verdict, n in verdicts.items()
            if n
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return [Section("Made from", [(CARD, "beside the data is not as redi.prepare writes it")])]
    drops = [("raw rows", f"{total:,}", ""), *rows]
    graded = [("labels", f"graded: {', '.join(labels)}")] if labels else []
    return [
        Section("Made from", [("raw data", made), ("rules", rules), *graded]),
        Section("Raw rows, dropped by", drops, ("rows", "share")),
    ]


def about_sources(texts: Texts) -> Section:
    top = texts.sources.most_common(TOP_SOURCES)
    others = texts.sources.total() - sum(count for _, count in top)
    unnamed = texts.rows - texts.sources.total()
    rows = [*top]
    rows += [(f"{len(texts.sources) - len(top):,} others", others)] if others else []
    rows += [("no source named", unnamed)] if unnamed else []
    cells = [(name, f"{count:,}", _share(count, texts.rows)) for name, count in rows]
    return Section("Sources", cells, ("rows", "share"))


def about_tokens(everything: Dataset, limits: Limits) -> Section:
    lengths = everything.lengths.reshape(-1)
    prompts = everything.prompt_lengths
    sides = 2 if everything.store.paired else 1
    parts = {**parts_of(everything), "together": lengths}
    limited = {"prompt": (prompts[::sides], limits.prompt), "together": (lengths, limits.total)}
    # The limit of a response is on all that follows the prompt.
    after = (lengths - prompts).reshape(-1, sides).T
    limited |= {name: (of, limits.response) for name, of in zip(list(parts)[1:], after)}
    rows = []
    for name, of in parts.items():
        quantiles = np.quantile(of, list(QUANTILES.values()), method="inverted_cdf")
        numbers = [of.sum(), *quantiles]
        if name in limited:
            held, limit = limited[name]
            numbers += [limit, (held > limit).sum()]
        cells = [f"{int(number):,}" for number in numbers]
        rows.append((name, *cells, *[""] * (len(QUANTILES) + 3 - len(cells))))
    return Section("Tokens", rows, ("in all", *QUANTILES, "limit", "over it"))


def about_texts(everything: Dataset, texts: Texts) -> Section:
    paired = everything.store.paired
    sides = ("chosen", "rejected") if paired else ("the responses",)
    found = {"</think>": texts.thought, "\\boxed{}": texts.answered}
    rows = [
        (name, " and ".join(f"{_share(n, texts.rows)} of {side}" for side, n in zip(sides, counts)))
        for name, counts in found.items()
    ]
    if paired:
        chosen, rejected = everything.response_lengths.reshape(-1, 2).T
        shorter, longer = int((rejected < chosen).sum()), int((rejected > chosen).sum())
        told = f"shorter than chosen in {_share(shorter, len(chosen))} of the pairs, longer in "
        rows.append(("rejected", told + _share(longer, len(chosen))))
    rows.append(("prompts", f"{_share(texts.prompts_again, texts.rows)} repeat an earlier one"))
    for name, counted in sorted(texts.labels.items()):
        values = ", ".join(f"{v}: {_share(n, texts.rows)}" for v, n in counted.most_common())
        rows.append((f"field {name}", values))
    return Section("Texts", rows)


def about_training(kept: Dataset, training: Training) -> Section:
    """What an epoch does: the first one's plan, as training makes it."""
    each, ranks, size = training.rows_per_step, training.ranks, training.pack_tokens
    name = name_of(kept.store.paired)
    epoch = plan(kept.lengths, each, size, ranks, training.seed)
    lengths = kept.lengths.reshape(-1).astype(np.float64)
    work = lengths + ATTENTION * lengths**2
    dealt = [[np.concatenate(packs) for packs in step] for step in epoch]
    tokens = np.array([sum(lengths[ids].sum() for ids in step) for step in dealt])
    works = np.array([[work[ids].sum() for ids in step] for step in dealt])
    balance = works.mean(axis=1) / works.max(axis=1)
    per_rank = np.mean([len(step[0]) for step in epoch])
    packs = sum(len(ids) > 0 for step in epoch for packs in step for ids in packs)
    dropped = [f"{count:,} {reason}" for reason, count in kept.dropped.items()]
    over = f"; left out: {', '.join(dropped)}" if dropped else ""
    rows = [
        (name, f"{len(kept):,} within the limits{over}"),
        ("steps", f"{len(epoch):,} an epoch, of {each:,} {name}"),
        ("tokens", f"a step: median {np.median(tokens):,.0f}, {_range(tokens)}"),
        (
            "packs",
            f"of {size:,} tokens: {per_rank:.1f} a step on each of {ranks} ranks, "
            f"{100 * lengths.sum() / (size * packs):.0f} % full",
        ),
        (
            "padding",
            f"none (padded batches of {PADDED_ROWS} {name} would be "
            f"{100 * padding(kept.lengths, training.seed):.0f} % padding)",
        ),
        (
            "balance",
            f"of {ranks} ranks, mean over largest work: {balance.mean():.3f}, "
            f"{balance.min():.3f} in the worst step",
        ),
    ]
    return Section("Training", rows)


def padding(lengths: np.ndarray, seed: int) -> float:
    """Share of padding, were the rows shuffled and laid side by side PADDED_ROWS at a time."""
    shuffled = lengths[np.random.default_rng([seed, 0]).permutation(len(lengths))]
    batches = [shuffled[i : i + PADDED_ROWS] for i in range(0, len(shuffled), PADDED_ROWS)]
    return 1 - float(shuffled.sum() / sum(int(batch.max()) * batch.size for batch in batches))


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def _range(values: np.ndarray) -> str:
    return f"{values.min():,.0f} to {values.max():,.0f}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
