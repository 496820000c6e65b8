r"""A response -> a verdict: correct, incorrect, no_answer, truncated or timeout.

    "<think>\n...</think> So it is \boxed{\frac{1}{2}}."  against  "0.5"  ->  correct

The answer is the last balanced box after `</think>`; a response that never stopped thinking, or was
cut off at the length limit, has none, whatever it says. Most answers are decided here, as text or
as integers; the rest is algebra (`equivalence.py`), done by worker processes. They may hang, eat
memory or crash: a question that does so ends as "timeout", its worker is replaced, and the next
question finds a fresh one. No Python code can stop a worker inside `5^{5^{5^{5^5}}}`, which holds
the interpreter's lock; the kernel can, so before each question a worker sets an alarm whose action
is its own death. A worker is a new program, not a fork: forking a process that holds threads and a
CUDA context is not safe. It lives in its own session, so that Ctrl-C reaches only the parent, and
sees the parent's end, however that comes, as the end of its input.
Left out: Math-Verify's own extraction, which merges neighbouring boxes and reads unfinished ones,
and its timeouts, which are Python signal handlers and do not interrupt a long integer power.
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from redi.config import UserError
from redi.eval import equivalence

Verdict = Literal["correct", "incorrect", "no_answer", "truncated", "timeout"]
Question = tuple[str, ...]  # an answer and the golds, any of which it may equal

ROOT = str(Path(__file__).resolve().parents[2])  # the folder that holds the package
MEMORY_LIMIT = 2 << 30  # bytes of address space; a comparison needs some 0.2 GiB
LONGEST_ANSWER = 2000  # characters; the longest gold of the five benchmarks has 204
STARTUP_S = 120.0  # importing sympy takes 0.5 s, a minute on a busy network file system

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract(response: str) -> str | None:
    r"""The content of the last balanced, non-empty `\boxed{}` or `\fbox{}` after `</think>`."""
    _, thought, text = response.partition("</think>")
    if not thought:
        return None
    # One pass with a stack, since a looping model writes thousands of boxes that never close.
    best_start, best, opened = -1, None, []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and start > best_start:
                content = text[start : token.start()].strip()
                if content:
                    best_start, best = start, content
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
    return best


def grade(response: str, answer: str | list[str], finish_reason: str = "stop") -> Verdict:
    """Grade one response in a worker shared by the whole process; see `Grader.grade`."""
    return _shared_grader().grade(response, answer, finish_reason)


@functools.cache
def _shared_grader() -> "Grader":
    grader = Grader(workers=1)
    atexit.register(grader.close)
    return grader


class Grader:
    """A pool of workers, started as they are needed. A context manager: leaving it ends them.

    workers: processes at most; limit_s: seconds for one comparison.
    """

    def __init__(self, workers: int = 1, limit_s: float = 10.0):
        assert workers >= 1, f"workers={workers}"
        assert limit_s > 0, f"limit_s={limit_s}"
        self.workers = workers
        self.limit_s = limit_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()  # a worker's pipe holds one conversation

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The grader starts new ones if it is used again."""
        while self._idle:
            self._idle.pop().kill()

    def grade(self, response: str, answer: str | list[str], finish_reason: str = "stop") -> Verdict:
        """The verdict on one response. `answer`: the gold, or several, any of which suffices.

        finish_reason "length" means that generation stopped at its limit of tokens. Raises
        UserError if the worker cannot start (Math-Verify is not installed).
        """
        return self.grade_all([(response, answer, finish_reason)])[0]

    def grade_all(self, items: Iterable[tuple[str, str | list[str], str]]) -> list[Verdict]:
        """Verdicts on (response, answer, finish_reason) items, in their order.

        An answer that occurs many times, as among the samples of one problem, is judged once.
        """
        decided = [_decide(*item) for item in items]
        questions = dict.fromkeys(d for d in decided if isinstance(d, tuple))
        with self._lock:
            verdicts = self._ask(questions)
        return [verdicts[d] if isinstance(d, tuple) else d for d in decided]

    def _ask(self, questions: Iterable[Question]) -> dict[Question, Verdict]:
        queue, verdicts = deque(questions), {}
        busy: dict[_Worker, Question] = {}
        try:
            with selectors.DefaultSelector() as selector:
                while queue or busy:
                    while queue and len(busy) < self.workers:
                        worker = self._take_worker()
                        busy[worker] = queue.popleft()
                        selector.register(worker.replies, selectors.EVENT_READ, worker)
                        worker.send(busy[worker])
                    for key, _ in selector.select():
                        worker = key.data
                        if (verdict := worker.receive()) is None:
                            continue
                        selector.unregister(worker.replies)
                        verdicts[busy.pop(worker)] = verdict
                        if verdict == "timeout":
                            worker.kill()
                        else:
                            self._idle.append(worker)
        finally:
            for worker in busy:
                worker.kill()
        return verdicts

    def _take_worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive():
                return worker
            worker.kill()
        return _Worker(self.limit_s)


def _decide(response: str, answer: str | list[str], finish_reason: str) -> Verdict | Question:
    """The verdict if it needs no algebra, else the question to ask a worker."""
    golds = [answer] if isinstance(answer, str) else list(answer)
    if not golds:
        raise ValueError("a response cannot be graded against an empty list of answers")
    if finish_reason == "length":
        return "truncated"
    given = extract(response)
    if given is None:
        return "no_answer"
    if len(given) > LONGEST_ANSWER:  # prose, or a loop: reading it takes quadratic time
        return "correct" if given in golds else "incorrect"
    key = equivalence.text_key(given)
    if any(equivalence.text_key(gold) == key for gold in golds):
        return "correct"
    number = equivalence.as_integer(given)
    numbers = [equivalence.as_integer(gold) for gold in golds]
    if number is not None and None not in numbers:
        return "correct" if number in numbers else "incorrect"
    return (given, *golds)


class _Worker:
    """One process that runs `serve`, and its two pipes."""

    def __init__(self, limit_s: float):
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from redi.eval.grade import serve; serve({limit_s})"],
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

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, question: Question) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died just now: `receive` says so
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> Verdict | None:
        """Its next reply: a verdict, or None for the greeting after its start. Blocks."""
        # os.read, since a buffered reader would hide a second line from the selector
        lines = os.read(self.replies.fileno(), 4096).decode().splitlines()
        if lines and lines[0] == "ready":
            self._ready = True
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
        assert line in get_args(Verdict), f"worker said {line!r}"
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


# ---------------------------------------------------------------- the worker's side


def serve(limit_s: float) -> None:
    """Answer questions from stdin until it closes.

    A question is a JSON line [answer, gold, ...], a reply one of correct, incorrect, timeout;
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
        verdict = _judge(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=replies)


def _judge(answer: str, *golds: str) -> Verdict:
    for gold in golds:
        try:
            if equivalence.equivalent(gold, answer):
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
