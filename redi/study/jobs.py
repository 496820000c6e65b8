"""Runs the jobs of a study, several at a time and each only once.

    OUT/journal.jsonl     one line per finished job: its commands, exit status, seconds
    OUT/logs/             what the commands print
    OUT/study.lock        held by the study and by every program it started

A job is skipped if the journal says that its commands, and those of all jobs it needs, succeeded. A
job that was killed runs again, and its programs resume. If only the study was killed, its programs
run on; the next study waits at the lock until they end. When a job fails, the jobs that need it are
not run; all others are.

Left out: several machines; threads. A loop looks at its processes ten times a second.
"""

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from redi.config import Stopped, UserError
from redi.data.files import make_folder
from redi.study.commands import ROOT, Job
from redi.train import StopSignals

LOOK_SECONDS = 0.1
ENTRY = {"job", "kind", "key", "status", "seconds", "ended"}  # fields of a line of the journal
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
    asked to stop; its programs have then ended, too.
    """
    make_folder(out / "logs")
    with _locked(out / "study.lock") as lock, StopSignals() as signals:
        work = _Work(jobs, out, places, lock)
        try:
            while work.waiting or work.running:
                if signals.wanted:
                    done = len(jobs) - len(work.waiting) - len(work.running)
                    raise Stopped(
                        f"{done} of {len(jobs)} jobs are done; the same command resumes them"
                    )
                work.start_what_fits()
                time.sleep(LOOK_SECONDS)
                work.look()
        finally:
            work.end()
    return work.failed


class _Work:
    """The jobs of one call: waiting, running, done, failed."""

    def __init__(self, jobs: Sequence[Job], out: Path, places: int, lock: TextIO):
        self.out, self.places, self.lock = out, places, lock
        self.keys = keys(jobs)
        self.entries = read_journal(out)
        done = [job for job in jobs if self._is_done(job)]
        self.done = {job.name for job in done}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}
        self.bar = tqdm(total=len(jobs), initial=len(done), desc=out.name, disable=None)
        if done and self.waiting:
            print(f"{out}: {len(done)} of {len(jobs)} jobs are done already", flush=True)

    def _is_done(self, job: Job) -> bool:
        entry = self.entries.get(job.name, {"key": None})
        succeeded = entry["key"] == self.keys[job.name] and entry["status"] == 0
        return succeeded and job.product.exists()

    def start_what_fits(self) -> None:
        ready = [job for job in self.waiting if self.done.issuperset(job.needs)]
        for job in ready[: self.places - len(self.running)]:
            self.waiting.remove(job)
            log = open(_log(self.out, job), "a", encoding="utf-8")  # noqa: SIM115 (till it ends)
            running = _Running(job, log)
            self._start(running)
            self.running.append(running)

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
            pass_fds=[self.lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the study, which passes it on
        )

    def look(self) -> None:
        """Start the next command of jobs whose command has ended, or finish them."""
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
        if status == 0 and not job.product.exists():
            status = 1
        entry = {
            "job": job.name,
            "kind": job.kind,
            "key": self.keys[job.name],
            "status": status,
            "seconds": round(seconds, 2),
            "ended": round(time.time(), 2),
            "commands": [shown(command) for command in job.commands],
        }
        self.entries[job.name] = entry
        _append(self.out / "journal.jsonl", entry)
        if status == 0:
            self.done.add(job.name)
            line = f"{job.name}: {seconds:.0f} s"
        else:
            log = _log(self.out, job)
            self._fail(job, f"{_last_line(log)} (all of it: {log})")
            line = f"failed: {job.name}: {self.failed[job.name]}"
        self.bar.n = len(self.done) + len(self.failed)
        self.bar.refresh()
        if self.bar.disable:
            line = f"[{self.bar.n}/{self.bar.total}] {line}"
        if self.bar.disable or status:
            self.bar.write(line, file=sys.stdout if status == 0 else sys.stderr)
            sys.stdout.flush()

    def _fail(self, job: Job, why: str) -> None:
        """Record the failure of the job, and of all jobs that need it."""
        self.failed[job.name] = why
        for other in [other for other in self.waiting if job.name in other.needs]:
            self.waiting.remove(other)
            self._fail(other, f"needs {job.name}")

    def end(self) -> None:
        """Ask the programs that are still running to stop, and wait for them."""
        for running in self.running:
            with suppress(ProcessLookupError):
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
        self.bar.close()


# ---------------------------------------------------------------- the journal


def keys(jobs: Sequence[Job]) -> dict[str, str]:
    """A job's name -> a hash of its commands and of those of all jobs it needs."""
    hashes: dict[str, str] = {}
    for job in jobs:
        content = [[shown(command) for command in job.commands], [hashes[n] for n in job.needs]]
        hashes[job.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return hashes


def read_journal(out: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each job. A line cut short by a kill is left out."""
    path, entries = out / "journal.jsonl", {}
    if path.is_file():
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
            with suppress(ValueError):
                entry = json.loads(line)
                if not isinstance(entry, dict) or not ENTRY.issubset(entry):
                    raise UserError(f"{path}:{number}: not a record of a study; delete the line")
                entries[entry["job"]] = entry
    return entries


def _append(path: Path, entry: dict[str, Any]) -> None:
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last line short
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def shown(command: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["python" if word == sys.executable else word for word in command])


def _log(out: Path, job: Job) -> Path:
    inside = os.path.relpath(job.name, out)
    return out / "logs" / f"{inside.replace(os.sep, '--')}.log"


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


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(
                f"{path.parent}: another study, or a program of one, is running; waiting",
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
