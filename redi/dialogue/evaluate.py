"""Evaluate a tutor: it talks with a student in every scenario, then a judge labels its replies.

    redi dialogue evaluate out/tutor --scenarios seen.jsonl --unseen unseen.jsonl \\
        --student out/student --judge out/judge --judge-settings agreement.json

    --student   recorded   the tutor answers every state of recorded dialogues (rows of --scenarios)
                MODEL      plays the student's card, live
                world      scripted (world.py), for scenarios of the generated world
    --judge     MODEL, or world: the labels that are right by the world's rules

OUT/dialogues.unfinished.jsonl gets each dialogue as it ends; the same command resumes. When all are
there, they become OUT/dialogues.jsonl, in the order of the scenarios, and are judged; report.py
makes the tables and the page. A killed evaluation ends in the same bytes as an undisturbed one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from redi import distributed
from redi.checkpoint.folder import Source, load_model, open_model
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, may_change, parse, program, require
from redi.data.files import Row, hash_files, whole_lines
from redi.data.tokenizer import Message
from redi.dialogue import report
from redi.dialogue.dialogues import Dialogue, Reply, read_dialogues, to_line, write_rows
from redi.dialogue.judge import Judge, Judgement, load_judge
from redi.dialogue.oracle import Menu, judge_hint, judge_reply
from redi.dialogue.rubric import GOOD
from redi.dialogue.scenario import (
    TEMPLATES,
    Scenario,
    read_scenarios,
    remember,
    topic_key,
    use_templates,
)
from redi.dialogue.talk import Steps, Voice, converse, replay, talk
from redi.distributed import World
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker
from redi.hub import is_hub_id
from redi.runlog import Progress, RunLog, is_finished, read_facts

NO_MODELS = ("recorded", "world", None)
JUDGED_AT_ONCE = 256  # replies


@dataclass(kw_only=True)
class EvaluateConfig:
    model: Annotated[str, "the tutor: folder or hub id"]
    scenarios: Annotated[str, "scenarios; for --student recorded, dialogues"] = ""
    unseen: Annotated[str | None, "the same, of topics that the tutor was not trained on"] = None
    student: Annotated[str, "recorded, world, or a model: folder or hub id"] = "recorded"
    judge: Annotated[str | None, "world, or a model: folder or hub id; none: no labels"] = None
    judge_settings: Annotated[str | None, "the judge's agreement.json"] = None
    templates: Annotated[str | None, "TOML file: the prompts of tutor, student and judge"] = None
    hints: Annotated[bool, "at each of the student's turns, ask for a suggestion"] = False
    samples: Annotated[int, "dialogues of each scenario, or replies to each recorded state"] = 1
    temperature: Annotated[float, "of sampling; 0 is greedy"] = 0.0
    top_p: Annotated[float, "mass of the nucleus"] = 0.95
    seed: Annotated[int, "of sampling and of the scripted student"] = 42
    max_new_tokens: Annotated[int, "longest turn, tokens"] = 256
    slots: Annotated[int, "dialogues side by side", may_change] = 16
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute; auto: bf16 on CUDA"] = "auto"
    out: Annotated[str | None, "folder; none: MODEL/dialogue", may_change] = None

    def __post_init__(self) -> None:
        require(self.scenarios, "scenarios", "nothing", "a file")
        for name in ("samples", "max_new_tokens", "slots"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        Sampling(self.temperature, self.top_p, self.seed)
        require(self.judge != "recorded", "judge", self.judge, "world or a model")
        no_model = self.judge_settings and self.judge in NO_MODELS
        require(not no_model, "judge_settings", self.judge_settings, "a model as --judge beside it")


@dataclass(frozen=True)
class Job:
    """A dialogue to hold, or a recorded one to answer."""

    side: str  # of the split by topics: seen or unseen
    scenario: Scenario
    start: Callable[[], Steps]
    states: tuple[list[Message], ...] = ()  # of a recorded dialogue


def evaluate(config: EvaluateConfig) -> str:
    """Talk, judge and report; what is on disk is kept. Returns what to print. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("redi dialogue evaluate runs in one process: start it without torchrun")
    use_templates(config.templates)
    if config.out is None:
        folder = "out/dialogue/" if is_hub_id(config.model) else ""
        config.out = f"{folder}{config.model}/dialogue"
    out, to_do = Path(config.out), read_jobs(config)
    models = {"tutor": config.model, "student": config.student, "judge": config.judge}
    models = {who: open_model(name)[1] for who, name in models.items() if name not in NO_MODELS}
    finished, facts = is_finished(config.out, config), facts_of(config, to_do, models)
    before = read_facts(out) if (out / "config.toml").is_file() else {}
    if changed := [name for name, now in facts.items() if before.get(name, now) != now]:
        what = " and ".join(changed)
        raise UserError(f"--out {out}: the {what} changed since it was started; choose another")
    if finished:
        return f"{(out / 'report.md').read_text('utf-8')}\n{out} is finished: nothing to do"
    world, log = distributed.start(timeout_minutes=30), RunLog(config.out, config)
    log.start({"torch": torch.__version__, **facts})
    path = out / "dialogues.jsonl"
    part = path.with_name("dialogues.unfinished.jsonl")
    if not path.is_file():
        done = hold(to_do, config, world, part)
        numbered = ((job.side, row) for job, rows in zip(to_do, done) for row in rows)
        write_rows(path, [{"side": side, **row} for side, row in numbered])
    part.unlink(missing_ok=True)
    if config.judge == "world":
        label_replies(path, WorldJudge())
    elif config.judge:
        label_replies(path, load_judge(config.judge, config.judge_settings, world))
    written = report.write(out)
    log.finish()
    return written


