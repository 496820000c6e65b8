"""A scenario: the scene of a dialogue, read from a file, and each side's prompt.

    # cafe.toml: one scenario; or many, as [[scenario]] tables, or rows of .jsonl, .json, Parquet
    topic = "ordering food"
    place = "a small cafe in London, at noon"
    tutor = "the waiter"            # the model's role
    student = "a tourist"
    tasks = ["order a drink", "ask what is in the soup", "pay"]      # the student's, in this order
    words = ["menu", "bill", "change"]               # to practice; optional, as all that follow
    level = "A2"
    facts = ["coffee costs 3 pounds", "the soup has nuts"]    # what the tutor must not contradict
    wants = ["a tea", "no nuts"]                     # the student's card: the tutor never sees it
    opening = "Hello! What can I get you?"           # the tutor's first words; else it finds them
    max_turns = 12                      # most replies of the tutor, not counting the opening

The tutor ends the dialogue with the plain text [end] after its last reply; any tokenizer can write
it. What a student types is never a command: both marks below are taken out of it.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from redi.config import UserError, check_table, load_toml, types_of
from redi.data.files import is_encodable, read_rows
from redi.data.tokenizer import Message

END = "[end]"
HINT = "(What could I say?)"  # asks the tutor for what the student could say next
# The prompt of each side. A line with an empty field is left out.
TEMPLATES = {
    "tutor": """\
You are {tutor} in {place}. Talk with {student} about {topic}.
{student} has these tasks, in this order: {tasks}
Facts: {facts}.
Words to practice: {words}.
Use words of level {level}.
Do one task at a time. Repeat what you hear, answer questions, and keep to the facts.
When all tasks are done, repeat what was agreed, say goodbye and end with [end].
""",
    "student": """\
You are {student} in {place}. Talk with {tutor} about {topic}.
Your tasks, in this order: {tasks}
You want: {wants}.
Words to practice: {words}.
Use words of level {level}.
""",
    "judge": """\
{tutor} in {place} talks with {student} about {topic}.
{student} has these tasks, in this order: {tasks}
Facts: {facts}.
{student} wants: {wants}.
When all tasks are done, {tutor} says goodbye and ends with [end].
""",
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    topic: Annotated[str, "is either seen or unseen in training"] = ""
    place: Annotated[str, "where it is"] = ""
    tutor: Annotated[str, "the model's role"] = ""
    student: Annotated[str, "the other's role"] = ""
    tasks: Annotated[list[str], "the student's, in this order"] = ()
    words: Annotated[list[str], "to practice"] = ()
    level: Annotated[str, "of the language, as A2"] = ""
    facts: Annotated[list[str], "what the tutor must not contradict"] = ()
    wants: Annotated[list[str], "the student's card, hidden from the tutor"] = ()
    opening: Annotated[str, "the tutor's first words; empty: it finds them"] = ""
    max_turns: Annotated[int, "most replies of the tutor, not counting the opening"] = 12
    id: Annotated[str, "names the scenario; empty: a hash of the rest"] = ""

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise UserError(f"key 'max_turns': expected at least 1, got {self.max_turns}")
        for name in ("topic", "place", "tutor", "student", "tasks"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value
            if not texts or not all(text.strip() for text in texts):
                raise UserError(f"key {name!r}: expected text, got {value!r}")
        if not self.id:
            content = json.dumps(self.as_row() | {"id": ""}, sort_keys=True).encode()
            object.__setattr__(self, "id", hashlib.sha256(content).hexdigest()[:12])

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> "Scenario":
        """Raises UserError, which begins with `where`: a key that is unknown, missing or wrong."""
        given = {key: value for key, value in row.items() if value is not None}
        checked = check_table(given, types_of(cls), where)
        if not is_encodable(json.dumps(checked, ensure_ascii=False)):
            raise UserError(f"{where}: the scenario has text that UTF-8 cannot hold")
        try:
            return cls(**checked)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def as_row(self) -> dict[str, Any]:
        """The fields that have a value, for JSON."""
        return {name: value for name, value in vars(self).items() if value}

    def prompt(self, view: str) -> str:
        """The prompt of the tutor, the student or the judge."""
        values = {name: str(value) for name, value in vars(self).items()}
        values["tasks"] = " ".join(f"{n}. {task}." for n, task in enumerate(self.tasks, 1))
        values |= {name: "; ".join(getattr(self, name)) for name in ("facts", "wants")}
        values["words"] = ", ".join(self.words)
        lines = []
        for line in TEMPLATES[view].splitlines():
            names = re.findall(r"{(\w+)}", line)
            if all(values[name] for name in names):
                text = re.sub(r"{(\w+)}", lambda field: values[field[1]], line)
                lines.append(text[:1].upper() + text[1:])
        return "\n".join(lines)


def read_scenarios(source: str) -> Iterator[Scenario]:
    """The scenarios of a TOML file, or of a file, folder or hub id of rows. Raises UserError."""
    if Path(source).suffix == ".toml":
        table = load_toml(source, source)
        rows = table.get("scenario", [table])
        if not rows or not isinstance(rows, list) or set(table) > {"scenario"}:
            raise UserError(f"{source}: expected one scenario, or [[scenario]] tables and no more")
        named = [(f"{source}: scenario {number}", row) for number, row in enumerate(rows, 1)]
    else:
        named = read_rows(source)
    for where, row in named:
        yield Scenario.of(row, where)


def topic_key(topic: str) -> str:
    """Topics that differ in letter case or blanks alone are one."""
    return " ".join(topic.casefold().split())


def remember(known: dict[str, Scenario], scenario: Scenario, file: str) -> None:
    """Add a scenario to those known by id. Raises UserError if another one has its id."""
    if known.setdefault(scenario.id, scenario).as_row() != scenario.as_row():
        raise UserError(f"{file}: two scenarios have the id {scenario.id!r}")


def use_templates(path: str | None) -> None:
    """From here on, use the templates in a TOML file (tutor = "...") in place of redi's own. Braces
    around anything but a word are text. Raises UserError."""
    own = check_table(load_toml(path, path), dict.fromkeys(TEMPLATES, str), path) if path else {}
    known = types_of(Scenario)
    for view, text in own.items():
        if not text.strip():
            raise UserError(f"{path}: key {view!r}: the template is empty")
        for name in set(re.findall(r"{(\w+)}", text)) - set(known):
            fields = ", ".join(known)
            raise UserError(f"{path}: key {view!r}: unknown field {{{name}}}; fields: {fields}")
    TEMPLATES.update(own)


def split_end(text: str) -> tuple[str, bool]:
    """A tutor's reply without the end marker, and whether it ends the dialogue."""
    text = text.strip()
    return text.removesuffix(END).strip(), text.endswith(END)


def without_end(text: str, growing: bool) -> str:
    """A tutor's reply as it is shown. growing: without what may become the end marker."""
    if growing:
        begun = (n for n in range(len(END) - 1, 0, -1) if text.endswith(END[:n]))
        text = text[: len(text) - next(begun, 0)]
    return text.replace(END, "")


def without_marks(text: str) -> str:
    """A student's words without the end marker and the hint request."""
    while END in text or HINT in text:
        text = text.replace(END, "").replace(HINT, "")
    return text.strip()


def words_used(scenario: Scenario, messages: list[Message]) -> list[str]:
    """The scenario's words that the student has used, in any letter case."""
    said = " ".join(m["content"].lower() for m in messages if m["role"] == "user")
    return [w for w in scenario.words if re.search(rf"(?<!\w){re.escape(w.lower())}(?!\w)", said)]
