"""A dialogue -> rows to train on.

    tutor      system, assistant, user, ...     a bad reply has weight 0: context, not learned
    student    the same with the roles swapped
    pairs      of a state (scenario, history) the first good and the first bad of its replies
    mixed      rows of general instructions between a tutor's

What is drawn depends on a seed and on what a row says, never on its place in a file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from redi.config import UserError
from redi.data.files import read_rows
from redi.data.formats import FIELDS, to_example
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.dialogues import Dialogue, Reply
from redi.dialogue.rubric import GOOD, Rubric, judge_messages
from redi.dialogue.scenario import HINT, without_marks

Row = dict[str, Any]  # in a form of redi.data.formats
# Replies to one state: place (0: said in a dialogue; from 1: in a list of replies), reply.
State = list[tuple[int, Reply]]


def chance(seed: int, *key: Any) -> float:
    """In [0, 1), the same for the same seed and key."""
    digest = hashlib.sha256(json.dumps([seed, *key], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def cleaned(dialogue: Dialogue) -> Dialogue:
    """With only the fields that are used, the student's words as tutors get them, and no blank text
    at the end: a last turn in which the student said nothing, or some of the replies."""
    fields = ("role", "label", "hint", "hint_label", "weight")

    def used(said: Message) -> Message:
        given = {name: said[name] for name in fields if said.get(name) not in (None, "")}
        return {"content": said["content"], **given}

    messages, replies = list(map(used, dialogue.messages)), map(used, dialogue.replies)
    for said in messages:
        if not is_answer(said):
            said["content"] = without_marks(said["content"])
    if messages and not is_answer(messages[-1]) and not messages[-1]["content"]:
        messages.pop()
    return Dialogue(dialogue.scenario, messages, [r for r in replies if r["content"].strip()])


def has_opening(dialogue: Dialogue) -> bool:
    """Whether it begins with the scenario's opening, which is neither generated nor judged."""
    opening = dialogue.scenario.opening
    return bool(opening and dialogue.messages and dialogue.messages[0]["content"] == opening)


def tutor_row(dialogue: Dialogue, seed: int, hint_share: float, counts: Counter[str]) -> Row | None:
    """None, and counted, if there is no reply to learn. counts: also the student's turns, and those
    before which a hint is put. Of a dialogue with several last replies, only the first right one is
    learned, and no hint is put in: its turns come again in the rows of other states."""
    scenario, opening = dialogue.scenario, has_opening(dialogue)
    identity = [scenario.id, [(said["role"], said["content"]) for said in dialogue.messages]]
    right = [reply for reply in dialogue.replies if is_right(reply)][:1]
    conversation, learned = [message("system", scenario.prompt("tutor"))], 0
    for number, said in enumerate([*dialogue.messages, *right]):
        words = said["content"]
        if said.get("role") == "user":
            counts["student's turns"] += not dialogue.replies
            if not dialogue.replies and chance(seed, "hint", identity, number) < hint_share:
                counts["hints"] += 1
                conversation += [message("user", HINT), message("assistant", words)]
            conversation.append(message("user", words))
        else:
            is_last = number == len(dialogue.messages)
            is_context = (opening and number == 0) or (dialogue.replies and not is_last)
            weight = {"weight": 0} if is_context or not is_right(said) else {}
            learned += not weight
            conversation.append(message("assistant", words) | weight)
    if not is_answer(conversation[-1]):
        conversation.pop()
    counts["tutor: no reply to learn"] += not learned
    return {"messages": conversation} if learned else None


def is_right(said: Mapping[str, Any]) -> bool:
    """Whether a reply has no fault that is known, and no weight 0."""
    return said.get("label", GOOD) == GOOD and said.get("weight") != 0


def student_row(dialogue: Dialogue, counts: Counter[str]) -> Row | None:
    """None, and counted, if there is no turn to learn; None for one with several last replies."""
    if dialogue.replies:
        return None
    swapped = {"assistant": "user", "user": "assistant"}
    turns = [message(swapped[said["role"]], said["content"]) for said in dialogue.messages]
    if turns and not is_answer(turns[-1]):
        turns.pop()
    counts["student: no turn to learn"] += not turns
    system = message("system", dialogue.scenario.prompt("student"))
    return {"messages": [system, *turns]} if turns else None


def judge_row(reply: Reply, rubric: Rubric, seen: set[str], counts: Counter[str]) -> Row | None:
    """None if a judge cannot give the label, or if the row is in `seen`. counts: gets why."""
    if reply.label not in rubric.labels(reply):
        counts["judge: label that is not in the rubric"] += 1
        return None
    row = {"prompt": judge_messages(reply, rubric), "completion": reply.label}
    text = json.dumps([reply.scenario.id, row])
    if text in seen:
        counts["judge: repeated"] += 1
        return None
    seen.add(text)
    return row


def pair(state: State, seed: int, counts: Counter[str]) -> Row | None:
    """The first good and the first bad reply: by their places, and among equal ones drawn. counts:
    gets the reason if there is no pair."""
    drawn = sorted(state, key=lambda entry: (entry[0], chance(seed, "reply", entry[1].content)))
    good = next((reply for _, reply in drawn if reply.label == GOOD), None)
    bad = next((reply for _, reply in drawn if reply.label not in (None, GOOD)), None)
    if good is None or bad is None:
        counts[f"pairs: no {'good' if good is None else 'bad'} reply"] += 1
        return None
    if good.content == bad.content:
        counts["pairs: chosen equals rejected"] += 1
        return None
    system = message("system", good.scenario.prompt("tutor"))
    request = [message("user", HINT)] if good.is_hint else []
    return {
        "prompt": [system, *good.history, *request],
        "chosen": [message("assistant", good.content)],
        "rejected": [message("assistant", bad.content)],
    }


def mixed(rows: list[Row], source: str, share: float, seed: int) -> list[Row]:
    """The rows, and evenly between them as many of `source` as make up this share of all. Raises
    UserError if there are too few."""
    found = {}
    for where, row in read_rows(source, FIELDS):
        example = to_example(row, where, paired=False)
        row = {"prompt": example.prompt, "completion": example.responses[0]}
        found.setdefault(chance(seed, "mix", row), row)
    count = round(len(rows) * share / (1 - share))
    if count > len(found):
        wanted = f"--mix-share {share} beside {len(rows)} rows takes {count}"
        raise UserError(f"{source}: holds {len(found)} different rows; {wanted}")
    drawn = [found[key] for key in sorted(found)[:count]]
    spread = [(i / len(part), row) for part in (rows, drawn) for i, row in enumerate(part, 1)]
    return [row for _, row in sorted(spread, key=lambda entry: entry[0])]
