"""A study -> its jobs: the command lines that make its models and evaluate them, and which job
needs which."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.study.plan import Model, Study, as_text

ROOT = Path(__file__).resolve().parents[2]  # where the programs are


@dataclass(frozen=True)
class Job:
    """Commands that run one after another and may run again; in the end, `product` exists."""

    name: str
    kind: str  # data, stage 1, stage 2 or evaluation
    commands: list[list[str]]
    needs: list[str]  # names of jobs that are to be done before
    product: Path


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
        [sys.executable, "-m", "redi.toy", str(folder), *flags(toy)],
        [sys.executable, "-m", "redi.prepare", str(folder / "raw.parquet"), "--out", str(folder)],
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
            found += [f"--{key.replace('_', '-')}", *map(as_text, values)]
    return found
