r"""The report of an evaluation, and the comparison of two on the same scenarios.

    redi dialogue report out/tutor/dialogue                  write report.json, .md and .html again
    redi dialogue report out/sft/dialogue out/redi/dialogue  is the second one better?

    response success     share of the tutor's replies that are good
    suggestion success   the same of its hints
    session success      share of dialogues that the tutor ended and in which no reply is bad

Intervals are the middle 95 % over scenarios drawn with replacement, since the replies of a dialogue
are not independent, and over topics: how far the rate holds for other topics. Corrected rates use
the judge's TPR and TNR. Left out: a correction for comparing many runs.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from redi.config import UserError, load_toml, parse, program
from redi.data.files import Row, hash_files, read_rows, write_aside
from redi.data.tokenizer import is_answer
from redi.dialogue.figures import corrected_rate, read_rates
from redi.dialogue.page import dialogues_page, labels
from redi.dialogue.scenario import topic_key
from redi.eval.reporting.statistics import DRAWS, bootstrap, interval, permutation_p_value
from redi.runlog import read_facts
from redi.tables import Cells, markdown_table, text_table

SIDES = ("seen", "unseen")
RESPONSE, SUGGESTION, SESSION = "response success", "suggestion success", "session success"
MEASURED = {RESPONSE: "replies", SUGGESTION: "hints"}  # what agreement.json calls them
KEYS = {"scenarios": "id", "topics": "topic"}  # of the scenario
SETTINGS = "judge's settings"  # among an evaluation's facts
MOST_STEPS = 2520  # finer differences of shares are rounded for the test


@dataclass(kw_only=True)
class ReportConfig:
    runs: Annotated[list[str], "folders that redi dialogue evaluate wrote: one, or two to compare"]


def successes(row: Row) -> dict[str, tuple[int, int]]:
    """Of a dialogue or state, rate -> how many are good, of how many."""
    replies, hints = labels(row), labels(row, "hint_label")
    good, is_session = replies.count("good"), "end" in row
    succeeded = is_session and row["end"] == "tutor" and good == len(replies)
    return {
        RESPONSE: (good, len(replies)),
        SUGGESTION: (hints.count("good"), len(hints)),
        SESSION: (int(succeeded), int(is_session)),
    }


def unit(row: Row, key: str) -> str:
    """What is drawn with this row: the scenario of its id, or its topic."""
    value = row["scenario"][key]
    return topic_key(value) if key == "topic" else value


def summed(rows: list[Row], rate: str, key: str = "id") -> dict[str, np.ndarray]:
    """Value of a field of the scenario -> (good, count), where the count is not 0."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, dtype=int))
    for row in rows:
        sums[unit(row, key)] += successes(row)[rate]
    return {name: pair for name, pair in sums.items() if pair[1]}


def rate_interval(rows: list[Row], rate: str, key: str) -> list[float] | None:
    """Dialogues with the same value of the field are drawn together. None if all have the same."""
    pairs = np.array(list(summed(rows, rate, key).values()))
    if len(pairs) == 1:
        return None
    return bootstrap(lambda drawn: np.divide(*pairs[drawn].sum(0)), len(pairs), DRAWS).tolist()


def counts(rows: list[Row], is_judged: bool) -> dict[str, int]:
    """What else happened. A session failed because of the tutor if a reply is bad or was cut; of
    the student if it said nothing or was cut; else of what ended it."""
    found: Counter[str] = Counter(dict.fromkeys(("replies", "tutor's tokens"), 0))
    for row in rows:
        said = [message for message in row["messages"] if is_answer(message)]
        replies = row.get("replies", said["opening" in row["scenario"] :])
        found["replies"] += len(replies)
        found["tutor's tokens"] += row["tokens"]
        found["replies cut by their limit"] += sum("cut" in reply for reply in replies)
        faults = [label for label in labels(row) if label != "good"]
        found.update(f"fault: {label}" for label in faults)
        if "end" in row:
            found[f"ended by: {row['end']}"] += 1
        if is_judged and successes(row)[SESSION] == (0, 1):
            is_tutors = faults or row["end"] == "length"
            found[f"failed because of: {'the tutor' if is_tutors else row['end']}"] += 1
    sizes = {name: len({unit(row, key) for row in rows}) for name, key in KEYS.items()}
    return {**sizes, "dialogues or states": len(rows), **+found}


def summary(settings: Row, rows: list[Row]) -> Row:
    """The content of report.json."""
    path, sides = settings.get("judge_settings"), {}
    known = read_rates(path) if path else {}
    for side in SIDES:
        some = [row for row in rows if row["side"] == side]
        rates: dict[str, Row] = {}
        for name in (RESPONSE, SUGGESTION, SESSION) if "judge" in settings else ():
            good, count = sum(summed(some, name).values(), np.zeros(2, dtype=int)).tolist()
            if count:
                rates[name] = {
                    "rate": good / count,
                    "good": good,
                    "count": count,
                    **{f"interval by {by}": rate_interval(some, name, KEYS[by]) for by in KEYS},
                }
                if measured := known.get(f"{side} {MEASURED.get(name)}"):
                    rates[name]["corrected"] = corrected_rate(good / count, count, measured)
        if some:
            sides[side] = {"rates": rates, "counts": counts(some, "judge" in settings)}
    return {"settings": settings, "sides": sides}


