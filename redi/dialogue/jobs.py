"""What an evaluation has to do: dialogues to hold, or states of recorded ones to answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.data.tokenizer import Message
from redi.dialogue.dialogues import Who, conversation, read_dialogues
from redi.dialogue.scenario import Scenario, read_scenarios
from redi.dialogue.talk import Steps, converse, replay


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
    `converse`. Raises UserError if a scenario occurs twice."""
    jobs: list[Job] = []
    ids: set[str] = set()
    for side, source in sides.items():
        for scenario in read_scenarios(source):
            if scenario.id in ids:
                raise UserError(f"{source}: another scenario has the id {scenario.id!r} already")
            ids.add(scenario.id)
            for sample in range(samples):
                start = partial(converse, scenario, sample, hints, world_seed)
                jobs.append(Job(side, scenario, start))
    return jobs


def states_to_answer(sides: dict[str, str], samples: int, hints: bool) -> list[Job]:
    """By recorded dialogue: the states before the tutor's replies, but for those that an earlier
    dialogue has had. Raises UserError."""
    jobs, known = [], set()
    for side, source in sides.items():
        for dialogue in read_dialogues(source, {}):
            states = []
            for reply in dialogue.all_replies():
                name = repr((dialogue.scenario.id, reply.history))
                if not reply.is_hint and not reply.place and name not in known:
                    known.add(name)
                    states.append(reply.history)
            start = partial(replay, dialogue.scenario, states, samples, hints)
            jobs.append(Job(side, dialogue.scenario, start, tuple(states)))
    return jobs


def check_prompts(jobs: Sequence[Job], source: Source, who: Who) -> None:
    """Raises UserError if a scenario's prompt fills the context of the model."""
    context = source.config["max_position_embeddings"]
    heard = [{"role": "assistant", "content": "?"}] if who == "student" else []
    for scenario in {job.scenario.id: job.scenario for job in jobs}.values():
        length = len(source.chat.encode_prompt(conversation(who, scenario, heard)))
        if length >= context:
            raise UserError(
                f"scenario {scenario.id!r}: its prompt for the {who} has {length} tokens, and the "
                f"context of {source.name} is {context}"
            )
