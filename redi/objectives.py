"""How a loss function trains a model: which log-prob kernel runs, and what is divided by what.

A loss is a pure function in losses.py or related_losses.py. Its argument names say what it needs of
the P pairs of a pack (PAIR_ARGUMENTS below); every other argument is a parameter and a flag. So the
objective NAME of `train_redi.py --objective NAME` is the function NAME_loss, looked up when a run
starts, and there are two ways to train with it:

    LinearObjective     the loss is linear in the log-probs. Its slopes are constants, so the weight
                        of every token is known before the forward pass, and one fused pass computes
                        loss and gradient. A pair's traces may be in different packs and ranks.
    PairwiseObjective   any differentiable function of a pair's log-probs: two passes over the
                        vocabulary, and both traces of a pair in one pack.

To add an objective: docs/objectives.md. Letters: P pairs, S sequences, R supervised tokens.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from redi import losses, related_losses
from redi.config import UserError
from redi.logprobs import PackLoss, token_logps_and_entropies, weighted_logp_sum
from redi.model import Transformer
from redi.packing import PackedBatch

# What --objective accepts. The linear ones have only means as arguments.
LINEAR = ("redi", "symmetric", "positives")
OBJECTIVES = (
    *LINEAR, "dpo", "simpo", "dpo_norm", "irpo", "dpop", "ipo", "apo_zero", "orpo", "npo", "topr",
    "dft", "redi_weighted",
)  # fmt: skip

# What a loss can ask for by naming an argument so: sums and means of a trace's token log-probs
# (P,), the reference model's, and the log-probs token by token (P tensors of (|y|,)).
PAIR_ARGUMENTS = (
    "chosen_sum", "rejected_sum", "chosen_mean", "rejected_mean",
    "ref_chosen_sum", "ref_rejected_sum", "ref_chosen_mean", "ref_rejected_mean",
    "chosen_logps", "rejected_logps",
)  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step, over all packs and ranks: what losses are divided by."""

    num_rows: int  # traces, or pairs
    num_tokens: int  # supervised


@dataclass(frozen=True)
class LinearObjective:
    """loss = sum_t w_t logp_t. token_weights(signs (S,), lengths (S,), totals) -> (S,): w of the
    tokens of each sequence, float64. signs: -1 rejected, +1 otherwise; lengths: |y|."""

    token_weights: Callable[[Tensor, Tensor, Totals], Tensor]
    keep_pairs = False  # must both traces of a pair be in one pack?
    needs_reference = False

    def loss(self, model: Transformer, batch: PackedBatch, totals: Totals) -> PackLoss:
        weights = batch.token_weights
        head = partial(weighted_logp_sum, targets=batch.targets, token_weights=weights)
        return model(batch, head)


