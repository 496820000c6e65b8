"""How far a judge agrees with labels, and what that says about a rate that it measured.

    redi dialogue agreement out/judge test.jsonl --unseen unseen.jsonl --dev dev.jsonl
    redi dialogue agreement out/second_tutor test.jsonl --kind likelihood --dev dev.jsonl

Files are dialogues with labels (dialogues.py), best of tutors that the judge was not trained on.
The threshold, and min or mean for the likelihood, are chosen on --dev alone. The table has the
figures of figures.py, and the mass of the labels, P(any of them): below 0.9 the model is no judge
yet. agreement.json adds the confusion and the judge's settings.
Left out: a second annotator; rows that name a scenario of another file.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.files import refuse_overwriting, write_aside
from redi.dialogue.dialogues import Reply, read_dialogues
from redi.dialogue.figures import LEVEL, auroc, bootstrap, choose_cut, confusion, figures, kappa
from redi.dialogue.judge import Judge, Judgement, JudgeSettings, make_judge, read_agreement
from redi.dialogue.rubric import GOOD, read_rubric
from redi.dialogue.scenario import use_templates
from redi.tables import text_table


@dataclass(kw_only=True)
class AgreementConfig:
    model: Annotated[str, "the judge: folder or hub id"]
    files: Annotated[list[str], "dialogues with labels, of seen topics"]
    kind: Annotated[Literal["labels", "likelihood"], "of the judge"] = "labels"
    unseen: Annotated[list[str], "the same of unseen topics"] = field(default_factory=list)
    dev: Annotated[list[str], "others, to choose the threshold on"] = field(default_factory=list)
    rubric: Annotated[str | None, "TOML file of labels; none: redi's own"] = None
    templates: Annotated[str | None, "TOML file: what tutor, student and judge are told"] = None
    out: Annotated[str, "file to write"] = "agreement.json"

    def __post_init__(self) -> None:
        needs_dev = self.kind == "likelihood" and not self.dev
        require(not needs_dev, "dev", "none", "labels to choose the likelihood's threshold on")


# ---------------------------------------------------------------- correcting a rate


@dataclass(frozen=True)
class Rates:
    """A judge's TPR over num_good labelled replies, and TNR over num_bad."""

    tpr: float
    num_good: int
    tnr: float
    num_bad: int


def corrected_rate(p: float, n: int, rates: Rates) -> tuple[float, float, float] | None:
    """The share of good replies, and its 95 % interval, if a judge finds a share p of n good.

    (p + TNR - 1) / (TPR + TNR - 1), with the adjusted interval of Lang and Reiczigel (2014), which
    Lee et al. (2511.21140) use for judges: the uncertainty of p, TPR and TNR enters. Replies count
    as independent. None if the judge is no better than chance: then p says nothing."""
    if rates.tpr + rates.tnr <= 1:
        return None
    rate = (p + rates.tnr - 1) / (rates.tpr + rates.tnr - 1)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    # Counts as if a few more had been seen: no share is 0 or 1, where its variance would vanish.
    n, num_good, num_bad = n + z**2, rates.num_good + 2, rates.num_bad + 2
    p = p + z**2 * (0.5 - p) / n
    tpr, tnr = (
        (1 + rates.tpr * rates.num_good) / num_good,
        (1 + rates.tnr * rates.num_bad) / num_bad,
    )
    of_p, of_tpr, of_tnr = p * (1 - p) / n, tpr * (1 - tpr) / num_good, tnr * (1 - tnr) / num_bad
    middle = (p + tnr - 1) / (tpr + tnr - 1)
    variance = of_p + middle**2 * of_tpr + (1 - middle) ** 2 * of_tnr
    reach = z * math.sqrt(variance) / (tpr + tnr - 1)
    middle += 2 * z**2 * (middle * of_tpr - (1 - middle) * of_tnr)
    return tuple(min(max(value, 0.0), 1.0) for value in (rate, middle - reach, middle + reach))


def read_rates(path: str) -> dict[str, Rates]:
    """The rates in an agreement.json, by "seen replies", "unseen replies", "seen hints", "unseen
    hints", as far as they were measured. Raises UserError."""
    measured = read_agreement(path)["measured"]
    return {name: Rates(**group["rates"]) for name, group in measured.items()}


# ---------------------------------------------------------------- the command


def labeled_replies(files: Sequence[str], left_out: Counter[str]) -> dict[str, list[Reply]]:
    """replies, hints -> those that have a label; the others are counted."""
    found: dict[str, list[Reply]] = {"replies": [], "hints": []}
    for file in files:
        for dialogue in read_dialogues(file, {}):
            for reply in dialogue.all_replies():
                kind = "hints" if reply.is_hint else "replies"
                if reply.label is None:
                    left_out[f"{kind} without a label"] += 1
                else:
                    found[kind].append(reply)
    return found


def is_good(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.label == GOOD for reply in replies], bool)


