"""Runs the jobs of a study, several at a time.

A job is done once its product exists. All others are started; a program that was killed before
resumes. When a job fails, those that need it are not run; the others are. What a program prints is
appended to its file in OUT/logs. Left out: several machines.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from redi.config import Stopped
from redi.data.files import make_folder
from redi.runlog import Progress
from redi.study.commands import ROOT, Job
from redi.train import StopSignals

POLL_SECONDS = 0.1
NOT_RUN = "not run, because it needs a job that failed"
STOP_SECONDS = 120.0  # a program that is asked to stop saves a checkpoint first


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
    running: dict[subprocess.Popen, Job] = {}
    failed: dict[str, str] = {}
    with Progress(len(jobs), str(out), "job", done=len(done)) as progress, StopSignals() as signals:
        try:
            while True:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    running[start(job, _log(job, out), workers, held)] = job
                if not running:
                    return failed | {job.name: NOT_RUN for job in waiting}
                time.sleep(POLL_SECONDS)
                if signals.wanted:
                    count = f"{len(done)} of {len(jobs)} jobs are done"
                    raise Stopped(f"{count}; the same command resumes the others")
                for process in [one for one in running if one.poll() is not None]:
                    job = running.pop(process)
                    progress.update({"job": job.name})
                    if process.returncode == 0 and job.product.exists():
                        done.add(job.product)
                    else:
                        log = _log(job, out)
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


def _log(job: Job, out: Path) -> Path:
    return out / "logs" / f"{os.path.relpath(job.name, out).replace(os.sep, '--')}.log"


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
