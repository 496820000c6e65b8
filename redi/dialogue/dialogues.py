"""Dialogues in files, and the replies in them that can be judged.

    {"scenario": {...}, "messages": [
        {"role": "assistant", "content": "Hello! What can I get you?"},
        {"role": "user", "content": "A tea.", "hint": "I want a tea.", "hint_label": "good"},
        {"role": "assistant", "content": "Here is your coffee.", "label": "wrong"}],
     "replies": [{"content": "Here you are.", "label": "good"}, ...]}

A scenario is a table, or the id of one that another file holds. Labels are optional. `replies` are
several answers to the last message, in place of one. A hint is what the tutor suggested that the
student say. Other fields are ignored. redi dialogue evaluate writes such rows, chat --save as well.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redi.config import UserError
from redi.data.files import is_encodable, read_rows
from redi.data.tokenizer import Message
from redi.dialogue.scenario import Scenario

TEXTS = ("content", "label", "hint", "hint_label")  # of a message


@dataclass(frozen=True)
class Reply:
    """What a tutor says in a state of a dialogue, to the student or, as a hint, for it."""

    scenario: Scenario
    history: list[Message]  # role and content, as the tutor saw them, without hints
    content: str
    label: str | None = None  # good or a fault, if it is known
    is_hint: bool = False


@dataclass(frozen=True)
class Dialogue:
    scenario: Scenario
    messages: list[dict[str, Any]]  # role, content, and what the module's docstring lists
    replies: list[dict[str, Any]]  # content, label

    def all_replies(self) -> Iterator[Reply]:
        """Every reply and hint with its state, in order."""
        history: list[Message] = []
        for message in self.messages:
            if message["role"] == "assistant":
                yield Reply(self.scenario, history, message["content"], message.get("label"))
            elif hint := message.get("hint"):
                yield Reply(self.scenario, history, hint, message.get("hint_label"), is_hint=True)
            history = [*history, {"role": message["role"], "content": message["content"]}]
        for reply in self.replies:
            yield Reply(self.scenario, history, reply["content"], reply.get("label"))


def read_dialogues(
    source: str, scenarios: Mapping[str, Scenario], unknown: Counter[str] | None = None
) -> Iterator[Dialogue]:
    """The dialogues of a file, folder or hub id. scenarios: by id, for rows that name theirs.
    unknown: counts rows by the id of a scenario that is not there; None: such a row is an error.
    Raises UserError: a row without a scenario, or with messages of another shape."""
    for where, row in read_rows(source):
        scenario = row.get("scenario")
        if isinstance(scenario, dict):
            scenario = Scenario.of(scenario, where)
        elif isinstance(scenario, str) and scenario in scenarios:
            scenario = scenarios[scenario]
        elif isinstance(scenario, str) and unknown is not None:
            unknown[scenario] += 1
            continue
        else:
            raise UserError(f"{where}: 'scenario' must be a table or the id of a known scenario")
        messages, replies = row.get("messages"), row.get("replies") or []
        for name, values in (("messages", messages), ("replies", replies)):
            if not isinstance(values, list) or not all(map(_has_content, values)):
                raise UserError(f'{where}: {name!r} must be a list of {{"content": text, ...}}')
        for value in (*messages, *replies):
            texts = (value[name] for name in TEXTS if value.get(name) is not None)
            if not all(isinstance(text, str) and is_encodable(text) for text in texts):
                raise UserError(f"{where}: {', '.join(TEXTS)} must be text in UTF-8")
            if value.get("weight") not in (None, 0, 1):
                raise UserError(f"{where}: a message's weight must be 0 or 1")
        if any(message.get("role") not in ("assistant", "user") for message in messages):
            raise UserError(f"{where}: 'messages' must have the roles assistant and user")
        yield Dialogue(scenario, messages, replies)


def _has_content(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)
