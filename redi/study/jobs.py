"""Runs the jobs of a study: as many at a time as there are places, each only once.

    OUT/journal.jsonl     a line a finished job: its commands, exit status, seconds
    OUT/logs/             what the commands print
    OUT/study.lock        held by the study and by every program it started

A job whose commands, and those of all it needs, are in the journal as done is not run again. One
that a kill interrupted is: the programs go on where they were. A study that was killed alone leaves
its programs behind to end their work; the next one waits for them at the lock. A job that fails
takes along those that need it and no others.

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
from statistics import fmean
from typing import Any, TextIO

from tqdm import tqdm

from redi.config import Stopped, UserError
from redi.data.files import make_folder
from redi.study.commands import ROOT, Job
from redi.train import StopSignals

LOOK_SECONDS = 0.1
ENTRY = {"job", "kind", "key", "status", "seconds", "ended"}  # of a line of the journal
GRACE_SECONDS = 120.0  # to end the step at hand and save a checkpoint, when asked to stop


@dataclass
class _Running:
    job: Job
    log: TextIO
    began: float = field(default_factory=time.monotonic)
    number: int = 0  # of the command at hand
    process: subprocess.Popen | None = None


def run_jobs(jobs: Sequence[Job], out: Path, places: int) -> dict[str, str]:
    """Do what is not done yet, `places` at a time. -> job -> why it failed, or which one that it
    needs did.

    Raises Stopped if the study was asked to stop: its programs were, too, and have ended.
    """
    make_folder(out / "logs")
    with _locked(out / "study.lock") as lock, StopSignals() as signals:
        work = _Work(jobs, out, places, lock)
        try:
            while work.waiting or work.running:
                if signals.wanted:
                    done = len(jobs) - len(work.waiting) - len(work.running)
                    raise Stopped(f"{done} of {len(jobs)} jobs are done; the same command goes on")
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
        self.bar = tqdm(
            total=len(jobs), initial=len(done), desc=out.name, unit="job", disable=None,
            dynamic_ncols=True, bar_format="{desc} {n}/{total} |{bar}| {elapsed}{postfix}",
        )  # fmt: skip
        if done and self.waiting:
            print(f"{out}: {len(done)} of {len(jobs)} jobs are done already", flush=True)

    def _is_done(self, job: Job) -> bool:
        entry = self.entries.get(job.name)
        right = entry and entry["key"] == self.keys[job.name] and entry["status"] == 0
        return bool(right) and job.product.exists()

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
            start_new_session=True,  # Ctrl-C is for the study, which tells its programs
        )

    def look(self) -> None:
        """Go on with the jobs whose command has ended."""
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
            said = f"{job.name}: {seconds:.0f} s"
        else:
            why = f"{_last_line(_log(self.out, job))} (all of it: {_log(self.out, job)})"
            self._fail(job, why)
            said = f"failed: {job.name}: {why}"
        self.bar.n = len(self.done) + len(self.failed)
        self.bar.set_postfix_str(f"{_time(self.seconds_left())} left")
        if self.bar.disable:
            said = f"[{self.bar.n}/{self.bar.total}, {_time(self.seconds_left())} left] {said}"
        if self.bar.disable or status:
            self.bar.write(said, file=sys.stdout if status == 0 else sys.stderr)
            sys.stdout.flush()

    def _fail(self, job: Job, why: str) -> None:
        """The job, and all those that cannot be done without it."""
        self.failed[job.name] = why
        for other in [other for other in self.waiting if job.name in other.needs]:
            self.waiting.remove(other)
            self._fail(other, f"needs {job.name}")

    def seconds_left(self) -> float:
        """By the mean time of jobs of the same kind; of all jobs where none of a kind is done."""
        times: dict[str, list[float]] = {}
        for entry in self.entries.values():
            if entry["status"] == 0:
                times.setdefault(entry["kind"], []).append(entry["seconds"])
        known = {kind: fmean(seconds) for kind, seconds in times.items()}
        usual = fmean(known.values()) if known else 0.0
        now = time.monotonic()
        left = sum(known.get(job.kind, usual) for job in self.waiting)
        for one in self.running:
            left += max(0.0, known.get(one.job.kind, usual) - (now - one.began))
        return left / self.places

    def end(self) -> None:
        """Ask the programs that still run to stop, and wait until they have."""
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
    """A job's name -> a hash of its commands and of those of all jobs before it."""
    found: dict[str, str] = {}
    for job in jobs:
        said = [[shown(command) for command in job.commands], [found[n] for n in job.needs]]
        found[job.name] = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    return found


def read_journal(out: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each job. A line that a kill cut short is left out."""
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
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _environment(places: int) -> dict[str, str]:
    """What programs that run side by side have alike: threads that share the cores."""
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
            print(f"{path.parent}: another study, or what one left behind, is at work; waiting")
            sys.stdout.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
