"""Fill the figures of bench/results/*.json into the tables of docs/measured.md and README.md.

    python docs/make_measured.py

The pages hold the words, the results the figures. A table row whose first cell is the id of a
result gets its figures in the columns `median`, `range` and `goal`; one whose first cell is the
name of a results file gets its machine and versions. A goal keeps the sign that the page gives it.
A figure that misses its goal becomes bold, and one that is not in the results "not measured".
"""

import json
import math
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs/measured.md", ROOT / "README.md")
ID = re.compile(r"[CDG]\d+\w*|\w+\.json")  # of a result or a file that may not be there yet
FILLED = ("median", "range", "goal", "machine", "python", "torch", "transformers", "trl")


def results() -> dict[str, dict[str, Any]]:
    """Id -> the entry of a result, and file name -> its machine and versions."""
    found = {}
    for path in sorted((ROOT / "bench/results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine"]
        on = {"machine": f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores"}
        found |= content["results"] | {path.name: on | content["versions"]}
    return found


def number(value: float) -> str:
    """Three digits: 0.0943, 1.00, 30000."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def cell(column: str, before: str, entry: dict[str, Any]) -> str:
    """The text of a cell. before: the text that it has."""
    if column not in ("median", "range", "goal"):
        return entry.get(column, "-")
    if "median" not in entry:
        return {"median": "not measured", "range": "", "goal": before}[column]
    if column == "range":
        return f"{number(entry['min'])} to {number(entry['max'])}" if entry["n"] > 1 else ""
    sign, goal = before.partition(" ")[0], entry["goal"]
    if column == "goal":
        return f"{sign} {goal:g}" if goal is not None else ""
    return number(entry["median"])


def missed(sign: str, entry: dict[str, Any]) -> bool:
    if entry.get("goal") is None or sign not in ("≤", "≥"):
        return False
    least, most = (entry["goal"], math.inf) if sign == "≥" else (-math.inf, entry["goal"])
    return not least <= entry["median"] <= most


def filled(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with its figures as they are in the results."""
    lines, columns = [], []
    for line in page.splitlines():
        cells = [text.strip() for text in line.strip("|").split("|")] if line[:1] == "|" else []
        if cells and (cells[0] in found or ID.fullmatch(cells[0])):
            entry = found.get(cells[0], {})
            named = zip(columns, cells, strict=True)
            cells = [cell(name, text, entry) if name in FILLED else text for name, text in named]
            sign = dict(zip(columns, cells)).get("goal", "").partition(" ")[0]
            if missed(sign, entry):
                cells[columns.index("median")] = f"**{number(entry['median'])}**"
            line = f"| {' | '.join(cells)} |"
        elif not set("".join(cells)) <= set("-:"):
            columns = cells  # the header of the rows that follow
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8"), results()), encoding="utf-8")
