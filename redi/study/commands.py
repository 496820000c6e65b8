"""A study -> its jobs: the command lines that train and evaluate its models, and their order."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError, parse
from redi.eval.protocol import EvalConfig
from redi.recipe import REDIConfig, SFTConfig
from redi.study.plan import STAGE_1, Flags, Model, Study, as_text
from redi.toy.student import ToyConfig

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
BENCHMARK_SEED = 42  # all seeds have the same benchmark


@dataclass(frozen=True)
class Job:
    """A program that resumes if it was killed, and that writes `product` last."""

    command: list[str]
    needs: list[Path]  # products of the jobs that must finish first
    product: Path
    config: Any = None  # what the program reads from its flags, and keeps in its folder

    @property
    def name(self) -> str:
        return str(self.product.parent)

    def __str__(self) -> str:
        """The command as a user types it, on lines of at most 100 characters."""
        lines = [""]
        for word in ("python" if w == sys.executable else w for w in self.command):
            if len(lines[-1]) + len(shlex.quote(word)) > 97:
                lines.append("   ")
            lines[-1] += f" {shlex.quote(word)}"
        return " \\\n".join(lines).lstrip()


def jobs(study: Study, gpus: int = 0) -> list[Job]:
    """All jobs of the study, each after the jobs that it needs. Raises UserError for a flag that
    its program would refuse: STUDY.toml, then the table, then the flag."""
    found: dict[Path, Job] = {}
    for model in study.models():
        toy = _toy(study, model) if model.toy is not None else []
        for job in (*toy, _training(study, model, gpus), _evaluation(study, model, gpus)):
            found.setdefault(job.product, job)
    return list(found.values())


def _toy(study: Study, model: Model) -> list[Job]:
    folder, where = _data(model), f"{study.path}: toy {model.teacher}".strip()
    fixed = {"seed": model.seed, "mislabelled_rejected": model.mislabelled}
    given = {"benchmark_seed": BENCHMARK_SEED, **model.toy}
    arguments, config = _flags(where, ToyConfig, given, fixed, str(folder))
    student, raw = folder / "student/config.json", str(folder / "raw.parquet")
    make = [sys.executable, "-m", "redi.toy", *arguments]
    prepare = [sys.executable, "-m", "redi.prepare", raw, "--out", str(folder)]
    return [Job(make, [], student, config), Job(prepare, [student], folder / "card.json")]


def _training(study: Study, model: Model, gpus: int) -> Job:
    data, stage_1 = _data(model), model.folder.with_name("sft")
    fixed = {"out": model.folder, "seed": model.seed, "cache": study.out / "tokens"}
    needs, product = [], model.folder / "config.json"
    if model.method == STAGE_1:
        where, given = f"{study.path}: [stage1]", study.stage1
        toy = {"model": data / "student", "data": data / "positives.jsonl"}
        command, config_class = "train-sft", SFTConfig
    else:
        where = f"{study.path}: [stage2] and [[method]] {model.method!r}"
        given = study.stage2 | model.settings
        fixed["model"], needs = stage_1, [stage_1 / "config.json"]
        toy = {"data": data / "pairs.jsonl"}
        if "eval_every" in given:
            toy["eval_benchmark"] = _benchmark(model)
        command, config_class = "train-redi", REDIConfig
    if model.toy is not None:
        fixed, needs = fixed | toy, [*needs, data / "card.json"]
    flags, config = _flags(where, config_class, given, fixed)
    return Job(_program(command, gpus, flags), needs, product, config)


def _evaluation(study: Study, model: Model, gpus: int) -> Job:
    where, out = f"{study.path}: [evaluation]", model.folder / "eval"
    fixed = {"model": model.folder, "out": out}
    if model.toy is not None:
        fixed["benchmark"] = _benchmark(model)
    flags, config = _flags(where, EvalConfig, study.evaluation, fixed)
    needs, product = [model.folder / "config.json"], out / "report.json"
    return Job(_program("evaluate", gpus, flags), needs, product, config)


def _data(model: Model) -> Path:
    share = model.mislabelled
    return model.folder.with_name(f"data-mislabelled-{as_text(share)}" if share else "data")


def _benchmark(model: Model) -> Path:
    return model.folder.with_name("data") / "benchmark.jsonl"


def _program(command: str, gpus: int, arguments: list[str]) -> list[str]:
    """`redi COMMAND`. On several GPUs, torchrun starts one process per GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    launcher = torchrun if gpus > 1 else []
    return [sys.executable, *launcher, "-m", "redi", command, *arguments]


def _flags(
    where: str, config_class: type, given: Flags, fixed: dict[str, Any], *first: str
) -> tuple[list[str], Any]:
    """(arguments of a program, what it reads from them). first: positional arguments; given: flags
    from the study's file; fixed: flags that the study sets itself."""
    if both := given.keys() & fixed.keys():
        raise UserError(f"{where}: key {min(both)!r}: the study sets it itself")
    if "help" in given:
        raise UserError(f"{where}: key 'help': not a setting")
    arguments = list(first)
    for key, value in (given | fixed).items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key.replace('_', '-')}", *map(as_text, values)]
    try:
        return arguments, parse(config_class, "", arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
