"""An optimizer step as packed batches.

`TrainData` turns the sequence ids of a plan into packs whose weights already contain the
counts of the *whole* step, so the losses of the packs add up to the loss of the step:

    for batch in data.batches(step):
        loss, token_logps, entropies = data.objective.loss(model, batch)

Letters: N rows, S sequences of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redi.data.dataset import Dataset
from redi.distributed import World
from redi.objectives import Objective, Totals
from redi.packing import PackedBatch, StepPlan, pack, plan


@dataclass(frozen=True)
class TrainData:
    """Rows to train on or to score, and the objective."""

    dataset: Dataset
    objective: Objective
    world: World
    pack_tokens: int
    reference: Tensor | None = None  # (N, 2) float64 sums on the host: checkpoint/reference.py

    def plan(self, rows_per_step: int, seed: int, epoch: int) -> list[StepPlan]:
        sizes = rows_per_step, self.pack_tokens, self.world.world_size
        return plan(self.dataset.lengths, *sizes, seed, epoch, self.objective.keep_pairs)

    def all_rows(self) -> StepPlan:
        """All rows as one step, for passes that do not train."""
        [step] = self.plan(rows_per_step=len(self.dataset), seed=0, epoch=0)
        return step

    def batches(self, step: StepPlan) -> Iterator[PackedBatch]:
        """This rank's packs of a step, read from disk and moved to the device."""
        all_ids = sequence_ids(step)
        totals = Totals(len(all_ids) / 2, int(self.dataset.response_lengths[all_ids].sum()))
        for ids in step[self.world.rank]:
            sequences = [self.dataset.sequence(i) for i in ids]
            signs = torch.tensor([s.sign for s in sequences])
            lengths = torch.from_numpy(self.dataset.response_lengths[ids]).long()
            weights = self.objective.sequence_weights(signs, lengths, totals)
            yield pack(sequences, weights, self.reference).to(self.world.device)


def sequence_ids(step: StepPlan) -> np.ndarray:
    """All sequences of a step, over its ranks and packs, ascending (S,)."""
    return np.sort(np.concatenate([ids for packs in step for ids in packs]))
