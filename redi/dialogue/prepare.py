"""Dialogues, with or without labels -> files to train a tutor, a student and a judge on.

    redi dialogue prepare talks.jsonl --out data/dialogue

    tutor.jsonl      every reply is learned but bad ones, which stay as context; 15 % of the
                     student's turns have a hint before them: (What could I say?) -> its words
    student.jsonl    the same dialogues with the roles swapped
    judge.jsonl      every labeled reply and hint -> its label
    pairs.jsonl      of a state (scenario, history) the first good and the first bad reply
    scenarios_seen.jsonl, and card.json: the account, topics, templates, hashes

Each also comes as *_test (scenarios that no training row has) and *_unseen (topics that none has).
Files that would be empty are not written. Topics, scenarios and hints are drawn by keyed hashes, so
an evaluation of the tutor, read with the same flags (redi dialogue prepare out/eval), keeps what is
unseen unseen. If it has fewer topics, name the unseen ones: card.json lists them.
"""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import redi
from redi.config import UserError, parse, program, require
from redi.data.files import Row, hash_files, make_folder, refuse_overwriting, write_aside
from redi.data.tokenizer import is_answer
from redi.dialogue import examples
from redi.dialogue.dialogues import Dialogue, Reply, read_dialogues, write_rows
from redi.dialogue.examples import chance
from redi.dialogue.rubric import read_rubric
from redi.dialogue.scenario import (
    TEMPLATES,
    Scenario,
    read_scenarios,
    remember,
    topic_key,
    use_templates,
)
from redi.hub import CARD, dataset_files
from redi.tables import text_table

KINDS = ("tutor", "student", "judge", "pairs")
SIDES = ("", "_test", "_unseen")  # endings of their files
SCENARIOS = ("scenarios_seen", "scenarios_test", "scenarios_unseen")  # of these sides
NAMES = (*(f"{kind}{side}" for side in SIDES for kind in KINDS), *SCENARIOS)


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
    templates: Annotated[str | None, "TOML file: the prompts of tutor, student and judge"] = None
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
    for scenario in read_scenarios(config.scenarios) if config.scenarios else ():
        remember(known, scenario, config.scenarios)
    named, copies = dict(known), defaultdict(list)
    for file in config.files:
        for whole in read_dialogues(file, named, dropped):
            dialogue = without_blanks(whole)
            counts["blank ones of several replies"] += len(whole.replies) - len(dialogue.replies)
            remember(known, dialogue.scenario, file)
            if reason := reason_to_drop(dialogue):
                dropped[reason] += 1
                continue
            texts = [said["content"] for said in dialogue.messages + dialogue.replies]
            copies[dialogue.scenario.id, len(dialogue.messages), *texts].append(dialogue)
    dropped["duplicate"] += sum(map(len, copies.values())) - len(copies)
    return [one_of(some, counts) for some in copies.values()]


def one_of(copies: list[Dialogue], counts: Counter[str]) -> Dialogue:
    """Of dialogues with the same texts, one with the labels and hints of all. A reply whose labels
    contradict each other is neither learned nor judged, and counted."""

    def merged(*same: Row) -> Row:
        one = {k: v for said in sorted(same, key=json.dumps) for k, v in said.items()}
        for name in ("label", "hint_label"):
            if len({said[name] for said in same if name in said}) > 1:
                counts["contradictory labels"] += 1
                del one[name]
                one["weight"] = 0
        return one

    first, *_ = copies
    messages, replies = (
        list(map(merged, *(getattr(copy, name) for copy in copies)))
        for name in ("messages", "replies")
    )
    return Dialogue(first.scenario, messages, replies)


def without_blanks(dialogue: Dialogue) -> Dialogue:
    """Without a last turn in which the student said nothing, and without blank replies."""
    messages = dialogue.messages
    if messages and not is_answer(messages[-1]) and not messages[-1]["content"]:
        messages = messages[:-1]
    replies = [reply for reply in dialogue.replies if reply["content"].strip()]
    return Dialogue(dialogue.scenario, messages, replies)


