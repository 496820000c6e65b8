"""STUDY.toml -> the settings, methods and models of a study. commands.py makes them jobs.

    seeds = [1, 2, 3, 4, 5]               # of the shuffles and, with [toy], of data and student
    mislabelled = [0.0, 0.2, 0.4]         # with [toy]: shares of wrong traces that are right
    [toy]                                 # flags of redi.toy; without it, [stage1] and [stage2] say
    operations = 8                        # where model and data are, or leave it to their defaults
    [[setting]]                           # a toy beside other ones: what differs from [toy]
    name = "rambling"
    rambling = 0.3
    [stage1]                              # settings of train_sft.py,
    lr = 4e-3
    [stage2]                              # of train_redi.py, the same for all methods,
    eval_every = 12                       # accuracy on the way, on the toy's benchmark
    [evaluation]                          # and of evaluate.py, for every model at the end
    samples = 8
    [[method]]                            # tables of one name are one method: its best counts.
    name = "DPO"                          # Every setting of train_redi.py; a list means each of
    objective = "dpo"                     # its values, with each of those of the other lists
    lr = [1e-4, 3e-4]
    beta = 0.1

Stage 1 is trained once per seed of a setting, and shared by all methods and shares of mislabelled
traces: these change pairs, not positives. A toy's benchmark is the same for all seeds, so seeds
differ only in data order, data and initialization. Accuracy on the way is measured inside training,
so no checkpoints are needed for it. Left out: a search.
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

# What a study sets itself: for each run, or because a run's result must not depend on it.
OF_RUNS = {"out", "seed", "cache", "resume", "dry_run"}
TAKEN: dict[type, set[str]] = {
    ToyConfig: {"out", "seed", "mislabelled_rejected"},
    SFTConfig: OF_RUNS,
    REDIConfig: OF_RUNS | {"model"},
    EvalConfig: {"model", "out", "completions", "export_prompts"},
}
BY_TOY = {"model", "data", "benchmark", "eval_benchmark"}
TABLES = ("toy", "stage1", "stage2", "evaluation")
BENCHMARK_SEED = 42
OWN_FILES = {"done", "logs", "tokens", "figures", "study.json", "study.lock", "report.md",
             "report.html"}  # fmt: skip
STAGE_1 = "stage 1"  # among methods, the name of what all start from


@dataclass(frozen=True)
class Setting:
    """A toy, or with toy None the model and the data that the sections name."""

    name: str
    toy: dict[str, Any] | None


@dataclass(frozen=True)
class Variant:
    """One point of a method's grid: everything that is not the same for all methods."""

    method: str
    settings: dict[str, Any]  # of train_redi.py: objective, lr, alpha, ...

    @property
    def slug(self) -> str:
        numbers = {k: v for k, v in self.settings.items() if k != "objective"}
        return "-".join([slug(self.method), *(f"{k}-{_in_path(v)}" for k, v in numbers.items())])


@dataclass(frozen=True)
class Model:
    """One model that a study trains. variant None: the stage-1 model."""

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
        """Every model of the study, stage 1 before what is made of it."""
        for setting, seed in itertools.product(self.settings, self.seeds):
            folder = self.out / slug(setting.name) / f"seed-{seed}"
            yield Model(setting, seed, 0.0, None, folder / "sft")
            for share, variant in itertools.product(self.mislabelled, self.variants):
                name = variant.slug + (f"-mislabelled-{share:g}" if share else "")
                yield Model(setting, seed, share, variant, folder / name)


# ---------------------------------------------------------------- the file


def read_study(path: str | Path, out: str | None = None) -> Study:
    """Raises UserError naming file and key. out: in place of out/NAME."""
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
    named = {f"{share:g}" for share in shares}  # as folders are
    if not shares or len(named) < len(shares) or not all(0 <= s <= 1 for s in shares):
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
    """The table as settings of a program, checked as the program will; more: its other settings."""
    taken = TAKEN[config] | (BY_TOY if is_toy else set())
    for key in table:
        if key in taken:
            raise UserError(f"{where}: key {key!r}: the study sets it itself")
    types = {k: t for k, t in types_of(config).items() if k not in taken}
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
    settings = []
    rows = tables.get("setting", [{"name": ""}])
    if not rows:
        raise UserError(f"{where}: 'setting': expected at least one [[setting]], or none named")
    for number, row in enumerate(rows, start=1):
        table = dict(row)
        name = table.pop("name", None)
        if "setting" in tables:
            _check_name(name, OWN_FILES, f"{where}: [[setting]] {number}")
        label = f"{where}: [[setting]] {name!r}" if name else f"{where}: [toy]"
        # `benchmark` is redi.toy's number of problems, not evaluate.py's files.
        toy = _checked_settings({**shared, **table}, ToyConfig, label, is_toy=False)
        settings.append(Setting(name, toy))
    _refuse_alike([slug(s.name) for s in settings], f"{where}: [[setting]]")
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
    _refuse_alike([variant.slug for variant in variants], f"{where}: [[method]]")
    return variants


def _check_name(name: object, taken: set[str], where: str) -> None:
    if not isinstance(name, str) or not slug(name):
        raise UserError(f"{where}: key 'name': expected a name with a letter of a-z or a digit")
    if slug(name) in taken:
        raise UserError(f"{where}: key 'name': {name!r} is taken")


def _refuse_alike(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{where}: {name!r} is there twice; what differs in its objective alone needs "
                "another name"
            )


def slug(text: str) -> str:
    """A name as part of a path: lower case, and a dash for everything else."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _in_path(value: Any) -> str:
    """A setting as part of a path; no two alike."""
    text = as_text(value)
    if re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        return text
    return f"{slug(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def as_text(value: Any) -> str:
    """A setting as a flag has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
