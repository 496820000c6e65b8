"""A dialogue -> rows to train tutor, student and judge on, and pairs of replies.

What is drawn depends on a seed and on what a row says, never on its place in a file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from redi.config import UserError
from redi.data.files import Row, read_rows
from redi.data.formats import FIELDS, to_example
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.dialogues import Dialogue, Reply, conversation
from redi.dialogue.rubric import GOOD, Rubric, judge_messages
from redi.dialogue.scenario import HINT


def chance(seed: int, *key: Any) -> float:
    """In [0, 1), the same for the same seed and key."""
    digest = hashlib.sha256(json.dumps([seed, *key], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def tutor_row(dialogue: Dialogue, seed: int, hint_share: float, counts: Counter[str]) -> Row | None:
    """None if there is no reply to learn. counts: that, the student's turns, and the hints before
    them. Of several last replies, only the first that is labeled good is learned, and neither hints
    nor earlier replies are: the earlier turns come again in the rows of other states."""
    scenario, several = dialogue.scenario, bool(dialogue.replies)
    identity = [scenario.id, [(said["role"], said["content"]) for said in dialogue.messages]]
    right = [r["content"] for r in dialogue.replies if r.get("label") and is_right(r)][:1]
    turns, learned = [message("system", scenario.prompt("tutor"))], len(right)
    drawn: Counter[str] = Counter()
    for number, said in enumerate(dialogue.messages):
        words = said["content"]
        if is_answer(said):
            is_opening = number == 0 and dialogue.has_opening
            is_learned = is_right(said) and not several and not is_opening
            learned += is_learned
            turns.append(message("assistant", words) | ({} if is_learned else {"weight": 0}))
        else:
            drawn["student's turns"] += not several
            if not several and chance(seed, "hint", identity, number) < hint_share:
                drawn["hints"] += 1
                turns += [message("user", HINT), message("assistant", words)]
            turns.append(message("user", words))
    turns += [message("assistant", words) for words in right]
    if not is_answer(turns[-1]):
        turns.pop()
    counts.update(drawn if learned else {"tutor: no reply to learn": 1})
    return {"messages": turns} if learned else None


def is_right(said: Row) -> bool:
    """Whether a reply has no fault that is known, no weight 0, and was not cut by a limit."""
    return said.get("label", GOOD) == GOOD and said.get("weight") != 0 and "cut" not in said


def student_row(dialogue: Dialogue, counts: Counter[str]) -> Row | None:
    """None, and counted, if there is no turn to learn; None for one with several last replies."""
    if dialogue.replies:
        return None
    messages = [said for said in dialogue.messages if is_answer(said) or "cut" not in said]
    turns = conversation("student", dialogue.scenario, messages)
    if not is_answer(turns[-1]):
        turns.pop()
    counts["student: no turn to learn"] += len(turns) < 2
    return {"messages": turns} if len(turns) > 1 else None


def judge_row(reply: Reply, rubric: Rubric, seen: set[str], counts: Counter[str]) -> Row | None:
    """None, and counted, if a judge cannot give the label, or if the row is in `seen`."""
    row = {"prompt": judge_messages(reply, rubric), "completion": reply.label}
    text = json.dumps([reply.scenario.id, row])
    if reply.label not in rubric.labels(reply):
        counts["judge: label that is not in the rubric"] += 1
    elif text in seen:
        counts["judge: repeated"] += 1
    else:
        seen.add(text)
        return row
    return None


def pair(state: Sequence[Reply], seed: int, counts: Counter[str]) -> Row | None:
    """The first good and the first bad reply: by their places, and among equal ones drawn. None,
    and counted, if there is no such pair."""
    drawn = sorted(state, key=lambda reply: (reply.place, chance(seed, "reply", reply.content)))
    good = next((r for r in drawn if r.label == GOOD and is_right(r.said)), None)
    bad = next((reply for reply in drawn if reply.label not in (None, GOOD)), None)
    if good is None or bad is None:
        counts[f"pairs: no {'good' if good is None else 'bad'} reply"] += 1
        return None
    if bad.content.strip() in {r.content.strip() for r in state if r.label == GOOD}:
        counts["pairs: rejected is also labeled good"] += 1
        return None
    return {
        "prompt": conversation("tutor", good.scenario, good.history, good.is_hint),
        "chosen": [message("assistant", good.content)],
        "rejected": [message("assistant", bad.content)],
    }


def mixed(rows: list[Row], source: str, share: float, seed: int, counts: Counter[str]) -> list[Row]:
    """The rows, and evenly between them as many of `source` as make up this share of all, without
    those that are labeled wrong. Raises UserError if there are too few."""
    found = {}
    for where, row in read_rows(source, FIELDS):
        example = to_example(row, where, "rows")
        if example.weights[0] <= 0:
            counts["mix: label false or weight 0"] += 1
            continue
        row = {"prompt": example.prompt, "completion": example.responses[0]}
        found.setdefault(chance(seed, "mix", row), row)
    count = round(len(rows) * share / (1 - share))
    if count > len(found):
        wanted = f"--mix-share {share} beside {len(rows)} rows takes {count}"
        raise UserError(f"{source}: holds {len(found)} different rows; {wanted}")
    drawn = [found[key] for key in sorted(found)[:count]]
    spread = [(i / len(part), row) for part in (rows, drawn) for i, row in enumerate(part, 1)]
    return [row for _, row in sorted(spread, key=lambda entry: entry[0])]
