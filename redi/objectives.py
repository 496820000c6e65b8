"""How a loss function trains a model: which log-prob kernel runs, and what is divided by what.

A loss is a pure function in losses.py or related_losses.py. Its argument names say what it needs of
the P pairs or the S traces of a pack (ARGUMENTS below); every other argument is a parameter and a
flag. So the objective NAME of `train_redi.py --objective NAME` is the function NAME_loss, looked up
when a run starts, and there are two ways to train with it:

    LinearObjective     the loss is linear in the log-probs. Its slopes are constants, so the weight
                        of every token is known before the forward pass, and one fused pass computes
                        loss and gradient. A pair's traces may be in different packs and ranks.
    NonlinearObjective  any differentiable function of the log-probs of a pair, whose traces are
                        then in one pack, or of a trace: two passes over the vocabulary.

A labeled row is half a pair. An objective that does not need both traces of a pair at once takes
labeled rows too: a step of N rows has N / 2 pairs, whatever the labels, so alpha means what it
means on pairs. A row's weight multiplies its loss and enters no count.

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

# What --objective accepts. The linear ones have only LINEAR_ARGUMENTS.
LINEAR = ("redi", "symmetric", "positives", "asymre", "w_reinforce")
OBJECTIVES = (
    *LINEAR, "dpo", "simpo", "dpo_norm", "irpo", "dpop", "ipo", "apo_zero", "orpo", "npo", "topr",
    "dft", "redi_weighted", "uft",
)  # fmt: skip

# What a loss can ask for by naming an argument so: means and sums of a trace's token log-probs
# (P,), the reference model's, and the log-probs token by token (P tensors of (|y|,)). Or, if it is
# a loss of single traces, the log-probs token by token (S tensors) and their signs, +1 and -1 (S).
LINEAR_ARGUMENTS = ("chosen_mean", "rejected_mean", "chosen_sum", "rejected_sum")
ARGUMENTS = (
    *LINEAR_ARGUMENTS, "ref_chosen_mean", "ref_rejected_mean", "ref_chosen_sum", "ref_rejected_sum",
    "chosen_logps", "rejected_logps", "logps", "signs",
)  # fmt: skip
STAGE_2 = ("pairs", "labeled rows")  # kinds of rows, as in data/formats.py


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step, over all packs and ranks: what losses are divided by."""

    num_pairs: float  # half the sequences
    num_tokens: int  # supervised


@dataclass(frozen=True)
class LinearObjective:
    """loss = sum_t w_t logp_t. sequence_weights(signs (S,), lengths (S,), totals) -> (S,): w of the
    tokens of each sequence, float64. signs: -1 rejected, +1 otherwise; lengths: |y|."""

    sequence_weights: Callable[[Tensor, Tensor, Totals], Tensor]
    takes: tuple[str, ...] = STAGE_2  # kinds of rows
    keep_pairs = False  # must both traces of a pair be in one pack?
    needs_reference = False

    def loss(self, model: Transformer, batch: PackedBatch) -> PackLoss:
        weights = batch.token_weights
        head = partial(weighted_logp_sum, targets=batch.targets, token_weights=weights)
        return model(batch, head)


