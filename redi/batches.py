"""An optimizer step as packed batches, and what is summed over them.

A `Task` is rows together with the objective that weighs them. It turns the sequence ids of a plan
into batches whose token weights hold the counts of the *whole* step, so the losses of its packs
add up to the loss of the step:

    totals = task.totals(step)
    for batch in task.batches(step, totals):
        share, logps = task.loss(model, batch, totals)      # the shares add up to the step's loss

Two passes without gradients live here too: the held-out loss, and the reference log-probs of DPO.
Letters: N rows, R supervised tokens, S sequences of a pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from redi.data.dataset import Dataset
from redi.distributed import Place
from redi.logprobs import token_logps
from redi.model import Transformer
from redi.objectives import Objective, Totals, sequence_sums
from redi.packing import Pack, PackedBatch, Step, pack, plan
from redi.runlog import Progress


@dataclass(frozen=True)
class Task:
    """Rows to train on or to score, and the objective."""

    dataset: Dataset
    objective: Objective
    place: Place
    pack_tokens: int
    reference: Tensor | None = None  # (N, 2), see objectives.Objective

    def plan(self, rows_per_step: int, seed: int, epoch: int) -> list[Step]:
        return plan(
            self.dataset.lengths,
            rows_per_step,
            self.pack_tokens,
            self.place.world_size,
            seed=seed,
            epoch=epoch,
            keep_pairs=self.objective.keep_pairs,
        )

    def everything(self) -> Step:
        """All rows as one step, for passes that do not train."""
        [step] = self.plan(rows_per_step=len(self.dataset), seed=0, epoch=0)
        return step

    def read_ahead(self, step: Step) -> None:
        """Start to bring in from disk what this rank will need for a step."""
        for ids in step[self.place.rank]:
            self.dataset.read_ahead(ids)

    def totals(self, step: Step) -> Totals:
        """Counts over all packs and ranks of a step."""
        ids = np.concatenate([ids for packs in step for ids in packs])
        rows = len(ids) // 2 if self.dataset.store.paired else len(ids)
        return Totals(rows, int(self.dataset.response_lengths[ids].sum()))

    def batches(self, step: Step, totals: Totals) -> Iterator[PackedBatch]:
        """This rank's packs of a step, read from disk and moved to the device."""
        for ids in step[self.place.rank]:
            yield self._load(ids, totals).to(self.place.device)

    def loss(self, model: Transformer, batch: PackedBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        """The pack's share of the step's loss, and its log-probs (R,) detached."""
        return self.objective.loss(model, batch, totals, self.reference)

    def _load(self, ids: Pack, totals: Totals) -> PackedBatch:
        sequences = [self.dataset.sequence(i) for i in ids]
        signs = torch.tensor([s.sign for s in sequences])
        lengths = torch.tensor([s.response_length for s in sequences])
        return pack(sequences, self.objective.token_weights(signs, lengths, totals))


# ---------------------------------------------------------------- what is logged of log-probs


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probs of a pack's sequences, with what sorts them into pairs."""

    row_ids: list[int]
    signs: list[int]
    lengths: list[int]
    sums: Tensor  # (S,) on the device until somebody reads them
    largest: Tensor  # () of all tokens; above 0 only if something is broken

    @classmethod
    def of(cls, batch: PackedBatch, logps: Tensor) -> "SequenceLogps":
        sums = sequence_sums(logps, batch.response_lengths)
        largest = logps.max() if len(logps) else logps.new_zeros(())
        return cls(batch.row_ids, batch.signs, batch.response_lengths, sums, largest)


def read(scalars: list[Tensor], parts: list[SequenceLogps]) -> tuple[list[float], dict[str, float]]:
    """Bring scalars and log-probs to the host, waiting for the device once.

    -> the scalars; the mean log-probs of chosen and rejected responses, in nats per token, over
    rows, and for pairs also the margin and the share of pairs ranked right. Raises RuntimeError
    for a log-prob above 0: a probability above 1 means a broken kernel or broken memory.
    """
    pieces = [*scalars, *(part.largest for part in parts), *(part.sums for part in parts)]
    values = torch.cat([piece.reshape(-1).to(torch.float64) for piece in pieces]).tolist()
    largest = max(values[len(scalars) : len(scalars) + len(parts)])
    if largest > 0:
        raise RuntimeError(f"a token has log-prob {largest}, above 0: the log-probs are wrong")
    sums = iter(values[len(scalars) + len(parts) :])
    means = {
        (row, sign): next(sums) / length
        for part in parts
        for row, sign, length in zip(part.row_ids, part.signs, part.lengths)
    }
    return values[: len(scalars)], _summary(means)


def _summary(means: dict[tuple[int, int], float]) -> dict[str, float]:
    """Of (row, sign) -> mean log-prob."""
    chosen = {row: mean for (row, sign), mean in means.items() if sign > 0}
    rejected = {row: mean for (row, sign), mean in means.items() if sign < 0}
    summary = {"chosen_logp": sum(chosen.values()) / len(chosen)}
    if rejected:
        margins = [chosen[row] - rejected[row] for row in chosen]
        summary["rejected_logp"] = sum(rejected.values()) / len(rejected)
        summary["margin"] = sum(margins) / len(margins)
        summary["ranked_right"] = sum(margin > 0 for margin in margins) / len(margins)
    return summary


# ---------------------------------------------------------------- passes without gradients


@torch.no_grad()
def held_out(model: Transformer, task: Task) -> dict[str, float]:
    """The objective's loss over all rows of `task` as one step, and their mean log-probs."""
    step, shares, parts = task.everything(), [], []
    totals = task.totals(step)
    for batch in task.batches(step, totals):
        share, logps = task.loss(model, batch, totals)
        shares.append(share)
        parts.append(SequenceLogps.of(batch, logps))
    losses, summary = read(shares, parts)
    return {"loss": sum(losses), **summary}


@torch.no_grad()
def with_reference(model: Transformer, task: Task) -> Task:
    """`task` with the log-probs of `model` as it is, if its objective wants them."""
    if not task.objective.needs_reference:
        return task
    step, parts = task.everything(), []
    with Progress(len(step[task.place.rank]), "reference log-probs", unit="pack") as progress:
        for batch in task.batches(step, task.totals(step)):
            targets = batch.targets
            logps = model(batch, lambda h, w, targets=targets: token_logps(h, w, targets))
            parts.append(SequenceLogps.of(batch, logps))
            progress.update({})
    # On the host, where a pack's rows are looked up; float64, so that no model's sums are rounded.
    sums = torch.empty(len(task.dataset), 2, dtype=torch.float64)
    for part in parts:
        columns = [0 if sign > 0 else 1 for sign in part.signs]
        sums[part.row_ids, columns] = part.sums.to("cpu", torch.float64)
    return replace(task, reference=sums)