def read_jobs(config: EvaluateConfig) -> list[Job]:
    """Raises UserError, also for a topic on both sides and a scenario that is not the world's."""
    read = states_to_answer if config.student == "recorded" else dialogues_to_hold
    jobs, known = [], {}
    for side, source in (("seen", config.scenarios), ("unseen", config.unseen)):
        jobs += read(side, source, config, known) if source else ()
    seen = {topic_key(job.scenario.topic) for job in jobs if job.side == "seen"}
    for job in jobs:
        if job.side == "unseen" and topic_key(job.scenario.topic) in seen:
            raise UserError(f"--unseen: the topic {job.scenario.topic!r} is in --scenarios, too")
        if "world" in (config.student, config.judge):
            Menu.of(job.scenario)
    return jobs


def dialogues_to_hold(
    side: str, source: str, config: EvaluateConfig, known: dict[str, Scenario]
) -> Iterator[Job]:
    """By scenario and sample. known: earlier scenarios by id. Raises UserError if one recurs."""
    seed = config.seed if config.student == "world" else None
    for scenario in read_scenarios(source):
        if scenario.id in known:
            raise UserError(f"{source}: another scenario has the id {scenario.id!r} already")
        known[scenario.id] = scenario
        for sample in range(config.samples):
            yield Job(side, scenario, partial(converse, scenario, sample, config.hints, seed))


def states_to_answer(
    side: str, source: str, config: EvaluateConfig, known: dict[str, Scenario]
) -> Iterator[Job]:
    """By recorded dialogue: the states before the tutor's replies. A state that an earlier dialogue
    of the file has is left out. known: earlier scenarios by id. Raises UserError."""
    asked = set()
    for dialogue in read_dialogues(source, {}):
        scenario, states = dialogue.scenario, []
        remember(known, scenario, source)
        for reply in dialogue.all_replies():
            name = repr((scenario.id, reply.history))
            if not reply.is_hint and name not in asked:
                asked.add(name)
                states.append(reply.history)
        start = partial(replay, scenario, states, config.samples, config.hints)
        yield Job(side, scenario, start, tuple(states))


