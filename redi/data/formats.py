"""Training rows of every usual shape -> `Example`: a prompt and the responses to learn from.

    rows          {"prompt", "completion"}            {"messages"}: every assistant turn is learned
    pairs         {"prompt", "chosen", "rejected"}    {"chosen", "rejected"}: they share the prompt
    labeled rows  {"prompt", "completion", "label"}   TRL's format for KTO; perhaps a "weight"

A prompt is text (a user's turn) or a list of {"role", "content"} messages. A response is text (an
assistant's turn), messages, or a whole conversation that begins with the prompt, which is removed.
An assistant's `reasoning_content` becomes a thought between <think> and </think> before its text.
An assistant's message with `"weight": 0`, as in OpenAI's format, is context: not learned from.
A file holds one kind of rows: its first row's. Each row's format is found from its fields; other
fields are ignored.

Left out: ShareGPT's {"from", "value"}, tool calls, images; a prompt inside two plain texts (where
it ends would be a guess). Teachers' traces with verdicts are for redi.prepare.
"""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows
from redi.data.tokenizer import Message, is_answer, is_learned

ROLES = ("system", "user", "assistant", "tool")
# Refused: training would silently leave out their text.
OTHER_CONTENT = ("tool_calls", "function_call", "reasoning", "thinking")
FORMATS = {  # kind of rows -> the fields of each format; the first that fits is taken
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "labeled rows": (("prompt", "completion", "label"),),
    "rows": (("prompt", "completion"), ("messages",)),
}
FIELDS = {"weight"} | {field for formats in FORMATS.values() for f in formats for field in f}
TRAINED_BY = {
    "pairs": "train_redi.py trains on files of pairs",
    "labeled rows": "train_redi.py trains on files of labeled rows, with objectives that take them",
    "rows": "train_sft.py trains on such rows",
}


@dataclass(frozen=True)
class Example:
    """A row. Each response begins with an assistant's message and ends with one that is learned
    from. Only the assistant's messages of a response without weight 0 are learned from."""

    prompt: list[Message]
    responses: list[list[Message]]  # one; of pairs two: chosen, rejected
    weights: tuple[float, ...] = (1.0,)  # of each response; below 0 if it is wrong or rejected


def read_examples(
    rows: Iterable[tuple[str, Row]], kind: str, skipped: Counter[str]
) -> Iterator[tuple[int, Example]]:
    """(where, row) -> (number of the row, from 1; its example). Rows that teach nothing are left
    out and counted in `skipped`. Raises UserError for a row that cannot be trained on."""
    for number, (where, row) in enumerate(rows, start=1):
        example = to_example(row, where, kind)
        if kind == "pairs" and example.responses[0] == example.responses[1]:
            skipped["chosen equals rejected"] += 1
        elif not all(example.weights):
            skipped["weight 0"] += 1
        elif kind == "rows" and example.weights[0] < 0:
            skipped["label false"] += 1
        else:
            yield number, example


def kind_of_rows(files: list[Path], kinds: Collection[str] = FORMATS) -> str:
    """The kind of the first row, which all rows must have. Raises UserError for none of `kinds`."""
    where, row = next(read_rows(files, FIELDS))
    return find_format(row, where, kinds)[0]


def find_format(
    row: Mapping[str, Any], where: str, kinds: Collection[str]
) -> tuple[str, tuple[str, ...]]:
    """(kind, fields) of the row's format. Raises UserError if no format of these kinds fits."""
    present = [name for name, value in row.items() if value is not None]
    fitting = [(k, f) for k, formats in FORMATS.items() for f in formats if set(f) <= set(present)]
    for kind, fields in fitting:
        if kind in kinds:
            return kind, fields
    hint = f"; {TRAINED_BY[fitting[0][0]]}" if fitting else ""
    if {"generations", "traces"} & set(present):
        hint = "; this looks like raw teacher data: python -m redi.prepare makes rows to train on"
    formats = [fields for kind in kinds for fields in FORMATS[kind]]
    expected = " or ".join("{" + ", ".join(fields) + "}" for fields in formats)
    listed = ", ".join(str(name)[:40] for name in present[:20]) or "none"
    raise UserError(f"{where}: fields seen: {listed}; expected {expected}{hint}")


