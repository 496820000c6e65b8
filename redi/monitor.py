"""What is watched while training.

    StepSums, StepStats mean log-probs and entropies of chosen and rejected traces, over all ranks
    squared_update_norm how far an optimizer step will move the weights
    CollapseGuard       warns when the chosen traces' log-prob falls with the rejected ones'
    training_flops      model FLOPs of a step, for the share of the GPU's peak (MFU)

Letters: R supervised tokens, S sequences.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.batches import TrainData, sequence_ids
from redi.checkpoint.resume import Checkpoints
from redi.distributed import local_shard, sum_over_ranks
from redi.gpus import find_gpu
from redi.logprobs import PackLoss
from redi.model import ModelConfig
from redi.packing import PackedBatch, StepPlan, to_device


@dataclass(frozen=True)
class StepStats:
    """A step over all packs and ranks. Means are over the tokens of a sequence, in nats."""

    ids: np.ndarray  # (S,) sequences, ascending; of pairs: chosen, rejected, chosen, ...
    signs: np.ndarray  # (S,) +1 chosen or right, -1 rejected or wrong
    paired: bool
    loss: float
    scalars: list[float]  # those given to `StepSums.gather`, summed over ranks
    mean_logps: np.ndarray  # (S,)
    mean_entropies: np.ndarray  # (S,)

    def summary(self, entropies: bool = True) -> dict[str, float]:
        """The loss, and means over rows: log-prob and entropy per token of chosen (right) and of
        rejected (wrong) traces, if there are any; their margin; the share of pairs ranked right."""
        means = {"logp": self.mean_logps} | ({"entropy": self.mean_entropies} if entropies else {})
        values = {"loss": self.loss}
        for name, of_sequences in means.items():
            for side, sign in (("chosen", 1), ("rejected", -1)):
                if sign in self.signs:
                    values[f"{side}_{name}"] = float(of_sequences[self.signs == sign].mean())
        if {"chosen_logp", "rejected_logp"} <= values.keys():
            values["margin"] = values["chosen_logp"] - values["rejected_logp"]
        if self.paired:
            chosen, rejected = self.mean_logps.reshape(-1, 2).T
            values["ranked_right"] = float((chosen > rejected).mean())
        return values


class StepSums:
    """Sums over the packs of a step, on the device of each rank."""

    def __init__(self, data: TrainData, step: StepPlan):
        self.data, self.paired, self.ids = data, data.dataset.store.paired, sequence_ids(step)
        # Every rank fills its own places of one vector; the sum over ranks is the whole vector.
        self.sizes = [1, data.world.world_size, len(self.ids), len(self.ids)]
        self.vector = torch.zeros(sum(self.sizes), dtype=torch.float64, device=data.world.device)

    def add(self, batch: PackedBatch, result: PackLoss) -> None:
        """Add a pack, after its backward: until then its entropies are 0."""
        loss, largest, logp_sums, entropy_sums = self.vector.split(self.sizes)
        loss += result.loss.detach()
        lengths, world = batch.response_lengths, self.data.world
        if not lengths:
            return  # an empty pack
        own = [2 * r + (s < 0) if self.paired else r for r, s in zip(batch.row_ids, batch.signs)]
        where = to_device(np.searchsorted(self.ids, own), world.device)
        for whole, values in (logp_sums, result.token_logps), (entropy_sums, result.entropies):
            if values is not None:  # added in a fixed order, so that the sum is repeatable
                parts = [part.sum() for part in values.split(lengths)]
                whole[where] = torch.stack(parts).double()
        largest[world.rank] = torch.maximum(largest[world.rank], result.token_logps.max())

    def gather(self, scalars: Sequence[Tensor | float] = ()) -> StepStats:
        """Sum over all ranks, also `scalars`: one all-reduce, one wait for the device. Raises
        RuntimeError for a log-prob above 0 (a broken kernel)."""
        vector = torch.cat([self.vector, self.vector.new_zeros(len(scalars))])
        for i, scalar in enumerate(scalars, start=len(self.vector)):
            vector[i].fill_(scalar)  # vector[i] = scalar would make the host wait
        sum_over_ranks(vector, self.data.world)
        parts = [part.numpy() for part in vector.cpu().split([*self.sizes, len(scalars)])]
        [loss], largest, logp_sums, entropy_sums, sums = parts
        if largest.max() > 0:
            raise RuntimeError(f"a token has log-prob {largest.max()}: the log-probs are wrong")
        lengths = self.data.dataset.response_lengths[self.ids]
        means = logp_sums / lengths, entropy_sums / lengths
        signs = self.data.dataset.signs[self.ids]
        return StepStats(self.ids, signs, self.paired, float(loss), sums.tolist(), *means)


# ---------------------------------------------------------------- the update's norm
#
#     delta = -lr * (m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) + decay * weight)
#
# with m and v AdamW's moments after the gradient of step k. The norm of delta over all weights is
# the update norm of the paper's Figures 4 and 5. It spikes when a run collapses; the norm of a
# clipped gradient does not. Computing it from the moments needs no copy of the weights; computing
# it before the step lets it share the all-reduce of the step's statistics.

BATCH = {"cpu": 1 << 17, "cuda": 1 << 26}  # weights at a time; on a CPU they stay in the cache


@torch.no_grad()
def squared_update_norm(optimizer: torch.optim.AdamW) -> Tensor:
    """() float64: sum of squares of what the next `optimizer.step()` will add to this rank's
    weights. Gradients must be clipped already. Exact up to the rounding of the addition."""
    parameter = optimizer.param_groups[0]["params"][0]
    total = torch.zeros((), dtype=torch.float64, device=parameter.device)
    step = optimizer.state[parameter].get("step", total).double() + 1.0  # all have taken as many
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        # Tensors: the host does not wait for the device.
        corrections = 1.0 / (1.0 - beta1**step), (beta2 / (1.0 - beta2**step)).sqrt()
        of_mean, of_root = (correction.to(parameter.dtype) for correction in corrections)
        for weights, gradients, means, squares in _batches(optimizer, group["params"]):
            updates = torch._foreach_lerp(means, gradients, 1.0 - beta1)
            scales = torch._foreach_addcmul(squares, gradients, gradients, value=1.0 / beta2 - 1.0)
            torch._foreach_sqrt_(scales)
            torch._foreach_mul_(scales, of_root)
            torch._foreach_add_(scales, group["eps"])
            torch._foreach_div_(updates, scales)
            torch._foreach_mul_(updates, of_mean)
            if group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            norms = torch.stack(torch._foreach_norm(updates)).double()
            total += group["lr"] ** 2 * norms.square().sum()
    return total


def _batches(
    optimizer: torch.optim.AdamW, parameters: list[Tensor]
) -> Iterator[list[list[Tensor]]]:
    """This rank's weights, gradients, means and mean squares as lists of flat pieces, about BATCH
    weights at a time: few kernels do the work of many, and their results take little memory."""
    zero = torch.zeros((), dtype=parameters[0].dtype, device=parameters[0].device)
    pieces, size = [], BATCH[zero.device.type]
    for parameter in parameters:
        weight, state = local_shard(parameter), optimizer.state[parameter]
        moments = (state.get(name, zero) for name in ("exp_avg", "exp_avg_sq"))  # zero at first
        others = (local_shard(t).expand_as(weight) for t in (parameter.grad, *moments))
        pieces += zip(*(t.reshape(-1).split(size) for t in (weight, *others)))
    ends = np.cumsum([len(weight) for weight, *_ in pieces]) // size
    for _, batch in itertools.groupby(zip(ends, pieces), key=lambda item: item[0]):
        yield [list(tensors) for tensors in zip(*(piece for _, piece in batch))]


# ---------------------------------------------------------------- collapse
#
# Minimizing the log-prob of rejected traces can also lower that of the chosen ones and ruin the
# model (docs/curves.md; the paper's Figures 4 and 5).
#
#     chosen log-prob    -0.5  -0.6  -0.9  -1.2  -1.4  ...     threshold 0.5 below the first step
#     low                   0     0     0     1     2          when low == steps: a warning
#                                       ^ the last good model: its checkpoint is kept
#
# Only answers can tell whether a fall is a collapse, so this warns, and stops only if asked to.


@dataclass
class CollapseGuard:
    """Watches the chosen traces' mean log-prob, one record per step. threshold: nats per token
    below the first record. steps: consecutive steps below that before it warns; after a recovery it
    can warn again."""

    threshold: float
    steps: int
    first: float | None = None
    low: int = 0  # consecutive steps
    last_good: int = 0  # the last step that was not low
    warned: bool = False

    def check(self, record: dict[str, Any]) -> str:
        """The warning, or "" at steps without one. Steps without right rows do not count."""
        now = record.get("chosen_logp")
        if now is None:
            return ""
        self.first = now if self.first is None else self.first
        fell = self.first - now
        self.low = self.low + 1 if fell > self.threshold else 0
        if self.low != self.steps:
            return ""
        return (
            f"collapse: chosen traces have been over {self.threshold:g} nats per token less likely "
            f"than at the start for {self.low} steps (now {fell:.2f}: {self.first:.2f} -> "
            f"{now:.2f}); a smaller --lr helps"
        )

    def watch(self, step: int, record: dict[str, Any], checkpoints: Checkpoints) -> str:
        """`check`, with the step and the checkpoint that is kept from before the fall: while the
        log-prob is low, and for good after a warning."""
        if "chosen_logp" not in record:  # of a step without right rows
            return ""
        warning = self.check(record)
        if self.low == 0 and not self.warned:
            checkpoints.pinned = 0
            self.last_good = step
        elif self.low == 1 and not self.warned:
            # A record is of the model before its step's update.
            before_the_fall = [s for s in checkpoints.steps() if s < self.last_good]
            checkpoints.pinned = max(before_the_fall, default=0)
        if not warning:
            return ""
        self.warned = True
        kept = checkpoints.at(checkpoints.pinned) if checkpoints.pinned else "no checkpoint"
        return f"step {step}: {warning}; kept from before the fall: {kept}"


# ---------------------------------------------------------------- FLOPs and MFU
#
# Model FLOPs as the literature counts them: every matmul once forward and twice backward, nothing
# for what activation checkpointing runs again. Attention counts per document: a pack of sixteen
# traces of 2k tokens does a sixteenth of the attention of one trace of 32k.


def training_flops(config: ModelConfig, lengths: list[int], supervised: int) -> float:
    """FLOPs over documents of `lengths` tokens, with the head on `supervised` rows: 6 per weight
    and token, and 6 * H * d * L^2 per layer for causal attention."""
    heads = config.num_heads * config.head_dim
    attention = config.hidden_size * 2 * (heads + config.num_kv_heads * config.head_dim)
    mlp = config.hidden_size * 3 * config.intermediate_size
    body = config.num_layers * (attention + mlp)
    head = config.vocab_size * config.hidden_size
    squares = sum(length**2 for length in lengths)
    return 6.0 * (body * sum(lengths) + head * supervised + config.num_layers * heads * squares)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, or None if unknown (every CPU)."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops if gpu else None