def cells(found: Row) -> Cells:
    """The table of a summary, rates in percent."""
    sides = found["sides"].values()
    rows = [["", *found["sides"]]]
    for name in (RESPONSE, SUGGESTION, SESSION):
        rates = [one["rates"].get(name, {}) for one in sides]
        for line in ("rate", *(f"interval by {by}" for by in KEYS), "corrected"):
            values = [_percent(one[line]) if line in one else "" for one in rates]
            rows += [[name if line == "rate" else f"  {line}", *values]] if any(values) else []
    # By name, so that all kinds of a fault are together.
    for name in sorted({name for one in sides for name in one["counts"]}):
        rows.append([name, *(f"{one['counts'].get(name, 0):,}" for one in sides)])
    return rows


def _percent(value: float | Sequence[float] | None) -> str:
    """Of a rate, of the ends of an interval, or of a rate and these. None: see corrected_rate."""
    if not isinstance(value, Sequence):
        return "none fits" if value is None else f"{100 * value:.1f}"
    *rate, low, high = (f"{100 * one:.1f}" for one in value)
    return f"{' '.join(rate)} [{low}, {high}]".strip()


# ---------------------------------------------------------------- evaluations in folders


class Run(NamedTuple):
    settings: Row  # of redi dialogue evaluate
    rows: list[Row]
    facts: dict[str, str]  # hashes of what else the result depends on


def read(out: str | Path) -> Run:
    """Raises UserError."""
    settings = load_toml(Path(out) / "config.toml", f"{out}/config.toml")
    rows = [row for _, row in read_rows(Path(out) / "dialogues.jsonl")]
    return Run(settings, rows, read_facts(Path(out)))


def write(out: Path) -> str:
    """Write report.json, report.md and report.html. Returns what to print. Raises UserError if the
    judge's settings are not those that it judged with."""
    settings, rows, facts = read(out)
    path = settings.get("judge_settings")
    if path and hash_files([Path(path)])[:16] != facts.get(SETTINGS):
        raise UserError(f"{path}: changed since {out} was evaluated")
    found = summary(settings, rows)
    table, title = cells(found), settings["model"]
    about = f"Student: {settings['student']}. Judge: {settings.get('judge', 'none')}. Rates in %."
    contents = {
        "report.json": json.dumps(found, indent=2) + "\n",
        "report.md": f"# {title}\n\n{about}\n\n{markdown_table(table)}\n",
        "report.html": dialogues_page(title, about, table, rows),
    }
    for name, content in contents.items():
        with write_aside(out / name) as file:
            file.write(content)
    return f"{text_table(table)}\nsaved {out}/report.html, .md and .json"


def compare(first: Run, second: Run) -> Cells:
    """The second minus the first, paired over scenarios: means over these of the shares that are
    good. Raises UserError if they differ in scenarios, student or judge, or have no judge."""
    for name in ("student", "judge"):
        if first.settings.get(name) != second.settings.get(name):
            raise UserError(f"the two evaluations have different settings of --{name}")
    if "judge" not in first.settings:
        raise UserError("the two evaluations have no --judge: there are no labels to compare")
    for name in (SETTINGS, *(f"{who}'s weights" for who in ("judge", "student"))):
        if first.facts.get(name) != second.facts.get(name):
            raise UserError(f"the two evaluations have different contents of the {name}")
    scenes = [{(r["side"], json.dumps(r["scenario"])) for r in run.rows} for run in (first, second)]
    if scenes[0] != scenes[1]:
        raise UserError("the two evaluations have different scenarios or sides: nothing is paired")
    table = [["second - first, points", "scenarios", "difference", "interval", "p"]]
    for side in SIDES:
        for name in (SESSION, RESPONSE):
            old, new = (
                summed([row for row in run.rows if row["side"] == side], name)
                for run in (first, second)
            )
            shares = [new[id][0] / new[id][1] - old[id][0] / old[id][1] for id in old if id in new]
            if shares:
                # In a unit in which the shares of sessions are whole
                unit = math.lcm(*(int(count) for _, count in (*old.values(), *new.values())))
                steps = [round(min(unit, MOST_STEPS) * share) for share in shares]
                low, high = (f"{100 * end:+.1f}" for end in interval(shares))
                mean, p = 100 * sum(shares) / len(shares), permutation_p_value(steps)
                cells = [str(len(shares)), f"{mean:+.1f}", f"[{low}, {high}]", f"{p:.2g}"]
                table.append([f"{name}, {side}", *cells])
    return table


@program
def main() -> None:
    config = parse(ReportConfig, "Report an evaluation, or compare two.")
    if len(config.runs) == 1:
        print(write(Path(config.runs[0])))
    elif len(config.runs) == 2:
        print(text_table(compare(*map(read, config.runs))))
    else:
        raise UserError(f"runs: expected one or two folders, got {len(config.runs)}")


if __name__ == "__main__":
    main()
