"""Many dialogues side by side, in rounds: all tutors' turns, then all students'.

    voices = {"tutor": Voice(speaker, sampling, 256), "student": Voice(...)}
    for number, rows in talk([(0, converse(scenario, sample=0)), ...], voices, slots=16): ...

A dialogue is a generator: it yields whom it waits for and what that side sees, is sent what was
said, and returns its rows for a file. So it knows nothing of the others, and its random numbers
depend on its scenario, sample and turn only. It keeps its row of each voice's cache until it ends.
"""

import hashlib
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from redi.config import UserError
from redi.data.files import Row
from redi.data.tokenizer import Message, is_answer
from redi.dialogue.dialogues import Who, conversation
from redi.dialogue.scenario import Scenario, split_end, without_marks
from redi.dialogue.world import say_as_student
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker, Turn


class Ask(NamedTuple):
    """What a dialogue waits for."""

    who: Who
    messages: list[Message]  # as this side sees them
    key: int


class Said(NamedTuple):
    text: str
    num_tokens: int
    finish: Literal["stop", "length", "context"]  # what ended it; context: it may be empty

    def cut(self) -> Row:
        """For a file: what cut the text, if anything did."""
        return {} if self.finish == "stop" else {"cut": self.finish}


Steps = Generator[Ask, Said, list[Row]]


@dataclass(frozen=True)
class Voice:
    """A model that speaks for one side of every dialogue."""

    speaker: Speaker
    sampling: Sampling
    max_new_tokens: int  # of a turn

    def say(self, asks: Mapping[int, Ask]) -> dict[int, Said]:
        """By row of the speaker: what is asked -> what is said. Raises UserError if there is no
        room for a dialogue at all."""
        speaker, turns, said = self.speaker, [], {}
        for row, ask in asks.items():
            prompt = speaker.chat.encode_prompt(ask.messages)
            room = speaker.context - len(prompt)
            if room < 1:
                length = len(speaker.chat.encode_prompt(ask.messages[:1]))
                if length >= speaker.context:
                    what = f"a scenario's prompt for the {ask.who} has {length} tokens"
                    raise UserError(f"{what}, and the model's context is {speaker.context}")
                said[row] = Said("", 0, "context")
            else:
                turns.append(Turn(row, prompt, ask.key, min(room, self.max_new_tokens)))
        ids: dict[int, list[int]] = {turn.row: [] for turn in turns}
        for row, token in speaker.answers(turns, self.sampling) if turns else ():
            ids[row].append(token)
        for turn in turns:
            written = ids[turn.row]
            stopped = written[-1] in speaker.stop_ids
            cut = "length" if turn.limit == self.max_new_tokens else "context"
            text = speaker.chat.decode(written[: len(written) - stopped])
            said[turn.row] = Said(text, len(written), "stop" if stopped else cut)
        return said


def turn_key(scenario_id: str, sample: int, turn: int, who: str) -> int:
    """63 bits that seed what is said at this point. turn: the tutor's replies before it; who:
    tutor, student or hint."""
    name = repr((scenario_id, sample, turn, who)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def ask(
    who: Who, scenario: Scenario, messages: Sequence[Row], sample: int, hint: bool = False
) -> Ask:
    """hint: see `conversation`."""
    key = turn_key(scenario.id, sample, num_replies(messages), "hint" if hint else who)
    return Ask(who, conversation(who, scenario, messages, hint), key)


def num_replies(messages: Sequence[Row]) -> int:
    return sum(map(is_answer, messages))


def converse(
    scenario: Scenario, sample: int, hints: bool = False, world_seed: int | None = None
) -> Steps:
    """A whole dialogue. hints: ask the tutor on the side, at each of the student's turns, what it
    could say. world_seed: of the world's scripted student; None: a voice speaks for the student.

    The row's "end" is tutor, max_turns, length (a reply was cut), context (no room for more words)
    or student (it said nothing, or was cut). "tokens" are the tutor's, without hints.
    """
    messages: list[Row] = []
    if scenario.opening:
        messages.append({"role": "assistant", "content": scenario.opening})
    num_tokens, end = 0, None
    while not end:
        turn = num_replies(messages)
        if messages:
            hint = {}
            if hints:
                asked = yield ask("tutor", scenario, messages, sample, hint=True)
                hint = {"hint": asked.text} if asked.num_tokens else {}
            if world_seed is None:
                words = yield ask("student", scenario, messages, sample)
            else:
                rng = random.Random(f"student {world_seed} {scenario.id} {sample} {turn}")
                words = Said(say_as_student(scenario, messages, rng), 0, "stop")
            text = without_marks(words.text)
            messages.append({"role": "user", "content": text, **hint, **words.cut()})
            if words.finish != "stop" or not text:
                end = "context" if words.finish == "context" else "student"
                break
        reply = yield ask("tutor", scenario, messages, sample)
        num_tokens += reply.num_tokens
        if reply.num_tokens:
            messages.append({"role": "assistant", "content": reply.text, **reply.cut()})
        if split_end(reply.text)[1]:
            end = "tutor"
        elif reply.finish != "stop":
            end = reply.finish
        elif turn + 1 - bool(scenario.opening) >= scenario.max_turns:
            end = "max_turns"
    row = {"scenario": scenario.as_row(), "sample": sample, "messages": messages}
    return [{**row, "end": end, "tokens": num_tokens}]


def replay(
    scenario: Scenario, histories: Sequence[list[Row]], samples: int, hints: bool = False
) -> Steps:
    """Several replies to each of the states of a recorded dialogue; a row for each. A reply that
    was cut has "cut", and one for which the context has no room is missing."""
    rows = []
    for history in histories:
        history, replies, num_tokens = list(history), [], 0
        if hints and history and history[-1]["role"] == "user":
            asked = yield ask("tutor", scenario, history[:-1], 0, hint=True)
            history[-1] = {**history[-1], **({"hint": asked.text} if asked.num_tokens else {})}
        for sample in range(samples):
            reply = yield ask("tutor", scenario, history, sample)
            num_tokens += reply.num_tokens
            replies += [{"content": reply.text, **reply.cut()}] if reply.num_tokens else []
        row = {"scenario": scenario.as_row(), "messages": history, "replies": replies}
        rows.append({**row, "tokens": num_tokens})
    return rows


def talk(
    dialogues: Iterable[tuple[int, Steps]], voices: Mapping[Who, Voice], slots: int
) -> Iterator[tuple[int, list[Row]]]:
    """Run numbered dialogues, at most `slots` at once; yields (number, rows) of each as it ends."""
    waiting, free = iter(dialogues), list(range(slots))
    live: dict[int, tuple[int, Steps]] = {}  # row of the caches -> number, dialogue
    asks: dict[int, Ask] = {}  # what each of these waits for

    def advance(row: int, said: Said | None) -> Iterator[tuple[int, list[Row]]]:
        number, steps = live[row]
        try:
            asks[row] = steps.send(said)
        except StopIteration as finished:
            del live[row]
            free.append(row)
            yield number, finished.value

    while True:
        while free and (new := next(waiting, None)):
            row = free.pop(0)
            live[row] = new
            yield from advance(row, None)
        if not live:
            return
        for who, voice in voices.items():
            asked = {row: asks[row] for row in sorted(live) if asks[row].who == who}
            for row, said in voice.say(asked).items():
                yield from advance(row, said)
