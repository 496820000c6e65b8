r"""Processes that compare answers, and may be killed while they do.

    pool = Pool(processes=2, limit_s=10.0)
    pool.ask([("math-verify", r"\frac{2}{4}", "0.5")])     (rule, answer, gold, ...) -> reply

Comparing two answers is algebra, which may hang, eat memory or crash. Nothing in Python can
interrupt `5^{5^{5^{5^5}}}`, which holds the interpreter's lock, so the parent kills a worker that
is late, replies "timeout" and starts another one. A worker is a new program that imports what
compares answers and nothing else: forking a process with threads and a CUDA context is not safe,
and the spawn method of multiprocessing would import the parent's program, and torch with it.
"""

import contextlib
import json
import logging
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from redi.config import UserError
from redi.eval.grading import equivalence, paper_grader

Reply = Literal["correct", "incorrect", "timeout"]
Question = tuple[str, ...]  # a rule, an answer and the golds, any of which it may equal

RULES = {
    "math-verify": equivalence.equivalent,
    "paper": paper_grader.equal,
    "readable": lambda gold, _: equivalence.is_readable(gold),  # a question about golds
}
ROOT = str(Path(__file__).resolve().parents[3])  # the folder that holds the package
MEMORY_LIMIT = 2 << 30  # bytes of address space; a comparison needs some 0.2 GiB
MOST_SECONDS = 86_400.0  # as a limit for one question; timers overflow at two million
STARTUP_S = 120.0  # importing sympy takes 0.5 s, a minute on a busy network file system


class Pool(contextlib.AbstractContextManager):
    """Up to `processes` workers, started as they are needed; limit_s: seconds for one question.
    Threads may share a pool. A context manager: leaving it ends the workers."""

    def __init__(self, processes: int = 1, limit_s: float = 10.0):
        self.limit_s = limit_s
        self._threads = ThreadPoolExecutor(processes)  # each waits for its own worker
        self._of_thread = threading.local()
        self._workers: set[_Worker] = set()

    def close(self, *_: object) -> None:
        """End the workers. The pool starts new ones if it is used again."""
        while self._workers:
            self._workers.pop().kill()

    __exit__ = close

    def ask(self, questions: Iterable[Question]) -> dict[Question, Reply]:
        """A reply to each question. Raises UserError if a worker cannot start."""
        questions = list(dict.fromkeys(questions))
        try:
            return dict(zip(questions, self._threads.map(self._ask, questions)))
        except BaseException:  # Ctrl-C too: a thread whose worker is killed stops waiting
            self.close()
            raise

    def _ask(self, question: Question) -> Reply:
        worker: _Worker | None = getattr(self._of_thread, "worker", None)
        if worker is None or worker.process.poll() is not None:
            worker = self._of_thread.worker = _Worker(self.limit_s)
            self._workers.add(worker)
            if (message := worker.receive(STARTUP_S)) != "ready":
                raise UserError(
                    "grading: the worker that runs Math-Verify did not start "
                    f"({message or 'it died or hung'}); pip install 'math-verify[antlr4_13_2]'"
                )
        with contextlib.suppress(OSError):  # it died just now, and `receive` will say so
            worker.connection.send_bytes(json.dumps(question).encode())
        reply = worker.receive(self.limit_s)
        if reply is None:
            worker.kill()
            self._workers.discard(worker)
        return reply or "timeout"


class _Worker:
    """One process that runs `serve`, and the connection to it."""

    def __init__(self, limit_s: float):
        self.connection, theirs = multiprocessing.connection.Pipe()
        call = f"serve({theirs.fileno()}, {limit_s})"
        path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            # -P: a file in the working folder does not stand in for a module of the same name
            [sys.executable, "-P", "-c", f"from {__name__} import serve; {call}"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the parent, which kills its workers
            # sympy's order of terms follows hashes: a verdict must not change between runs
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
        theirs.close()

    def receive(self, seconds: float) -> str | None:
        """Its next message; None if it dies, or if there is none for so many seconds."""
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll(seconds):
                return self.connection.recv_bytes().decode()
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------- in the worker


def serve(descriptor: int, limit_s: float) -> None:
    """Answer questions, JSON lists [rule, answer, gold, ...], until the parent closes the
    connection. The first message to the parent is "ready", or why there will be no replies."""
    connection = multiprocessing.connection.Connection(descriptor)
    logging.disable()  # Math-Verify warns that its timeouts are off
    try:
        equivalence.equivalent("x", "2x")  # imports it all, and builds the parser's tables
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(ValueError):  # a hard limit below ours stays as it is
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))
    except Exception as error:
        connection.send_bytes(f"{type(error).__name__}: {error}".replace("\n", " ").encode())
        return
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError):
        while True:
            question = json.loads(connection.recv_bytes())
            # If the parent was killed, nobody enforces the limit: then this timer ends the worker.
            signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
            reply = judge(*question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(reply.encode())


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