@dataclass(frozen=True)
class NonlinearObjective:
    """loss = sum over pairs, or over traces, of function(...), divided by the step's pairs."""

    function: Callable[..., Tensor]  # called with the ARGUMENTS in `arguments`
    arguments: Sequence[str]
    keep_pairs: bool

    @property
    def takes(self) -> tuple[str, ...]:
        return ("pairs",) if self.keep_pairs else STAGE_2

    @property
    def needs_reference(self) -> bool:
        return any(name.startswith("ref_") for name in self.arguments)

    def sequence_weights(self, signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        """(S,) float64: 1 / N_pairs, by which the loss of a pair or a trace is multiplied."""
        return torch.full(signs.shape, 1 / totals.num_pairs, dtype=torch.float64)

    def loss(self, model: Transformer, batch: PackedBatch) -> PackLoss:
        head = partial(token_logps_and_entropies, targets=batch.targets)
        token_logps, entropies = model(batch, head)  # (R,)
        if batch.row_ids:
            values = loss_arguments(token_logps, batch)
            losses = self.function(**{name: values[name] for name in self.arguments})
            weights = batch.sequence_weights[:: 2 if self.keep_pairs else 1]  # (P,) or (S,)
            if losses.shape != weights.shape:
                each = "pair, (P,)" if self.keep_pairs else "trace, (S,)"
                raise UserError(f"{self.function}: must return one loss per {each}")
            loss = (losses * weights).sum()
        else:  # an empty pack: its backward takes part in the exchange between ranks all the same
            loss = token_logps.sum()
        return PackLoss(loss, token_logps.detach(), entropies)


Objective = LinearObjective | NonlinearObjective


def loss_arguments(token_logps: Tensor, batch: PackedBatch) -> dict[str, Tensor | Sequence]:
    """ARGUMENTS of a pack: those of pairs are right if its sequences are chosen, rejected, chosen,
    ...; the reference's are there only if the pack has them. token_logps (R,)."""
    traces = token_logps.split(batch.response_lengths)  # S of (|y|,)
    sums = torch.stack([trace.sum(dtype=torch.float64) for trace in traces])  # (S,)
    means = torch.stack([trace.mean(dtype=torch.float64) for trace in traces])
    values = [("", "logps", traces), ("", "sum", sums), ("", "mean", means)]  # prefix, name, value
    if batch.reference is not None:
        ref_sums, ref_means = batch.reference.to(sums.dtype)  # (S,) each
        values += [("ref_", "sum", ref_sums), ("ref_", "mean", ref_means)]
    chosen = {f"{prefix}chosen_{name}": value[0::2] for prefix, name, value in values}
    rejected = {f"{prefix}rejected_{name}": value[1::2] for prefix, name, value in values}
    return chosen | rejected | {"logps": traces, "signs": batch.signs}


# ---------------------------------------------------------------- from a loss to an objective


def sft() -> Objective:
    """Stage 1, Eq. 1: every supervised token of the step has the weight slope / num_tokens."""
    [slope] = constant_slopes(partial(losses.sft_loss, num_tokens=1), ["logp_sum"], "sft")
    return LinearObjective(
        lambda signs, lengths, totals: slope / torch.full_like(lengths, totals.num_tokens).double(),
        takes=("rows",),
    )


def make_objective(name: str, **parameters: float) -> Objective:
    """The objective NAME of OBJECTIVES. parameters: those that `loss_parameters` lists. Raises
    UserError for one of LINEAR whose loss is not linear in M and S of the two traces."""
    loss = partial(loss_function(name), **parameters)
    arguments = [a for a in inspect.signature(loss).parameters if a in ARGUMENTS]
    if "signs" in arguments and set(arguments) != {"logps", "signs"}:
        raise UserError(f"{name}: a loss of single traces takes logps and signs, not {arguments}")
    if name not in LINEAR:
        return NonlinearObjective(loss, arguments, keep_pairs="signs" not in arguments)
    if not set(arguments) <= set(LINEAR_ARGUMENTS):
        raise UserError(f"{name}: a linear loss takes {LINEAR_ARGUMENTS}, not {arguments}")
    slopes = dict(zip(arguments, constant_slopes(loss, arguments, name)))
    table = [slopes.get(argument, 0.0) for argument in LINEAR_ARGUMENTS]
    by_mean, by_sum = torch.tensor(table, dtype=torch.float64).reshape(2, 2)  # (chosen, rejected)

    def sequence_weights(signs: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        side = (signs < 0).long()
        return (by_mean[side] + by_sum[side] * lengths) / (totals.num_pairs * lengths)

    return LinearObjective(sequence_weights)


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
    """The parameters of an objective, as alpha of redi: arguments that no pack supplies."""
    arguments = inspect.signature(loss_function(name)).parameters
    return [argument for argument in arguments if argument not in ARGUMENTS]
