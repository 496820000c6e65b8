"""From a loss function to what trains: token weights, references, flags and whole runs.

The equation is in one place: token weights are not written down but derived from the loss, so
a changed loss changes training. test_invariance.py compares whole models with the formulas.
"""

import inspect
import math
import re
from dataclasses import replace
from functools import partial, wraps

import pytest
import torch
from processes import main_in_this_process
from small_run import OF_REDI, flags, redi_config, refusal, run, sft_config, steps, weights
from small_step import PARAMETERS, backward, data_of, objective_of, tiny

from redi import losses, programs, recipe, related_losses
from redi.objectives import LINEAR, OBJECTIVES, Totals, loss_parameters, make_objective, sft
from redi.runlog import read_metrics

# ---------------------------------------------------------------- a changed loss changes training


@pytest.mark.parametrize("name", ["sft", "redi", "symmetric", "positives"])
def test_tripling_a_loss_function_triples_the_first_loss_and_gradient_of_a_run(
    name, here, monkeypatch
):
    make = sft_config if name == "sft" else partial(redi_config, objective=name)
    before, *_ = steps(run(make(out="before")))
    function = "sft_loss" if name == "sft" else "redi_loss"
    loss = getattr(losses, function)
    tripled = wraps(loss)(lambda *given, **named: 3 * loss(*given, **named))
    monkeypatch.setattr(losses, function, tripled)
    after, *_ = steps(run(make(out="after")))
    # In float32. The log-probs of symmetric's two traces nearly cancel: hence an absolute bound.
    assert after["loss"] == pytest.approx(3 * before["loss"], rel=1e-6, abs=1e-5)
    assert after["grad_norm"] == pytest.approx(3 * before["grad_norm"], rel=1e-5)
    assert abs(before["loss"]) > 1e-3
    assert after["chosen_logp"] == before["chosen_logp"]


NOT_LINEAR = r"^redi: is declared linear .* redi_loss is not "
UNTRAINABLE = [  # a loss, and why it is refused
    (lambda chosen_mean, rejected_mean, alpha: (chosen_mean - rejected_mean) ** 2, NOT_LINEAR),
    (lambda chosen_mean, rejected_mean, alpha: -chosen_mean * rejected_mean, NOT_LINEAR),
    (lambda chosen_mean, rejected_mean, alpha: -chosen_mean + rejected_mean + 5.0, NOT_LINEAR),
    (lambda chosen_mean, rejected_mean, alpha: torch.relu(20.0 - chosen_mean), NOT_LINEAR),
    # It bends where log-probs are.
    (lambda chosen_mean, rejected_mean, alpha: rejected_mean.clamp(max=-1.0), NOT_LINEAR),
    (
        lambda chosen_logps, rejected_sum, alpha: -rejected_sum,
        r"^redi: a linear loss takes .*, not .*'chosen_logps'",
    ),
    (lambda chosen_mean, beta, gamma: -chosen_mean.mean(), "must return one loss per pair"),
    (lambda logps, signs, beta, gamma: logps[0].sum(), "must return one loss per trace"),
    (
        lambda chosen_mean, signs, beta, gamma: -chosen_mean,
        r"simpo: a loss of single traces takes logps and signs, not \['chosen_mean', 'signs'\]",
    ),
]


@pytest.mark.parametrize(("loss", "why"), UNTRAINABLE)
def test_a_loss_that_cannot_be_trained_as_declared_stops_the_run_by_name(
    loss, why, here, monkeypatch
):
    monkeypatch.setattr(losses, "redi_loss", loss)
    monkeypatch.setattr(losses, "simpo_loss", loss)
    simpo = {"objective": "simpo", "beta": 2.0, "gamma": 1.0}
    is_simpo = "gamma" in inspect.signature(loss).parameters
    assert re.search(why, refusal(run, redi_config(**simpo if is_simpo else {})))


# ---------------------------------------------------------------- token weights, worked by hand


ALPHAS = [("redi", {"alpha": alpha}, alpha) for alpha in (0.0, 0.2, 0.5, 0.8, 1.0)]


@pytest.mark.parametrize(
    ("name", "parameters", "alpha"), [*ALPHAS, ("symmetric", {}, 1.0), ("positives", {}, 0.0)]
)
def test_weights_are_exactly_minus_1_and_alpha_over_pairs_and_length(name, parameters, alpha):
    signs, lengths = torch.tensor([1, -1] * 50), torch.arange(1, 101)
    whole_step = Totals(num_pairs=700, num_tokens=12_345)  # more than the sequences of this pack
    weights = make_objective(name, **parameters).sequence_weights(signs, lengths, whole_step)
    for weight, sign, length in zip(weights.tolist(), signs.tolist(), lengths.tolist()):
        assert weight == (-1.0 if sign > 0 else alpha) / (700 * length)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 1_000_003])
def test_sft_weights_are_exactly_minus_1_over_the_steps_tokens(num_tokens):
    signs, lengths = torch.ones(5, dtype=torch.int64), torch.arange(1, 6)
    weights = sft().sequence_weights(signs, lengths, Totals(5, num_tokens))
    assert weights.tolist() == [-1 / num_tokens] * 5


# ---------------------------------------------------------------- what argument names say