def facts_of(
    config: EvaluateConfig, to_do: Sequence[Job], models: dict[str, Source]
) -> dict[str, str]:
    """Hashes of everything else that the result depends on."""
    told = [(job.side, job.scenario, job.states) for job in to_do]
    facts = {"scenarios or templates": _hash((told, TEMPLATES))}
    if config.judge_settings:
        facts[report.SETTINGS] = hash_files([Path(config.judge_settings)])[:16]
    for who, source in models.items():
        tokenizer = source.chat.fingerprint if source.chat else ""
        settings = json.dumps(source.config, sort_keys=True)
        facts[f"{who}'s weights"] = weights_hash(source.folder)
        facts[f"{who}'s tokenizer or settings"] = _hash((tokenizer, settings, source.stop_ids))
    return facts


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def hold(to_do: Sequence[Job], config: EvaluateConfig, world: World, part: Path) -> list[list[Row]]:
    """Hold the dialogues that `part` does not have yet. Returns the rows of all."""
    with open(part, "ab") as file:
        lines = list(whole_lines(part))
        file.truncate(sum(map(len, lines)))
        done = {entry["number"]: entry["rows"] for entry in map(json.loads, lines)}
        left = [number for number in range(len(to_do)) if number not in done]
        slots = min(config.slots, len(left))
        voices = load_voices(config, world, slots) if left else {}
        with Progress(len(to_do), "talk", "dialogue", done=len(done)) as progress:
            try:
                steps = ((number, to_do[number].start()) for number in left)
                for number, rows in talk(steps, voices, slots):
                    file.write(to_line({"number": number, "rows": rows}).encode())
                    file.flush()  # from here on it survives a kill of this process
                    done[number] = rows
                    progress.update({})
            except KeyboardInterrupt:
                text = f"{part} holds {len(done)} of {len(to_do)} dialogues"
                raise KeyboardInterrupt(f"{text}; the same command resumes") from None
    return [done[number] for number in range(len(to_do))]


def load_voices(config: EvaluateConfig, world: World, slots: int) -> dict[str, Voice]:
    voices, sampling = {}, Sampling(config.temperature, config.top_p, config.seed)
    for who, name in (("tutor", config.model), ("student", config.student)):
        if name not in NO_MODELS:
            model, source = load_model(name)
            model.to(world.device, distributed.compute_dtype(config.dtype, world))
            speaker = Speaker(model.requires_grad_(False), source, slots)
            voices[who] = Voice(speaker, sampling, config.max_new_tokens)
    return voices


# ---------------------------------------------------------------- judging


class WorldJudge:
    """Finds the labels that are right by the world's rules."""

    def judge(self, replies: Sequence[Reply]) -> list[Judgement]:
        found = []
        for one in replies:
            of_world = judge_hint if one.is_hint else judge_reply
            label = of_world(one.scenario, one.history, one.content)
            found.append(Judgement(label, float(label == GOOD), float(label == GOOD)))
        return found


def label_replies(path: Path, judge: Judge) -> None:
    """Write labels and scores beside the replies and hints in an evaluation's dialogues."""
    rows = [json.loads(line) for line in whole_lines(path)]
    replies = [reply for row in rows for reply in replies_to_judge(row)]
    with Progress(len(replies), "judge", "reply") as progress:
        for begin in range(0, len(replies), JUDGED_AT_ONCE):
            some = replies[begin : begin + JUDGED_AT_ONCE]
            for reply, found in zip(some, judge.judge(some)):
                kind = "hint_" if reply.is_hint else ""
                reply.said[f"{kind}label"] = found.label
                reply.said[f"{kind}good"] = round(found.good, 6)
                progress.update({})
    write_rows(path, rows)


def replies_to_judge(row: Row) -> list[Reply]:
    """What the tutor generated; not the replies that a recorded dialogue already had."""
    scenario = Scenario.of(row["scenario"], "scenario")
    found = Dialogue(scenario, row["messages"], row.get("replies", [])).all_replies()
    return [one for one in found if one.is_hint or one.place or "replies" not in row]


@program
def main() -> None:
    print(evaluate(parse(EvaluateConfig, "Let a tutor talk in scenarios, and judge its replies.")))


if __name__ == "__main__":
    main()
