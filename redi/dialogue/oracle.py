"""What a tutor's reply means in the generated world (world.py), and whether it is right.

The state of a dialogue follows from the words of the scenario that the student has said, and a
reply is read the same way: which choice its questions name, which options and prices it states,
whether it ends. Only such words count, so replies of any model can be labeled.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from redi.config import UserError
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.scenario import END, Scenario, split_end

SHARED = {
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "color": "red, green, yellow, brown, white, black, orange",
    "size": "tiny, small, medium, large, huge, giant",
    "payment": "cash, card, check, voucher, coin, transfer",
    "hour": "eight, nine, ten, eleven, noon, midnight",
    "number": "two, three, four, five, six, seven",
}
PRICE_WORDS = re.compile(r"\b(how much|cost|price|pay for)\b", re.IGNORECASE)
NEGATION = re.compile(r"\b(no|not|sorry|cannot|can't|don't|isn't|out of)\b", re.IGNORECASE)


@cache
def topics() -> dict[str, tuple[str, str, str, list[str]]]:
    """Topic -> (place, tutor, the topic's own choice, its seven options)."""
    lines = Path(__file__).with_name("topics.txt").read_text("utf-8").splitlines()
    rows = (line.split("|") for line in lines)
    return {topic: (*facts, items.split(", ")) for topic, *facts, items in rows}


@dataclass(frozen=True)
class Menu:
    """What a scenario's tasks and facts say."""

    offered: dict[str, dict[str, int | None]]  # choice -> option -> price, if it has one
    known_words: dict[str, list[str]]  # choice -> all words of the world for it

    @classmethod
    def of(cls, scenario: Scenario) -> "Menu":
        """Raises UserError for a scenario of something else."""
        offered, own = {}, topics().get(scenario.topic, ("", "", "", []))
        prices = dict(re.findall(r"(.+) costs (\d+) pounds", "\n".join(scenario.facts)))
        for task in scenario.tasks:
            slot, _, options = task.removeprefix("choose the ").partition(": ")
            words = re.split(", | or ", options)
            offered[slot] = {word: int(prices[word]) if word in prices else None for word in words}
        lists = {slot: words.split(", ") for slot, words in SHARED.items()} | {own[2]: own[3]}
        if scenario.topic not in topics() or not offered.keys() <= lists.keys():
            raise UserError(f"scenario {scenario.id!r}: not of the world (redi.dialogue.world)")
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
    asked = [slot for m in history if is_answer(m) for slot in asked_choices(menu, m["content"])]
    words = menu.find(hint, asked[-1]) if asked else []
    fits = words and all(word in menu.offered[asked[-1]] for word in words)
    return "good" if fits and END not in hint else "unfit"


def _says(text: str, word: str) -> bool:
    return _place(text, word) >= 0


def _place(text: str, word: str) -> int:
    found = re.search(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE)
    return found.start() if found else -1
