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
    right_rows = 3                     # with [toy]: not pairs but labeled rows, 3 of 10 right

Stage 1 is trained once per teacher and seed, and shared by all methods, shares of mislabelled
traces and labeled rows, which change what stage 2 alone learns from. A toy's benchmark is the same
for all seeds, so seeds differ only in data, data order and initialization. Left out: a search.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from redi.config import UserError, check_table, load_toml, recipe_path

Flags = dict[str, Any]  # of one program, without the dashes
KEYS = {
    "seeds": list[int], "mislabelled": list[float], "toy": dict, "stage1": dict, "stage2": dict,
    "evaluation": dict, "teacher": list[dict], "method": list[dict],
}  # fmt: skip
STAGE_1 = "stage 1"  # listed among the methods: the model that all of them start from


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with one choice of its settings, on the data of one teacher."""

    teacher: str  # name of its [[teacher]], or "" in a file without teachers
    mislabelled: float
    method: str  # STAGE_1 or a [[method]]
    settings: Flags  # of train_redi.py: objective, lr, alpha, ...; empty for stage 1

    @property
    def variant(self) -> dict[str, Any]:
        """The fields of this class alone."""
        return {field.name: getattr(self, field.name) for field in fields(Variant)}

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


@dataclass(frozen=True)
class Study:
    path: Path
    text: str  # the file, as it was when it was read
    out: Path
    models: list[Model]  # the stage-1 model precedes those that start from it
    stage1: Flags
    stage2: Flags
    evaluation: Flags


def read_study(path: str | Path, out: str | Path | None = None) -> Study:
    """Read a STUDY.toml. out: None for out/NAME. Flags of programs are checked by `jobs`.

    Raises UserError: the file, then the key.
    """
    where, path = str(path), recipe_path(path)
    tables = check_table(load_toml(path, where), KEYS, where)
    if "toy" not in tables and ("teacher" in tables or "mislabelled" in tables):
        raise UserError(f"{where}: [[teacher]] and 'mislabelled' need [toy]")
    out = Path(out or f"out/{path.stem}")
    models = list(_models(tables, where, out))
    if all(model.method == STAGE_1 for model in models):
        raise UserError(f"{where}: expected at least one seed and one [[method]]")
    for folder, count in Counter(model.folder for model in models).items():
        if count > 1:
            raise UserError(
                f"{where}: {count} models would be {folder}; give each seed, share and value once, "
                "and different names to teachers, and to methods that differ only in objective"
            )
    flags = (tables.get(name, {}) for name in ("stage1", "stage2", "evaluation"))
    return Study(path, path.read_text(encoding="utf-8"), out, models, *flags)


def _models(tables: dict[str, Any], where: str, out: Path) -> Iterator[Model]:
    """Raises UserError for a name or a method that cannot be."""
    teachers = _by_name(tables, "teacher", where) if "teacher" in tables else [("", {})]
    variants = [
        (method, settings)
        for method, table in _by_name(tables, "method", where)
        for settings in _combinations(table, f"{where}: [[method]] {method!r}")
    ]
    for (teacher, flags), seed in itertools.product(teachers, tables.get("seeds", [])):
        folder = out / slug(teacher) / f"seed-{seed}"
        shared = {"teacher": teacher, "seed": seed, "toy": None}
        if "toy" in tables:
            shared["toy"] = tables["toy"] | flags
        yield Model(**shared, mislabelled=0.0, method=STAGE_1, settings={}, folder=folder / "sft")
        for share, (method, settings) in itertools.product(
            tables.get("mislabelled", [0.0]), variants
        ):
            # Folders are named after all settings but the objective.
            named = settings | ({"mislabelled": share} if share else {})
            numbers = [f"{k}-{slug(as_text(v))}" for k, v in named.items() if k != "objective"]
            yield Model(
                **shared,
                mislabelled=share,
                method=method,
                settings=settings,
                folder=folder / "-".join([slug(method), *numbers]),
            )


def _by_name(tables: dict[str, Any], key: str, where: str) -> Iterator[tuple[str, Flags]]:
    """(name, the other keys) of each [[key]]."""
    for number, row in enumerate(tables.get(key, []), start=1):
        name = row.get("name")
        if not isinstance(name, str) or slug(name) in ("", slug(STAGE_1)):
            expected = f"expected a name with a letter of a-z or a digit, not {STAGE_1!r}"
            raise UserError(f"{where}: [[{key}]] {number}: key 'name': {expected}")
        yield name, {key: value for key, value in row.items() if key != "name"}


def _combinations(method: Flags, where: str) -> list[Flags]:
    """Every choice of a method's values."""
    grid = {key: value if isinstance(value, list) else [value] for key, value in method.items()}
    for key in ("objective", "lr", *grid):
        if not grid.get(key) or any(isinstance(value, list) for value in grid[key]):
            raise UserError(f"{where}: key {key!r}: expected a value or a list of values")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


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
