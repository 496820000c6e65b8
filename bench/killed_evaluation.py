r"""What does it cost to kill an evaluation ten times?

    make demo && python -m bench.killed_evaluation out/demo/sft out/demo/benchmark.jsonl

One greedy evaluation runs through; another is killed (SIGKILL) at ten random moments and started
again each time. Both must leave the same bytes in report, completions and verdicts; and the killed
one may compute at most 1.1 times the tokens. Tokens are counted where the model reads them, prompts
and answers, so those of completions that a kill cut off count as well, and so do the prompts read
again. Linux.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.measure import result, write
from redi.config import UserError, program

ROOT = Path(__file__).parent.parent
KILLS = 10
SAMPLES, SLOTS = 8, 16
SEED = 1
NEW_TOKENS = 96
COMPARED = ("report.json", "report.md", "report.html", "completions", "problems", "verdicts")
COUNTED = "from bench.killed_evaluation import evaluate_counted; evaluate_counted()"


def evaluate_counted() -> None:
    """evaluate.py, after a file's name among the arguments: in the file stands how many tokens the
    model has read, in this process and in those before it."""
    from redi import programs
    from redi.model import Layers

    counter = os.open(sys.argv.pop(1), os.O_RDWR | os.O_CREAT)
    total = int(os.pread(counter, 20, 0) or 0)

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(self: object, tokens: Tensor, *rest: Any) -> Any:
            nonlocal total
            total += tokens.numel()
            os.pwrite(counter, b"%020d" % total, 0)  # first: a kill comes within the pass
            return read(self, tokens, *rest)

        return reading

    Layers.forward = counted(Layers.forward)  # prompts, and answers a token per row
    programs.evaluate()


def tokens_read(out: Path) -> int:
    return int(out.with_suffix(".tokens").read_bytes())


def command(model: str, benchmark: str, out: Path) -> list[str]:
    flags = ["--model", model, "--benchmark", benchmark, "--out", out, "--temperature", 0,
             "--samples", SAMPLES, "--slots", SLOTS, "--user-prompt", "plain",
             "--max-new-tokens", NEW_TOKENS]  # fmt: skip
    return [*map(str, [sys.executable, "-c", COUNTED, out.with_suffix(".tokens"), *flags])]


def start(model: str, benchmark: str, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = command(model, benchmark, out)
    return subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)


def made(out: Path) -> int:
    files = (out / "completions").glob("*.unfinished-*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def kill_at(running: subprocess.Popen, out: Path, completions: int) -> None:
    while made(out) < completions:
        if running.poll() is not None:
            raise RuntimeError(f"the evaluation ended with status {running.returncode}")
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    running.kill()
    running.wait()


def finish(running: subprocess.Popen) -> None:
    if running.wait() != 0:
        raise RuntimeError(f"the evaluation ended with status {running.returncode}")


def contents(out: Path) -> dict[str, bytes]:
    files = [f for name in COMPARED for f in (out / name, *(out / name).rglob("*")) if f.is_file()]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@program
def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[2]).is_file():
        raise UserError("usage: python -m bench.killed_evaluation MODEL BENCHMARK.jsonl")
    model, benchmark = (str(Path(argument).resolve()) for argument in sys.argv[1:])
    random.seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        finish(start(model, benchmark, whole))
        count = len(
            (whole / "completions" / f"{Path(benchmark).stem}.jsonl").read_bytes().split(b"\n")
        )
        for place in sorted(random.sample(range(count - 1 - SLOTS), KILLS)):
            kill_at(start(model, benchmark, killed), killed, place)
            print(f"killed with {made(killed)} of {count - 1} completions on disk")
        finish(start(model, benchmark, killed))
        tokens = [tokens_read(out) for out in (whole, killed)]
        before, after = contents(whole), contents(killed)
    different = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    print(f"{len(before)} files, {len(different)} differ {different}")
    print(f"{tokens[0]} tokens in one go, {tokens[1]} with {KILLS} kills")
    write(
        "killed_evaluation",
        {
            "files_that_differ": result([len(different)], 0, "the evaluation that ran through"),
            "tokens": result([tokens[1] / tokens[0]], 1.1, "the evaluation that ran through"),
        },
    )


if __name__ == "__main__":
    main()
