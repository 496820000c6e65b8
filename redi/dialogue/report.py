r"""The report of an evaluation; two evaluations of the same scenarios compared.

    redi dialogue report out/tutor/dialogue                  write report.json, .md and .html again
    redi dialogue report out/sft/dialogue out/redi/dialogue  is the second one better?

    response success     share of the tutor's replies that are good
    suggestion success   the same of its hints
    session success      share of dialogues that the tutor ended and in which no reply is bad
    pass^k               mean over scenarios of C(c, k) / C(n, k): the chance that k of the n
                         sessions of one, of which c succeed, all do

Intervals are the middle 95 % over scenarios drawn with replacement, since the replies of a dialogue
are not independent; by topic, over topics: how far the rate holds for others. The corrected rates
use the judge's TPR and TNR. Left out: a correction for comparing many runs.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from redi.config import UserError, load_toml, parse, program
from redi.data.files import Row, read_rows, write_aside
from redi.dialogue.page import dialogues_page
from redi.dialogue.scenario import Scenario, words_used
from redi.eval.reporting.statistics import DRAWS, LEVEL, interval, permutation_p_value
from redi.tables import Cells, markdown_table, text_table

Success = Callable[[Row], tuple[int, int]]  # row -> how many are good, of how many
SIDES = ("seen", "unseen")
KEYS = {"topics": "topic", "scenarios": "id"}  # of the scenario
MOST_STEPS = 2520  # finer differences of shares are rounded for the test


@dataclass(kw_only=True)
class ReportConfig:
    runs: Annotated[list[str], "folders that redi dialogue evaluate wrote: one, or two to compare"]


# ---------------------------------------------------------------- of one dialogue


def labels(row: Row) -> list[str]:
    """Of the tutor's replies, in order."""
    return [one["label"] for one in row["messages"] + row.get("replies", []) if "label" in one]


def of_replies(row: Row) -> tuple[int, int]:
    return labels(row).count("good"), len(labels(row))


def of_hints(row: Row) -> tuple[int, int]:
    found = [one["hint_label"] for one in row["messages"] if "hint_label" in one]
    return found.count("good"), len(found)


def of_session(row: Row) -> tuple[int, int]:
    """(0, 0) for the state of a recorded dialogue, and without a judge."""
    replies = [message for message in row["messages"] if message["role"] == "assistant"]
    if "end" not in row or len(replies) - len(labels(row)) > ("opening" in row["scenario"]):
        return 0, 0
    good, count = of_replies(row)
    return int(row["end"] == "tutor" and good == count), 1


def blame(row: Row) -> str:
    """For a failed session: the tutor if a reply is bad or was cut; the student if it said nothing
    or was cut; else what ended it."""
    good, count = of_replies(row)
    return "the tutor" if good < count or row["end"] == "length" else row["end"]


RATES = {
    "response success": of_replies,
    "suggestion success": of_hints,
    "session success": of_session,
}
MEASURED = {"response success": "replies", "suggestion success": "hints"}  # in agreement.json


# ---------------------------------------------------------------- of one side of the split