def choose_settings(judge: Judge, dev: dict[str, list[Reply]]) -> JudgeSettings:
    """The statistic with the highest AUROC on replies, and its thresholds."""
    statistic, cuts = judge.settings.statistic, {}
    for kind, replies in dev.items():
        good = is_good(replies)
        if kind == "hints" and len(set(good)) < 2:
            continue  # they get the threshold of replies
        require_both(good, "--dev")
        scores = {name: np.array(values) for name, values in judge.scores(replies).items()}
        if kind == "replies":
            statistic = max(scores, key=lambda name: auroc(good, scores[name]))
        cuts[kind] = [float(x) for x in choose_cut(good, scores[statistic])]
    return replace(judge.settings, statistic=statistic, cuts=cuts)


def require_both(good: np.ndarray, where: str) -> None:
    if len(set(good)) < 2:
        count = f"{good.sum()} good and {(~good).sum()} bad labels of replies"
        raise UserError(f"{where}: {count}; both are needed to measure a judge")


def measure(
    replies: Sequence[Reply], judgements: Sequence[Judgement], of_labels: bool
) -> dict[str, Any]:
    """What agreement.json has for a group of replies. of_labels: the judge tells faults apart."""
    good, labels = is_good(replies), [reply.label for reply in replies]
    chances, scores, masses = (
        np.array([getattr(one, name) for one in judgements]) for name in ("good", "score", "mass")
    )
    values = figures(good, chances, scores)
    ends = bootstrap(
        lambda rows: list(figures(good[rows], chances[rows], scores[rows]).values()),
        [reply.scenario.id for reply in replies],
    )
    counts = confusion(labels, [one.label for one in judgements])
    table = np.array([[row[label] for label in counts] for row in counts.values()])
    faults = {label: row for label, row in counts.items() if label != GOOD and row}
    found = {
        "dialogues": len({reply.scenario.id for reply in replies}),
        "figures": {name: [values[name], *ends[i].tolist()] for i, name in enumerate(values)},
        "recall": {name: [row.total() - row[GOOD], row.total()] for name, row in faults.items()},
        "confusion": counts,
        "rates": asdict(Rates(values["TPR"], int(good.sum()), values["TNR"], int((~good).sum()))),
    }
    if of_labels:
        found |= {"kappa of labels": kappa(table), "mass of labels": float(masses.mean())}
    return found


def as_table(measured: dict[str, dict[str, Any]], of_labels: bool) -> str:
    groups = measured.values()
    rates = [Rates(**group["rates"]) for group in groups]
    rows = [["", *measured], ["good, bad", *(f"{r.num_good}, {r.num_bad}" for r in rates)]]
    for name in ("accuracy", "kappa", "AUROC", "TPR", "TNR", "ECE"):
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*group["figures"][name]) for group in groups)
        rows.append([name, *cells])
    for name in ("kappa of labels", "mass of labels") if of_labels else ():
        rows.append([name, *(f"{group[name]:.2f}" for group in groups)])
    for fault in sorted({fault for group in groups for fault in group["recall"]}):
        cells = (group["recall"].get(fault) for group in groups)
        rows.append([f"recall of {fault}", *("{}/{}".format(*c) if c else "-" for c in cells)])
    return text_table(rows)


@program
def main() -> None:
    config = parse(AgreementConfig, "Measure how far a judge agrees with labels.")
    refuse_overwriting("out", config.out, [*config.files, *config.unseen, *config.dev])
    use_templates(config.templates)
    left_out: Counter[str] = Counter()
    sources = {"seen": config.files, "unseen": config.unseen, "dev": config.dev}
    replies = {side: labeled_replies(files, left_out) for side, files in sources.items()}
    dev = replies.pop("dev")
    groups = {f"{side} {kind}": group for side in replies for kind, group in replies[side].items()}
    for name, group in list(groups.items()):
        if name.endswith("replies") and sources[name.split()[0]]:
            require_both(is_good(group), name)
        elif len(set(is_good(group))) < 2 and groups.pop(name):
            left_out[f"{name}, all good or all bad"] += len(group)
    rubric = vars(read_rubric(config.rubric)) if config.kind == "labels" else {}
    judge = make_judge(config.model, JudgeSettings(kind=config.kind, rubric=rubric))
    if config.dev:  # else labels are good from P(good) 0.5 on
        judge.settings = choose_settings(judge, dev)
    of_labels = config.kind == "labels"
    measured = {
        name: measure(group, judge.judge(group), of_labels) for name, group in groups.items()
    }
    facts = {"model": config.model, "files": sources, "left out": left_out}
    facts |= {"judge": asdict(judge.settings), "measured": measured}
    with write_aside(config.out) as file:
        file.write(json.dumps(facts, indent=2) + "\n")
    print(as_table(measured, of_labels))
    for kind, (threshold, _) in judge.settings.cuts.items():
        print(f"{kind}: good from a {judge.settings.statistic} of {threshold:.2f} on")
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    print(f"saved {config.out}")
