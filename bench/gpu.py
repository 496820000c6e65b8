"""What redi does on a GPU: right first, then how fast and how large (G1 to G9).

    python -m bench.gpu               everything, in under ten minutes, on a machine with one GPU
    python -m bench.gpu G3            one part, in this process, with its whole traceback

    G9            bf16 is right on the device (bench.gpu_checks)
    G1            the head's loss: milliseconds, and G2, bytes, beside Liger (bench.gpu_loss)
    G3            packed attention beside flex attention and the raw op (bench.gpu_attention)
    G4, G5        SFT and REDI at Qwen2.5-Math-1.5B's size, tokens a second (bench.gpu_steps)
    G7            decoding 256 rows, beside the bandwidth limit and transformers (bench.gpu_decode)
    G8            a PROJECTION of the whole evaluation's hours, from a slice of it
    G6            the peak of a step beside redi.memory's formula
    G4_compiled   G4 with compiled blocks, for scale
    G4_TRL, ...   TRL on the same rows (bench.gpu_trl)

Every part is a process of its own: it has the GPU to itself, gives back all of it, and one that
breaks breaks no other. A part that needs more time than is left is skipped, and one that takes more
than it was given is ended; a peer that is not installed is skipped: a line says each. What breaks
is told in a line, the others go on, and the exit status is 1 at the end, as it is when a check of
G9 misses its goal.

Clocks, power and other people's work on the GPU are taken as they are: compare ratios, which were
measured in one run.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import torch

from bench.gpu_meter import Entries
from bench.measure import write
from redi.config import UserError, one_line, program

TOTAL_SECONDS = 550.0  # of the parts; starting and the table take some more
ROOT = Path(__file__).parent.parent
TRL = ("trl", "datasets", "accelerate", "transformers")


@dataclass(frozen=True)
class Part:
    """A process of its own."""

    run: str  # module.function of bench: device -> entries
    seconds: float  # it is given; with less left it is not begun
    needs: tuple[str, ...] = ()  # packages without which there is nothing to run


PARTS = {  # in this order: what matters most comes first
    "G9": Part("gpu_checks.run", 90),
    "G1": Part("gpu_loss.run", 90),
    "G3": Part("gpu_attention.run", 120),
    "G4": Part("gpu_steps.sft", 100),
    "G5": Part("gpu_steps.redi", 100),
    "G7": Part("gpu_decode.decode", 120),
    "G4_TRL": Part("gpu_trl.sft", 150, TRL),
    "G5_TRL": Part("gpu_trl.dpo", 150, TRL),
    "G8": Part("gpu_decode.evaluation", 110),
    "G6": Part("gpu_steps.peaks", 100),
    "G4_compiled": Part("gpu_steps.sft_compiled", 100),
    "G4_TRL_flex": Part("gpu_trl.sft_flex", 120, TRL),
}
RATIOS = {  # id -> ours, the peers of which the fastest counts, the goal
    "G4": ("G4_tok_s", ("G4_TRL_tok_s", "G4_TRL_flex_tok_s"), 1.5),
    "G5": ("G5_tok_s", ("G5_TRL_tok_s",), 2.5),
}
MORE_IS_BETTER = {"G3", "G4", "G5", "G4_tok_s", "G5_tok_s"}
MORE_IS_BETTER |= {"G7_4k", "G7_8k", "G7_4k_HF", "G7_8k_HF"}


# ---------------------------------------------------------------- one part, in this process


def function_of(name: str) -> Callable[[torch.device], Entries]:
    module, _, function = PARTS[name].run.partition(".")
    return getattr(importlib.import_module(f"bench.{module}"), function)


def run_here(name: str) -> int:
    """Run a part, and print {"results": ...} or {"failed": ...} as the last line; exit status."""
    try:
        outcome = {"results": function_of(name)(torch.device("cuda", 0))}
    except Exception as error:
        traceback.print_exc()
        outcome = {"failed": told(error)}
    print(json.dumps(outcome), flush=True)
    return int("failed" in outcome)


def told(error: Exception) -> str:
    """What broke, and the last line of ours that it went through, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [f for f in frames if f.filename.startswith((f"{ROOT}/bench", f"{ROOT}/redi"))]
    where = f" ({Path(here[-1].filename).name}:{here[-1].lineno})" if here else ""
    return f"{type(error).__name__}: {one_line(str(error))[:200]}{where}"


# ---------------------------------------------------------------- all parts, a process each


