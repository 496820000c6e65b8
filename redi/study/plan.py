"""STUDY.toml -> the models of a study, and the command lines that make and evaluate them.

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

Stage 1 is trained once for a seed of a setting, and shared by all methods and shares of mislabelled
traces: these change pairs, not positives. A toy's benchmark is the same for all seeds, so that they
differ in data order, data, and initialisation alone.

Accuracy on the way is measured inside training, on the weights at hand, so that a grid of runs
writes no checkpoints but those it resumes from. Left out: a search; a grid is what it says.
"""

import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, check_table, load_toml, types_of
from redi.eval.protocol import EvalConfig
from redi.toy import ToyConfig
from train_redi import REDIConfig
from train_sft import SFTConfig

ROOT = Path(__file__).resolve().parents[2]  # where the programs are
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
        return "-".join([slug(self.method), *(f"{k}-{_text(v)}" for k, v in numbers.items())])


@dataclass(frozen=True)
class Model:
    """One model that a study trains. variant None: the stage-1 model."""

    setting: Setting
    seed: int
    mislabelled: float
    variant: Variant | None
    folder: Path


@dataclass(frozen=True)
class Job:
    """Commands that are run one after another. They can be run again; done, `product` is there."""

    name: str
    kind: str  # jobs of a kind take about equally long
    commands: list[list[str]]
    needs: list[str]  # names of jobs that are to be done before
    product: Path


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
    if not shares or len(set(shares)) < len(shares) or not all(0 <= s <= 1 for s in shares):
        raise UserError(f"{where}: key 'mislabelled': expected different numbers within [0, 1]")
    if not is_toy and ("setting" in tables or "mislabelled" in tables):
        raise UserError(f"{where}: [[setting]] and 'mislabelled' need [toy]")
    stage2 = _section(tables, "stage2", REDIConfig, where, is_toy, objective="redi")
    return Study(
        path=Path(path),
        out=Path(out or f"out/{Path(path).stem}"),
        seeds=seeds,
        mislabelled=shares,
        settings=_settings(tables, where),
        stage1=_section(tables, "stage1", SFTConfig, where, is_toy),
        stage2=stage2,
        variants=_variants(tables.get("method", []), stage2, where, is_toy),
        evaluation=_section(tables, "evaluation", EvalConfig, where, is_toy),
    )


def _section(
    tables: dict[str, Any], name: str, config: type, where: str, is_toy: bool, **more: Any
) -> dict[str, Any]:
    """The table `name` as settings of a program, checked as the program will."""
    return _checked_settings(tables.get(name, {}), config, f"{where}: [{name}]", is_toy, **more)


def _checked_settings(
    table: dict[str, Any], config: type, where: str, is_toy: bool, **more: Any
) -> dict[str, Any]:
    """more: settings that the program gets beside those of the table."""
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
    for number, row in enumerate(tables.get("setting", [{"name": ""}]), start=1):
        table = dict(row)
        name = table.pop("name", None)
        if not isinstance(name, str) or ("setting" in tables and not slug(name)):
            raise UserError(f"{where}: [[setting]] {number}: key 'name': expected a name")
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
        if not isinstance(name, str) or not slug(name):
            raise UserError(f"{where}: [[method]] {number}: key 'name': expected a name")
        if slug(name) == slug(STAGE_1):
            raise UserError(f"{where}: [[method]] {number}: key 'name': {name!r} is taken")
        label = f"{where}: [[method]] {name!r}"
        for key in ("objective", "lr"):
            if not grid.get(key):
                raise UserError(f"{label}: key {key!r} is missing")
        del grid["name"]
        for values in itertools.product(*grid.values()):
            table = dict(zip(grid, values))
            settings = _checked_settings(table, REDIConfig, label, is_toy, **_without(stage2, grid))
            variants.append(Variant(name, settings))
    if not variants:
        raise UserError(f"{where}: expected at least one [[method]]")
    _refuse_alike([variant.slug for variant in variants], f"{where}: [[method]]")
    return variants


def _without(table: dict[str, Any], keys: Any) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _refuse_alike(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {name!r} is there twice")


def slug(text: str) -> str:
    """A name as part of a path: lower case, and a dash for everything else."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


# ---------------------------------------------------------------- the commands


def jobs(study: Study, gpus: int = 0) -> list[Job]:
    """Everything that there is to do, in an order in which it can be done."""
    found: list[Job] = []
    for model in study.models():
        if model.variant is None:
            if model.setting.toy is not None:
                found += [_data(model, share) for share in sorted({0.0, *study.mislabelled})]
            found.append(_stage1(study, model, gpus))
        else:
            found.append(_stage2(study, model, gpus))
        found.append(_evaluation(study, model, gpus))
    return found


def _data(model: Model, share: float) -> Job:
    folder = _data_folder(model.folder.parent, share)
    toy = {**model.setting.toy, "seed": model.seed, "mislabelled_rejected": share}
    commands = [
        [*_module("redi.toy"), str(folder), *flags(toy)],
        [*_module("redi.prepare"), str(folder / "raw.parquet"), "--out", str(folder)],
    ]
    return Job(str(folder), "data", commands, [], folder / "pairs.jsonl")


def _data_folder(base: Path, share: float) -> Path:
    return base / (f"data-mislabelled-{share:g}" if share else "data")


def _stage1(study: Study, model: Model, gpus: int) -> Job:
    data = _data_folder(model.folder.parent, 0.0)
    paths = {"model": str(data / "student"), "data": str(data / "positives.jsonl")}
    is_toy = model.setting.toy is not None
    settings = {**study.stage1, **(paths if is_toy else {}), **_of_run(study, model)}
    command = [*_program("train_sft.py", gpus), *flags(settings)]
    needs = [str(data)] if is_toy else []
    return Job(str(model.folder), "stage 1", [command], needs, model.folder / "config.json")


def _stage2(study: Study, model: Model, gpus: int) -> Job:
    base = model.folder.parent
    data = _data_folder(base, model.mislabelled)
    settings = {**study.stage2, **model.variant.settings, "model": str(base / "sft")}
    needs = [str(base / "sft")]
    if model.setting.toy is not None:
        settings["data"] = str(data / "pairs.jsonl")
        needs.append(str(data))
        if "eval_every" in settings:
            settings["eval_benchmark"] = str(_benchmark(base))
    command = [*_program("train_redi.py", gpus), *flags(settings | _of_run(study, model))]
    return Job(str(model.folder), "stage 2", [command], needs, model.folder / "config.json")


def _of_run(study: Study, model: Model) -> dict[str, Any]:
    return {"out": str(model.folder), "seed": model.seed, "cache": str(study.out / "tokens")}


def _evaluation(study: Study, model: Model, gpus: int) -> Job:
    out = model.folder / "eval"
    settings = {**study.evaluation, "model": str(model.folder), "out": str(out)}
    if model.setting.toy is not None:
        settings["benchmark"] = str(_benchmark(model.folder.parent))
    command = [*_program("evaluate.py", gpus), *flags(settings)]
    return Job(str(out), "evaluation", [command], [str(model.folder)], out / "report.json")


def _benchmark(base: Path) -> Path:
    return _data_folder(base, 0.0) / "benchmark.jsonl"


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _program(name: str, gpus: int) -> list[str]:
    """gpus: that it runs on; above 1 torchrun starts a process for each."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    return [sys.executable, *(several if gpus > 1 else []), os.path.relpath(ROOT / name)]


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags that `redi.config.parse` reads."""
    found: list[str] = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if values:
            found += [f"--{key.replace('_', '-')}", *map(_text, values)]
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