def reason_to_drop(dialogue: Dialogue) -> str | None:
    roles = [said["role"] for said in dialogue.messages] + ["assistant"] * bool(dialogue.replies)
    num_replies = roles.count("assistant") - dialogue.has_opening
    if not num_replies:
        return "no tutor reply"
    if roles != [("assistant", "user")[number % 2] for number in range(len(roles))]:
        return "roles do not alternate, tutor first"
    if not all(said["content"].strip() for said in dialogue.messages):
        return "empty text"
    return "over max_turns" if num_replies > dialogue.scenario.max_turns else None


def split(config: PrepareConfig, scenarios: Mapping[str, Scenario]) -> dict[str, str]:
    """Scenario id -> its side. Raises UserError: unknown topics, or none left to train on."""
    topics = {topic_key(scenario.topic) for scenario in scenarios.values()}
    unseen = config.unseen_topics
    if [type(value) for value in unseen] == [int]:
        require(unseen[0] >= 0, "unseen_topics", unseen[0], "at least 0")
        drawn = sorted(topics, key=lambda topic: (chance(config.seed, "topic", topic), topic))
        unseen = drawn[: unseen[0]]
    unseen = [topic_key(str(topic)) for topic in unseen]
    for topic in unseen:
        require(topic in topics, "unseen_topics", repr(topic), "one number, or topics of the rows")
    if topics and topics == set(unseen):
        raise UserError(f"--unseen-topics: of {len(topics)} topics, none is left to train on")
    sides = {}
    for name, scenario in scenarios.items():
        is_test = chance(config.seed, "test", name) < config.test_share
        sides[name] = (
            "_unseen" if topic_key(scenario.topic) in unseen else "_test" if is_test else ""
        )
    return sides


def make_rows(
    config: PrepareConfig, dialogues: list[Dialogue], counts: Counter[str]
) -> dict[str, list[Row]]:
    """File name without .jsonl -> rows. counts: turns, hints, and what the files leave out."""
    scenarios = {dialogue.scenario.id: dialogue.scenario for dialogue in dialogues}
    sides, rubric = split(config, scenarios), read_rubric(config.rubric)
    rows: dict[str, list[Row]] = defaultdict(list)
    states: dict[str, list[Reply]] = defaultdict(list)
    judged: set[str] = set()

    def add(kind: str, scenario: Scenario, row: Row | None) -> None:
        if row:
            rows[f"{kind}{sides[scenario.id]}"].append(row)

    for name, scenario in scenarios.items():
        rows[SCENARIOS[SIDES.index(sides[name])]].append(scenario.as_row())
    for dialogue in dialogues:
        scenario = dialogue.scenario
        learned = examples.tutor_row(dialogue, config.seed, config.hint_share, counts)
        add("tutor", scenario, learned)
        add("student", scenario, examples.student_row(dialogue, counts))
        for reply in dialogue.all_replies():
            if reply.label or reply.place:
                key = json.dumps([scenario.id, reply.is_hint, reply.history])
                states[key].append(reply)
            if reply.label:
                add("judge", scenario, examples.judge_row(reply, rubric, judged, counts))
    for state in states.values():
        if len(state) > 1 or state[0].place:  # not the only reply in a dialogue
            counts["states with several replies"] += 1
            add("pairs", state[0].scenario, examples.pair(state, config.seed, counts))
    return rows


def leaks(rows: Mapping[str, list[Row]]) -> dict:
    """How many words the words and facts of unseen scenarios have, and which of them the tutor's
    rows have. Numbers are not words."""

    def words(texts: Iterable[str]) -> set[str]:
        return set(re.findall(r"[^\W\d_]+", " ".join(texts).lower()))

    lists = (row.get(key, ()) for row in rows["scenarios_unseen"] for key in ("words", "facts"))
    of_unseen = words(chain.from_iterable(lists))
    of_rows = words(said["content"] for row in rows["tutor"] for said in row["messages"])
    return {"words_of_unseen_topics": len(of_unseen), "in_tutor.jsonl": sorted(of_unseen & of_rows)}