@dataclass
class Session:
    """What came of the parts so far."""

    results: Entries
    failed: list[str]
    ends: float  # when all has to be over, by time.monotonic

    def take(self, name: str, part: Part) -> None:
        left = self.ends - time.monotonic()
        if missing := [package for package in part.needs if not find_spec(package)]:
            print(f"{name}: skipped: {', '.join(missing)} not installed")
        elif left < part.seconds:
            print(f"{name}: skipped: may take {part.seconds:.0f} s, and {left:.0f} s are left")
        else:
            began = time.monotonic()
            outcome = in_process([sys.executable, "-m", "bench.gpu", name], part.seconds)
            self.results |= outcome.get("results", {})
            if problem := outcome.get("failed"):
                self.failed.append(name)
                print(f"{name}: failed: {problem}")
            print(f"{name}: {time.monotonic() - began:.0f} s\n", flush=True)


def in_process(command: list[str], seconds: float) -> dict:
    """Run a part's command and print what it prints; -> its last line, or why there is none."""
    # Files, not pipes: a compiler that outlives the part would hold those open. A session of their
    # own, so that they can be ended with it.
    with tempfile.TemporaryFile() as shown, tempfile.TemporaryFile() as errors:
        part = subprocess.Popen(
            command, cwd=ROOT, stdout=shown, stderr=errors, start_new_session=True
        )
        try:
            part.wait(seconds)
            why = f"exit status {part.returncode}"
        except subprocess.TimeoutExpired:
            why = f"took more than {seconds:.0f} s and was ended"
        finally:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
                part.wait()
        lines, last_words = (lines_of(file) for file in (shown, errors))
    ended_well = bool(lines) and lines[-1].startswith(('{"results"', '{"failed"'))
    outcome = lines.pop() if ended_well else ""  # whatever happened to it on its way out
    if lines:
        print("\n".join(lines))
    last_word = f": {last_words[-1][:200]}" if last_words else ""
    return json.loads(outcome) if ended_well else {"failed": one_line(why + last_word)}


def lines_of(file: BinaryIO) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


# ---------------------------------------------------------------- ratios, table


def ratios(results: Entries) -> Entries:
    """Ours over the fastest peer that ran, from both sides' speeds."""
    found: Entries = {}
    for name, (ours, names, goal) in RATIOS.items():
        peers = [results[peer] for peer in names if peer in results]
        if ours in results and peers:
            mine, peer = results[ours], max(peers, key=lambda entry: entry["median"])
            found[name] = {
                "median": mine["median"] / peer["median"],
                "min": mine["min"] / peer["max"],
                "max": mine["max"] / peer["min"],
                "n": min(mine["n"], peer["n"]),
                "goal": goal,
                "peer": peer["peer"],
            }
    return found


def missed(name: str, entry: dict) -> bool:
    if entry["goal"] is None:
        return False
    if name in MORE_IS_BETTER:
        return not entry["median"] >= entry["goal"]
    return not entry["median"] <= entry["goal"]  # so that nan misses


def table(results: Entries) -> str:
    lines = [f"{'':<26}{'median':>11}{'min':>11}{'max':>11}{'goal':>12}   over, or in"]
    for name, entry in results.items():
        numbers = "".join(f"{entry[key]:>11.4g}" for key in ("median", "min", "max"))
        sign = ">=" if name in MORE_IS_BETTER else "<="
        goal = "-" if entry["goal"] is None else f"{sign} {entry['goal']:.4g}"
        verdict = "  MISSED" if missed(name, entry) else ""
        lines.append(f"{name:<26}{numbers}{goal:>12}   {entry['peer']}{verdict}")
    return "\n".join(lines)


@program
def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: bench.gpu measures on a GPU; the other benches do not")
    if sys.argv[1:]:
        if sys.argv[1] not in PARTS:
            raise UserError(f"no part {sys.argv[1]!r}; there are {', '.join(PARTS)}")
        sys.exit(run_here(sys.argv[1]))
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}\n", flush=True)
    session = Session({}, [], time.monotonic() + TOTAL_SECONDS)
    for name, part in PARTS.items():
        session.take(name, part)
    results = session.results | ratios(session.results)
    if results:
        print(table(results))
        write("gpu", results)
    wrong = [name for name in results if name.startswith("G9") and missed(name, results[name])]
    for what, names in (("failed", session.failed), ("not right", wrong)):
        if names:
            print(f"{what}: {', '.join(names)}")
    sys.exit(int(bool(session.failed or wrong)))


if __name__ == "__main__":
    main()
