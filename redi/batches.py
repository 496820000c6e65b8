"""An optimizer step as packed batches, and what is summed over them.

A `Task` is rows together with the objective that weighs them. It turns the sequence ids of a plan
into batches whose token weights hold the counts of the *whole* step, so the losses of its packs
add up to the loss of the step:

    totals = task.totals(step)
    for batch in task.batches(step, totals):
        share, logps = task.loss(model, batch, totals)      # the shares add up to the step's loss

`read` adds up what the ranks have of a step. Two passes without gradients live here too: the
held-out loss, and the reference log-probs of DPO.
Letters: N rows, R supervised tokens, S sequences of a pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redi.checkpoint.reference import load_reference, save_reference
from redi.data.dataset import Dataset
from redi.distributed import World, sum_over_ranks, without_gradients
from redi.logprobs import token_logps
from redi.model import Transformer
from redi.objectives import Objective, Totals, sequence_sums
from redi.packing import Pack, PackedBatch, StepPlan, pack, plan
from redi.runlog import Progress


@dataclass(frozen=True)
class TrainData:
    """Rows to train on or to score, and the objective."""

    dataset: Dataset
    objective: Objective
    world: World
    pack_tokens: int
    reference: Tensor | None = None  # (N, 2), see objectives.Objective
    cache_path: Path | None = None  # where it is kept between runs: reference.py

    def plan(self, rows_per_step: int, seed: int, epoch: int) -> list[StepPlan]:
        return plan(
            self.dataset.lengths,
            rows_per_step,
            self.pack_tokens,
            self.world.world_size,
            seed=seed,
            epoch=epoch,
            keep_pairs=self.objective.keep_pairs,
        )

    def everything(self) -> StepPlan:
        """All rows as one step, for passes that do not train."""
        [step] = self.plan(rows_per_step=len(self.dataset), seed=0, epoch=0)
        return step

    def read_ahead(self, step: StepPlan) -> None:
        """Start to bring in from disk what this rank will need for a step."""
        for ids in step[self.world.rank]:
            self.dataset.read_ahead(ids)

    def ids(self, step: StepPlan) -> np.ndarray:
        """Of all the step's sequences, ascending."""
        return np.sort(np.concatenate([ids for packs in step for ids in packs]))

    def totals(self, step: StepPlan) -> Totals:
        """Counts over all packs and ranks of a step."""
        ids = self.ids(step)
        rows = len(ids) // 2 if self.dataset.store.paired else len(ids)
        return Totals(rows, int(self.dataset.response_lengths[ids].sum()))

    def batches(self, step: StepPlan, totals: Totals) -> Iterator[PackedBatch]:
        """This rank's packs of a step, read from disk and moved to the device."""
        for ids in step[self.world.rank]:
            yield self._load(ids, totals).to(self.world.device)

    def loss(
        self,
        model: Transformer,
        batch: PackedBatch,
        totals: Totals,
        entropies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The pack's share of the step's loss, and its log-probs (R,) detached. entropies (R,):
        memory for them; they are there once backward has run."""
        return self.objective.loss(model, batch, totals, self.reference, entropies)

    def _load(self, ids: Pack, totals: Totals) -> PackedBatch:
        sequences = [self.dataset.sequence(i) for i in ids]
        signs = torch.tensor([s.sign for s in sequences])
        lengths = torch.tensor([s.response_length for s in sequences])
        return pack(sequences, self.objective.token_weights(signs, lengths, totals))


# ---------------------------------------------------------------- what is logged of log-probs


@dataclass(frozen=True)
class SequenceStats:
    """Log-probs of a pack's sequences, and the entropies they were drawn from."""

    ids: list[int]  # S, as packing.plan numbers sequences
    sums: Tensor  # (S,) on the device until somebody reads them
    largest: Tensor  # () of all tokens; above 0 only if something is broken
    entropies: Tensor | None  # (S,) summed like the log-probs

    @classmethod
    def of(
        cls, batch: PackedBatch, logps: Tensor, paired: bool, entropies: Tensor | None = None
    ) -> "SequenceStats":
        """logps (R,) and entropies (R,) of the pack's tokens; the latter after backward."""
        ids = batch.row_ids
        if paired:
            ids = [2 * row + (sign < 0) for row, sign in zip(batch.row_ids, batch.signs)]
        largest = logps.max() if len(logps) else logps.new_zeros(())
        sums, lengths = sequence_sums(logps, batch.response_lengths), batch.response_lengths
        summed = None if entropies is None else sequence_sums(entropies, lengths)
        return cls(ids, sums, largest, summed)


@dataclass(frozen=True)
class StepStats:
    """What all ranks together have of a step, on the host of each."""

    added: list[float]
    replicated: list[float]
    means: dict[int, float]  # sequence id -> mean log-prob of its tokens, in nats
    entropies: dict[int, float]  # -> mean entropy of what they were predicted with; {} if not asked
    paired: bool

    def summary(self) -> dict[str, float]:
        """The mean log-probs of chosen and rejected responses, in nats per token, over rows, and
        for pairs also the margin and the share of pairs ranked right; the entropies likewise."""
        chosen, rejected = self._sides(self.means)
        found = {"chosen_logp": _mean(chosen)}
        if self.paired:
            margins = [c - r for c, r in zip(chosen, rejected)]
            found |= {
                "rejected_logp": _mean(rejected),
                "margin": _mean(margins),
                "ranked_right": sum(margin > 0 for margin in margins) / len(margins),
            }
        chosen, rejected = self._sides(self.entropies)
        found |= {"chosen_entropy": _mean(chosen)} if chosen else {}
        return found | ({"rejected_entropy": _mean(rejected)} if rejected else {})

    def _sides(self, of_ids: dict[int, float]) -> tuple[list[float], list[float]]:
        """Of chosen and of rejected sequences, in row order: ids ascend."""
        if not self.paired:
            return list(of_ids.values()), []
        chosen = [value for i, value in of_ids.items() if i % 2 == 0]
        return chosen, [value for i, value in of_ids.items() if i % 2]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def read(
    task: TrainData,
    step: StepPlan,
    parts: list[SequenceStats],
    scalars: list[Tensor | float],
    replicated: list[Tensor] = (),
    with_entropies: bool = False,
) -> StepStats:
    """Bring a step's scalars, log-probs and entropies together and to the host: one exchange
    between ranks, and one wait for the device.

    parts: of this rank's packs. add: scalars that are summed over ranks. alike: scalars that every
    rank has alike. with_entropies: parts hold them. Raises RuntimeError for a log-prob above 0: a
    probability above 1 means a broken kernel or broken memory.
    """
    world, ids = task.world, task.ids(step)
    mine = np.array([i for part in parts for i in part.ids], dtype=np.int64)
    # [the sums | a place for every rank's largest log-prob | one for every sequence of the step,
    # and one more for its entropy]
    sizes = [len(scalars), world.world_size, len(ids), len(ids) * with_entropies]
    vector = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
    sums, largest, logps, entropies = vector.split(sizes)
    for number, scalar in enumerate(scalars):
        sums[number] = scalar
    if parts:
        largest[world.rank] = torch.stack([part.largest for part in parts]).max()
        where = torch.from_numpy(np.searchsorted(ids, mine)).to(world.device, non_blocking=True)
        logps[where] = torch.cat([part.sums for part in parts]).to(torch.float64)
        if with_entropies:
            entropies[where] = torch.cat([part.entropies for part in parts]).to(torch.float64)
    sum_over_ranks(vector, world)
    values = torch.cat([vector, *(scalar.reshape(1).to(vector) for scalar in replicated)]).tolist()
    added, highest, *of_sequences = (
        values[i : i + n] for i, n in zip(np.cumsum([0, *sizes]), sizes)
    )
    if max(highest) > 0:
        raise RuntimeError(f"a token has log-prob {max(highest)}, above 0: the log-probs are wrong")
    lengths = task.dataset.response_lengths[ids].tolist()
    means, of_entropies = (
        {int(i): value / length for i, value, length in zip(ids, of_ids, lengths)}
        for of_ids in of_sequences
    )
    paired = task.dataset.store.paired
    return StepStats(added, values[len(vector) :], means, of_entropies, paired)


# ---------------------------------------------------------------- passes without gradients


def held_out(model: Transformer, task: TrainData) -> dict[str, float]:
    """The objective's loss over all rows of `task` as one step, and their mean log-probs."""
    step, shares, parts = task.everything(), [], []
    totals = task.totals(step)
    with without_gradients(model):
        for batch in task.batches(step, totals):
            share, logps = task.loss(model, batch, totals)
            shares.append(share.to(torch.float64))
            parts.append(SequenceStats.of(batch, logps, task.dataset.store.paired))
    reading = read(task, step, parts, [torch.stack(shares).sum()])
    return {"loss": reading.added[0], **reading.summary()}


def with_reference(model: Transformer, task: TrainData) -> TrainData:
    """`task` with the log-probs of `model` as it is, if its objective wants them: from
    `task.kept_in` where they are there, else computed and kept."""
    if not task.objective.needs_reference:
        return task
    if task.cache_path:
        kept = load_reference(task.cache_path, len(task.dataset), task.world)
        if kept is not None:
            if task.world.rank == 0:
                print(f"reference log-probs of {len(kept):,} pairs: {task.cache_path}", flush=True)
            return replace(task, reference=kept)
    reference = _score(model, task)
    if task.cache_path:
        save_reference(task.cache_path, reference, task.world)
    return replace(task, reference=reference)


def _score(model: Transformer, task: TrainData) -> Tensor:
    """Summed log-probs (N, 2) of every row's chosen and rejected sequence."""
    step, parts = task.everything(), []
    packs = step[task.world.rank]
    shown = task.world.rank == 0
    with (
        Progress(len(packs), "reference log-probs", "pack", shown) as progress,
        without_gradients(model),
    ):
        for batch in task.batches(step, task.totals(step)):
            targets = batch.targets
            logps = model(batch, lambda h, w, targets=targets: token_logps(h, w, targets))
            parts.append(SequenceStats.of(batch, logps, paired=True))
            progress.update({})
    # On the host, where a pack's rows are looked up; float64, so that no model's sums are rounded.
    sums = torch.zeros(2 * len(task.dataset), dtype=torch.float64)
    for part in parts:
        sums[part.ids] = part.sums.to("cpu", torch.float64)
    sum_over_ranks(sums, task.world)
    return sums.reshape(-1, 2)