def prepare(config: PrepareConfig) -> dict:
    """Write the files into `config.out`, card.json last: without it, the others may not belong
    together. Returns what card.json holds. Raises UserError: bad input, nothing to train on, or a
    file that cannot be written."""
    use_templates(config.templates)
    inside = [(file, Path(file) / "dialogues.jsonl") for file in config.files]  # an evaluation's
    config = dataclasses.replace(config, files=[str(p) if p.is_file() else f for f, p in inside])
    others = [file for file in (config.scenarios, config.mix) if file]
    read = [path for file in (*config.files, *others) for path in files_of(file)]
    for name in NAMES:
        refuse_overwriting("out", Path(config.out) / f"{name}.jsonl", read)
    dropped, counts = Counter(), Counter()
    dialogues = read_all(config, dropped, counts)
    rows = make_rows(config, dialogues, counts)
    if not any(rows[kind] for kind in KINDS):
        why = ", ".join(f"{number} {reason}" for reason, number in (dropped + counts).items())
        raise UserError(f"{config.files[0]}: no row to train on; {why}")
    leak, num_talks = leaks(rows), len(rows["tutor"])
    if config.mix:
        how = config.mix, config.mix_share, config.seed, counts
        rows["tutor"] = examples.mixed(rows["tutor"], *how)
        counts["mixed in"] = len(rows["tutor"]) - num_talks
    seen, test, unseen = ({row["topic"] for row in rows[name]} for name in SCENARIOS)
    facts = {
        "redi": redi.__version__,
        "settings": {k: v for k, v in vars(config).items() if k != "out"},
        "dropped": +dropped,
        "dialogues": len(dialogues),
        "counts": +counts,
        "rows": {name: len(rows[name]) for name in NAMES},
        "topics": {"seen": sorted(seen | test), "unseen": sorted(unseen)},
        "leak": leak,
        "templates": TEMPLATES,
        "read_sha256": {str(path): hash_files([path]) for path in read},
    }
    out = Path(config.out)
    make_folder(out)
    (out / CARD).unlink(missing_ok=True)
    for name in NAMES:
        if rows[name]:
            write_rows(out / f"{name}.jsonl", rows[name])
        else:  # a file of an earlier run would not fit these
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    with write_aside(out / CARD) as file:
        file.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts


def files_of(source: str) -> list[Path]:
    """A TOML file of scenarios is no dataset."""
    return [Path(source)] if source.endswith(".toml") else dataset_files(source)


def account(facts: dict) -> str:
    """What became of every row, and the rows of each file."""
    lines = [("rows", facts["dialogues"] + facts["dropped"].total())]
    lines += [(f"  {reason}", number) for reason, number in facts["dropped"].items()]
    lines += [("dialogues", facts["dialogues"])]
    lines += [(f"  {reason}", number) for reason, number in facts["counts"].items()]
    lines += [(f"{name}.jsonl", number) for name, number in facts["rows"].items() if number]
    leaked = f"{len(facts['leak']['in_tutor.jsonl'])} of {facts['leak']['words_of_unseen_topics']}"
    return "\n".join([
        text_table([(name, str(number)) for name, number in lines]),
        f"unseen topics: {', '.join(facts['topics']['unseen']) or 'none'}",
        f"leak: {leaked} words of their words and facts occur in tutor.jsonl",
    ])  # fmt: skip


@program
def main() -> None:
    config = parse(PrepareConfig, "Turn dialogues into files to train tutor, student and judge on.")
    print(account(prepare(config)))
    print(f"saved in {config.out}, with {CARD}")


if __name__ == "__main__":
    main()
