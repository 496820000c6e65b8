"""STUDY.toml -> the settings, methods and models of a study.

    seeds = [1, 2, 3, 4, 5]            # of the shuffles and, with [toy], of data and student
    mislabelled = [0.0, 0.2, 0.4]      # with [toy]: shares of rejected traces that are right
    [toy]                              # flags of redi.toy. Without it, model and data are those of
    operations = 8                     # [stage1] and [stage2], or their defaults
    [[setting]]                        # one of several toys: what differs from [toy]
    name = "rambling"
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

Stage 1 is trained once per setting and seed, and shared by all methods and shares of mislabelled
traces, which change pairs, not positives. A toy's benchmark is the same for all seeds, so seeds
differ only in data, data order and initialization. Left out: a search.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, check_table, load_toml, types_of
from redi.eval.protocol import EvalConfig
from redi.recipe import REDIConfig, SFTConfig
from redi.toy.student import ToyConfig

# Flags that the study sets itself, or that a study must not set.
RUN_FLAGS = {"out", "seed", "cache", "resume", "dry_run"}
OWN_FLAGS: dict[type, set[str]] = {
    ToyConfig: {"out", "seed", "mislabelled_rejected"},
    SFTConfig: RUN_FLAGS,
    REDIConfig: RUN_FLAGS | {"model"},
    EvalConfig: {"model", "out", "completions", "export_prompts"},
}
TOY_FLAGS = {"model", "data", "benchmark", "eval_benchmark"}  # with [toy], its files
TABLES = ("toy", "stage1", "stage2", "evaluation")
BENCHMARK_SEED = 42  # all seeds have the same benchmark
OWN_FILES = {"done", "logs", "tokens", "figures", "study.json", "study.lock", "report.md",
             "report.html"}  # fmt: skip
STAGE_1 = "stage 1"  # listed among the methods: the model that all of them start from


@dataclass(frozen=True)
class Setting:
    """A toy by its flags. toy None: no [toy]; [stage1] and [stage2] name model and data."""

    name: str
    toy: dict[str, Any] | None


@dataclass(frozen=True)
class Variant:
    """One point of a method's grid."""

    method: str
    settings: dict[str, Any]  # of train_redi.py: objective, lr, alpha, ...

    @property
    def slug(self) -> str:
        numbers = {k: v for k, v in self.settings.items() if k != "objective"}
        return "-".join([slug(self.method), *(f"{k}-{_in_path(v)}" for k, v in numbers.items())])


@dataclass(frozen=True)
class Model:
    """One model that the study trains. variant None: the stage-1 model."""

    setting: Setting
    seed: int
    mislabelled: float
    variant: Variant | None
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Study:
    path: Path
    out: Path
    seeds: list[int]
    mislabelled: list[float]
    settings: list[Setting]
    stage1: dict[str, Any]
    stage2: dict[str, Any]
    variants: list[Variant]
    evaluation: dict[str, Any]

    def models(self) -> Iterator[Model]:
        """Every model of the study; the stage-1 model precedes those that start from it."""
        for setting, seed in itertools.product(self.settings, self.seeds):
            folder = self.out / slug(setting.name) / f"seed-{seed}"
            yield Model(setting, seed, 0.0, None, folder / "sft")
            for share, variant in itertools.product(self.mislabelled, self.variants):
                name = variant.slug + (f"-mislabelled-{share:g}" if share else "")
                yield Model(setting, seed, share, variant, folder / name)


# ---------------------------------------------------------------- the file


def read_study(path: str | Path, out: str | None = None) -> Study:
    """Read and check a STUDY.toml. out: None for out/NAME. Raises UserError: file and key."""
    tables, where = load_toml(path, str(path)), str(path)
    known = {"seeds": list[int], "mislabelled": list[float]}
    plain = check_table(
        {k: v for k, v in tables.items() if k not in (*TABLES, "setting", "method")}, known, where
    )
    for name in TABLES:
        if not isinstance(tables.get(name, {}), dict):
            raise UserError(f"{where}: {name!r}: expected a table, [{name}]")
    for name in ("setting", "method"):
        rows = tables.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{where}: {name!r}: expected tables, [[{name}]]")
    is_toy, seeds = "toy" in tables, plain.get("seeds", [])
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: key 'seeds': expected different whole numbers; got {seeds}")
    shares = plain.get("mislabelled", [0.0])
    names = {f"{share:g}" for share in shares}  # as in the names of folders
    if not shares or len(names) < len(shares) or not all(0 <= s <= 1 for s in shares):
        raise UserError(f"{where}: key 'mislabelled': expected different numbers within [0, 1]")
    if not is_toy and ("setting" in tables or "mislabelled" in tables):
        raise UserError(f"{where}: [[setting]] and 'mislabelled' need [toy]")

    def section(name: str, config: type, **more: Any) -> dict[str, Any]:
        return _checked_settings(tables.get(name, {}), config, f"{where}: [{name}]", is_toy, **more)

    stage2 = section("stage2", REDIConfig, objective="redi")
    return Study(
        path=Path(path),
        out=Path(out or f"out/{Path(path).stem}"),
        seeds=seeds,
        mislabelled=shares,
        settings=_settings(tables, where),
        stage1=section("stage1", SFTConfig),
        stage2=stage2,
        variants=_variants(tables.get("method", []), stage2, where, is_toy),
        evaluation=section("evaluation", EvalConfig),
    )


