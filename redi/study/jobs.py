"""The jobs of a study: the command lines that train and evaluate its models, run several at a time.

A job is done once its product exists. All others are started; a program that was killed before
resumes. When a job fails, those that need it are not run; the others are. What a program prints is
appended to its file in OUT/logs. Left out: several machines.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from redi.config import Stopped, UserError, parse
from redi.data.files import make_folder
from redi.eval.protocol import EvalConfig
from redi.recipe import REDIConfig, SFTConfig
from redi.runlog import Progress
from redi.study.plan import STAGE_1, Flags, Model, Study, as_text
from redi.toy import ToyConfig
from redi.train import StopSignals

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
BENCHMARK_SEED = 42  # all seeds have the same benchmark
POLL_SECONDS = 0.1
STOP_SECONDS = 120.0  # a program that is asked to stop saves a checkpoint first


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
        """The command as a user types it."""
        return shlex.join("python" if word == sys.executable else word for word in self.command)


def jobs(study: Study, gpus: int = 0) -> list[Job]:
    """All jobs of the study, each after the jobs that it needs. Raises UserError for a flag that
    its program would refuse: STUDY.toml, then the table, then the flag."""
    found: dict[Path, Job] = {}
    for model in study.models:
        for job in _jobs_of(model, study, gpus):
            found.setdefault(job.product, job)
    return list(found.values())


def _jobs_of(model: Model, study: Study, gpus: int) -> Iterator[Job]:
    """The jobs of one model. `fixed`: the flags that the study sets itself."""
    folder, share, settings = model.folder.parent, model.mislabelled, dict(model.settings)
    rows = settings.pop("right_rows", None) if model.toy is not None else None
    differing = {"mislabelled": share, "right-rows": rows}  # what only stage 2 learns from
    data = folder / "-".join(["data", *(f"{k}-{as_text(v)}" for k, v in differing.items() if v)])
    card, benchmark = data / "card.json", folder / "data/benchmark.jsonl"
    if model.toy is not None:
        where, student = f"{study.path}: toy {model.teacher}".strip(), data / "student/config.json"
        fixed = {"seed": model.seed, "mislabelled_rejected": share, "right_rows": rows}
        given = {"benchmark_seed": BENCHMARK_SEED, **model.toy}
        flags, config = _flags(where, ToyConfig, given, fixed, str(data))
        yield Job(_program("toy", flags), [], student, config)
        prepare = [str(data / "raw.parquet"), "--out", str(data)]
        yield Job(_program("prepare", prepare), [student], card)

    fixed = {"out": model.folder, "seed": model.seed, "cache": study.out / "tokens"}
    needs, trained = [], model.folder / "config.json"
    if model.method == STAGE_1:
        where, given = f"{study.path}: [stage1]", study.stage1
        toy = {"model": data / "student", "data": data / "positives.jsonl"}
        command, config_class = "train-sft", SFTConfig
    else:
        where = f"{study.path}: [stage2] and [[method]] {model.method!r}"
        given = study.stage2 | settings
        fixed["model"], needs = folder / "sft", [folder / "sft/config.json"]
        toy = {"data": data / ("pairs.jsonl" if rows is None else "rows.jsonl")}
        toy |= {"eval_benchmark": benchmark} if "eval_every" in given else {}
        command, config_class = "train-redi", REDIConfig
    if model.toy is not None:
        fixed, needs = fixed | toy, [*needs, card]
    flags, config = _flags(where, config_class, given, fixed)
    yield Job(_program(command, flags, gpus), needs, trained, config)

    fixed = {"model": model.folder, "out": model.folder / "eval"}
    fixed |= {"benchmark": benchmark} if model.toy is not None else {}
    flags, config = _flags(f"{study.path}: [evaluation]", EvalConfig, study.evaluation, fixed)
    report = model.folder / "eval/report.json"
    yield Job(_program("evaluate", flags, gpus), [trained], report, config)


def _program(command: str, arguments: list[str], gpus: int = 0) -> list[str]:
    """`redi COMMAND`. On several GPUs, torchrun starts one process per GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    launcher = torchrun if gpus > 1 else []
    return [sys.executable, *launcher, "-m", "redi", command, *arguments]


def _flags(
    where: str, config_class: type, given: Flags, fixed: Flags, *first: str
) -> tuple[list[str], Any]:
    """(arguments of a program, what it reads from them). first: positional arguments; given: flags
    from the study's file; fixed: flags that the study sets itself, None for a default."""
    if wrong := given.keys() & {*fixed, "help"}:
        raise UserError(f"{where}: key {min(wrong)!r}: not one that a study's file can set")
    arguments = list(first)
    for key, value in (given | fixed).items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key.replace('_', '-')}", *map(as_text, values)]
    try:
        return arguments, parse(config_class, "", arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ---------------------------------------------------------------- running them


def run_jobs(
    jobs: Sequence[Job], out: Path, workers: int, held: IO | None = None
) -> dict[str, str]:
    """Run the jobs that are not done, at most `workers` at a time.

    held: a locked file; the programs inherit it, so its lock lasts until the last one exits, even
    if this process is killed. Returns the names of the jobs that failed and of those that need
    them, each with the reason, the first failure first. Raises Stopped after a signal, once all
    programs have exited.
    """
    make_folder(out / "logs")
    done = {job.product for job in jobs if job.product.exists()}
    waiting = [job for job in jobs if job.product not in done]
    running: dict[subprocess.Popen, tuple[Job, Path]] = {}
    failed: dict[str, str] = {}
    not_run = "not run, because it needs a job that failed"
    with Progress(len(jobs), str(out), "job", done=len(done)) as progress, StopSignals() as signals:
        try:
            while True:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    name = os.path.relpath(job.name, out).replace(os.sep, "--")
                    log = out / "logs" / f"{name}.log"
                    running[start(job, log, workers, held)] = job, log
                if not running:
                    return failed | dict.fromkeys((job.name for job in waiting), not_run)
                time.sleep(POLL_SECONDS)
                if signals.wanted:
                    count = f"{len(done)} of {len(jobs)} jobs are done"
                    raise Stopped(f"{count}; the same command resumes the others")
                for process in [one for one in running if one.poll() is not None]:
                    job, log = running.pop(process)
                    progress.update({"job": job.name})
                    if process.returncode == 0 and job.product.exists():
                        done.add(job.product)
                    else:
                        last_line = log.read_text("utf-8", errors="replace").strip().split("\n")[-1]
                        failed[job.name] = f"{last_line} (all of it: {log})"
                        tqdm.write(f"failed: {job.name}: {failed[job.name]}", file=sys.stderr)
        finally:
            _stop(running)


def start(job: Job, log: Path, workers: int, held: IO | None) -> subprocess.Popen:
    """Start the job's program. Programs that run at the same time share the cores."""
    shared = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")])),
    }
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {job}", file=file, flush=True)
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | shared,
            pass_fds=[held.fileno()] if held else [],
            start_new_session=True,  # Ctrl-C reaches only the study, which stops its programs
        )


def _stop(running: Iterable[subprocess.Popen]) -> None:
    """Ask the programs to save their state and exit, and wait for them. Those that still run after
    STOP_SECONDS, or at a second Ctrl-C, are killed."""
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # torchrun's ranks too
                process.wait()
