"""From a loss function to what trains: token weights, references and flags follow from it.

    python -m pytest tests/test_objectives.py

The equation is in one place: token weights are not written down but derived from the loss, so
a changed loss changes training. test_invariance.py compares whole models with the formulas.
"""

import inspect
from functools import wraps

import pytest
import torch
from small_run import redi_config, run, steps
from small_step import PARAMETERS

from redi import losses, objectives, recipe, related_losses
from redi.config import UserError
from redi.objectives import (
    LINEAR,
    OBJECTIVES,
    PAIR_ARGUMENTS,
    Totals,
    loss_function,
    loss_parameters,
    make_objective,
    sft,
)


def objective_named(name: str) -> objectives.Objective:
    return make_objective(name, **PARAMETERS[name])


# ---------------------------------------------------------------- a changed loss changes training


@pytest.mark.parametrize("name", ["redi", "symmetric", "positives"])
def test_tripling_redi_loss_triples_the_first_loss_and_gradient_of_a_run(name, here, monkeypatch):
    before, *_ = steps(run(redi_config(objective=name, out="before")))
    redi_loss = losses.redi_loss

    @wraps(redi_loss)  # its arguments' names say what it needs
    def tripled(*arguments, **parameters):
        return 3 * redi_loss(*arguments, **parameters)

    monkeypatch.setattr(losses, "redi_loss", tripled)
    after, *_ = steps(run(redi_config(objective=name, out="after")))
    # In float32. The log-probs of symmetric's two traces nearly cancel: hence an absolute bound.
    assert after["loss"] == pytest.approx(3 * before["loss"], rel=1e-6, abs=1e-5)
    assert after["grad_norm"] == pytest.approx(3 * before["grad_norm"], rel=1e-5)
    assert abs(before["loss"]) > 1e-3
    assert after["chosen_logp"] == before["chosen_logp"]


def test_doubling_sft_loss_doubles_the_weight_of_every_token(monkeypatch):
    monkeypatch.setattr(losses, "sft_loss", lambda logp_sum, num_tokens: -2 * logp_sum / num_tokens)
    weights = sft().token_weights(torch.tensor([1]), torch.tensor([4]), Totals(8, 64))
    assert weights.tolist() == [-2 / 64]


def squared_margin(chosen_mean, rejected_mean, alpha):
    return (chosen_mean - alpha * rejected_mean) ** 2


def product(chosen_mean, rejected_mean, alpha):
    return -chosen_mean + alpha * chosen_mean * rejected_mean


def with_a_constant(chosen_mean, rejected_mean, alpha):
    return -chosen_mean + alpha * rejected_mean + 5.0


def hinge(chosen_mean, rejected_mean, alpha):
    return torch.relu(20.0 - chosen_mean + alpha * rejected_mean)


def bent_where_log_probs_are(chosen_mean, rejected_mean, alpha):
    return -chosen_mean + alpha * rejected_mean.clamp(max=-1.0)


@pytest.mark.parametrize(
    "loss", [squared_margin, product, with_a_constant, hinge, bent_where_log_probs_are]
)
def test_a_loss_declared_linear_that_is_not_stops_the_run_by_name(loss, here, monkeypatch):
    monkeypatch.setattr(losses, "redi_loss", loss)
    with pytest.raises(UserError, match=r"^redi: is declared linear .* redi_loss is not "):
        run(redi_config())
    assert not (here / "run").exists()


def test_a_pairwise_loss_that_averages_over_the_pack_is_refused(here, monkeypatch):
    monkeypatch.setattr(losses, "simpo_loss", lambda chosen_mean, beta, gamma: -chosen_mean.mean())
    with pytest.raises(UserError, match="must return one loss per pair"):
        run(redi_config(objective="simpo", beta=2.0, gamma=1.0))


def test_a_linear_loss_gets_its_means_by_name(monkeypatch):
    signs, lengths = torch.tensor([1, -1]), torch.tensor([4, 2])
    monkeypatch.setattr(losses, "redi_loss", lambda rejected_mean, chosen_mean, alpha: (
        -chosen_mean + alpha * rejected_mean))  # fmt: skip
    weights = make_objective("redi", alpha=0.8).token_weights(signs, lengths, Totals(1, 6))
    assert weights.tolist() == [-0.25, 0.4]


def test_a_linear_loss_of_sums_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(losses, "redi_loss", lambda chosen_sum, rejected_sum, alpha: -chosen_sum)
    with pytest.raises(UserError, match=r"^redi: a linear loss takes .*, not .*'chosen_sum'"):
        make_objective("redi", alpha=0.8)


def test_simpo_declared_linear_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(objectives, "LINEAR", (*LINEAR, "simpo"))
    with pytest.raises(UserError, match=r"^simpo: is declared linear"):
        objective_named("simpo")


# ---------------------------------------------------------------- token weights, worked by hand


def test_weights_are_those_of_the_whole_step_not_of_the_sequences_at_hand():
    # Traces of 4 and of 5 tokens in a step of 8 pairs: -1 / (8 * 4) chosen, .8 / (8 * 5) rejected.
    signs, lengths, totals = torch.tensor([1, -1]), torch.tensor([4, 5]), Totals(8, 64)
    weights = make_objective("redi", alpha=0.8).token_weights(signs, lengths, totals)
    assert weights.tolist() == [-1 / 32, 0.8 / 40]
    # A trace of 4 tokens in a step of 64 supervised tokens: -1 / 64, whatever its length.
    assert sft().token_weights(signs[:1], lengths[:1], totals).tolist() == [-1 / 64]


