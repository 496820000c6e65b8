"""STUDY.toml -> the models of a study.

    seeds = [1, 2, 3, 4, 5]            # of the shuffles and, with [toy], of data and student
    mislabelled = [0.0, 0.2, 0.4]      # with [toy]: shares of rejected traces that are right
    [toy]                              # flags of redi.toy. Without it, model and data are those of
    operations = 8                     # [stage1] and [stage2], or their defaults
    [[teacher]]                        # with [toy]: one of several teachers, and the flags in which
    name = "rambling"                  # its toy differs from [toy]
    rambling = 0.3
    [stage1]                           # flags of train_sft.py
    lr = 4e-3
    [stage2]                           # flags of train_redi.py, the same for all methods
    eval_every = 12                    # accuracy during training, on the toy's benchmark
    [evaluation]                       # flags of evaluate.py, for every model at the end
    samples = 8
    [[method]]                         # Tables with the same name are one method, which is judged
    name = "DPO"                       # by its best variant. Any flag of train_redi.py; lists are
    objective = "dpo"                  # combined: each value with each value of the other lists
    lr = [1e-4, 3e-4]
    beta = 0.1

Stage 1 is trained once per teacher and seed, and shared by all methods and shares of mislabelled
traces, which change pairs, not positives. A toy's benchmark is the same for all seeds, so seeds
differ only in data, data order and initialization. Left out: a search.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redi.config import UserError, check_table, load_toml, recipe_path

Flags = dict[str, Any]  # of one program, without the dashes
KEYS = {
    "seeds": list[int], "mislabelled": list[float], "toy": dict, "stage1": dict, "stage2": dict,
    "evaluation": dict, "teacher": list[dict], "method": list[dict],
}  # fmt: skip
RESERVED = {"logs", "tokens", "figures", "study.json", "study.lock", "report.html"}
STAGE_1 = "stage 1"  # listed among the methods: the model that all of them start from


@dataclass(frozen=True)
class Variant:
    """A method with one choice of its settings, on the data of one teacher."""

    teacher: str  # name of its [[teacher]], or "" in a file without teachers
    mislabelled: float
    method: str  # STAGE_1 or a [[method]]
    settings: Flags  # of train_redi.py: objective, lr, alpha, ...; empty for stage 1

    @property
    def key(self) -> tuple:
        """Equal for models that differ only in their seed."""
        return self.teacher, self.mislabelled, self.method, *self.settings.items()

    @property
    def name(self) -> str:
        """The settings beside the method's name: "lr 1e-4, beta 0.1"."""
        return in_words(self.settings)


@dataclass(frozen=True, kw_only=True)
class Model(Variant):
    """One model that the study trains."""

    toy: Flags | None  # of redi.toy
    seed: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Study:
    path: Path
    text: str  # the file, as it was when it was read
    out: Path
    seeds: list[int]
    mislabelled: list[float]
    toys: dict[str, Flags | None]  # teacher -> flags of redi.toy; without [toy] just "" -> None
    stage1: Flags
    stage2: Flags
    variants: dict[str, tuple[str, Flags]]  # name of the folder -> method, settings
    evaluation: Flags

    def models(self) -> Iterator[Model]:
        """Every model of the study; the stage-1 model precedes those that start from it."""
        for (teacher, toy), seed in itertools.product(self.toys.items(), self.seeds):
            folder = self.out / slug(teacher) / f"seed-{seed}"
            yield Model(teacher, 0.0, STAGE_1, {}, toy=toy, seed=seed, folder=folder / "sft")
            grid = itertools.product(self.mislabelled, self.variants.items())
            for share, (name, (method, settings)) in grid:
                path = folder / (name + (f"-mislabelled-{as_text(share)}" if share else ""))
                yield Model(teacher, share, method, settings, toy=toy, seed=seed, folder=path)


# ---------------------------------------------------------------- the file


def read_study(path: str | Path, out: str | Path | None = None) -> Study:
    """Read a STUDY.toml. out: None for out/NAME. Flags of programs are checked by `jobs`.

    Raises UserError: the file, then the key.
    """
    where, path = str(path), recipe_path(path)
    tables = check_table(load_toml(path, where), KEYS, where)
    seeds, shares = tables.get("seeds", []), tables.get("mislabelled", [0.0])
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: key 'seeds': expected different whole numbers; got {seeds}")
    if not shares or len(set(shares)) < len(shares) or not all(0 <= s <= 1 for s in shares):
        raise UserError(f"{where}: key 'mislabelled': expected different numbers within [0, 1]")
    if "toy" not in tables and ("teacher" in tables or "mislabelled" in tables):
        raise UserError(f"{where}: [[teacher]] and 'mislabelled' need [toy]")
    toys = {"": tables.get("toy")}
    if rows := tables.get("teacher"):
        named = _by_name(rows, RESERVED, f"{where}: [[teacher]]")
        toys = {name: tables["toy"] | flags for name, flags in named}
        if len(set(map(slug, toys))) < len(rows):
            raise UserError(f"{where}: [[teacher]]: expected different names")
    return Study(
        path=path,
        text=path.read_text(encoding="utf-8"),
        out=Path(out or f"out/{path.stem}"),
        seeds=seeds,
        mislabelled=shares,
        toys=toys,
        stage1=tables.get("stage1", {}),
        stage2=tables.get("stage2", {}),
        variants=_variants(tables.get("method", []), f"{where}: [[method]]"),
        evaluation=tables.get("evaluation", {}),
    )


def _variants(rows: list[Flags], where: str) -> dict[str, tuple[str, Flags]]:
    """Every combination of a method's values. Folders are named after all but the objective."""
    variants: dict[str, tuple[str, Flags]] = {}
    for method, row in _by_name(rows, {slug(STAGE_1)}, where):
        grid = {key: value if isinstance(value, list) else [value] for key, value in row.items()}
        for key in ("objective", "lr", *grid):
            if not grid.get(key):
                raise UserError(f"{where} {method!r}: key {key!r}: expected at least one value")
            if any(isinstance(value, list) for value in grid[key]):
                raise UserError(f"{where} {method!r}: key {key!r}: expected values, not lists")
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values))
            numbers = [f"{k}-{slug(as_text(v))}" for k, v in settings.items() if k != "objective"]
            name = "-".join([slug(method), *numbers])
            if name in variants:
                raise UserError(
                    f"{where}: {name!r} occurs twice; give each value once, and different names "
                    "to methods that differ in their objective alone"
                )
            variants[name] = method, settings
    if not variants:
        raise UserError(f"{where}: expected at least one")
    return variants


def _by_name(rows: list[Flags], taken: set[str], where: str) -> Iterator[tuple[str, Flags]]:
    """(name, the other keys) of each table. taken: names that no table may have."""
    for number, row in enumerate(rows, start=1):
        name = row.get("name")
        if not isinstance(name, str) or not slug(name):
            expected = "expected a name with a letter of a-z or a digit"
            raise UserError(f"{where} {number}: key 'name': {expected}")
        if slug(name) in taken:
            raise UserError(f"{where} {number}: key 'name': {name!r} is taken")
        yield name, {key: value for key, value in row.items() if key != "name"}


def slug(text: str) -> str:
    """A name as part of a path: lower case, with dashes for all other characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def as_text(value: Any) -> str:
    """A setting as people type it, exactly: 1e-4, not 0.0001."""
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_words(settings: Flags) -> str:
    return ", ".join(f"{k} {as_text(v)}" for k, v in settings.items() if k != "objective")
