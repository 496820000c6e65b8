"""Talk to a model in a terminal.

    redi chat out/redi                      a conversation; /help lists the commands
    redi chat out/redi -p "6-1-9*7=?"       one answer
    redi chat out/redi < questions.txt      an answer to every line

The text of an answer appears as soon as it cannot change any more, thoughts dimmed. Ctrl-C ends the
answer, and a second one the program. What the conversation has in common with the last prompt stays
in the cache, by token ids: a template that drops earlier thoughts makes that part shorter.
Answers are sampled by evaluate.py's engine: `-p TEXT` is sample 0 of problem 1 in a benchmark named
chat, with --user-prompt plain and an empty --prefix.
Left out: several conversations, tools, other samplers.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from redi import distributed
from redi.checkpoint.folder import load_model
from redi.config import UserError, parse, program, require
from redi.data.files import write_aside
from redi.data.tokenizer import Message
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker
from redi.eval.protocol import request_key

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = """/retry         answer the last question again, with other random numbers
/undo          take back the last question and its answer
/clear         begin again
/system TEXT   set the system prompt, and begin again
/save FILE     write the conversation as a training row
/quit          end (or Ctrl-D)"""


@dataclass(kw_only=True)
class ChatConfig:
    model: Annotated[str, "folder or hub id"]
    p: Annotated[str | None, "answer this and end"] = None
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.6
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    seed: Annotated[int, "of sampling"] = 42
    max_new_tokens: Annotated[int | None, "longest answer; none: what the context leaves"] = None
    verbose: Annotated[bool, "after each answer, its tokens and their rate"] = False

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "within (0, 1]")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        limit = self.max_new_tokens
        require(limit is None or limit >= 1, "max_new_tokens", limit, "at least 1")


@dataclass
class Conversation:
    speaker: Speaker
    config: ChatConfig
    terminal: bool  # of the output
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0  # at the last answer

    def ask(self, text: str) -> None:
        """Add the user's turn and print the answer."""
        self.messages.append({"role": "user", "content": text})
        self.attempt = 0
        try:
            self._answer()
        except UserError:
            self.messages.pop()
            raise

    def _answer(self) -> None:
        config, speaker = self.config, self.speaker
        prompt = speaker.chat.encode_prompt(self.messages)
        room = speaker.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens, and the model's context is "
                f"{speaker.context:,}: /undo or /clear"
            )
        turn = sum(message["role"] == "user" for message in self.messages)
        key = request_key("chat", str(turn), self.attempt)
        sampling = Sampling(config.temperature, config.top_p, config.seed)
        limit = min(config.max_new_tokens or room, room)
        ids, shown, notes, began = [], "", [], time.monotonic()
        before = speaker.chat.decode(prompt[-8:])  # a template may open the thought itself
        try:
            for token in speaker.answer(prompt, key, sampling, limit):
                if token in speaker.stop_ids:
                    break
                ids.append(token)
                # The bytes of a character may be in several tokens: wait for the last of them.
                text = speaker.chat.decode(ids).rstrip("\ufffd")
                self._print(text[len(shown) :], is_thought(before + shown, before + text))
                shown = text
            else:
                notes.append(f"cut off after {limit:,} tokens")
        except KeyboardInterrupt:
            notes.append("stopped")
        text = speaker.chat.decode(ids)
        self._print(text[len(shown) :] + "\n", dim=False)
        self.messages.append({"role": "assistant", "content": text})
        if self.config.verbose:
            rate = len(ids) / (time.monotonic() - began)
            notes.append(f"{len(prompt):,} + {len(ids):,} tokens, {rate:.1f} tok/s")
        if notes:
            print(f"[{'; '.join(notes)}]", file=sys.stderr)

    def _print(self, text: str, dim: bool) -> None:
        if not self.terminal:
            print(text, end="", flush=True)
            return
        text = "".join(
            c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
            for c in text
        )  # characters that do not print can be commands to the terminal
        colored = dim and "NO_COLOR" not in os.environ
        print(f"{DIM}{text}{PLAIN}" if colored else text, end="", flush=True)

    def command(self, line: str) -> None:
        """Raises UserError for an unknown command, and where there is nothing to take back."""
        name, _, argument = line.partition(" ")
        if name == "/retry":
            self._take_back("assistant")
            self.attempt += 1
            self._answer()
        elif name == "/undo":
            self._take_back("assistant")
            self.messages.pop()
        elif name == "/clear":
            self.messages = [m for m in self.messages if m["role"] == "system"]
        elif name == "/system":
            self.messages = [{"role": "system", "content": argument}] if argument else []
        elif name == "/save" and argument:
            if not self.messages:
                raise UserError("nothing to save")
            with write_aside(Path(argument)) as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            print(f"saved {argument}", file=sys.stderr)
        else:
            print(HELP, file=sys.stderr)

    def _take_back(self, role: str) -> None:
        if not self.messages or self.messages[-1]["role"] != role:
            raise UserError("there is no answer yet")
        self.messages.pop()


def is_thought(before: str, after: str) -> bool:
    """Whether what came between the two is between <think> and </think>, or one of these."""
    return any(text.rfind("<think>") > text.rfind("</think>") for text in (before, after))


def lines_of_the_user() -> Iterator[str]:
    """What is typed or piped, without empty lines. In a terminal, with a prompt and editing."""
    if not sys.stdin.isatty():
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
        return
    import readline  # noqa: F401 (gives input() its editing and history)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line == "/quit":
            return
        if line:
            yield line


@program
def main() -> None:
    config = parse(ChatConfig, "Talk to a model.")
    model, source = load_model(config.model)
    world = distributed.start(timeout_minutes=30)
    model.to(world.device, distributed.compute_dtype("auto", world)).requires_grad_(False)
    conversation = Conversation(Speaker(model, source), config, sys.stdout.isatty())
    if config.p is not None:
        conversation.ask(config.p)
        return
    for line in lines_of_the_user():
        try:
            (conversation.command if line.startswith("/") else conversation.ask)(line)
        except UserError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
