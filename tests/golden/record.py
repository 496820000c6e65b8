"""Record the golden files: the results of the runs in runs.py.

    python tests/golden/record.py

They were recorded at commit 760cfaf; tests/test_golden.py compares them with today's results.
Record them again only when a change of numbers is intended, and say in the commit which numbers
change and why.

    steps.json           loss and gradient norm of each step, and the final log-probs, per objective
                         and number of ranks
    completions.json     token ids and texts, per way of sampling
    prepared.json        positives.jsonl, pairs.jsonl and the counts of card.json, per set of rules

Floats keep all their digits.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from runs import record

HERE = Path(__file__).parent


def write(name: str, value: Any) -> None:
    """Write JSON with every list of numbers on one line, so that a diff is readable."""
    text = json.dumps(value, indent=1)
    text = re.sub(r"\[\s+(-?\d[^][{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recorded = record(Path(folder))
    for name, value in recorded.items():
        write(name, value)
        print(HERE / f"{name}.json")


if __name__ == "__main__":
    main()
