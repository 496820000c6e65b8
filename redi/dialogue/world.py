"""A generated world of 51 topics, in which every reply can be judged without a person.

    python -m redi.dialogue.world OUT --dialogues 400      scenarios, and dialogues of good tutors

A tutor sells or books something: it asks for two to four choices in the scenario's order, says back
what it heard, answers questions, and ends when all is known.

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

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from redi.config import parse, program, require
from redi.data.files import make_folder, write_aside
from redi.data.tokenizer import Message
from redi.dialogue.scenario import END, Scenario, split_end

SHARED = {
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "color": "red, green, yellow, brown, white, black, orange",
    "size": "tiny, small, medium, large, huge, giant",
    "payment": "cash, card, check, voucher, coin, transfer",
    "hour": "eight, nine, ten, eleven, noon, midnight",
    "number": "two, three, four, five, six, seven",
}
OFFERED = 3
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
ASK_MISSING = ("Do you have {v}?", "Is there {v}?", "I want {v}.", "Can I have {v}?")
STRAY = (
    "Do you like football?", "It is raining today.", "My dog is ill.", "Where is the station?",
    "I saw a good film yesterday.", "What is your name?", "I am very tired.", "Can you sing?",
    "My brother lives in Canada.", "The bus was late again.", "Do you have children?",
    "I lost my keys.",
)  # fmt: skip
LOST = "I do not understand."  # what the student says if it is asked nothing
ODD = 0.35  # of the student's turns
PRICE_WORDS = re.compile(r"\b(how much|cost|price|pay for)\b", re.IGNORECASE)
NEGATION = re.compile(r"\b(no|not|sorry|cannot|can't|don't|isn't|out of)\b", re.IGNORECASE)


@cache
def topics() -> dict[str, tuple[str, str, str, list[str]]]:
    """Topic -> place, tutor, what is chosen there, and seven of them."""
    lines = Path(__file__).with_name("topics.txt").read_text("utf-8").splitlines()
    rows = (line.split("|") for line in lines)
    return {topic: (*facts, items.split(", ")) for topic, *facts, items in rows}


def make_scenario(topic: str, number: int, seed: int) -> Scenario:
    """The scenario of this number. The topic's own choice and one to three of the shared ones."""
    rng = random.Random(f"scenario {seed} {topic} {number}")
    place, tutor, own, items = topics()[topic]
    lists = {own: items, **{name: words.split(", ") for name, words in SHARED.items()}}
    slots = [own, *rng.sample(sorted(SHARED), rng.randint(1, 3))]
    rng.shuffle(slots)
    facts, wants = [], []
    for slot in slots:
        offered = rng.sample(lists[slot], OFFERED)
        wants.append(f"{slot}: {rng.choice(offered)}")
        if slot == own:
            offered = [f"{item} ({rng.randint(2, 19)} pounds)" for item in offered]
        facts.append(f"{slot}: {listed(offered, 'or')}")
    return Scenario(
        topic=topic,
        place=place,
        tutor=tutor,
        student="a customer",
        tasks=[f"choose the {slot}" for slot in slots],
        facts=facts,
        wants=wants,
        max_turns=12,
        id=f"{topic} {seed}.{number}",
    )


def listed(words: Sequence[str], last: str) -> str:
    """The words, with commas and a last `or` or `and`."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


# ---------------------------------------------------------------- what was said, by its meaning


@dataclass(frozen=True)
class Menu:
    """What a scenario's facts and tasks say: choice -> option -> price, None if it has none."""

    offered: dict[str, dict[str, int | None]]  # in the order of the tasks
    known_words: dict[str, list[str]]  # choice -> all words of the world for it

    @classmethod
    def of(cls, scenario: Scenario) -> "Menu":
        offered, own = {}, topics()[scenario.topic]
        for fact in scenario.facts:
            slot, _, options = fact.partition(": ")
            options = re.findall(r"([\w' -]+?)(?: \((\d+) pounds\))?(?:, | or |$)", options)
            offered[slot] = {word: int(price) if price else None for word, price in options}
        lists = {slot: words.split(", ") for slot, words in SHARED.items()} | {own[2]: own[3]}
        return cls(offered, {slot: lists[slot] for slot in offered})

    def find(self, text: str, slot: str) -> list[str]:
        """The world's words for a choice that occur in a text, offered here or not."""
        return [word for word in self.known_words[slot] if _says(text, word)]


@dataclass
class State:
    """What a dialogue has settled, after the student's last turn."""

    values: dict[str, str]  # choice -> what the student took
    new: list[str]  # choices that the last turn settled
    price_of: tuple[str, str] | None = None  # (choice, word) whose price it asked
    missing: str | None = None  # a word it asked for that is not offered
    stray: bool = False  # it spoke of something else


def read_state(menu: Menu, messages: Sequence[Message]) -> State:
    """Replay the student's turns."""
    state, asked = State({}, []), None
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            asked = next(iter(asked_choices(menu, text)), asked)
        elif message["role"] == "user":
            state = State(state.values, [])
            found = [(slot, word) for slot in menu.offered for word in menu.find(text, slot)]
            offered = [(slot, word) for slot, word in found if word in menu.offered[slot]]
            if PRICE_WORDS.search(text) and offered:
                state.price_of = offered[0]
            elif offered:
                for slot, word in offered:
                    if slot not in state.values:
                        state.values[slot] = word
                        state.new.append(slot)
            elif of_asked := [word for slot, word in found if slot == asked]:
                state.missing = of_asked[0]
            else:
                state.stray = True
    return state


