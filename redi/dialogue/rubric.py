"""The labels of a judge, and what it is asked.

    # rubric.toml            a missing table is redi's own; each needs the label good
    [replies]
    good = "right, and the next step"
    rude = "not polite"
    [hints]
    good = "can be said now"
    unfit = "cannot be said now"

A judge is trained with the rubric in its prompts, so it needs the same one later.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from redi.config import UserError, check_table, load_toml, types_of
from redi.data.tokenizer import Message
from redi.dialogue.dialogues import Reply

GOOD = "good"
REPLIES = {
    GOOD: "right, and the next step",
    "wrong": "contradicts the facts or what was said",
    "ignores": "leaves out what it must answer or repeat",
    "ends_early": "ends before all tasks are done",
    "goes_on": "does not end when all tasks are done",
    "repeats": "asks again what is known",
    "skips": "leaves out the next task",
    "off_topic": "follows the other away from the tasks",
    "broken": "no sense, or asks nothing",
}
HINTS = {GOOD: "can be said now", "unfit": "cannot be said now"}


@dataclass(frozen=True)
class Rubric:
    """Label -> what it means, in a few words: they are in every prompt."""

    replies: Annotated[dict, "labels of a tutor's replies"] = field(default_factory=REPLIES.copy)
    hints: Annotated[dict, "labels of hints"] = field(default_factory=HINTS.copy)

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> "Rubric":
        """Raises UserError, which begins with `where`. A table that is missing is redi's own."""
        rubric = cls(**check_table(dict(table), types_of(cls), where))
        for name, labels in vars(rubric).items():
            if GOOD not in labels or len(labels) < 2:
                raise UserError(f"{where}: {name!r} needs the label 'good' and at least one other")
            if not all(isinstance(text, str) for text in labels.values()):
                raise UserError(f'{where}: {name!r}: expected label = "what it means"')
        return rubric

    def labels(self, reply: Reply) -> dict[str, str]:
        return self.hints if reply.is_hint else self.replies


def read_rubric(path: str | None) -> Rubric:
    """The rubric in a TOML file; None: redi's own. Raises UserError."""
    return Rubric.of(load_toml(path, path), path) if path else Rubric()


def judge_messages(reply: Reply, rubric: Rubric) -> list[Message]:
    """What a judge of labels is asked. What varies least comes first, so that the prompts of a
    dialogue begin alike, and all prompts begin with the rubric: prefix_trees.py runs it once."""
    labels = "\n".join(f"{label}: {text}" for label, text in rubric.labels(reply).items())
    scenario = reply.scenario
    names = {"assistant": scenario.tutor, "user": scenario.student}
    said = [(names[message["role"]], message["content"]) for message in reply.history]
    said.append(("hint" if reply.is_hint else scenario.tutor, reply.content))
    lines = [f"{who}: {' '.join(text.split())}" for who, text in said]  # a line each
    lines.append("Judge the line above. Answer with one label.")
    return [
        {"role": "system", "content": f"Labels:\n{labels}\n\n{scenario.prompt('judge')}"},
        {"role": "user", "content": "\n".join(lines)},
    ]
