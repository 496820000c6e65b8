"""A generated world of 51 topics, in which every reply can be judged without a person.

    python -m redi.dialogue.world OUT --dialogues 400      scenarios, and dialogues of good tutors

A tutor sells or books something. It asks for two to four choices in the order of the scenario,
repeats what it hears, answers questions, and ends when all is known.

    tutor      Hello! Which day would you like: Friday, Monday or Sunday?
    student    I would like Friday.
    tutor      OK, Friday. And the repair: brake, mirror or engine?
    student    How much is the engine?                          a third of the student's turns are
    tutor      The engine costs 4 pounds. What repair ...?      no plain answers: a price, something
    student    The brake, please.                               that is not to be had, small talk,
    tutor      That is Friday and brake. Goodbye! [end]         two answers at once

The right next act follows from what was said, so `judge_reply` labels any reply of any model by its
meaning: which choice it asks for, which values and prices it names, whether it ends. How it is
worded does not matter. Everything is drawn by keyed random numbers: rows do not depend on order.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from redi.config import parse, program, require
from redi.data.files import make_folder
from redi.data.tokenizer import Message
from redi.dialogue.dialogues import write_rows
from redi.dialogue.oracle import SHARED, Menu, asked_choices, read_state, topics
from redi.dialogue.scenario import END, Scenario

OFFERED = 3
HABIT = 4  # times as often as each other wording
# The acts of a tutor, and a student's. {v}: values; {o}: options; {s}: what is chosen; {n}: a price
OPEN = ("Hello!", "Good morning!", "Welcome!", "Nice to see you!")
ASK = (
    "Which {s} would you like: {o}?",
    "What {s} do you want: {o}?",
    "And the {s}: {o}?",
    "Can you choose the {s}: {o}?",
    "Please tell me the {s}: {o}?",
)
CONFIRM = ("OK, {v}.", "Very good, {v}.", "You take {v}.", "I write down {v}.")
PRICE = (
    "The {v} costs {n} pounds.",
    "The {v} is {n} pounds.",
    "You pay {n} pounds for the {v}.",
    "That is {n} pounds for the {v}.",
)
MISSING = (
    "Sorry, we have no {v}.",
    "There is no {v} today.",
    "I am sorry, {v} is not possible.",
    "We do not have {v}.",
)
STEER = (
    "Let us stay with the {s}.",
    "We can talk about that later.",
    "I cannot help with that here.",
    "I do not know, I am only {t}.",
)
CLOSE = (
    "So you take {v}. Goodbye! [end]",
    "That is {v}. Have a nice day! [end]",
    "All done: {v}. See you soon! [end]",
    "Thank you, it is {v}. Goodbye! [end]",
)
ANSWER = ("I want {v}.", "{v}, please.", "I would like {v}.", "Let us say {v}.", "I take {v}.")
ASK_PRICE = (
    "How much is the {v}?",
    "What does the {v} cost?",
    "What is the price of the {v}?",
    "How much do I pay for the {v}?",
)
ASK_MISSING = ("Do you have {v}?", "Is there {v}?", "Can I have {v}?", "What about {v}?")
STRAY = (
    "Do you like football?", "It is raining today.", "My dog is ill.", "Where is the station?",
    "I saw a good film yesterday.", "What is your name?", "I am very tired.", "Can you sing?",
    "My brother lives in Canada.", "The bus was late again.", "Do you have children?",
    "I lost my keys.",
)  # fmt: skip
LOST = "I do not understand."  # what the student says if it is asked nothing
ODD = 0.35  # of the student's turns


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
    return Scenario(
        topic=topic,
        place=place,
        tutor=tutor,
        student="a customer",
        tasks=tasks,
        facts=facts,
        wants=wants,
        max_turns=12,
        id=f"{topic} {seed}.{number}",
    )


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
        said.append(wording(OPEN, rng))
    elif not left:
        values = listed([state.values[slot] for slot in menu.offered], "and")
        return wording(CLOSE, rng).format(v=values)
    elif state.new:
        values = listed([state.values[slot] for slot in state.new], "and")
        said.append(wording(CONFIRM, rng).format(v=values))
    elif state.price_of:
        slot, word = state.price_of
        said.append(wording(PRICE, rng).format(v=word, n=menu.offered[slot][word]))
    elif state.missing:
        said.append(wording(MISSING, rng).format(v=state.missing))
    else:
        said.append(wording(STEER, rng).format(s=left[0], t=scenario.tutor))
    options = listed(list(menu.offered[left[0]]), "or")
    said.append(wording(ASK, rng).format(s=left[0], o=options))
    return " ".join(said)


def wording(ways: Sequence[str], rng: random.Random) -> str:
    """One of several: a speaker has a habit, the first, and other ways."""
    return rng.choices(ways, [HABIT, *[1] * (len(ways) - 1)])[0]


def say_as_student(scenario: Scenario, history: Sequence[Message], rng: random.Random) -> str:
    """The student's next words: what its card says of the choice that was asked, but for a third of
    the turns, in which it asks a price, for something that is not offered, or strays."""
    menu = Menu.of(scenario)
    wants = dict(want.split(": ", 1) for want in scenario.wants)
    state = read_state(menu, history)
    asked = [slot for slot in asked_choices(menu, history[-1]["content"]) if slot in wants]
    if not asked:
        return LOST
    slot, said = asked[0], len(history) > 1
    later = [s for s in menu.offered if s not in state.values and s != slot]
    if (state.new or not said) and rng.random() < ODD:  # never twice in a row
        acts = ["missing", "stray", *(["two"] if later else [])]
        acts += ["price"] * 2 if any(menu.offered[slot].values()) else []
        act = rng.choice(acts)
        if act == "price":
            return rng.choice(ASK_PRICE).format(v=rng.choice(list(menu.offered[slot])))
        if act == "missing":
            others = [w for w in menu.known_words[slot] if w not in menu.offered[slot]]
            return rng.choice(ASK_MISSING).format(v=rng.choice(others))
        if act == "stray":
            return rng.choice(STRAY)
        both = listed([wants[slot], wants[later[0]]], "and")
        return _sentence(rng.choice(ANSWER).format(v=both))
    return _sentence(rng.choice(ANSWER).format(v=wants[slot]))


def _sentence(text: str) -> str:
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