def test_every_loss_of_pairs_is_an_objective_and_some_need_a_reference():
    defined = {
        name.removesuffix("_loss")
        for module in (losses, related_losses)
        for name, value in vars(module).items()
        if name.endswith("_loss") and inspect.isfunction(value)
    }
    assert set(OBJECTIVES) == defined - {"sft"}
    split = [name for name in OBJECTIVES if not objective_of(name).keep_pairs]
    assert split == [*LINEAR, "uft"]
    some = ("redi", "symmetric", "dpo", "simpo", "positives", "topr", "dft")
    assert [name for name in some if objective_of(name).needs_reference] == ["dpo", "topr"]
    assert not sft().needs_reference


def test_a_new_argument_of_a_loss_is_a_reference_or_a_flag_at_once(monkeypatch):
    monkeypatch.setattr(
        related_losses, "dft_loss", lambda chosen_logps, ref_chosen_sum, gamma: ref_chosen_sum
    )
    assert loss_parameters("dft") == ["gamma"]
    assert make_objective("dft", gamma=0.5).needs_reference
    assert refusal(redi_config, objective="dft") == "--gamma is missing: dft needs it"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_without_its_own_parameters_is_refused_and_so_is_anothers(name):
    takes = loss_parameters(name)
    for missing in () if name == "redi" else takes:  # redi's alpha has a default
        given = {key: 0.5 for key in takes if key != missing}
        message = refusal(redi_config, objective=name, **given)
        assert message.startswith(f"--{missing} is missing: {name} needs it")
    for foreign in set(recipe.PARAMETERS) - set(takes):
        given = {**dict.fromkeys(takes, 0.5), foreign: 0.5}
        message = refusal(redi_config, objective=name, **given)
        assert message == f"--{foreign}: expected none with {name}; got 0.5"
    assert set(recipe.PUBLISHED.get(name, takes)) == set(takes)


REFUSED_SETTINGS = [
    ({"objective": "dpo_norm"}, "--beta is missing: dpo_norm needs it (published: 5)"),
    # A share in two losses, a weight in the others.
    (
        {"objective": "redi_weighted", "alpha": 1.5, "gamma": 1.0},
        "--alpha: expected within [0, 1]; got 1.5",
    ),
    ({"objective": "uft", "alpha": 1.5}, "--alpha: expected within [0, 1]; got 1.5"),
    ({"objective": "asymre", "baseline": 1.0}, "--baseline: expected below 1; got 1.0"),
    ({"objective": "orpo", "alpha": -1.0}, "--alpha: expected at least 0; got -1.0"),
    ({"rows_per_step": 0}, "--rows-per-step: expected at least 1; got 0"),
    ({"pack_tokens": 0}, "--pack-tokens: expected at least 1; got 0"),
    ({"collapse_steps": 0}, "--collapse-steps: expected at least 1; got 0"),
    ({"collapse_threshold": 0.0}, "--collapse-threshold: expected above 0; got 0.0"),
    ({"out": "student"}, "--out: expected another folder than --model; got student"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SETTINGS)
def test_a_setting_out_of_range_or_missing_is_refused_by_name(settings, message):
    assert refusal(redi_config, **settings) == message
    assert redi_config(objective="dpop", beta=0.3, alpha=50.0).alpha == 50.0
    assert redi_config(objective="redi", alpha=1.5).alpha == 1.5  # for rows of which few are wrong


# ---------------------------------------------------------------- whole runs


# Two do not learn from rejected traces, and uft hardly does from tokens that are unlikely already.
WIDENS = set(OBJECTIVES) - {"positives", "dft", "uft"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_by_its_flags_and_some_widen_the_margin(name, here):
    settings = {**OF_REDI, "rows_per_step": 5, "pack_tokens": 150, "objective": name}
    settings |= PARAMETERS[name]
    if name in WIDENS:
        settings |= {"rows_per_step": 10, "epochs": 8}
    if name == "redi_weighted":
        # This student's log-probs are below -1 / 0.3 nats per token, where a gamma of 0.3 pulls
        # rejected traces up.
        settings["gamma"] = 0.05
    assert main_in_this_process(programs.train_redi, *flags(settings)) == 0
    *found, last = read_metrics(here / "run")
    assert last["kind"] == "finished"
    assert [record["kind"] for record in found] == ["train"] * (8 if name in WIDENS else 2)
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in found)
    before = weights("student")
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights("run").items())
    if name in WIDENS:
        assert found[-1]["margin"] > found[0]["margin"] + 0.1
        assert found[-1]["loss"] < found[0]["loss"]


def test_the_gradient_of_simpo_turns_to_that_of_symmetric_as_beta_falls():
    """Appendix B."""

    def gradient(name: str, **parameters: float) -> torch.Tensor:
        model = tiny(True, torch.float64)
        backward(model, replace(data_of("simpo"), objective=make_objective(name, **parameters)))
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    symmetric = gradient("symmetric")
    cosines = [
        torch.cosine_similarity(gradient("simpo", beta=beta, gamma=1.0), symmetric, dim=0).item()
        for beta in (2.0, 1.0, 1e-1, 1e-2, 1e-3)
    ]
    assert cosines[0] < 0.99  # the paper's beta is another direction
    assert cosines == sorted(cosines)
    assert cosines[-1] >= 0.999
    # The angle falls in proportion to beta: 1 - cosine a hundredfold for a tenth.
    assert (1 - cosines[3]) / (1 - cosines[2]) == pytest.approx(0.01, rel=0.3)