def summed(rows: list[Row], success: Success, key: str = "id") -> dict[str, np.ndarray]:
    """A field of the scenario -> (good, count), where anything counts."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, dtype=int))
    for row in rows:
        sums[row["scenario"][key]] += success(row)
    return {name: pair for name, pair in sums.items() if pair[1]}


def drawn_rates(rows: list[Row], success: Success, key: str, seed: int) -> np.ndarray | None:
    """The bootstrap's rates (DRAWS,), with what has one value of the field drawn as a whole. None
    if there is only one value."""
    pairs = np.array(list(summed(rows, success, key).values()))
    if len(pairs) == 1:
        return None
    shares = np.full(len(pairs), 1 / len(pairs))
    good, count = (np.random.default_rng(seed).multinomial(len(pairs), shares, DRAWS) @ pairs).T
    return good / count


def middle(values: np.ndarray | None) -> list[float] | None:
    return (
        None if values is None else np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    )


def pass_hat(rows: list[Row]) -> dict[str, float]:
    """pass^k for k = 1, 2, 4, ... samples."""
    pairs = [pair.tolist() for pair in summed(rows, of_session).values()]
    most, k, found = min((n for _, n in pairs), default=0), 1, {}
    while k <= most:
        found[f"pass^{k}"] = sum(math.comb(c, k) / math.comb(n, k) for c, n in pairs) / len(pairs)
        k *= 2
    return found


def counts(rows: list[Row]) -> dict[str, float]:
    """What else happened; sorted, so that kinds of a thing are together."""
    found: Counter[str] = Counter(dict.fromkeys(("replies", "tutor's tokens"), 0))
    for row in rows:
        replies = row.get("replies", [m for m in row["messages"] if m["role"] == "assistant"])
        found["replies"] += len(replies)
        found["tutor's tokens"] += row["tokens"]
        found.update(f"fault: {label}" for label in labels(row) if label != "good")
        found["replies cut by their limit"] += sum("cut" in reply for reply in replies)
        if "end" not in row:
            continue
        scenario = Scenario.of(row["scenario"], "scenario")
        found["words to practice"] += len(scenario.words)
        found["words to practice, used"] += len(words_used(scenario, row["messages"]))
        found[f"ended by: {row['end']}"] += 1
        bad = [number for number, label in enumerate(labels(row), 1) if label != "good"]
        found.update(f"first bad reply: {number}" for number in bad[:1])
        if of_session(row) == (0, 1):
            found[f"failed because of: {blame(row)}"] += 1
    dialogues = sum("end" in row for row in rows)
    per = {"replies per dialogue": round(found["replies"] / dialogues, 2)} if dialogues else {}
    sizes = {name: len({row["scenario"][key] for row in rows}) for name, key in KEYS.items()}
    return {**sizes, "dialogues or states": len(rows), **per, **dict(sorted((+found).items()))}


def of_side(rows: list[Row], seed: int) -> Row:
    """What report.json has for it, and the draws that the difference of the sides needs."""
    found = {"rates": {}, "draws": {}}
    for name, success in RATES.items():
        if pairs := summed(rows, success):
            good, count = sum(pairs.values()).tolist()
            draws = {by: drawn_rates(rows, success, key, seed) for by, key in KEYS.items()}
            intervals = {f"interval by {by}": middle(drawn) for by, drawn in draws.items()}
            one = {"rate": good / count, "good": good, "count": count, **intervals}
            found["rates"][name], found["draws"][name] = one, draws["topics"]
    return {**found, "pass^k": pass_hat(rows), "counts": counts(rows)}


# ---------------------------------------------------------------- of an evaluation


class Run(NamedTuple):
    settings: Row  # of redi dialogue evaluate
    rows: list[Row]


def read(out: str | Path) -> Run:
    """Raises UserError."""
    settings = load_toml(Path(out) / "config.toml", f"{out}/config.toml")
    return Run(settings, [row for _, row in read_rows(Path(out) / "dialogues.jsonl")])


def summary(settings: Row, rows: list[Row]) -> Row:
    """The content of report.json."""
    split = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    sides = {side: of_side(some, i) for i, (side, some) in enumerate(split.items()) if some}
    draws = {side: one.pop("draws") for side, one in sides.items()}
    difference = {}
    for name in RATES:
        if all(name in draws.get(side, ()) for side in SIDES):
            seen, unseen = (sides[side]["rates"][name]["rate"] for side in SIDES)
            drawn = [draws[side][name] for side in SIDES]
            change = None if any(one is None for one in drawn) else middle(drawn[1] - drawn[0])
            difference[name] = {"rate": unseen - seen, "interval by topics": change}
    if settings.get("judge_settings"):
        from redi.dialogue.agreement import corrected_rate, read_rates

        known = read_rates(settings["judge_settings"])
        for side, one in sides.items():
            for name, of in one["rates"].items():
                if rates := known.get(f"{side} {MEASURED.get(name)}"):
                    of["corrected"] = corrected_rate(of["rate"], of["count"], rates)
    return {"settings": settings, "sides": sides, "unseen - seen": difference}


def cells(found: Row) -> Cells:
    """The table of a summary."""
    sides = found["sides"].values()
    rows = [["", *found["sides"], "unseen - seen"]]
    for name in RATES:
        of = [one["rates"].get(name) for one in sides] + [found["unseen - seen"].get(name)]
        if not any(of):
            continue
        rows.append([name, *(f"{100 * one['rate']:.1f}" if one else "" for one in of)])
        for line in ("interval by scenarios", "interval by topics", "corrected"):
            values = [one.get(line) if one else None for one in of]
            if any(values):
                rows.append([f"  {line}", *map(_shown, values)])
    for group in ("pass^k", "counts"):
        for name in dict.fromkeys(name for one in sides for name in one[group]):
            values = (one[group].get(name, 0) for one in sides)
            shown = (f"{100 * v:.1f}" if group == "pass^k" else f"{v:,}" for v in values)
            rows.append([name, *shown, ""])
    return rows


def _shown(values: Sequence[float] | None) -> str:
    """In percent: the ends of an interval, or a rate and these."""
    *rate, low, high = [f"{100 * value:.1f}" for value in values or ()] or ["", ""]
    return f"{' '.join(rate)} [{low}, {high}]".strip() if high else ""


def write(out: Path) -> str:
    """Write report.json, report.md and report.html. Returns what to print."""
    settings, rows = read(out)
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


# ---------------------------------------------------------------- two evaluations


def compare(first: Run, second: Run) -> Cells:
    """The second minus the first, paired over scenarios: means over these of the shares that are
    good. Raises UserError if they differ in scenarios, student or judge."""
    for name in ("student", "judge"):
        if first.settings.get(name) != second.settings.get(name):
            raise UserError(f"the two evaluations have different settings of --{name}")
    ids = [{row["scenario"]["id"] for row in run.rows} for run in (first, second)]
    if ids[0] != ids[1]:
        raise UserError("the two evaluations have different scenarios: nothing is paired")
    table = [["second - first, points", "scenarios", "difference", "interval", "p"]]
    for side in SIDES:
        for name in ("session success", "response success"):
            old, new = (
                summed([row for row in run.rows if row["side"] == side], RATES[name])
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
    if len(config.runs) > 2:
        raise UserError(f"runs: expected one or two folders, got {len(config.runs)}")
    if len(config.runs) == 1:
        print(write(Path(config.runs[0])))
    else:
        print(text_table(compare(*map(read, config.runs))))


if __name__ == "__main__":
    main()
