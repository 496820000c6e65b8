"""Dialogues, with or without labels -> files to train a tutor, a student and a judge on.

    redi dialogue prepare talks.jsonl --out data/dialogue

    tutor.jsonl      every reply is learned but bad ones, which stay as context; before 15 % of the
                     student's turns a hint is put: (What could I say?) -> the student's words
    student.jsonl    the same dialogues with the roles swapped
    judge.jsonl      every labelled reply and hint -> its label
    pairs.jsonl      of a state (scenario, history) the first good and the first bad reply
    scenarios_seen.jsonl, and card.json: the account, topics, templates, hashes

each also as *_test (scenarios that no training row has) and *_unseen (topics that none has). The
files that would be empty are not written. Topics, scenarios and hints are drawn by keyed hashes:
whatever the order of the rows, they are the same. So an evaluation of the tutor, read with the same
flags (redi dialogue prepare out/eval), keeps what is unseen unseen. If it has fewer topics, name
the unseen ones, as card.json does.
"""

import contextlib
import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import redi
from redi.config import UserError, parse, program, require
from redi.data.files import hash_files, make_folder, refuse_overwriting, to_disk, write_aside
from redi.dialogue import examples
from redi.dialogue.dialogues import Dialogue, read_dialogues
from redi.dialogue.examples import Row, State, chance, has_opening
from redi.dialogue.rubric import read_rubric
from redi.dialogue.scenario import TEMPLATES, Scenario, read_scenarios, use_templates
from redi.hub import CARD, dataset_files
from redi.tables import text_table

KINDS = ("tutor", "student", "judge", "pairs")
# Ending of a side's files -> what its scenarios' file ends with.
SIDES = {"": "_seen", "_test": "_test", "_unseen": "_unseen"}
NAMES = [f"{kind}{side}" for side in SIDES for kind in KINDS]
NAMES += [f"scenarios{ending}" for ending in SIDES.values()]


@dataclass(kw_only=True)
class PrepareConfig:
    files: Annotated[list[str], "dialogues: files, folders, hub ids, or evaluations of a tutor"]
    out: Annotated[str, "folder for the training files and card.json"] = "data/dialogue"
    scenarios: Annotated[str | None, "scenarios that rows name by their ids"] = None
    unseen_topics: Annotated[list[int | str], "kept out of training: how many topics, or names"] = (
        field(default_factory=lambda: [10])
    )
    test_share: Annotated[float, "of the other topics' scenarios, kept out of training"] = 0.05
    hint_share: Annotated[float, "of the student's turns, with a hint before them"] = 0.15
    mix: Annotated[str | None, "rows of general instructions to mix into tutor.jsonl"] = None
    mix_share: Annotated[float, "of tutor.jsonl, that these rows are"] = 0.1
    templates: Annotated[str | None, "TOML file: what tutor, student and judge are told"] = None
    rubric: Annotated[str | None, "TOML file: the judge's labels; none: redi's own"] = None
    seed: Annotated[int, "of the topics, scenarios, hints and mixed rows that are drawn"] = 1

    def __post_init__(self) -> None:
        require(0 <= self.hint_share <= 1, "hint_share", self.hint_share, "from 0 to 1")
        for name in ("test_share", "mix_share"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "at least 0 and less than 1")


def read_all(config: PrepareConfig, dropped: Counter[str], counts: Counter[str]) -> list[Dialogue]:
    """The dialogues to train on. Raises UserError, also if two scenarios have one id."""
    known: dict[str, Scenario] = {}

    def check(scenario: Scenario, file: str) -> None:
        if known.setdefault(scenario.id, scenario).as_row() != scenario.as_row():
            raise UserError(f"{file}: two scenarios have the id {scenario.id!r}")

    for scenario in read_scenarios(config.scenarios) if config.scenarios else ():
        check(scenario, config.scenarios)
    named, unknown, seen, kept = dict(known), Counter(), set(), []
    for file in config.files:
        for row in read_dialogues(file, named, unknown):
            dialogue = examples.cleaned(row)
            counts["blank ones of several replies"] += len(row.replies) - len(dialogue.replies)
            check(dialogue.scenario, file)
            content = json.dumps([dialogue.scenario.id, dialogue.messages, dialogue.replies])
            if reason := reason_to_drop(dialogue) or ("duplicate" if content in seen else None):
                dropped[reason] += 1
            else:
                seen.add(content)
                kept.append(dialogue)
    dropped["unknown scenario id"] += unknown.total()
    return kept


