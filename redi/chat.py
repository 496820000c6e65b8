"""Talk to a model in a terminal.

    redi chat out/redi                      a conversation; /help lists the commands
    redi chat out/redi -p "What is 6*7?"    one answer
    redi chat out/redi < questions.txt      an answer to every line
    redi chat out/tutor --scenario cafe.toml [--judge out/judge]    a dialogue in a scene

The text of an answer appears as soon as it cannot change any more, thoughts dimmed. Ctrl-C stops
the answer; at the prompt it ends the program. The tokens that a prompt shares with the previous
prompt and answer stay in the cache. `-p TEXT` prints what evaluate.py samples first for problem 1
of a benchmark named chat, with --user-prompt plain and an empty --prefix; in a scenario
(redi/dialogue/lesson.py) the answers are those of redi dialogue evaluate.
Left out: several conversations, tools, other samplers.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated

from redi import distributed
from redi.checkpoint.folder import load_model
from redi.config import UserError, parse, program, require
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.dialogues import write_rows
from redi.dialogue.lesson import Lesson
from redi.dialogue.scenario import HINT, use_templates, without_end, without_marks
from redi.dialogue.talk import num_replies
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker
from redi.eval.protocol import request_key

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
UNPRINTABLE = "\n\t\u200c\u200d\xa0\u202f"  # and yet printed: joiners of emoji, blanks
HELP = """\
/hint          in a scenario: what you could say
/retry         answer the last question again, with other random numbers
/undo          take back the last question and its answer
/clear         begin again
/system TEXT   set the system prompt, and begin again
/save FILE     write the conversation as a training row
/quit          end (or Ctrl-D)"""


@dataclass(kw_only=True)
class ChatConfig:
    model: Annotated[str, "folder or hub id"]
    p: Annotated[str | None, "answer this and end"] = None
    scenario: Annotated[str | None, "file: talk in its first scenario"] = None
    templates: Annotated[str | None, "TOML file: the scenario's prompts"] = None
    judge: Annotated[str | None, "model that judges the tutor's replies after the dialogue"] = None
    judge_settings: Annotated[str | None, "the judge's agreement.json"] = None
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.6
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    seed: Annotated[int, "of sampling"] = 42
    max_new_tokens: Annotated[int | None, "longest answer; none: what the context leaves"] = None
    verbose: Annotated[bool, "after each answer, its tokens and their rate"] = False

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_p, self.seed)
        limit = self.max_new_tokens
        require(limit is None or limit >= 1, "max_new_tokens", limit, "at least 1")
        require(not (self.p and self.scenario), "p", self.p, "nothing beside --scenario")
        require(self.scenario or not self.judge, "judge", self.judge, "--scenario beside it")
        settings = self.judge_settings
        require(self.judge or not settings, "judge_settings", settings, "--judge beside it")


@dataclass
class Conversation:
    speaker: Speaker
    config: ChatConfig
    terminal: bool  # of the output
    lesson: Lesson | None = None
    messages: list[Message] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)  # by the number of answers before

    def begin(self) -> None:
        """Without a scenario, the user begins; in one, the tutor."""
        if not self.lesson:
            self.messages = [m for m in self.messages if m["role"] == "system"]
            return
        self.messages = self.lesson.begin()
        if is_answer(self.messages[-1]):
            self._print(self.messages[-1]["content"] + "\n", dim=False)
        else:
            self._answer(self.messages)

    def ask(self, text: str) -> None:
        """Add the user's turn and print the answer."""
        if self.lesson:
            text = without_marks(text)
            if not text:
                return
            if self.lesson.is_ended_by(self.messages):
                raise UserError("the dialogue has ended: /save FILE, /clear or /quit")
        self._answer([*self.messages, {"role": "user", "content": text}])

    def _answer(self, messages: list[Message], attempt: int = 0) -> None:
        """Continue with these messages. If that fails, the conversation stays as it was."""
        if self.lesson:
            key = self.lesson.key(messages, attempt, "tutor")
        else:
            key = request_key("chat", str(sum(m["role"] == "user" for m in messages)), attempt)
        self.messages = [*messages, {"role": "assistant", "content": self._say(messages, key)}]
        self.attempts[num_replies(messages)] = attempt

    def _say(self, messages: list[Message], key: int) -> str:
        """Print and return the model's next turn. Raises UserError if the context is full."""
        config, speaker, notes = self.config, self.speaker, []
        prompt = speaker.chat.encode_prompt(messages)
        room = speaker.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens, and the model's context is "
                f"{speaker.context:,}: /undo or /clear"
            )
        sampling = Sampling(config.temperature, config.top_p, config.seed)
        limit = min(config.max_new_tokens or room, room)
        ids, shown, began = [], "", time.monotonic()
        controls = set(speaker.chat.control_ids.values())
        header = list(takewhile(lambda token: token not in controls, reversed(prompt)))
        before = speaker.chat.decode(header[::-1])  # a template may open the thought itself
        try:
            for token in speaker.answer(prompt, key, sampling, limit):
                if token in speaker.stop_ids:
                    break
                ids.append(token)
                # The bytes of a character may be in several tokens: wait for the last of them.
                text = self._visible(speaker.chat.decode(ids).rstrip("\ufffd"), growing=True)
                self._print(text[len(shown) :], is_thought(before + shown, before + text))
                shown = text
            else:
                notes.append(f"cut off after {limit:,} tokens")
        except KeyboardInterrupt:
            if config.p is not None:
                raise
            notes.append("stopped")
        text = speaker.chat.decode(ids)
        self._print(self._visible(text)[len(shown) :] + "\n", dim=False)
        if config.verbose:
            rate = len(ids) / (time.monotonic() - began)
            notes.append(f"{len(prompt):,} + {len(ids):,} tokens, {rate:.1f} tok/s")
        if notes:
            print(f"[{'; '.join(notes)}]", file=sys.stderr)
        return text

    def _visible(self, text: str, growing: bool = False) -> str:
        return without_end(text, growing) if self.lesson else text

    def _print(self, text: str, dim: bool) -> None:
        if not self.terminal:
            print(text, end="", flush=True)
            return
        text = "".join(
            c if c.isprintable() or c in UNPRINTABLE else c.encode("unicode_escape").decode()
            for c in text
        )  # characters that do not print can be commands to the terminal
        colored = dim and not os.environ.get("NO_COLOR")
        print(f"{DIM}{text}{PLAIN}" if colored else text, end="", flush=True)

    def command(self, line: str) -> None:
        """Run a /command; an unknown one prints the help. Raises UserError if there is no answer to
        take back or to save."""
        name, _, argument = line.partition(" ")
        if name == "/hint" and self.lesson:
            asked = [*self.messages, {"role": "user", "content": HINT}]
            self._say(asked, self.lesson.key(self.messages, 0, "hint"))
        elif name == "/retry":
            before = self._without_answer()
            self._answer(before, self.attempts[num_replies(before)] + 1)
        elif name == "/undo":
            before = self._without_answer()
            if before[-1]["role"] == "system":  # it was the tutor's first
                self.begin()
            else:
                self.messages = before[:-1]
        elif name == "/clear":
            self.begin()
        elif name == "/system" and not self.lesson:
            self.messages = [{"role": "system", "content": argument}] if argument else []
        elif name == "/save" and argument:
            if not self._without_answer() or not self.messages[-1]["content"].strip():
                raise UserError("the last answer is empty: nothing to save")
            path = Path(argument.replace("\0", "")).expanduser()
            if not path.name or (path.exists() and not path.is_file()):
                raise UserError(f"/save {argument}: expected a file to write")
            own = {"messages": self.messages}
            write_rows(path, [self.lesson.row(self.messages) if self.lesson else own])
            print(f"saved {path}", file=sys.stderr)
        else:
            print(HELP, file=sys.stderr)

    def _without_answer(self) -> list[Message]:
        if not self.messages or not is_answer(self.messages[-1]):
            raise UserError("there is no answer yet")
        return self.messages[:-1]