def asked_choices(menu: Menu, reply: str) -> list[str]:
    """The choices that a tutor's reply asks for, in its order: named in a question."""
    questions = re.findall(r"[^.!?]*\?", reply)
    found = []
    for question in questions:
        places = {slot: _place(question, slot) for slot in menu.offered}
        for slot in sorted((s for s in places if places[s] >= 0), key=places.get):
            found += [slot] if slot not in found else []
        for slot, options in menu.offered.items():  # "Monday or Friday?" asks for the day
            if slot not in found and sum(_says(question, word) for word in options) > 1:
                found.append(slot)
    return found


def judge_reply(scenario: Scenario, history: Sequence[Message], reply: str) -> str:
    """The label of a tutor's reply to a history of assistant's and user's messages: good, or the
    first fault of wrong, ignores, ends_early, goes_on, repeats, skips, off_topic and broken."""
    menu = Menu.of(scenario)
    state = read_state(menu, history)
    text, ended = split_end(reply)
    asked = asked_choices(menu, text)
    left = [slot for slot in menu.offered if slot not in state.values]
    if _contradicts(menu, state, text, asked):
        return "wrong"
    if _ignores(menu, state, text):
        return "ignores"
    if not left:
        whole = all(_says(text, word) for word in state.values.values())
        return "good" if ended and whole and not asked else "goes_on" if not ended else "ignores"
    if ended:
        return "ends_early"
    if left[0] in asked and not set(asked) & set(state.values):
        return "good"
    if set(asked) & set(state.values):
        return "repeats"
    if asked:
        return "skips"
    return "off_topic" if state.stray and len(text.split()) > 3 else "broken"


def _contradicts(menu: Menu, state: State, text: str, asked: list[str]) -> bool:
    """Whether a text names a value that the student did not take, an option that is not offered, or
    a wrong price."""
    statements = [s for s in re.findall(r"[^.!?]+[.!?]?", text) if not s.endswith("?")]
    for slot, offered in menu.offered.items():
        for word in menu.find(text, slot):
            if word == state.missing and NEGATION.search(text):
                continue
            if word not in offered:
                return True
            is_known = word == state.values.get(slot) or (slot, word) == state.price_of
            if slot not in asked and not is_known:
                return True
        said = [w for s in statements if not NEGATION.search(s) for w in menu.find(s, slot)]
        allowed = {state.values.get(slot), *([state.price_of[1]] if state.price_of else [])}
        if set(said) - allowed:
            return True
    prices = set(re.findall(r"\d+", text))
    right = {str(price) for options in menu.offered.values() for price in options.values()}
    if state.price_of:
        right = {str(menu.offered[state.price_of[0]][state.price_of[1]])}
    return bool(prices - right)


def _ignores(menu: Menu, state: State, text: str) -> bool:
    """Whether a text leaves out what it must answer: a value, a price, or that something is not
    to be had."""
    if any(not _says(text, state.values[slot]) for slot in state.new):
        return True
    if state.price_of:
        slot, word = state.price_of
        price = menu.offered[slot][word]
        return not (_says(text, str(price)) if price else _says(text, word))
    return bool(state.missing and not NEGATION.search(text))


def judge_hint(scenario: Scenario, history: Sequence[Message], hint: str) -> str:
    """good if the student could say this now: an offered word of the choice that was asked last."""
    menu = Menu.of(scenario)
    asked = [slot for m in history if is_tutor(m) for slot in asked_choices(menu, m["content"])]
    words = menu.find(hint, asked[-1]) if asked else []
    fits = words and all(word in menu.offered[asked[-1]] for word in words)
    return "good" if fits and END not in hint else "unfit"


def is_tutor(message: Message) -> bool:
    return message["role"] == "assistant"


def _says(text: str, word: str) -> bool:
    return _place(text, word) >= 0


def _place(text: str, word: str) -> int:
    found = re.search(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE)
    return found.start() if found else -1


# ---------------------------------------------------------------- a good tutor and a student


def say_as_tutor(scenario: Scenario, history: Sequence[Message], rng: random.Random) -> str:
    """A right reply, in one of its wordings."""
    menu = Menu.of(scenario)
    state, said = read_state(menu, history), []
    left = [slot for slot in menu.offered if slot not in state.values]
    if not history:
        said.append(rng.choice(OPEN))
    elif not left:
        values = listed([state.values[slot] for slot in menu.offered], "and")
        return rng.choice(CLOSE).format(v=values)
    elif state.new:
        values = listed([state.values[slot] for slot in state.new], "and")
        said.append(rng.choice(CONFIRM).format(v=values))
    elif state.price_of:
        slot, word = state.price_of
        said.append(rng.choice(PRICE).format(v=word, n=menu.offered[slot][word]))
    elif state.missing:
        said.append(rng.choice(MISSING).format(v=state.missing))
    else:
        said.append(rng.choice(STEER).format(s=left[0], t=scenario.tutor))
    options = listed(list(menu.offered[left[0]]), "or")
    said.append(rng.choice(ASK).format(s=left[0], o=options))
    return " ".join(said)


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
    with write_aside(path) as file:
        for row in rows(config.dialogues, config.seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"saved {path}: {config.dialogues} dialogues")


if __name__ == "__main__":
    main()