@pytest.mark.parametrize(
    ("name", "on_chosen", "on_rejected"), [("symmetric", -1 / 6, 1 / 4), ("positives", -1 / 6, 0.0)]
)
def test_weights_of_a_step_of_two_pairs(name, on_chosen, on_rejected):
    # |y_w| 3 and |y_l| 2: -1 / (2 * 3) and slope / (2 * 2), slope 1 for symmetric, 0 for positives.
    signs, lengths = torch.tensor([1, -1]), torch.tensor([3, 2])
    weights = make_objective(name).token_weights(signs, lengths, Totals(2, 11))
    assert weights.tolist() == [on_chosen, on_rejected]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_redi_weights_are_exactly_minus_1_and_alpha_over_pairs_and_length(alpha):
    signs, lengths = torch.tensor([1, -1] * 50), torch.arange(1, 101)
    weights = make_objective("redi", alpha=alpha).token_weights(signs, lengths, Totals(7, 5050))
    for weight, sign, length in zip(weights.tolist(), signs.tolist(), lengths.tolist()):
        assert weight == (-1.0 if sign > 0 else alpha) / (7 * length)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 1_000_003])
def test_sft_weights_are_exactly_minus_1_over_the_steps_tokens(num_tokens):
    signs = lengths = torch.ones(5, dtype=torch.int64)
    weights = sft().token_weights(signs, lengths, Totals(5, num_tokens))
    assert weights.tolist() == [-1 / num_tokens] * 5


@pytest.mark.parametrize("name", ["sft", *OBJECTIVES])
def test_token_weights_are_double_and_empty_for_no_sequences(name):
    objective = sft() if name == "sft" else objective_named(name)
    none = torch.zeros(0, dtype=torch.int64)
    weights = objective.token_weights(none, none, Totals(5, 5))
    assert weights.dtype == torch.float64
    assert weights.shape == (0,)


# ---------------------------------------------------------------- losses = token weights


def ragged_pairs(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Seven pairs of log-probs, each with its own lengths from 1 to 9."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (7, 2), generator=generator).tolist()
    draw = [[-torch.rand(n, generator=generator).double() * 5 for n in both] for both in lengths]
    return [w.requires_grad_() for w, _ in draw], [r.requires_grad_() for _, r in draw]


def means(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.mean() for part in parts])


def assert_weighted_sum_is(loss: torch.Tensor, objective, signs: list[int], parts) -> None:
    """sum_t weight_t logp_t has the value and the gradients of `loss`."""
    lengths = torch.tensor([len(part) for part in parts])
    weights = objective.token_weights(torch.tensor(signs), lengths, Totals(7, int(lengths.sum())))
    weighted = sum(weight * part.sum() for weight, part in zip(weights, parts))
    torch.testing.assert_close(weighted, loss, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(loss, parts, allow_unused=True, materialize_grads=True)
    for a, b in zip(torch.autograd.grad(weighted, parts), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_redi_as_token_weights_is_redi(alpha):
    chosen, rejected = ragged_pairs()
    loss = losses.redi_loss(means(chosen), means(rejected), alpha).mean()
    objective = make_objective("redi", alpha=alpha)
    assert_weighted_sum_is(loss, objective, [1] * 7 + [-1] * 7, [*chosen, *rejected])


@pytest.mark.parametrize("name", ["symmetric", "positives"])
def test_symmetric_and_positives_as_token_weights_are_their_losses(name):
    chosen, rejected = ragged_pairs(1)
    loss = loss_function(name)(means(chosen), means(rejected)).mean()
    objective = make_objective(name)
    assert_weighted_sum_is(loss, objective, [1] * 7 + [-1] * 7, [*chosen, *rejected])


def test_sft_as_token_weights_is_sft():
    traces, _ = ragged_pairs(2)
    loss = losses.sft_loss(torch.cat(traces).sum(), sum(map(len, traces)))
    assert_weighted_sum_is(loss, sft(), [1] * 7, traces)


# ---------------------------------------------------------------- what argument names say


def test_every_objective_is_a_loss_and_every_loss_of_pairs_an_objective():
    defined = {
        name.removesuffix("_loss")
        for module in (losses, related_losses)
        for name, value in vars(module).items()
        if name.endswith("_loss") and inspect.isfunction(value)
    }
    assert set(OBJECTIVES) == defined - {"sft"}
    assert set(LINEAR) <= set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_flags_of_an_objective_are_the_other_arguments_of_its_loss(name):
    arguments = list(inspect.signature(loss_function(name)).parameters)
    assert loss_parameters(name) == [a for a in arguments if a not in PAIR_ARGUMENTS]
    assert set(loss_parameters(name)) == set(PARAMETERS[name]) <= set(recipe.PARAMETERS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_reference_is_needed_by_those_whose_loss_has_a_ref_argument(name):
    arguments = inspect.signature(loss_function(name)).parameters
    expected = any(argument.startswith("ref_") for argument in arguments)
    assert objective_named(name).needs_reference == expected
    assert objective_named(name).keep_pairs == (name not in LINEAR)


def test_of_the_papers_objectives_dpo_alone_needs_a_reference():
    names = ("redi", "symmetric", "dpo", "simpo")
    assert [name for name in names if objective_named(name).needs_reference] == ["dpo"]
    assert not sft().needs_reference


def test_a_new_argument_of_a_loss_is_a_reference_or_a_flag_at_once(monkeypatch):
    def dft_loss(chosen_logps, ref_chosen_sum, gamma):
        return ref_chosen_sum * gamma

    monkeypatch.setattr(related_losses, "dft_loss", dft_loss)
    assert loss_parameters("dft") == ["gamma"]
    assert make_objective("dft", gamma=0.5).needs_reference
    with pytest.raises(UserError, match="--gamma is missing: dft needs it"):
        redi_config(objective="dft")
