"""The table "What fits where" of docs/running.md, by `redi trace`: minutes on a CPU, no GPU.

python docs/make_fits.py
"""

import json
import subprocess
import sys
import tempfile
from math import floor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from redi.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
MACHINES = {  # GPU, number of them -> further flags of training
    ("A100", 8): [],
    ("H100", 8): [],
    ("H200", 1): [],
    ("RTX 4090", 1): ["--offload"],
}
HEADER = (
    "GPUs", "program and flags", "peak / formula, GiB", "blocks kept", "tokens/s at most / likely",
    "minutes at least / likely",
)  # fmt: skip


def row(gpu: str, gpus: int, command: list[str]) -> tuple[str, ...]:
    """Trace a run. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        machine = ["--gpu", gpu, "--gpus", str(gpus), "--save", str(file)]
        run = [sys.executable, "-m", "redi", "trace", *command, *machine]
        subprocess.run(run, check=True, stdout=sys.stderr, cwd=ROOT)
        found = json.loads(file.read_text(encoding="utf-8"))
    speed, memory, kept = found["run"], f"{found['peak_gib']:.1f}", ""
    if "kept" in found:  # of training
        memory += f" / {found['formula_gib']:.1f}"
        kept = f"{found['kept']} of {found['kept'] + found['checkpointed']}"
    memory += f" of {found['memory_gib']:.1f}"
    memory += "" if found.get("fits", True) else ": does not fit"
    return (
        f"{gpus} x {gpu}", f"`{' '.join(command)}`", memory, kept,
        f"{speed['tokens_per_second']:,.0f} / {speed['likely_tokens_per_second']:,.0f}",
        f"{floor(speed['minutes']):,} / {floor(speed['likely_minutes']):,}",
    )  # fmt: skip


if __name__ == "__main__":
    rows = [
        row(gpu, gpus, [program, *(flags if program != "evaluate" else [])])
        for (gpu, gpus), flags in MACHINES.items()
        for program in ("train-sft", "train-redi", "evaluate")
    ]
    print(markdown_table([HEADER, *rows]))
