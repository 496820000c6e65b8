"""How far a judge agrees with labels: the figures of figures.py, with intervals.

    redi dialogue agreement out/judge test.jsonl --unseen unseen.jsonl --dev dev.jsonl
    redi dialogue agreement out/second_tutor test.jsonl --kind likelihood --dev dev.jsonl

Files are dialogues with labels (dialogues.py), best of tutors that the judge was not trained on.
The threshold, and min or mean for the likelihood, are chosen on --dev alone. agreement.json has the
judge's settings, too. Left out: a second annotator; rows that name a scenario of another file.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np

from redi.config import UserError, parse, program, require
from redi.data.files import refuse_overwriting, write_aside
from redi.dialogue.dialogues import Reply, read_dialogues
from redi.dialogue.figures import Rates, auroc, choose_cut, figures, intervals
from redi.dialogue.judge import Judgement, JudgeSettings, ModelJudge, make_judge
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
    templates: Annotated[str | None, "TOML file: the prompts of tutor, student and judge"] = None
    out: Annotated[str, "file to write"] = "agreement.json"

    def __post_init__(self) -> None:
        needs_dev = self.kind == "likelihood" and not self.dev
        require(not needs_dev, "dev", "none", "labels to choose the likelihood's threshold on")


def labeled_replies(
    files: Sequence[str], already_read: set[str], left_out: Counter[str]
) -> dict[str, list[Reply]]:
    """replies, hints -> those that have a label; the others are counted, as are dialogues that are
    in `already_read`, to which the others are added."""
    found: dict[str, list[Reply]] = {"replies": [], "hints": []}
    for dialogue in (one for file in files for one in read_dialogues(file, {})):
        content = json.dumps([dialogue.scenario.id, dialogue.messages, dialogue.replies])
        if content in already_read:
            left_out["repeated dialogues"] += 1
            continue
        already_read.add(content)
        for reply in dialogue.all_replies():
            kind = "hints" if reply.is_hint else "replies"
            if reply.label is not None:
                found[kind].append(reply)
            elif reply.place or not dialogue.replies:  # not the history of several replies
                left_out[f"{kind} without a label"] += 1
    return found


def is_good(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.label == GOOD for reply in replies], bool)


def require_both(replies: Sequence[Reply], where: str) -> None:
    good = is_good(replies)
    if len(set(good)) < 2:
        count = f"{good.sum()} good and {(~good).sum()} bad labels of replies"
        raise UserError(f"{where}: {count}; both are needed to measure a judge")


def choose_settings(judge: ModelJudge, dev: dict[str, list[Reply]]) -> JudgeSettings:
    """The statistic with the highest AUROC on replies, and the thresholds. Hints that are all good
    or all bad get the threshold of replies."""
    statistic, cuts = judge.settings.statistic, {}
    require_both(dev["replies"], "--dev")
    for kind, replies in dev.items():
        good = is_good(replies)
        if len(set(good)) == 2:
            scores = {name: np.array(values) for name, values in judge.read(replies)[0].items()}
            if kind == "replies":
                statistic = max(scores, key=lambda name: auroc(good, scores[name]))
            cuts[kind] = [float(x) for x in choose_cut(good, scores[statistic])]
    return replace(judge.settings, statistic=statistic, cuts=cuts)


def measure(replies: Sequence[Reply], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What agreement.json has for a group of replies."""
    good, labels = is_good(replies), np.array([reply.label for reply in replies])
    chances, scores = (np.array([getattr(one, x) for one in judgements]) for x in ("good", "score"))
    ids = [reply.scenario.id for reply in replies]
    values = figures(good, chances, scores)
    ends = intervals(lambda rows: figures(good[rows], chances[rows], scores[rows]), ids)
    caught = {label: chances[labels == label] < 0.5 for label in sorted({*labels} - {GOOD})}
    return {
        "dialogues": len(set(ids)),
        "figures": {name: [value, *ends[name]] for name, value in values.items()},
        "recall": {label: [int(one.sum()), len(one)] for label, one in caught.items()},
        "rates": asdict(Rates(values["TPR"], int(good.sum()), values["TNR"], int((~good).sum()))),
    }


def as_table(measured: dict[str, dict[str, Any]]) -> str:
    groups = measured.values()
    rates = [Rates(**group["rates"]) for group in groups]
    rows = [["", *measured], ["good, bad", *(f"{r.num_good}, {r.num_bad}" for r in rates)]]
    for name in next(iter(groups))["figures"]:
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*group["figures"][name]) for group in groups)
        rows.append([name, *cells])
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
    already_read: set[str] = set()
    replies = {
        side: labeled_replies(files, already_read, left_out) for side, files in sources.items()
    }
    dev, groups = replies.pop("dev"), {}
    for side, kinds in replies.items():
        if sources[side]:
            require_both(kinds["replies"], f"{side} replies")
        for kind, group in kinds.items():
            if len(set(is_good(group))) == 2:
                groups[f"{side} {kind}"] = group
            elif group:
                left_out[f"{side} {kind}, all good or all bad"] += len(group)
    rubric = vars(read_rubric(config.rubric)) if config.kind == "labels" else {}
    judge = make_judge(config.model, JudgeSettings(kind=config.kind, rubric=rubric))
    if config.dev:  # else labels are good from P(good) 0.5 on
        judge.settings = choose_settings(judge, dev)
    measured = {name: measure(group, judge.judge(group)) for name, group in groups.items()}
    facts = {"model": config.model, "files": sources, "left out": left_out}
    facts |= {"judge": asdict(judge.settings), "measured": measured}
    with write_aside(config.out) as file:
        file.write(json.dumps(facts, indent=2) + "\n")
    print(as_table(measured))
    for kind, (threshold, _) in judge.settings.cuts.items():
        print(f"{kind}: good from a {judge.settings.statistic} of {threshold:.2f} on")
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    print(f"saved {config.out}")
