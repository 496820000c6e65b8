"""Runs the jobs of a study, several at a time and each only once.

    OUT/done/         one file per finished job: its commands, key and seconds
    OUT/logs/         what the commands print
    OUT/study.lock    held by the study and by every program it started

A job's key is a hash of its commands and of the keys of all jobs it needs; a job is skipped if it
finished with the same key. A job that was killed runs again, and its programs resume. If only the
study was killed, its programs continue, and the next study waits at the lock until they end. When a
job fails, the jobs that need it are not run; all others are.

Left out: several machines.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from redi.config import Stopped
from redi.data.files import lock, make_folder, write_aside
from redi.study.commands import ROOT, Job
from redi.train import StopSignals

POLL_SECONDS = 0.1
GRACE_SECONDS = 120.0  # for a program to finish its step and save a checkpoint


@dataclass
class _Running:
    job: Job
    log: TextIO
    began: float = field(default_factory=time.monotonic)
    number: int = 0  # of the command that is running
    process: subprocess.Popen | None = None


def run_jobs(jobs: Sequence[Job], out: Path, places: int) -> dict[str, str]:
    """Run the jobs that are not done, `places` at a time.

    Returns job -> why it failed, or which failed job it needs. Raises Stopped if the study was
    asked to stop, after its programs have ended.
    """
    for folder in ("logs", "done"):
        make_folder(out / folder)
    with open(out / "study.lock", "w", encoding="utf-8") as lock_file:
        if not lock(lock_file):
            print(f"{out}: another study, or a program of one, is running; waiting", flush=True)
            lock(lock_file, wait=True)
        with StopSignals() as signals:
            work = _Work(jobs, out, places, lock_file)
            try:
                while work.waiting or work.running:
                    if signals.wanted:
                        done = f"{len(work.done)} of {len(jobs)} jobs are done"
                        raise Stopped(f"{done}; the same command resumes them")
                    work.start_what_fits()
                    time.sleep(POLL_SECONDS)
                    work.poll()
            finally:
                work.end()
    return work.failed


class _Work:
    """The jobs of one call: waiting, running, done, failed."""

    def __init__(self, jobs: Sequence[Job], out: Path, places: int, lock_file: TextIO):
        self.out, self.places, self.lock_file = out, places, lock_file
        self.keys = keys(jobs)
        self.done = {job.name for job in jobs if self._is_done(job)}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}
        self.total = len(jobs)
        if self.done and self.waiting:
            print(f"{out}: {len(self.done)} of {self.total} jobs are done already", flush=True)

    def _is_done(self, job: Job) -> bool:
        record = self._file("done", job, "json")
        if not (record.is_file() and job.product.exists()):
            return False
        return json.loads(record.read_text(encoding="utf-8"))["key"] == self.keys[job.name]

    def _file(self, folder: str, job: Job, suffix: str) -> Path:
        name = os.path.relpath(job.name, self.out).replace(os.sep, "--")
        return self.out / folder / f"{name}.{suffix}"

    def start_what_fits(self) -> None:
        ready = [job for job in self.waiting if self.done.issuperset(job.needs)]
        for job in ready[: self.places - len(self.running)]:
            self.waiting.remove(job)
            log = open(self._file("logs", job, "log"), "a", encoding="utf-8")  # noqa: SIM115
            self.running.append(_Running(job, log))
            self._start(self.running[-1])

    def _start(self, running: _Running) -> None:
        command = running.job.commands[running.number]
        running.log.write(f"$ {shown(command)}\n")
        running.log.flush()
        running.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=running.log,
            stderr=subprocess.STDOUT,
            env=_environment(self.places),
            pass_fds=[self.lock_file.fileno()],
            start_new_session=True,  # Ctrl-C reaches the study, which passes it on
        )

    def poll(self) -> None:
        """Start the next command of every job whose command has ended, or finish the job."""
        for running in list(self.running):
            status = running.process.poll()
            if status is None:
                continue
            running.number += 1
            if status == 0 and running.number < len(running.job.commands):
                self._start(running)
                continue
            self.running.remove(running)
            running.log.close()
            self._finish(running, status)

    def _finish(self, running: _Running, status: int) -> None:
        job, seconds = running.job, time.monotonic() - running.began
        succeeded = status == 0 and job.product.exists()
        if succeeded:
            commands = [shown(command) for command in job.commands]
            record = {"key": self.keys[job.name], "seconds": seconds, "commands": commands}
            with write_aside(self._file("done", job, "json")) as file:
                json.dump(record, file, indent=2)
            self.done.add(job.name)
            line = f"{job.name}: {seconds:.0f} s"
        else:
            log = self._file("logs", job, "log")
            self._fail(job, f"{_last_line(log)} (all of it: {log})")
            line = f"failed: {job.name}: {self.failed[job.name]}"
        line = f"[{len(self.done) + len(self.failed)}/{self.total}] {line}"
        print(line, file=sys.stdout if succeeded else sys.stderr, flush=True)

    def _fail(self, job: Job, why: str) -> None:
        """Record the failure of the job, and of all jobs that need it."""
        self.failed[job.name] = why
        for other in [other for other in self.waiting if job.name in other.needs]:
            self.waiting.remove(other)
            self._fail(other, f"needs {job.name}")

    def end(self) -> None:
        """Ask the programs that are still running to stop, and wait for them."""
        for running in self.running:
            running.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE_SECONDS
        for running in self.running:
            try:
                running.process.wait(max(0.0, until - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                with suppress(ProcessLookupError):
                    os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            running.log.close()


def keys(jobs: Sequence[Job]) -> dict[str, str]:
    """Job name -> a hash of its commands and of the keys of all jobs it needs."""
    hashes: dict[str, str] = {}
    for job in jobs:
        content = [[shown(command) for command in job.commands], [hashes[n] for n in job.needs]]
        hashes[job.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return hashes


def seconds_of(out: Path) -> float:
    """The seconds of all finished jobs, added up."""
    return sum(json.loads(path.read_text())["seconds"] for path in (out / "done").glob("*.json"))


def shown(command: Sequence[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["python" if word == sys.executable else word for word in command])


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _environment(places: int) -> dict[str, str]:
    """The environment of a program: programs that run side by side share the cores."""
    own = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // places)),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")])),
    }
    return {**os.environ, **own}