def reason_to_drop(dialogue: Dialogue) -> str | None:
    roles = [said["role"] for said in dialogue.messages] + ["assistant"] * bool(dialogue.replies)
    num_replies = roles.count("assistant") - has_opening(dialogue)
    if not num_replies:
        return "no tutor reply"
    if roles != [("assistant", "user")[number % 2] for number in range(len(roles))]:
        return "roles do not alternate, tutor first"
    if not all(said["content"].strip() for said in dialogue.messages):
        return "empty text"
    return "over max_turns" if num_replies > dialogue.scenario.max_turns else None


def split(config: PrepareConfig, scenarios: dict[str, Scenario]) -> dict[str, str]:
    """Scenario id -> its side. Raises UserError: unknown topics, or none left to train on."""
    topics = {scenario.topic for scenario in scenarios.values()}
    unseen = config.unseen_topics
    if [type(value) for value in unseen] == [int]:
        require(unseen[0] >= 0, "unseen_topics", unseen[0], "at least 0")
        drawn = sorted(topics, key=lambda topic: (chance(config.seed, "topic", topic), topic))
        unseen = drawn[: unseen[0]]
    for topic in unseen:
        require(topic in topics, "unseen_topics", repr(topic), "one number, or topics of the rows")
    if topics == set(unseen):
        raise UserError(f"--unseen-topics: of {len(topics)} topics, none is left to train on")

    def side(scenario: Scenario) -> str:
        is_tested = chance(config.seed, "test", scenario.id) < config.test_share
        return "_unseen" if scenario.topic in unseen else "_test" if is_tested else ""

    return {name: side(scenario) for name, scenario in scenarios.items()}


def make_rows(
    config: PrepareConfig, dialogues: list[Dialogue], sides: dict[str, str], counts: Counter[str]
) -> dict[str, list[Row]]:
    """File name without .jsonl -> rows. counts: gets turns, hints, and what files leave out."""
    rubric = read_rubric(config.rubric)
    rows: dict[str, list[Row]] = defaultdict(list)
    states: dict[str, State] = defaultdict(list)
    judged: set[str] = set()
    for dialogue in dialogues:
        side = sides[dialogue.scenario.id]
        seed, share = config.seed, config.hint_share
        if row := examples.tutor_row(dialogue, seed, share, counts):
            rows[f"tutor{side}"].append(row)
        if row := examples.student_row(dialogue, counts):
            rows[f"student{side}"].append(row)
        replies = list(dialogue.all_replies())[has_opening(dialogue) :]
        for place, reply in enumerate(replies, 1 + len(dialogue.replies) - len(replies)):
            if reply.label or place > 0:
                key = json.dumps([reply.scenario.id, reply.is_hint, reply.history])
                states[key].append((max(0, place), reply))
            if reply.label and (row := examples.judge_row(reply, rubric, judged, counts)):
                rows[f"judge{side}"].append(row)
    for state in states.values():
        if len(state) > 1 or state[0][0]:  # not the only reply in a dialogue
            counts["states with several replies"] += 1
            if row := examples.pair(state, config.seed, counts):
                rows[f"pairs{sides[state[0][1].scenario.id]}"].append(row)
    return rows


def leaks(unseen: Iterable[Scenario], rows: Iterable[Row]) -> tuple[list[str], int]:
    """The words in the words and facts of unseen scenarios: those that rows have, and how many in
    all. Numbers are no words."""

    def words(texts: Iterable[str]) -> set[str]:
        return set(re.findall(r"[^\W\d_]+", " ".join(texts).lower()))

    of_unseen = words(text for scenario in unseen for text in (*scenario.words, *scenario.facts))
    of_rows = words(said["content"] for row in rows for said in row["messages"])
    return sorted(of_unseen & of_rows), len(of_unseen)


