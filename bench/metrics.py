"""What the curves of training dynamics cost: a step with entropy and update norm over one without.

    python -m bench.metrics            about six minutes

M1: a Qwen2 of 12.6 M parameters (4 layers, hidden 256, 32,768 words, tied, fp32) takes redi's own
optimizer step, data to update, on 32 pairs of two traces of 64 tokens in one pack, with REDI (the
one-pass kernel). That is a small step: the update norm costs the same for a step of a hundred times
as many tokens. M1_entropy and M1_update have one of the two only; M1_update_alone is the time of
the update norm by itself over that of the step without it. M2 is M1 with SimPO (the two-pass
kernel).

Interleaved, CPU time, one thread; the ratio of each round's step to its step without either. What
makes a ratio count, in the same run: from the same weights both report the same loss and gradient
norm, to the bit, and the entropy reported is that of the whole logits in float64.
"""

from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.measure import CPUSeconds, cpu_seconds, interleave, result, write
from redi import batches, train
from redi.batches import TrainData
from redi.distributed import World
from redi.model import ModelConfig, Transformer
from redi.objectives import Objective, Totals, make_objective
from redi.packing import PackedBatch, TokenSequence
from redi.toy import student as toy

PAIRS, PROMPT, LENGTH = 32, 8, 64
ROUNDS = 7
GOAL = 1.02
WITHOUT = "the step without them"
MODEL = ModelConfig(
    vocab_size=32_768, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4,
    num_kv_heads=4, head_dim=64, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=LENGTH,
)  # fmt: skip
SETTINGS = SimpleNamespace(lr=1e-5, weight_decay=1e-4, clip=1.0, reshard_after_forward=False)
OBJECTIVE = {"M1": make_objective("redi", 0.8), "M2": make_objective("simpo", 2.0, 1.0)}


class Rows:
    """Pairs of random tokens, with the fields of Dataset that a Task reads."""

    store = SimpleNamespace(paired=True)

    def __init__(self, pairs: int, vocabulary: int):
        draw = np.random.default_rng(0)
        rows = draw.integers(0, vocabulary, (2 * pairs, LENGTH))
        self.sequences = [
            TokenSequence(row, PROMPT, number // 2, -1 if number % 2 else +1)
            for number, row in enumerate(rows)
        ]
        self.lengths = np.full((pairs, 2), LENGTH)
        self.response_lengths = np.full(2 * pairs, LENGTH - PROMPT)

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, number: int) -> TokenSequence:
        return self.sequences[number]


class Training:
    """redi's step over all pairs, with what is asked for."""

    def __init__(self, config: ModelConfig, objective: Objective, pairs: int):
        self.model = Transformer(config)
        toy.initialise(self.model, seed=0)
        self.optimizer = train.make_optimizer(self.model, SETTINGS)
        rows, world = Rows(pairs, config.vocab_size), World(0, 1, torch.device("cpu"))
        self.task = TrainData(rows, objective, world, pack_tokens=2 * pairs * LENGTH)
        self.step = self.task.everything()

    def __call__(self, entropy: bool = True, update: bool = True, lr: float = 1e-5) -> dict:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with ExitStack() as stack:
            if not entropy:
                stack.enter_context(mock.patch.object(TrainData, "loss", no_entropies))
                stack.enter_context(mock.patch.object(train, "read", read_no_entropies))
            if not update:
                stack.enter_context(mock.patch.object(train, "squared_update", no_update))
            record, _ = train._train_step(
                self.model, self.optimizer, self.task, self.step, SETTINGS,
                SimpleNamespace(wanted=False),
            )  # fmt: skip
        return record

    def update_alone(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach()  # any numbers
        train.squared_update_norm(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def entropy(self) -> float:
        """Of the model as it is at the chosen tokens: whole logits, a trace at a time, float64."""
        means = []
        for ids in range(0, 2 * len(self.task.dataset), 2):
            step = [[np.array([ids, ids + 1])]]
            [batch] = self.task.batches(step, self.task.totals(step))
            with torch.no_grad():
                logits = self.model(batch, lambda h, w: h.double() @ w.double().T)  # (R, V)
            logps = logits.log_softmax(dim=1)
            entropies = -(logps.exp() * logps).sum(dim=1)
            means.append(entropies[: batch.response_lengths[0]].mean().item())
        return sum(means) / len(means)


def no_entropies(
    task: TrainData, model: Transformer, batch: PackedBatch, totals: Totals, _: Tensor
):
    return task.objective.loss(model, batch, totals, task.reference)


def read_no_entropies(*given: Any, with_entropies: bool, **named: Any) -> batches.StepStats:
    return batches.read(*given, **named)


def no_update(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.zeros(())


VARIANTS = {
    "both": {},
    "entropy": {"update": False},
    "update": {"entropy": False},
    "neither": {"entropy": False, "update": False},
}


def compare(training: Training) -> None:
    """Raises AssertionError unless all variants train alike and the entropy is right."""
    records = {name: training(**which, lr=0.0) for name, which in VARIANTS.items()}
    for name, record in records.items():
        for key in ("loss", "grad_norm", "chosen_logp", "rejected_logp"):
            right = records["neither"][key]
            assert record[key] == right, f"{name}: {key} {record[key]}, without {right}"
    found, right = records["both"]["chosen_entropy"], training.entropy()
    assert abs(found - right) < 1e-5, f"entropy {found}, of the whole logits {right}"


def share(seconds: dict[str, list[CPUSeconds]], which: str) -> list[float]:
    pairs = zip(seconds[which], seconds["neither"])
    return [ours.total / without.total for ours, without in pairs]


def measured(
    name: str, config: ModelConfig, objective: Objective, pairs: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """{name: ..., name_entropy: ..., name_update: ..., name_update_alone: ...}"""
    training = Training(config, objective, pairs)
    compare(training)
    steps = {which: partial(training, **asked) for which, asked in VARIANTS.items()}
    seconds = interleave(steps, rounds)
    keys = {"both": name, "entropy": f"{name}_entropy", "update": f"{name}_update"}
    alone = [cpu_seconds(training.update_alone).total for _ in range(rounds)]
    shares = [a / b.total for a, b in zip(alone, seconds["neither"])]
    found = {
        key: result(share(seconds, which), GOAL if which == "both" else None, WITHOUT)
        for which, key in keys.items()
    }
    found[f"{name}_update_alone"] = result(shares, None, WITHOUT)
    for key, entry in found.items():
        print(f"{key:<16}{entry['median']:>8.4f}{entry['min']:>8.4f}{entry['max']:>8.4f}")
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'step over':<16}{'median':>8}{'min':>8}{'max':>8}   {WITHOUT}")
    found = {}
    for name, objective in OBJECTIVE.items():
        found |= measured(name, MODEL, objective, PAIRS, ROUNDS)
    write("metrics", found)


if __name__ == "__main__":
    main()