def is_thought(before: str, after: str) -> bool:
    """Whether the newly printed text is part of a thought, tags included."""
    return any(text.rfind("<think>") > text.rfind("</think>") for text in (before, after))


def lines_of_the_user() -> Iterator[str]:
    """What is typed or piped up to /quit, without empty lines. In a terminal, with a prompt."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 (gives input() its editing and history)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8
    while True:
        try:
            if is_terminal and not sys.stdout.isatty():  # where input() would write its prompt
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if is_terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            return
        if line == "/quit":
            return
        if line:
            yield line


@program
def main() -> None:
    config = parse(ChatConfig, "Talk to a model.")
    if None in (sys.stdin, sys.stdout):
        raise UserError("standard input and output must be open")
    model, source = load_model(config.model)
    world = distributed.start(timeout_minutes=30)
    model.to(world.device, distributed.compute_dtype("auto", world)).requires_grad_(False)
    speaker, lesson = Speaker(model, source), None
    if config.scenario:
        use_templates(config.templates)
        lesson = Lesson.load(config.scenario, config.judge, config.judge_settings, world)
    conversation = Conversation(speaker, config, sys.stdout.isatty(), lesson)
    if lesson:
        conversation._print(f"{lesson.scene()}\n", dim=False)
    if config.p is not None:
        conversation.ask(config.p)
        return
    conversation.begin()
    for line in lines_of_the_user():
        try:
            (conversation.command if line.startswith("/") else conversation.ask)(line)
        except UserError as error:
            print(error, file=sys.stderr)
    if lesson:
        conversation._print(lesson.summary(conversation.messages) + "\n", dim=False)


if __name__ == "__main__":
    main()