def prepare(config: PrepareConfig) -> dict:
    """Write the files into `config.out`, card.json last. Returns what card.json holds. Raises
    UserError: bad input, nothing to train on, or a file that cannot be written."""
    use_templates(config.templates)
    inside = [(file, Path(file) / "dialogues.jsonl") for file in config.files]  # an evaluation's
    config = dataclasses.replace(config, files=[str(p) if p.is_file() else f for f, p in inside])
    others = [file for file in (config.scenarios, config.mix) if file]
    read = [path for file in (*config.files, *others) for path in dataset_files(file)]
    out = Path(config.out)
    for name in NAMES:
        refuse_overwriting("out", out / f"{name}.jsonl", read)
    dropped, counts = Counter(), Counter()
    dialogues = read_all(config, dropped, counts)
    if not dialogues:
        raise UserError(f"{config.files[0]}: no dialogue to train on; {shown(dropped)}")
    scenarios = {dialogue.scenario.id: dialogue.scenario for dialogue in dialogues}
    sides = split(config, scenarios)
    rows = make_rows(config, dialogues, sides, counts)
    if not any(rows[kind] for kind in KINDS):
        raise UserError(f"{config.files[0]}: no row to train on; {shown(counts)}")
    topics: dict[str, set[str]] = {"seen": set(), "unseen": set()}
    for name, scenario in scenarios.items():
        rows[f"scenarios{SIDES[sides[name]]}"].append(scenario.as_row())
        topics["unseen" if sides[name] == "_unseen" else "seen"].add(scenario.topic)
    unseen = [scenario for name, scenario in scenarios.items() if sides[name] == "_unseen"]
    leaked, words = leaks(unseen, rows["tutor"])
    if config.mix:
        num_talks = len(rows["tutor"])
        rows["tutor"] = examples.mixed(rows["tutor"], config.mix, config.mix_share, config.seed)
        counts["mixed in"] = len(rows["tutor"]) - num_talks
    facts = {
        "redi": redi.__version__,
        "settings": {k: v for k, v in vars(config).items() if k != "out"},
        "dropped": dropped,
        "dialogues": len(dialogues),
        "counts": counts,
        "rows": {name: len(rows[name]) for name in NAMES},
        "topics": {side: sorted(names) for side, names in topics.items()},
        "leak": {"words_of_unseen_topics": words, "in_tutor.jsonl": leaked},
        "templates": TEMPLATES,
        "read_sha256": {str(path): hash_files([path]) for path in read},
    }
    write(out, rows, facts)
    return facts


def write(out: Path, rows: dict[str, list[Row]], facts: dict) -> None:
    make_folder(out)
    with contextlib.ExitStack() as opened:
        # They are renamed in reverse order, so card.json last.
        card = opened.enter_context(write_aside(out / CARD))
        facts["sha256"] = {}
        for name in filter(rows.get, NAMES):
            file = opened.enter_context(write_aside(out / f"{name}.jsonl"))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
            to_disk(file)
            facts["sha256"][f"{name}.jsonl"] = hash_files([Path(file.name)])
        json.dump(facts, card, indent=2, ensure_ascii=False)
        card.write("\n")
    for name in NAMES:
        if not rows[name]:  # the file of an earlier run would belong to other files
            (out / f"{name}.jsonl").unlink(missing_ok=True)


def shown(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items() if number)


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn dialogues into files to train tutor, student and judge on.")
    try:
        facts = prepare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was written to {config.out}") from None
    print(account(facts))
    print(f"saved in {config.out}: {', '.join(facts['sha256'])}, {CARD}")


def account(facts: dict) -> str:
    """What became of every row, and what each side got."""
    rows, counts, dropped = facts["rows"], facts["counts"], facts["dropped"]
    lines = [("rows", facts["dialogues"] + dropped.total())]
    lines += [(f"  {reason}", number) for reason, number in dropped.items() if number]
    lines += [("dialogues", facts["dialogues"])]
    lines += [(f"  {reason}", number) for reason, number in counts.items() if number]
    table = [("", "train", "test", "unseen")]
    seen, unseen = facts["topics"].values()
    table += [("topics", str(len(seen)), "", str(len(unseen)))]
    for kind in ("scenarios", *KINDS):
        endings = SIDES.values() if kind == "scenarios" else SIDES
        table.append((kind, *(str(rows[f"{kind}{ending}"]) for ending in endings)))
    leak = facts["leak"]
    leaked = f"{len(leak['in_tutor.jsonl'])} of {leak['words_of_unseen_topics']}"
    return "\n".join([
        text_table([(name, str(number)) for name, number in lines]),
        text_table(table),
        f"unseen topics: {', '.join(unseen) or 'none'}",
        f"leak: {leaked} words of their words and facts occur in tutor.jsonl",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
