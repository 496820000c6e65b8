"""Judges of replies: fine-tuned language models whose log-probs are read; no text is parsed.

    labels      "The waiter in a cafe talks with ...", the transcript, the reply -> "wrong"
                P(label) from the log-probs of all labels; an instruct model judges untrained, too
    likelihood  how likely the reply's tokens are under a tutor that was fine-tuned on good
                dialogues; not the tutor that is judged, because a model likes its own words

The likelihood is that of the least likely token, or the mean: redi dialogue agreement chooses the
better one, sets the thresholds, and writes both as a judge's settings.
Left out: reasons in words, which cost a hundred times the tokens; pairs of replies.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol

import numpy as np

from redi import distributed
from redi.checkpoint.folder import Source, load_model
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, check_table, types_of
from redi.dialogue.dialogues import Reply, conversation
from redi.dialogue.figures import read_agreement
from redi.dialogue.prefix_trees import Question, answer_logps
from redi.dialogue.rubric import GOOD, Rubric, judge_messages
from redi.distributed import World
from redi.model import Transformer

BAD = "bad"  # the other label of the likelihood, which knows no faults


@dataclass(frozen=True)
class Judgement:
    label: str  # good, or a fault; of the likelihood, good or bad
    good: float  # in [0, 1], from 0.5 on the label is good
    score: float  # what `good` is made of, by JudgeSettings.statistic


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """good = 1 / (1 + exp((threshold - score) / scale)), so that it is 0.5 at the threshold."""

    kind: Annotated[Literal["labels", "likelihood"], "of the judge"] = "labels"
    statistic: Annotated[str, "the score: logit of P(good); min or mean of log-probs"] = "logit"
    cuts: Annotated[dict, "replies, hints -> [threshold, scale]"] = field(default_factory=dict)
    rubric: Annotated[dict, "of a judge of labels: replies, hints"] = field(default_factory=dict)
    weights: Annotated[str, "hash of the model that was measured"] = ""

    def good(self, score: float, reply: Reply) -> float:
        """Hints have the cut of replies if they have none of their own."""
        cut = self.cuts.get("hints") if reply.is_hint else None
        threshold, scale = cut or self.cuts.get("replies") or (0.0, 1.0)
        return 0.5 + 0.5 * math.tanh((score - threshold) / scale / 2)  # the same, and no overflow


class Judge(Protocol):
    def judge(self, replies: Sequence[Reply]) -> list[Judgement]: ...


class ModelJudge(ABC):
    """A judge whose scores a subclass reads from a model's log-probs."""

    def __init__(self, model: Transformer, source: Source, settings: JudgeSettings):
        self.model, self.source, self.settings = model, source, settings

    @abstractmethod
    def read(self, replies: Sequence[Reply]) -> tuple[dict[str, list[float]], list[str]]:
        """(statistic -> the score of each reply by it, the label of each if it is bad)"""

    def judge(self, replies: Sequence[Reply]) -> list[Judgement]:
        (scores, faults), judgements = self.read(replies), []
        for reply, score, fault in zip(replies, scores[self.settings.statistic], faults):
            good = self.settings.good(score, reply)
            judgements.append(Judgement(GOOD if good >= 0.5 else fault, good, score))
        return judgements


class LabelJudge(ModelJudge):
    """Reads the probability of each label of a rubric after the prompt of `judge_messages`."""

    def __init__(self, model: Transformer, source: Source, settings: JudgeSettings):
        super().__init__(model, source, settings)
        self.rubric = Rubric.of(settings.rubric, f"rubric of {source.name}")
        labels = {**self.rubric.replies, **self.rubric.hints}
        asked = [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}]
        answers = [(asked, {"role": "assistant", "content": label}) for label in labels]
        rows = source.chat.encode_rows(answers)
        self.ids = {label: row.response_ids for label, row in zip(labels, rows)}  # stop token last

    def label_logps(self, replies: Sequence[Reply]) -> list[dict[str, float]]:
        """Of each reply, label -> log-prob of its tokens and the stop token, in nats."""
        questions = []
        for reply in replies:
            prompt = self.source.chat.encode_prompt(judge_messages(reply, self.rubric))
            group = f"{reply.is_hint} {reply.scenario.id}"  # the rubrics differ
            answers = [self.ids[label] for label in self.rubric.labels(reply)]
            questions.append(Question(group, prompt, answers))
        found = zip(replies, answer_logps(self.model, questions))
        sums = ((reply, [part.double().sum().item() for part in parts]) for reply, parts in found)
        return [dict(zip(self.rubric.labels(reply), values)) for reply, values in sums]

    def read(self, replies: Sequence[Reply]) -> tuple[dict[str, list[float]], list[str]]:
        logits, faults = [], []
        for logps in self.label_logps(replies):
            others = {label: logp for label, logp in logps.items() if label != GOOD}
            logits.append(float(logps[GOOD] - np.logaddexp.reduce(list(others.values()))))
            faults.append(max(others, key=others.get))
        return {"logit": logits}, faults


class LikelihoodJudge(ModelJudge):
    """Reads the log-probs of a reply's tokens as a tutor's next turn, the stop token included; a
    hint's as its answer to the request for one."""

    def read(self, replies: Sequence[Reply]) -> tuple[dict[str, list[float]], list[str]]:
        answers = []
        for reply in replies:
            seen = conversation("tutor", reply.scenario, reply.history, reply.is_hint)
            answers.append((seen, {"role": "assistant", "content": reply.content}))
        questions = [
            Question(reply.scenario.id, row.prompt_ids, [row.response_ids])
            for reply, row in zip(replies, self.source.chat.encode_rows(answers))
        ]
        logps = [found.double() for [found] in answer_logps(self.model, questions)]
        scores = {"min": [x.min().item() for x in logps], "mean": [x.mean().item() for x in logps]}
        return scores, [BAD] * len(logps)


# ---------------------------------------------------------------- a judge from files


def load_judge(model: str, settings_file: str | None = None, world: World | None = None) -> Judge:
    """The judge of a model folder or hub id. settings_file: written by redi dialogue agreement;
    None: labels by redi's own rubric. world: None if the program has not started one yet. Raises
    UserError."""
    table = read_agreement(settings_file)["judge"] if settings_file else {}
    settings = JudgeSettings(**check_table(table, types_of(JudgeSettings), str(settings_file)))
    return make_judge(model, settings, world)


def make_judge(model: str, settings: JudgeSettings, world: World | None = None) -> ModelJudge:
    weights, source = load_model(model)
    measured = weights_hash(source.folder)
    if settings.weights not in ("", measured):
        raise UserError(f"--judge-settings: measured on another model than {model}")
    settings = replace(settings, weights=measured)
    if source.chat is None:
        raise UserError(f"{source.folder}: no tokenizer.json; a judge needs one")
    world = world or distributed.start(timeout_minutes=30)
    weights.to(world.device, distributed.compute_dtype("auto", world)).requires_grad_(False)
    return (LabelJudge if settings.kind == "labels" else LikelihoodJudge)(weights, source, settings)
