"""A generated world of 51 topics, in which every reply can be judged without a person.

    python -m redi.dialogue.world OUT --dialogues 400      scenarios, and dialogues of good tutors

A tutor sells or books something. It asks for two to four choices in the order of the scenario,
repeats what it hears, answers questions, and ends when all is known.

    tutor      Hello! Which day would you like: Friday, Monday or Sunday?
    student    I would like Friday.
    tutor      OK, Friday. And the repair: brake, mirror or engine?
    student    How much is the engine?                  a third of the student's turns are not plain
    tutor      The engine costs 4 pounds. What ...?     answers: it asks a price or for something
    student    The brake, please.                       else, chats, or answers two things at once
    tutor      That is Friday and brake. Goodbye! [end]

Each act has at least four wordings (wordings.txt). Everything is drawn by keyed random numbers, so
rows do not depend on their order. oracle.py labels the replies.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from redi.config import parse, program, require
from redi.data.files import make_folder
from redi.data.tokenizer import Message
from redi.dialogue.dialogues import write_rows
from redi.dialogue.oracle import SHARED, Menu, asked_choices, read_state, topics
from redi.dialogue.scenario import END, Scenario

OFFERED = 3
HABIT = 4  # times as often as each other wording
LOST = "I do not understand."  # what the student says if it is asked nothing
ODD = 0.35  # of the student's turns


def read_wordings() -> dict[str, list[str]]:
    """Act of a tutor or a student -> its wordings. {v}: values; {o}: options; {s}: what is chosen;
    {n}: a price; {t}: the tutor."""
    lines = Path(__file__).with_name("wordings.txt").read_text("utf-8").splitlines()
    return {act: wordings for act, *wordings in (line.split("|") for line in lines)}


WORDINGS = read_wordings()


def make_scenario(topic: str, number: int, seed: int) -> Scenario:
    """The scenario of this number. The topic's own choice and one to three of the shared ones."""
    rng = random.Random(f"scenario {seed} {topic} {number}")
    place, tutor, own, items = topics()[topic]
    lists = {own: items, **{name: words.split(", ") for name, words in SHARED.items()}}
    slots = [own, *rng.sample(sorted(SHARED), rng.randint(1, 3))]
    rng.shuffle(slots)
    tasks, facts, wants = [], [], []
    for slot in slots:
        offered = rng.sample(lists[slot], OFFERED)
        tasks.append(f"choose the {slot}: {listed(offered, 'or')}")
        wants.append(f"{slot}: {rng.choice(offered)}")
        if slot == own:
            facts += [f"{item} costs {rng.randint(2, 19)} pounds" for item in offered]
    scene = {"topic": topic, "place": place, "tutor": tutor, "student": "a customer"}
    return Scenario(**scene, tasks=tasks, facts=facts, wants=wants, id=f"{topic} {seed}.{number}")


def listed(words: Sequence[str], last: str) -> str:
    """The words, with commas and a last `or` or `and`."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


# ---------------------------------------------------------------- a good tutor and a student


def say_as_tutor(scenario: Scenario, history: Sequence[Message], rng: random.Random) -> str:
    """A right reply, in one of its wordings."""
    menu = Menu.of(scenario)
    state, said = read_state(menu, history), []
    left = [slot for slot in menu.offered if slot not in state.values]
    if not history:
        said.append(wording("open", rng))
    elif not left:
        values = listed([state.values[slot] for slot in menu.offered], "and")
        return wording("close", rng, v=values)
    elif state.new:
        values = listed([state.values[slot] for slot in state.new], "and")
        said.append(wording("confirm", rng, v=values))
    elif state.price_of:
        slot, word = state.price_of
        said.append(wording("price", rng, v=word, n=menu.offered[slot][word]))
    elif state.missing:
        said.append(wording("missing", rng, v=state.missing))
    else:
        said.append(wording("steer", rng, s=left[0], t=scenario.tutor))
    options = listed(list(menu.offered[left[0]]), "or")
    said.append(wording("ask", rng, s=left[0], o=options))
    return " ".join(said)


def wording(act: str, rng: random.Random, **values: Any) -> str:
    """One of several: a speaker has a habit, the first, and other ways."""
    ways = WORDINGS[act]
    return rng.choices(ways, [HABIT, *[1] * (len(ways) - 1)])[0].format(**values)


def say_as_student(scenario: Scenario, history: Sequence[Message], rng: random.Random) -> str:
    """The student's next words: what its card says of the choice that was asked, but for a third of
    the turns, in which it asks a price, for something that is not offered, or strays."""
    menu = Menu.of(scenario)
    wants = dict(want.split(": ", 1) for want in scenario.wants)
    state = read_state(menu, history)
    asked = [slot for slot in asked_choices(menu, history[-1]["content"]) if slot in wants]
    if not asked:
        return LOST
    slot, said = asked[0], wants[asked[0]]
    later = [s for s in menu.offered if s not in state.values and s != slot]
    if (state.new or len(history) < 2) and rng.random() < ODD:  # never twice in a row
        acts = ["missing", "stray", *(["two"] if later else [])]
        acts += ["price"] * 2 if any(menu.offered[slot].values()) else []
        act = rng.choice(acts)
        if act == "stray":
            return rng.choice(WORDINGS["stray"])
        if act == "price":
            return rng.choice(WORDINGS["ask price"]).format(v=rng.choice(list(menu.offered[slot])))
        if act == "missing":
            others = [w for w in menu.known_words[slot] if w not in menu.offered[slot]]
            return rng.choice(WORDINGS["ask missing"]).format(v=rng.choice(others))
        said = listed([wants[slot], wants[later[0]]], "and")
    text = rng.choice(WORDINGS["answer"]).format(v=said)
    return text[:1].upper() + text[1:]


def make_dialogue(scenario: Scenario, seed: int) -> list[Message]:
    """A dialogue of a good tutor with the student."""
    rng, messages = random.Random(f"dialogue {seed} {scenario.id}"), []
    while True:
        messages.append({"role": "assistant", "content": say_as_tutor(scenario, messages, rng)})
        if messages[-1]["content"].endswith(END):
            return messages
        messages.append({"role": "user", "content": say_as_student(scenario, messages, rng)})


# ---------------------------------------------------------------- the program


@dataclass(kw_only=True)
class WorldConfig:
    out: Annotated[str, "folder for dialogues.jsonl"]
    dialogues: Annotated[int, "of all topics together"] = 400
    seed: Annotated[int, "of scenarios and dialogues"] = 1

    def __post_init__(self) -> None:
        require(self.dialogues >= 1, "dialogues", self.dialogues, "at least 1")


def rows(count: int, seed: int) -> Iterator[dict]:
    """Dialogues with their scenarios, topics in turn."""
    names = list(topics())
    for number in range(count):
        scenario = make_scenario(names[number % len(names)], number // len(names), seed)
        yield {"scenario": scenario.as_row(), "messages": make_dialogue(scenario, seed)}


@program
def main() -> None:
    config = parse(WorldConfig, "Make scenarios and dialogues of a world of 51 topics.")
    make_folder(config.out)
    path = Path(config.out) / "dialogues.jsonl"
    write_rows(path, rows(config.dialogues, config.seed))
    print(f"saved {path}: {config.dialogues} dialogues")


if __name__ == "__main__":
    main()