@dataclass(frozen=True)
class PairwiseObjective:
    """loss = sum over pairs of pair_loss(...) (P,), divided by the step's number of pairs."""

    pair_loss: Callable[..., Tensor]  # called with the PAIR_ARGUMENTS in `arguments`
    arguments: Sequence[str]
    keep_pairs = True

    @property
    def needs_reference(self) -> bool:
        return any(name.startswith("ref_") for name in self.arguments)

    def token_weights(self, signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        """Zeros (S,): pack() needs weights, but these are known only after the forward pass."""
        return torch.zeros(signs.shape, dtype=torch.float64)

    def loss(self, model: Transformer, batch: PackedBatch, totals: Totals) -> PackLoss:
        head = partial(token_logps_and_entropies, targets=batch.targets)
        token_logps, entropies = model(batch, head)  # (R,)
        if batch.row_ids:
            values = pair_arguments(token_logps, batch)
            per_pair = self.pair_loss(**{name: values[name] for name in self.arguments})  # (P,)
            if per_pair.shape != (len(batch.row_ids) // 2,):
                raise UserError(f"{self.pair_loss}: must return one loss per pair, (P,)")
            loss = per_pair.sum() / totals.num_rows
        else:  # an empty pack: its backward takes part in the exchange between ranks all the same
            loss = token_logps.sum()
        return PackLoss(loss, token_logps.detach(), entropies)


Objective = LinearObjective | PairwiseObjective


def pair_arguments(token_logps: Tensor, batch: PackedBatch) -> dict[str, Tensor | Sequence[Tensor]]:
    """PAIR_ARGUMENTS of a pack whose sequences are chosen, rejected, chosen, ...; the reference's
    only if the pack has them. token_logps (R,)."""
    traces = token_logps.split(batch.response_lengths)  # 2P of (|y|,)
    sums = torch.stack([trace.sum() for trace in traces])  # (2P,)
    means = torch.stack([trace.mean() for trace in traces])
    values = [("", "logps", traces), ("", "sum", sums), ("", "mean", means)]  # prefix, name, value
    if batch.reference is not None:
        ref_sums, ref_means = batch.reference.to(sums.dtype)  # (2P,) each
        values += [("ref_", "sum", ref_sums), ("ref_", "mean", ref_means)]
    chosen = {f"{prefix}chosen_{name}": value[0::2] for prefix, name, value in values}
    rejected = {f"{prefix}rejected_{name}": value[1::2] for prefix, name, value in values}
    return chosen | rejected


# ---------------------------------------------------------------- from a loss to an objective


def sft() -> Objective:
    """Stage 1, Eq. 1: every supervised token of the step has the weight slope / num_tokens."""
    [slope] = constant_slopes(partial(losses.sft_loss, num_tokens=1), ["logp_sum"], "sft")
    return LinearObjective(
        lambda signs, lengths, totals: slope / torch.full_like(lengths, totals.num_tokens).double()
    )


def make_objective(name: str, **parameters: float) -> Objective:
    """The objective NAME of OBJECTIVES. parameters: those that `loss_parameters` lists. Raises
    UserError for one of LINEAR whose loss is not linear in M_w and M_l."""
    loss = partial(loss_function(name), **parameters)
    arguments = [a for a in inspect.signature(loss).parameters if a in PAIR_ARGUMENTS]
    if name not in LINEAR:
        return PairwiseObjective(loss, arguments)
    means = ["chosen_mean", "rejected_mean"]
    if set(arguments) != set(means):
        raise UserError(f"{name}: a linear loss takes {means}, not {arguments}")
    slopes = torch.tensor(constant_slopes(loss, means, name), dtype=torch.float64)

    def token_weights(signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return slopes[(signs < 0).long()] / (totals.num_rows * lengths)

    return LinearObjective(token_weights)


def constant_slopes(loss: Callable[..., Tensor], arguments: list[str], name: str) -> list[float]:
    """The derivatives of a linear loss by its arguments, taken by autograd in float64. Raises
    UserError unless the loss equals slopes * point at 64 random points. A constant term is refused
    too: it would be missing from the logged loss."""
    random = torch.Generator().manual_seed(0)
    exponents = torch.rand(64, len(arguments), dtype=torch.float64, generator=random)
    points = (-1e-3 * 3e4**exponents).requires_grad_()  # exponent 0: -0.001, exponent 1: -30
    values = [torch.as_tensor(loss(**dict(zip(arguments, point)))) for point in points]
    values = torch.stack(values).double()  # (64,)
    # A loss that depends on none of its arguments has no graph; 0 * points gives it one.
    slopes = torch.autograd.grad((values + 0 * points.sum()).sum(), points)[0]  # (64, arguments)
    if not torch.allclose(values, points @ slopes[0], rtol=1e-12, atol=1e-12):
        raise UserError(
            f"{name}: is declared linear (LINEAR in redi/objectives.py), but {name}_loss is not "
            f"{slopes[0].tolist()} * {arguments} everywhere"
        )
    return slopes[0].tolist()


def loss_function(name: str) -> Callable[..., Tensor]:
    """NAME_loss of losses.py or related_losses.py."""
    return getattr(losses, f"{name}_loss", None) or getattr(related_losses, f"{name}_loss")


def loss_parameters(name: str) -> list[str]:
    """The parameters of an objective, as alpha of redi: arguments that no pair supplies."""
    arguments = inspect.signature(loss_function(name)).parameters
    return [argument for argument in arguments if argument not in PAIR_ARGUMENTS]
