"""Stages of a demonstration that takes hours: commands that users have, each run once."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Stages:
    """Runs commands, and remembers how long they took."""

    def __init__(self, out: Path):
        self.out, self.file = out, out / "times.json"
        self.times = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def run(self, made: str, *commands: str) -> None:
        """Run commands that make OUT/`made`, unless it is there. {out} in a command is OUT."""
        if (self.out / made).exists():
            return
        for command in commands:
            words = [word.format(out=self.out) for word in command.split()]
            print(f"$ python -m {' '.join(words)}", flush=True)
            began = time.monotonic()
            status = call([sys.executable, "-m", *words])
            self.times[made] = self.times.get(made, 0) + round(time.monotonic() - began)
            self.file.write_text(json.dumps(self.times, indent=1))
            if status:
                sys.exit(status)  # its own message is enough


def call(words: list[str]) -> int:
    """Run a command, and wait for its end even after Ctrl-C: a trainer that gets the same Ctrl-C
    saves a checkpoint first. Returns its exit status."""
    with subprocess.Popen(words, cwd=ROOT) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()
