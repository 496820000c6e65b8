"""Training rows of every usual shape -> `Example`: a prompt, and what is learned from after it.

    for SFT     {"prompt", "completion"}            {"messages"}, loss on every assistant turn
    for pairs   {"prompt", "chosen", "rejected"}    {"chosen", "rejected"}, the prompt implicit

A prompt is text (a user's turn) or a list of {"role", "content"} messages. A response is text (an
assistant's turn), messages, or a whole conversation that repeats the prompt: in

    {"prompt": "1+1?", "chosen":   [{"role": "user", "content": "1+1?"}, {"role": "assistant", ..}],
                       "rejected": [{"role": "user", "content": "1+1?"}, {"role": "assistant", ..}]}

the prompt is not learned from, and not there twice. Text goes through the model's chat template
like any turn: a tuned model is asked in no other way. The format is recognised row by row, from the
fields; fields besides those named are ignored.

Left out: ShareGPT's {"from", "value"}, tool calls, images; a prompt inside two plain texts (where
it ends would be a guess). Rows of teachers' traces, with verdicts, are redi.prepare's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows
from redi.data.tokenizer import Message

ROLES = ("system", "user", "assistant", "tool")
EQUAL = "chosen equals rejected"
# Content that stands beside `content`, which would silently be missing.
ELSEWHERE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
FORMATS = {  # stage -> the fields of each format, the first that fits is taken
    False: (("prompt", "completion"), ("messages",)),
    True: (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
TEACHERS = ("generations", "traces")  # fields of rows for redi.prepare
PROGRAMS = {False: "train_sft.py", True: "train_redi.py"}


@dataclass(frozen=True)
class Example:
    """A row. A response begins and ends with an assistant's message; all of the assistant's in it
    are learned from, others are not."""

    prompt: list[Message]  # up to where what is learned begins
    responses: list[list[Message]]  # SFT: one; pairs: chosen, rejected


def read_examples(
    files: list[Path], paired: bool, skipped: Counter[str]
) -> Iterator[tuple[int, Example]]:
    """(the row's number, from 1; the example) of every row of the files; skipped ones are counted.

    Raises UserError, with file and line, for a row that cannot be trained on.
    """
    return examples(read_rows(files), paired, skipped)


def examples(
    rows: Iterable[tuple[str, Row]], paired: bool, skipped: Counter[str]
) -> Iterator[tuple[int, Example]]:
    """The same of (place, row)."""
    for number, (where, row) in enumerate(rows, start=1):
        example = to_example(row, where, paired)
        if paired and example.responses[0] == example.responses[1]:
            skipped[EQUAL] += 1
        else:
            yield number, example


def recognise(row: Mapping[str, Any], where: str, paired: bool) -> tuple[str, ...]:
    """The fields of the row's format. Raises UserError for a row of none."""
    seen = [name for name, value in row.items() if value is not None]
    for fields in FORMATS[paired]:
        if all(name in seen for name in fields):
            return fields
    known = " or ".join("{" + ", ".join(fields) + "}" for fields in FORMATS[paired])
    other = any(all(name in seen for name in fields) for fields in FORMATS[not paired])
    hint = ""
    if any(name in seen for name in TEACHERS):
        hint = "; it looks like a teacher's: python -m redi.prepare makes rows to train on"
    elif other:
        hint = f"; {PROGRAMS[not paired]} trains on such rows"
    listed = ", ".join(str(name)[:40] for name in seen[:20]) or "none"
    raise UserError(f"{where}: fields seen: {listed}; expected {known}{hint}")


def to_example(row: Row, where: str, paired: bool) -> Example:
    """One row. Raises UserError, which begins with `where`, for one that cannot be trained on."""
    fields = recognise(row, where, paired)
    if fields == ("messages",):
        return _of_conversation(_messages(row, "messages", where), where)
    prompt = _messages(row, "prompt", where, "user") if "prompt" in fields else None
    sides = ("chosen", "rejected") if paired else ("completion",)
    responses = [_messages(row, side, where, "assistant") for side in sides]
    if prompt is None:
        prompt = _common(*responses)
        if not prompt:
            raise UserError(
                f"{where}: no prompt: 'chosen' and 'rejected' do not begin with the same messages"
            )
    elif prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: 'prompt' ends with an assistant's message")
    whole = [r for r in responses if not _is_answer(r[0])]
    if whole and isinstance(row.get("prompt"), str):  # it is one turn of the conversation
        prompt = _common(*whole) if len(whole) > 1 else _up_to_answer(whole[0])
        if row["prompt"] not in [m["content"] for m in prompt]:
            raise UserError(f"{where}: 'prompt' is not what {' and '.join(sides)} begin with")
    responses = [
        _after(prompt, response, f"{where}: {side!r}") for side, response in zip(sides, responses)
    ]
    return Example(prompt, responses)


# ---------------------------------------------------------------- conversations


def _of_conversation(messages: list[Message], where: str) -> Example:
    prompt = _up_to_answer(messages)
    return Example(prompt, [_after(prompt, messages, f"{where}: 'messages'")])


def _up_to_answer(messages: list[Message]) -> list[Message]:
    first = next((i for i, m in enumerate(messages) if _is_answer(m)), len(messages))
    return messages[:first]


def _common(*conversations: list[Message]) -> list[Message]:
    """The messages that all of them begin with, up to an answer if they are wholly the same."""
    same = []
    for turns in zip(*conversations):
        if any(turn != turns[0] for turn in turns):
            return same
        same.append(turns[0])
    while same and _is_answer(same[-1]):
        same.pop()
    return same


def _after(prompt: list[Message], response: list[Message], what: str) -> list[Message]:
    """The response without the prompt, if it repeats it."""
    if not _is_answer(response[0]):
        if response[: len(prompt)] != prompt:
            raise UserError(f"{what} is a whole conversation that does not begin with the prompt")
        response = response[len(prompt) :]
    if not prompt:
        raise UserError(f"{what} begins with an answer: a prompt is missing")
    if not response or not _is_answer(response[0]) or not _is_answer(response[-1]):
        raise UserError(f"{what} must go on with an assistant's message, and end with one")
    if not all(m["content"].strip() for m in response if _is_answer(m)):
        raise UserError(f"{what} is empty; a response needs text")
    return response


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


# ---------------------------------------------------------------- messages


def _messages(row: Row, field: str, where: str, role: str | None = None) -> list[Message]:
    """A field that holds messages, checked; or, with a role, text that is one of its turns."""
    value = row[field]
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        text = "text, or " if role else ""
        raise UserError(
            f'{where}: {field!r} must be {text}a list of {{"role": ..., "content": text}} messages '
            f"with roles among {', '.join(ROLES)}"
        )
    for message in value:
        if found := [name for name in ELSEWHERE if message.get(name)]:
            raise UserError(f"{where}: {field!r} has {found[0]!r} beside 'content': not trained on")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(value: Any) -> bool:
    """A role goes through the template as it is, so only known ones may."""
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
        and is_encodable(value["content"])
    )
