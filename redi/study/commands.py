"""A study -> its jobs: the command lines that train and evaluate its models, and their order."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.study.plan import Model, Study, as_text

ROOT = Path(__file__).resolve().parents[2]  # where the programs are


@dataclass(frozen=True)
class Job:
    """Commands that run one after another and can run again; they end by writing `product`."""

    name: str
    commands: list[list[str]]
    needs: list[str]  # names of the jobs that must finish first
    product: Path


def jobs(study: Study, gpus: int = 0) -> list[Job]:
    """All jobs of the study, each after the jobs that it needs."""
    found: list[Job] = []
    for model in study.models():
        if model.variant is None and model.setting.toy is not None:
            found += [_data(model, share) for share in sorted({0.0, *study.mislabelled})]
        found += [_training(study, model, gpus), _evaluation(study, model, gpus)]
    return found


def _data(model: Model, share: float) -> Job:
    folder = _data_folder(model, share)
    toy = {**model.setting.toy, "seed": model.seed, "mislabelled_rejected": share}
    commands = [
        [sys.executable, "-m", "redi.toy", str(folder), *flags(toy)],
        [sys.executable, "-m", "redi.prepare", str(folder / "raw.parquet"), "--out", str(folder)],
    ]
    return Job(str(folder), commands, [], folder / "pairs.jsonl")


def _data_folder(model: Model, share: float = 0.0) -> Path:
    return model.folder.with_name(f"data-mislabelled-{share:g}" if share else "data")


def _training(study: Study, model: Model, gpus: int) -> Job:
    data = _data_folder(model, model.mislabelled)
    if model.variant is None:
        program, settings, needs = "train_sft.py", study.stage1, []
        toy = {"model": data / "student", "data": data / "positives.jsonl"}
    else:
        stage_1 = str(model.folder.with_name("sft"))
        program, needs = "train_redi.py", [stage_1]
        settings = study.stage2 | model.variant.settings | {"model": stage_1}
        toy = {"data": data / "pairs.jsonl"}
        if "eval_every" in settings:
            toy["eval_benchmark"] = _benchmark(model)
    if model.setting.toy is not None:
        settings, needs = settings | toy, [*needs, str(data)]
    settings = settings | {"out": model.folder, "seed": model.seed, "cache": study.out / "tokens"}
    command = _command(program, settings, gpus)
    return Job(str(model.folder), [command], needs, model.folder / "config.json")


def _evaluation(study: Study, model: Model, gpus: int) -> Job:
    out = model.folder / "eval"
    settings = study.evaluation | {"model": model.folder, "out": out}
    if model.setting.toy is not None:
        settings["benchmark"] = _benchmark(model)
    command = _command("evaluate.py", settings, gpus)
    return Job(str(out), [command], [str(model.folder)], out / "report.json")


def _benchmark(model: Model) -> Path:
    return _data_folder(model) / "benchmark.jsonl"


def _command(program: str, settings: dict[str, Any], gpus: int) -> list[str]:
    """The program on all GPUs; for several, torchrun starts one process per GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    start = [sys.executable, *(torchrun if gpus > 1 else []), os.path.relpath(ROOT / program)]
    return start + flags(settings)


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags that `redi.config.parse` reads."""
    found: list[str] = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if values:
            found += [f"--{key.replace('_', '-')}", *map(as_text, values)]
    return found
