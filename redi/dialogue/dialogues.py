"""Dialogues in files, and the replies in them that can be judged.

    {"scenario": {...}, "messages": [
        {"role": "assistant", "content": "Hello! What can I get you?"},
        {"role": "user", "content": "A tea.", "hint": "I want a tea.", "hint_label": "good"},
        {"role": "assistant", "content": "Here is your coffee.", "label": "wrong"}],
     "replies": [{"content": "Here you are.", "label": "good"}, ...]}

A scenario is a table, or the id of one in another file. Labels are optional. `replies` are several
answers to the last message instead of one. A hint is what the tutor suggested that the student say.
Other fields are ignored. redi dialogue evaluate and chat's /save write such rows.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows, write_aside
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.scenario import HINT, Scenario, without_marks

Who = Literal["tutor", "student"]
TEXTS = ("content", "label", "hint", "hint_label")
FIELDS = ("role", *TEXTS, "weight", "cut")  # of a message


@dataclass(frozen=True)
class Reply:
    """What a tutor says in a state of a dialogue: to the student or, as a hint, for the student."""

    scenario: Scenario
    history: list[Message]  # role and content, as the tutor saw them, without hints
    content: str
    label: str | None = None  # good or a fault, if it is known
    is_hint: bool = False
    place: int = 0  # in the list of several replies, from 1; 0: said in the dialogue
    said: Row = field(default_factory=dict)  # the entry of the dialogue's row that holds it


@dataclass(frozen=True)
class Dialogue:
    scenario: Scenario
    messages: list[Row]  # role, content, and what the module's docstring lists
    replies: list[Row]  # content, label

    @property
    def has_opening(self) -> bool:
        """Whether it begins with the scenario's opening, which is neither generated nor judged."""
        opening = self.scenario.opening
        return bool(opening and self.messages and self.messages[0]["content"] == opening)

    def all_replies(self) -> Iterator[Reply]:
        """Every reply and hint with its state, in order, but for the scenario's opening."""
        history: list[Message] = []
        for said in self.messages:
            if not is_answer(said) and "hint" in said:
                label = said.get("hint_label")
                yield Reply(self.scenario, history, said["hint"], label, is_hint=True, said=said)
            elif is_answer(said) and (history or not self.has_opening):
                yield Reply(self.scenario, history, said["content"], said.get("label"), said=said)
            history = [*history, {"role": said["role"], "content": said["content"]}]
        for place, said in enumerate(self.replies, 1):
            label = said.get("label")
            yield Reply(self.scenario, history, said["content"], label, place=place, said=said)


def conversation(
    who: Who, scenario: Scenario, messages: Sequence[Row], hint: bool = False
) -> list[Message]:
    """What one side sees of a dialogue, its own words as the assistant's. hint: the tutor is asked
    what the student could say, rather than for its reply."""
    swapped = {"assistant": "user", "user": "assistant"} if who == "student" else {}
    seen = [{"role": "system", "content": scenario.prompt(who)}]
    for said in messages:
        role = said["role"]
        seen.append({"role": swapped.get(role, role), "content": said["content"]})
    return [*seen, {"role": "user", "content": HINT}] if hint else seen


def read_dialogues(
    source: str, scenarios: Mapping[str, Scenario], dropped: Counter[str] | None = None
) -> Iterator[Dialogue]:
    """The dialogues of a file, folder or hub id; the student's words without marks. scenarios: by
    id, for rows that name theirs. dropped: counts rows with an unknown id; None: such a row is an
    error. Raises UserError: a row without a scenario, or with messages of another shape."""
    for where, row in read_rows(source):
        scenario = row.get("scenario")
        if isinstance(scenario, dict):
            scenario = Scenario.of(scenario, where)
        elif isinstance(scenario, str) and scenario in scenarios:
            scenario = scenarios[scenario]
        elif isinstance(scenario, str) and dropped is not None:
            dropped["unknown scenario id"] += 1
            continue
        else:
            raise UserError(f"{where}: 'scenario' must be a table or the id of a known scenario")
        messages = _checked(row.get("messages"), "messages", where)
        for said in messages:
            if said.get("role") not in ("assistant", "user"):
                raise UserError(f"{where}: 'messages' must have the roles assistant and user")
            if not is_answer(said):
                said["content"] = without_marks(said["content"])
        yield Dialogue(scenario, messages, _checked(row.get("replies") or [], "replies", where))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with write_aside(path) as file:
        file.writelines(map(to_line, rows))


def to_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _checked(values: Any, name: str, where: str) -> list[Row]:
    """Messages or replies, with those of the fields that have a value. Raises UserError."""
    found = []
    for value in values if isinstance(values, list) else [None]:
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise UserError(f'{where}: {name!r} must be a list of {{"content": text, ...}}')
        one = {key: value[key] for key in FIELDS if value.get(key) not in (None, "")}
        texts = [one[key] for key in TEXTS if key in one]
        if not all(isinstance(text, str) and is_encodable(text) for text in texts):
            raise UserError(f"{where}: {', '.join(TEXTS)} must be text in UTF-8")
        for label in (one[key] for key in ("label", "hint_label") if key in one):
            if label.strip().casefold() == "good" != label:
                raise UserError(f"{where}: the label {label!r} is not spelled 'good'")
        if one.get("weight", 1) not in (0, 1):
            raise UserError(f"{where}: a message's weight must be 0 or 1")
        found.append({"content": "", **one})
    return found