def to_example(row: Row, where: str, kind: str) -> Example:
    """Convert one row. Raises UserError, which begins with `where`, if it cannot be trained on."""
    _, fields = find_format(row, where, [kind])
    sides = [field for field in fields if field not in ("prompt", "label")]
    role = None if "messages" in fields else "assistant"
    prompt = _texts(_read_messages(row, "prompt", where, "user")) if "prompt" in fields else None
    responses = [_read_messages(row, side, where, role) for side in sides]
    conversations = [response for response in responses if not is_answer(response[0])]
    if prompt is None:
        prompt = _shared_prompt(responses)
        if kind == "pairs" and not prompt:
            raise UserError(
                f"{where}: no prompt: 'chosen' and 'rejected' do not begin with the same messages"
            )
    elif is_answer(prompt[-1]):
        raise UserError(f"{where}: 'prompt' ends with an assistant's message")
    elif conversations and isinstance(row["prompt"], str):  # one turn of the whole prompt
        prompt = _shared_prompt(conversations)
        if row["prompt"] not in [message["content"] for message in prompt]:
            raise UserError(f"{where}: 'prompt' is not what {' and '.join(sides)} begin with")
    named = zip(sides, responses)
    responses = [_after_prompt(prompt, r, f"{where}: {side!r}") for side, r in named]
    if kind == "pairs":
        return Example(prompt, responses, (1.0, -1.0))
    return Example(prompt, responses, (_signed_weight(row, where),))


def _signed_weight(row: Row, where: str) -> float:
    """A row's weight, 1 if it names none; times -1 if its label is false."""
    label, weight = row.get("label", True), row.get("weight")
    weight = 1.0 if weight is None else weight
    if not isinstance(label, bool):  # 0 and 1 may be scores, or classes
        raise UserError(f"{where}: 'label' must be true or false; got {label!r:.40}")
    if type(weight) not in (int, float) or not 0 <= weight <= sys.float_info.max:
        raise UserError(f"{where}: 'weight' must be a number, at least 0; got {weight!r:.40}")
    return float(weight if label else -weight)


def _shared_prompt(conversations: list[list[Message]]) -> list[Message]:
    """Of one conversation the messages before its first answer; of two, those that both begin with
    (of two equal ones, without the answers at the end)."""
    conversations = [_texts(conversation) for conversation in conversations]
    if len(conversations) == 1:
        return list(takewhile(lambda message: not is_answer(message), conversations[0]))
    shared = []
    for turns in zip(*conversations):
        if any(turn != turns[0] for turn in turns):
            return shared
        shared.append(turns[0])
    while shared and is_answer(shared[-1]):
        shared.pop()
    return shared


def _after_prompt(prompt: list[Message], response: list[Message], what: str) -> list[Message]:
    """The response without the prompt that it may repeat. Raises UserError if it is no answer."""
    if not is_answer(response[0]):
        if _texts(response[: len(prompt)]) != prompt:
            raise UserError(f"{what} is a whole conversation that does not begin with the prompt")
        response = response[len(prompt) :]
    if not prompt:
        raise UserError(f"{what} begins with an answer: a prompt is missing")
    if not response or not is_answer(response[0]) or not is_answer(response[-1]):
        raise UserError(
            f"{what} must start with an assistant's message after the prompt, and end with one"
        )
    if not all(message["content"].strip() for message in response if is_answer(message)):
        raise UserError(f"{what} is empty; a response needs text")
    learned = [number for number, message in enumerate(response, 1) if is_learned(message)]
    if not learned:
        raise UserError(f"{what} has no answer to learn from: each has weight 0")
    return response[: learned[-1]]  # what follows is context for nothing


def _read_messages(row: Row, field: str, where: str, role: str | None = None) -> list[Message]:
    """The messages of a field. With a role, the field may also be text: a turn of that role."""
    value = row[field]
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        text = "text, or " if role else ""
        raise UserError(
            f'{where}: {field!r} must be {text}a list of {{"role": ..., "content": text}} messages '
            f"with roles among {', '.join(ROLES)}"
        )
    lost = [
        name
        for message in value
        for name in (*OTHER_CONTENT, *([] if is_answer(message) else ["reasoning_content"]))
        if message.get(name)
    ]
    if lost:
        raise UserError(
            f"{where}: {field!r} has {lost[0]!r} beside 'content', which redi cannot train on"
        )
    for message in value:
        weight, thoughts = message.get("weight"), message.get("reasoning_content")
        if weight not in (None, 0, 1):
            raise UserError(f"{where}: {field!r} has the weight {weight!r}; expected 0 or 1")
        text = f"{thoughts}{message['content']}"
        if is_answer(message) and thoughts is not None and re.search("</?think>", text):
            raise UserError(
                f"{where}: {field!r} has a reasoning_content, and <think> or </think> in a text"
            )
    return [
        {"role": message["role"], "content": with_thoughts(message)}
        | ({"weight": 0} if is_answer(message) and message.get("weight") == 0 else {})
        for message in value
    ]


def _texts(messages: list[Message]) -> list[Message]:
    """The messages without weights, which mean nothing in a prompt."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def with_thoughts(message: Message) -> str:
    """The content after its reasoning_content in <think> tags, as Qwen3's template writes them."""
    thoughts, text = message.get("reasoning_content"), message["content"]
    if not thoughts:
        return text
    newline = "\n"
    return f"<think>\n{thoughts.strip(newline)}\n</think>\n\n{text.lstrip(newline)}"


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        return False  # the template inserts the role as it is
    texts = [value.get("content"), value.get("reasoning_content") or ""]
    return all(isinstance(text, str) and is_encodable(text) for text in texts)
