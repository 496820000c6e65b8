"""How an objective of losses.py meets the model: which log-prob kernel, which weights.

Two kinds. A *linear* objective (SFT, REDI, symmetric) is a signed weight per response token, known
before the forward pass from lengths alone: it runs through the one-pass kernel, and a pair's two
sequences may lie in different packs. A *pairwise* one (DPO, SimPO) puts a sigmoid around the pair:
it needs the two-pass kernel, and both sequences in one pack.

To try another objective, write it as a function of its parameters and add it to OBJECTIVES.
Letters: P pairs, S sequences of a pack, R supervised tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redi import losses
from redi.logprobs import token_logps, weighted_logp_sum
from redi.model import Transformer
from redi.packing import PackedBatch


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step, over all packs and ranks: what losses are divided by."""

    num_rows: int  # traces, or pairs
    num_tokens: int  # supervised


@dataclass(frozen=True)
class Pairs:
    """The log-probs of a pack's pairs, as a pairwise loss needs them. All (P,)."""

    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    ref_chosen_sum: Tensor | None
    ref_rejected_sum: Tensor | None


@dataclass(frozen=True)
class Objective:
    """What the train loop minimises.

    token_weights(signs (S,), lengths (S,), totals) -> (S,) goes into every pack (zero for an
    objective that is not linear). loss(model, batch, totals, reference) -> the pack's share of the
    step's loss, and its log-probs (R,) detached; shares add up, nothing is averaged. reference
    (N, 2), on the host: the starting model's summed log-probs of each row's chosen and rejected
    sequence.
    """

    token_weights: Callable[[Tensor, Tensor, Totals], Tensor]
    loss: Callable[[Transformer, PackedBatch, Totals, Tensor | None], tuple[Tensor, Tensor]]
    keep_pairs: bool = False
    needs_reference: bool = False


def linear(token_weights: Callable[[Tensor, Tensor, Totals], Tensor]) -> Objective:
    """loss = sum_t w_t logp_t, in one pass."""

    def loss(model: Transformer, batch: PackedBatch, totals: Totals, reference: Tensor | None):
        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weighted_logp_sum(hidden, weight, batch.targets, batch.token_weights)

        return model(batch, head)

    return Objective(token_weights, loss)


def pairwise(pair_loss: Callable[[Pairs], Tensor], needs_reference: bool = False) -> Objective:
    """loss = sum over pairs of pair_loss (P,), divided by the step's number of pairs."""

    def no_weights(signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return torch.zeros(signs.shape, dtype=torch.float64)

    def loss(model: Transformer, batch: PackedBatch, totals: Totals, reference: Tensor | None):
        logps = model(batch, lambda hidden, weight: token_logps(hidden, weight, batch.targets))
        sums = sequence_sums(logps, batch.response_lengths)  # (S,) chosen, rejected, chosen, ...
        means = sequence_means(logps, batch.response_lengths)
        of_rows = None if reference is None else reference[batch.row_ids[0::2]].to(sums)  # (P, 2)
        pairs = Pairs(
            chosen_sum=sums[0::2],
            rejected_sum=sums[1::2],
            chosen_mean=means[0::2],
            rejected_mean=means[1::2],
            ref_chosen_sum=None if of_rows is None else of_rows[:, 0],
            ref_rejected_sum=None if of_rows is None else of_rows[:, 1],
        )
        return pair_loss(pairs).sum() / totals.num_rows, logps.detach()

    return Objective(no_weights, loss, keep_pairs=True, needs_reference=needs_reference)


def sequence_sums(logps: Tensor, lengths: list[int]) -> Tensor:
    """Sum the log-probs (R,) of each sequence -> (S,). A fixed order of additions: repeatable."""
    return torch.stack([part.sum() for part in logps.split(lengths)]) if lengths else logps


def sequence_means(logps: Tensor, lengths: list[int]) -> Tensor:
    """The same per token -> (S,)."""
    return torch.stack([part.mean() for part in logps.split(lengths)]) if lengths else logps


# ---------------------------------------------------------------- the paper's

SFT = linear(lambda signs, lengths, totals: losses.sft_token_weights(lengths, totals.num_tokens))


def redi(alpha: float) -> Objective:
    return linear(
        lambda signs, lengths, totals: losses.redi_token_weights(
            signs, lengths, totals.num_rows, alpha
        )
    )


def symmetric() -> Objective:
    return redi(alpha=1.0)


def dpo(beta: float) -> Objective:
    return pairwise(
        lambda p: losses.dpo_loss(
            p.chosen_sum, p.rejected_sum, p.ref_chosen_sum, p.ref_rejected_sum, beta
        ),
        needs_reference=True,
    )


def simpo(beta: float, gamma: float) -> Objective:
    return pairwise(lambda p: losses.simpo_loss(p.chosen_mean, p.rejected_mean, beta, gamma))


# What --objective of stage 2 chooses from. A function's parameters are the flags it takes.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "redi": redi,
    "symmetric": symmetric,
    "dpo": dpo,
    "simpo": simpo,
}
