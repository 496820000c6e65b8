"""What importing the trainer costs, in CPU seconds beyond `import torch` (C18).

    python -m bench.import_time        about two minutes on one core

Each import runs in a fresh interpreter with one thread; `import torch` is measured beside it every
round and taken off. Ours is train_redi.py imported whole; the peer is TRL's SFTTrainer and
DPOTrainer. Both lists show what a program pays before its first line of work.
"""

import json
import os
import statistics
import subprocess
import sys

from bench.measure import result, write

ROUNDS = 7
TORCH, OURS, PEER = "torch", "train_redi", "trl's trainers"
IMPORTS = {
    TORCH: "import torch",
    OURS: "import torch; import train_redi",
    PEER: "import torch; from trl import DPOTrainer, SFTTrainer",
}
REPORT = "import json, os, sys; print(json.dumps([sum(os.times()[:2]), sorted(sys.modules)]))"


def run(statement: str) -> tuple[float, set[str]]:
    """(user and system seconds of a fresh interpreter that does this, modules it then has)."""
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; {REPORT}"],
        env={**os.environ, **one_thread},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return seconds, set(modules)


def main() -> None:
    modules = {name: run(statement)[1] for name, statement in IMPORTS.items()}  # files get cached
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    order = list(IMPORTS)
    for _ in range(ROUNDS):
        for name in order:
            seconds[name].append(run(IMPORTS[name])[0])
        order.reverse()
    beyond = {
        name: [took - torch for took, torch in zip(seconds[name], seconds[TORCH])]
        for name in (OURS, PEER)
    }
    print(f"{'import':<18}{'CPU s':>7}{'beyond torch':>14}{'modules':>9}")
    for name in IMPORTS:
        line = f"{name:<18}{statistics.median(seconds[name]):>7.2f}"
        if name in beyond:
            added = len(modules[name] - modules[TORCH])
            line += f"{statistics.median(beyond[name]):>14.2f}{added:>9,}"
        print(line)
    peer = f"{PEER}: {statistics.median(beyond[PEER]):.2f} s"
    results = {"C18": result(beyond[OURS], 0.3, peer), "C18_peer": result(beyond[PEER], None, PEER)}
    entry = results["C18"]
    print(f"\nC18  {entry['median']:.2f} s ({entry['min']:.2f} to {entry['max']:.2f})  goal 0.3")
    write("import_time", results)


if __name__ == "__main__":
    main()
