"""What an evaluation has to do: dialogues to hold, or states of recorded ones to answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.data.files import Row
from redi.data.tokenizer import Message
from redi.dialogue.dialogues import Dialogue, Reply, read_dialogues
from redi.dialogue.oracle import Menu
from redi.dialogue.scenario import Scenario, read_scenarios, without_marks
from redi.dialogue.talk import Steps, Who, ask, converse, replay


@dataclass(frozen=True)
class Job:
    side: str  # of the split by topics: seen or unseen
    scenario: Scenario
    start: Callable[[], Steps]
    states: tuple[list[Message], ...] = ()  # of a recorded dialogue, to be answered


def dialogues_to_hold(
    sides: dict[str, str], samples: int, hints: bool, world_seed: int | None
) -> list[Job]:
    """By scenario and sample. sides: seen, unseen -> a file of scenarios. world_seed: see
    `converse`. Raises UserError: no scenario, one that occurs twice or is not of the world."""
    jobs: dict[tuple[str, int], Job] = {}
    for side, source in sides.items():
        for scenario in read_scenarios(source):
            if (scenario.id, 0) in jobs:
                raise UserError(f"{source}: another scenario has the id {scenario.id!r} already")
            for sample in range(samples):
                start = partial(converse, scenario, sample, hints, world_seed)
                jobs[scenario.id, sample] = Job(side, scenario, start)
    return list(jobs.values())


def states_to_answer(sides: dict[str, str], samples: int, hints: bool) -> list[Job]:
    """By recorded dialogue. A state that an earlier one has had is left out. Raises UserError."""
    jobs, known = [], set()
    for side, source in sides.items():
        for dialogue in read_dialogues(source, {}):
            states = []
            for state in states_of(dialogue):
                if (name := repr((dialogue.scenario.id, state))) not in known:
                    known.add(name)
                    states.append(state)
            start = partial(replay, dialogue.scenario, states, samples, hints)
            jobs.append(Job(side, dialogue.scenario, start, tuple(states)))
    return jobs


def states_of(dialogue: Dialogue) -> Iterator[list[Message]]:
    """The messages before each of the tutor's replies, but for its given opening. No words of the
    student are a command."""
    history: list[Message] = []
    for message in dialogue.messages:
        role, text = message["role"], message["content"]
        if role == "assistant" and (history or not dialogue.scenario.opening):
            yield list(history)
        text = without_marks(text) if role == "user" else text
        history.append({"role": role, "content": text})


def check_topics(jobs: Sequence[Job], of_the_world: bool) -> None:
    """Raises UserError: no job; a topic on both sides, or one that is not the world's."""
    sides = {
        side: {j.scenario.topic for j in jobs if j.side == side} for side in ("seen", "unseen")
    }
    if not sides["seen"]:
        raise UserError("--scenarios: expected at least one scenario")
    if both := sorted(sides["seen"] & sides["unseen"]):
        raise UserError(f"--unseen: the topic {both[0]!r} is in --scenarios, too")
    for job in jobs if of_the_world else ():
        try:
            Menu.of(job.scenario)
        except KeyError:
            name = job.scenario.id
            raise UserError(f"scenario {name!r}: not of the world (redi.dialogue.world)") from None


def check_prompts(jobs: Sequence[Job], source: Source, who: Who) -> None:
    """Raises UserError if a scenario's prompt fills the context of the model."""
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; a dialogue needs it")
    context = source.config["max_position_embeddings"]
    heard = [{"role": "assistant", "content": "?"}] if who == "student" else []
    for scenario in {job.scenario.id: job.scenario for job in jobs}.values():
        length = len(source.chat.encode_prompt(ask(who, scenario, heard, 0).messages))
        if length >= context:
            raise UserError(
                f"scenario {scenario.id!r}: its prompt for the {who} has {length} tokens, and the "
                f"context of {source.name} is {context}"
            )


def replies_to_judge(row: Row) -> Iterator[tuple[Reply, Row]]:
    """The tutor's replies and hints in an evaluation's row, each with the message that holds it."""
    scenario, history = Scenario.of(row["scenario"], "row"), []
    for message in row["messages"]:
        recorded = "replies" in row or (not history and scenario.opening)
        if message["role"] == "assistant" and not recorded:
            yield Reply(scenario, history, message["content"]), message
        elif "hint" in message:
            yield Reply(scenario, history, message["hint"], is_hint=True), message
        history = [*history, {"role": message["role"], "content": message["content"]}]
    for reply in row.get("replies", ()):
        yield Reply(scenario, history, reply["content"]), reply
