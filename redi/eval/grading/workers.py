r"""Processes that compare answers, and may be killed while they do.

    with Pool(workers=2, limit_s=10.0) as pool:
        pool.ask([("math-verify", r"\frac{2}{4}", "0.5")])     (rule, answer, gold, ...) -> reply

Comparing two answers is algebra, which may hang, eat memory or crash. Such a question ends as
"timeout", and the next one gets a fresh worker. Python code cannot stop a worker inside
`5^{5^{5^{5^5}}}`, which holds the interpreter's lock; the kernel can, so a worker sets an alarm
before each question whose default action is its death. If a library turns the alarm off, the parent
kills the worker a little later. A worker is a new program, since forking a process with threads and
a CUDA context is not safe. It has its own session, so Ctrl-C reaches only the parent, and it ends
when the parent closes its input.
Left out: Math-Verify's own timeouts, Python signal handlers that cannot interrupt a long power.
"""

import contextlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from redi.config import UserError
from redi.eval.grading import equivalence, paper_grader

Reply = Literal["correct", "incorrect", "timeout"]
Question = tuple[str, ...]  # a rule, an answer and the golds, any of which it may equal

RULES = {
    "math-verify": equivalence.equivalent,
    "paper": paper_grader.equal,
    "readable": lambda gold, _: equivalence.is_readable(gold),  # asked of golds, not of answers
}
ROOT = str(Path(__file__).resolve().parents[3])  # the folder that holds the package
MEMORY_LIMIT = 2 << 30  # bytes of address space; a comparison needs some 0.2 GiB
STARTUP_S = 120.0  # importing sympy takes 0.5 s, a minute on a busy network file system
GRACE_S = 5.0  # from a worker's own limit to the parent's


class Pool:
    """Workers, started as they are needed. A context manager: leaving it ends them.

    workers: processes at most; limit_s: seconds for one question.
    """

    def __init__(self, workers: int, limit_s: float):
        assert workers >= 1, f"workers={workers}"
        assert limit_s > 0, f"limit_s={limit_s}"
        self.workers = workers
        self.limit_s = limit_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()  # a worker's pipe holds one conversation

    def close(self) -> None:
        """End the workers. The pool starts new ones if it is used again."""
        while self._idle:
            self._idle.pop().kill()

    def ask(self, questions: Iterable[Question]) -> dict[Question, Reply]:
        """A reply to each. Raises UserError if a worker cannot start."""
        queue, replies = deque(dict.fromkeys(questions)), {}
        busy: dict[_Worker, Question] = {}
        with self._lock:
            try:
                with selectors.DefaultSelector() as selector:
                    while queue or busy:
                        while queue and len(busy) < self.workers:
                            worker = self._take_worker()
                            busy[worker] = queue.popleft()
                            selector.register(worker.replies, selectors.EVENT_READ, worker)
                            worker.send(busy[worker])
                        # A late worker is killed; the end of its output is then an event as well.
                        for key, _ in selector.select(GRACE_S):
                            worker = key.data
                            if (reply := worker.receive()) is None:
                                continue
                            selector.unregister(worker.replies)
                            replies[busy.pop(worker)] = reply
                            if reply == "timeout":
                                worker.kill()
                            else:
                                self._idle.append(worker)
                        for worker in busy:
                            worker.end_if_late()
            finally:
                for worker in busy:
                    worker.kill()
        return replies

    def _take_worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive():
                return worker
            worker.kill()
        return _Worker(self.limit_s)


class _Worker:
    """One process that runs `serve`, and its two pipes."""

    def __init__(self, limit_s: float):
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from redi.eval.grading.workers import serve; serve({limit_s})",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
                # sympy's order of terms follows hashes: a verdict must not change between runs
                "PYTHONHASHSEED": "0",
            },
        )
        self.replies = self._process.stdout
        self._ready = False
        self._limit_s = limit_s
        self._deadline = time.monotonic() + STARTUP_S + GRACE_S

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, question: Question) -> None:
        if self._ready:
            self._deadline = time.monotonic() + self._limit_s + GRACE_S
        with contextlib.suppress(BrokenPipeError):  # it died just now: `receive` says so
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> Reply | None:
        """Its next reply: a verdict, or None for the greeting after its start. Blocks."""
        # os.read, since a buffered reader would hide a second line from the selector
        lines = os.read(self.replies.fileno(), 4096).decode().splitlines()
        if lines and lines[0] == "ready":
            self._ready = True
            self._deadline = time.monotonic() + self._limit_s + GRACE_S
            lines = lines[1:]
            if not lines:
                return None
        line = lines[0] if lines else ""
        if not self._ready:
            raise UserError(
                f"grading: the worker that runs Math-Verify did not start "
                f"({line or 'it died'}); pip install -r requirements.txt"
            )
        if line == "":
            return "timeout"  # killed by its alarm, or by what the comparison did to it
        assert line in get_args(Reply), f"worker said {line!r}"
        return line

    def end_if_late(self) -> None:
        if time.monotonic() > self._deadline:
            self._process.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


# ---------------------------------------------------------------- the worker's side


def serve(limit_s: float) -> None:
    """Answer questions from stdin until it closes.

    A question is a JSON line [rule, answer, gold, ...], a reply one of correct, incorrect, timeout;
    before them comes `ready`, or why not. A question that takes limit_s seconds ends the process.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not a reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, STARTUP_S)
    logging.disable()  # Math-Verify warns that its timeouts are off
    try:
        equivalence.equivalent("x", "2x")  # imports it all, and builds the parser's tables
        _limit_memory()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=replies)
        return
    print("ready", file=replies)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        reply = judge(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=replies)


def judge(rule: str, answer: str, *golds: str) -> Reply:
    for gold in golds:
        try:
            if RULES[rule](gold, answer):
                return "correct"
        except MemoryError:
            return "timeout"
        except Exception:
            continue  # what cannot be read or compared is not this gold
    return "incorrect"


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