def _checked_settings(
    table: dict[str, Any], config: type, where: str, is_toy: bool, **more: Any
) -> dict[str, Any]:
    """The table, checked as its program checks its flags. more: flags given elsewhere."""
    own_flags = OWN_FLAGS[config] | (TOY_FLAGS if is_toy else set())
    for key in table:
        if key in own_flags:
            raise UserError(f"{where}: key {key!r}: the study sets it itself")
    types = {k: t for k, t in types_of(config).items() if k not in own_flags}
    settings = check_table(table, types, where)
    try:
        config(**({"out": "-"} if config is ToyConfig else {}), **more | settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return settings


def _settings(tables: dict[str, Any], where: str) -> list[Setting]:
    if "toy" not in tables:
        return [Setting("", None)]
    shared = {"benchmark_seed": BENCHMARK_SEED, **tables["toy"]}
    # is_toy=False: `benchmark` is redi.toy's number of problems here, not evaluate.py's files.
    if "setting" not in tables:
        return [Setting("", _checked_settings(shared, ToyConfig, f"{where}: [toy]", is_toy=False))]
    settings, taken = [], set(OWN_FILES)
    for number, row in enumerate(tables["setting"], start=1):
        name = row.get("name")
        _check_name(name, taken, f"{where}: [[setting]] {number}")
        taken.add(slug(name))
        flags = shared | {key: value for key, value in row.items() if key != "name"}
        label = f"{where}: [[setting]] {name!r}"
        settings.append(Setting(name, _checked_settings(flags, ToyConfig, label, is_toy=False)))
    if not settings:
        raise UserError(f"{where}: 'setting': expected at least one [[setting]]")
    return settings


def _variants(
    rows: list[dict[str, Any]], stage2: dict[str, Any], where: str, is_toy: bool
) -> list[Variant]:
    variants = []
    for number, row in enumerate(rows, start=1):
        grid = {key: value if isinstance(value, list) else [value] for key, value in row.items()}
        name = row.get("name")
        _check_name(name, {slug(STAGE_1)}, f"{where}: [[method]] {number}")
        label = f"{where}: [[method]] {name!r}"
        for key in ("objective", "lr"):
            if key not in grid:
                raise UserError(f"{label}: key {key!r} is missing")
        for key, values in grid.items():
            if not values:
                raise UserError(f"{label}: key {key!r}: expected at least one value")
        del grid["name"]
        for values in itertools.product(*grid.values()):
            table = dict(zip(grid, values))
            shared = {key: value for key, value in stage2.items() if key not in grid}
            settings = _checked_settings(table, REDIConfig, label, is_toy, **shared)
            variants.append(Variant(name, settings))
    if not variants:
        raise UserError(f"{where}: expected at least one [[method]]")
    slugs = [variant.slug for variant in variants]
    for name in slugs:
        if slugs.count(name) > 1:
            raise UserError(
                f"{where}: [[method]]: {name!r} is there twice; methods that differ in their "
                "objective alone need different names"
            )
    return variants


def _check_name(name: object, taken: set[str], where: str) -> None:
    if not isinstance(name, str) or not slug(name):
        raise UserError(f"{where}: key 'name': expected a name with a letter of a-z or a digit")
    if slug(name) in taken:
        raise UserError(f"{where}: key 'name': {name!r} is taken")


def slug(text: str) -> str:
    """A name as part of a path: lower case, with dashes for all other characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _in_path(value: Any) -> str:
    """A setting as part of a path; different for every value."""
    text = as_text(value)
    if re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        return text
    return f"{slug(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def as_text(value: Any) -> str:
    """A setting as it is typed after a flag."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
