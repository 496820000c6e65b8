"""How an objective of losses.py or related_losses.py meets the model: which log-prob kernel, which
weights.

Two kinds. A *linear* objective (SFT, REDI, symmetric, positives) is a signed weight per response
token, known before the forward pass from lengths alone: it runs through the one-pass kernel, and a
pair's two sequences may lie in different packs. A *pairwise* one (DPO and the rest) is any function
of a pair's log-probs: it needs the two-pass kernel, and both sequences in one pack.

To try another objective, write it as a function of its parameters and add it to OBJECTIVES:
docs/new-objective.md does. Letters: P pairs, S sequences of a pack, R supervised tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redi import losses, related_losses
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
    """The log-probs of a pack's pairs, as a pairwise loss needs them. All (P,) but the tokens'."""

    chosen_logps: Sequence[Tensor]  # P of (|y_w|,), token by token
    rejected_logps: Sequence[Tensor]  # P of (|y_l|,)
    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    ref_chosen_sum: Tensor | None  # the reference's, where the objective asked for one
    ref_rejected_sum: Tensor | None
    ref_chosen_mean: Tensor | None
    ref_rejected_mean: Tensor | None

    @classmethod
    def of(cls, logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> "Pairs":
        """logps (R,) of a pack whose sequences are chosen, rejected, chosen, ...; reference (N, 2),
        see Objective."""
        lengths = batch.response_lengths
        tokens, sums = logps.split(lengths), sequence_sums(logps, lengths)  # S, (S,)
        means = sequence_means(logps, lengths)
        ref_sums = ref_means = None
        if reference is not None:
            ref_sums = reference[batch.row_ids[0::2]].reshape(-1).to(sums)  # (S,)
            ref_means = ref_sums / torch.tensor(lengths).to(sums)
        both = (tokens, sums, means, ref_sums, ref_means)
        sides = (None if part is None else part[i::2] for part in both for i in (0, 1))
        return cls(*sides)


@dataclass(frozen=True)
class Objective:
    """What the train loop minimises.

    token_weights(signs (S,), lengths (S,), totals) -> (S,) goes into every pack (zero for an
    objective that is not linear). loss(model, batch, totals, reference, entropies) -> the pack's
    share of the step's loss, and its log-probs (R,) detached; shares add up, nothing is averaged.
    reference (N, 2), on the host: the starting model's summed log-probs of each row's chosen and
    rejected sequence. entropies (R,) or None: memory for them, see logprobs.token_logps.
    """

    token_weights: Callable[[Tensor, Tensor, Totals], Tensor]
    loss: Callable[..., tuple[Tensor, Tensor]]
    keep_pairs: bool = False
    needs_reference: bool = False


def linear(token_weights: Callable[[Tensor, Tensor, Totals], Tensor]) -> Objective:
    """loss = sum_t w_t logp_t, in one pass."""

    def loss(
        model: Transformer,
        batch: PackedBatch,
        totals: Totals,
        reference: Tensor | None,
        entropies: Tensor | None = None,
    ):
        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weighted_logp_sum(hidden, weight, batch.targets, batch.token_weights, entropies)

        return model(batch, head)

    return Objective(token_weights, loss)


def pairwise(pair_loss: Callable[[Pairs], Tensor], needs_reference: bool = False) -> Objective:
    """loss = sum over pairs of pair_loss (P,), divided by the step's number of pairs."""

    def no_weights(signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return torch.zeros(signs.shape, dtype=torch.float64)

    def loss(
        model: Transformer,
        batch: PackedBatch,
        totals: Totals,
        reference: Tensor | None,
        entropies: Tensor | None = None,
    ):
        logps = model(batch, lambda h, w: token_logps(h, w, batch.targets, entropies))  # (R,)
        if not batch.row_ids:  # a rank without work: its backward is waited for all the same
            return logps.sum(), logps.detach()
        pairs = Pairs.of(logps, batch, reference)
        return pair_loss(pairs).sum() / totals.num_rows, logps.detach()

    return Objective(no_weights, loss, keep_pairs=True, needs_reference=needs_reference)


def sequence_sums(logps: Tensor, lengths: list[int]) -> Tensor:
    """Sum the log-probs (R,) of each sequence -> (S,). A fixed order of additions: repeatable."""
    return torch.stack([part.sum() for part in logps.split(lengths)]) if lengths else logps


def sequence_means(logps: Tensor, lengths: list[int]) -> Tensor:
    """The same per token -> (S,), of at least one sequence."""
    return torch.stack([part.mean() for part in logps.split(lengths)])


def sums_of(p: Pairs) -> tuple[Tensor, ...]:
    """(S_w, S_l, S_w_ref, S_l_ref), the arguments DPO begins with; each (P,)."""
    return p.chosen_sum, p.rejected_sum, p.ref_chosen_sum, p.ref_rejected_sum


def means_of(p: Pairs) -> tuple[Tensor, ...]:
    """(M_w, M_l, M_w_ref, M_l_ref)."""
    return p.chosen_mean, p.rejected_mean, p.ref_chosen_mean, p.ref_rejected_mean


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
    return pairwise(lambda p: losses.dpo_loss(*sums_of(p), beta), needs_reference=True)


def simpo(beta: float, gamma: float) -> Objective:
    return pairwise(lambda p: losses.simpo_loss(p.chosen_mean, p.rejected_mean, beta, gamma))


# ---------------------------------------------------------------- others


def positives() -> Objective:
    return redi(alpha=0.0)


def dpo_norm(beta: float) -> Objective:
    return pairwise(
        lambda p: related_losses.dpo_norm_loss(*means_of(p), beta), needs_reference=True
    )


def irpo(beta: float, alpha: float) -> Objective:
    return pairwise(
        lambda p: related_losses.irpo_loss(*sums_of(p), p.chosen_mean, beta, alpha),
        needs_reference=True,
    )


def dpop(beta: float, alpha: float) -> Objective:
    return pairwise(
        lambda p: related_losses.dpop_loss(*sums_of(p), beta, alpha), needs_reference=True
    )


def ipo(beta: float) -> Objective:
    return pairwise(lambda p: related_losses.ipo_loss(*means_of(p), beta), needs_reference=True)


def apo_zero(beta: float) -> Objective:
    return pairwise(lambda p: related_losses.apo_zero_loss(*sums_of(p), beta), needs_reference=True)


def orpo(alpha: float) -> Objective:
    return pairwise(lambda p: related_losses.orpo_loss(p.chosen_mean, p.rejected_mean, alpha))


def npo(beta: float, alpha: float) -> Objective:
    return pairwise(
        lambda p: related_losses.npo_loss(
            p.chosen_mean, p.rejected_sum, p.ref_rejected_sum, beta, alpha
        ),
        needs_reference=True,
    )


def topr() -> Objective:
    return pairwise(
        lambda p: related_losses.topr_loss(p.chosen_sum, p.rejected_sum, p.ref_rejected_sum),
        needs_reference=True,
    )


def dft() -> Objective:
    return pairwise(lambda p: related_losses.dft_loss(p.chosen_logps))


def redi_weighted(alpha: float, gamma: float) -> Objective:
    return pairwise(
        lambda p: related_losses.redi_weighted_loss(p.chosen_mean, p.rejected_mean, alpha, gamma)
    )


# What --objective of stage 2 chooses from. A function's parameters are the flags it takes.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "redi": redi,
    "symmetric": symmetric,
    "dpo": dpo,
    "simpo": simpo,
    "positives": positives,
    "dpo_norm": dpo_norm,
    "irpo": irpo,
    "dpop": dpop,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "orpo": orpo,
    "npo": npo,
    "topr": topr,
    "dft": dft,
    "redi_weighted": redi_weighted,
}
