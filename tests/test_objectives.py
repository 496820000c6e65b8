"""From a loss function to what trains: token weights, references, flags and whole runs.

The equation is in one place: token weights are not written down but derived from the loss, so
a changed loss changes training. test_invariance.py compares whole models with the formulas.
"""

import inspect
import math
from functools import wraps

import pytest
import torch
from small_run import HERE, loaded, redi_config, run, steps, weights
from small_step import PARAMETERS, objective_of

from redi import losses, objectives, programs, recipe, related_losses
from redi.batches import TrainData
from redi.config import UserError
from redi.objectives import (
    LINEAR,
    OBJECTIVES,
    Totals,
    loss_parameters,
    make_objective,
    sft,
)
from redi.runlog import read_metrics

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


NOT_LINEAR = {  # of M_w, M_l and alpha
    "square": lambda w, r, alpha: (w - alpha * r) ** 2,
    "product": lambda w, r, alpha: -w + alpha * w * r,
    "constant": lambda w, r, alpha: -w + alpha * r + 5.0,
    "hinge": lambda w, r, alpha: torch.relu(20.0 - w + alpha * r),
    "bend where log-probs are": lambda w, r, alpha: -w + alpha * r.clamp(max=-1.0),
}


@pytest.mark.parametrize("shape", NOT_LINEAR)
def test_a_loss_declared_linear_that_is_not_stops_the_run_by_name(shape, here, monkeypatch):
    def redi_loss(chosen_mean, rejected_mean, alpha):
        return NOT_LINEAR[shape](chosen_mean, rejected_mean, alpha)

    monkeypatch.setattr(losses, "redi_loss", redi_loss)
    with pytest.raises(UserError, match=r"^redi: is declared linear .* redi_loss is not "):
        run(redi_config())
    assert not (here / "run").exists()


def test_losses_that_cannot_be_trained_as_declared_are_refused_by_name(here, monkeypatch):
    monkeypatch.setattr(losses, "redi_loss", lambda chosen_sum, rejected_sum, alpha: -chosen_sum)
    with pytest.raises(UserError, match=r"^redi: a linear loss takes .*, not .*'chosen_sum'"):
        make_objective("redi", alpha=0.8)
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "LINEAR", (*LINEAR, "simpo"))
        with pytest.raises(UserError, match=r"^simpo: is declared linear"):
            objective_of("simpo")
    monkeypatch.setattr(losses, "simpo_loss", lambda chosen_mean, beta, gamma: -chosen_mean.mean())
    with pytest.raises(UserError, match="must return one loss per pair"):
        run(redi_config(objective="simpo", beta=2.0, gamma=1.0))


def test_a_linear_loss_gets_its_means_by_name(monkeypatch):
    monkeypatch.setattr(losses, "redi_loss", lambda rejected_mean, chosen_mean, alpha: (
        -chosen_mean + alpha * rejected_mean))  # fmt: skip
    signs, lengths = torch.tensor([1, -1]), torch.tensor([4, 2])
    weights = make_objective("redi", alpha=0.8).token_weights(signs, lengths, Totals(1, 6))
    assert weights.tolist() == [-0.25, 0.4]


# ---------------------------------------------------------------- token weights, worked by hand


ALPHAS = [("redi", {"alpha": alpha}, alpha) for alpha in (0.0, 0.2, 0.5, 0.8, 1.0)]


@pytest.mark.parametrize(
    ("name", "parameters", "alpha"), [*ALPHAS, ("symmetric", {}, 1.0), ("positives", {}, 0.0)]
)
def test_weights_are_exactly_minus_1_and_alpha_over_pairs_and_length(name, parameters, alpha):
    signs, lengths = torch.tensor([1, -1] * 50), torch.arange(1, 101)
    whole_step = Totals(num_rows=700, num_tokens=12_345)  # more than the sequences of this pack
    weights = make_objective(name, **parameters).token_weights(signs, lengths, whole_step)
    for weight, sign, length in zip(weights.tolist(), signs.tolist(), lengths.tolist()):
        assert weight == (-1.0 if sign > 0 else alpha) / (700 * length)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 1_000_003])
def test_sft_weights_are_exactly_minus_1_over_the_steps_tokens(num_tokens):
    signs, lengths = torch.ones(5, dtype=torch.int64), torch.arange(1, 6)
    weights = sft().token_weights(signs, lengths, Totals(5, num_tokens))
    assert weights.tolist() == [-1 / num_tokens] * 5


@pytest.mark.parametrize("name", ["sft", *OBJECTIVES])
def test_token_weights_are_double_and_empty_for_no_sequences(name):
    none = torch.zeros(0, dtype=torch.int64)
    weights = objective_of(name).token_weights(none, none, Totals(5, 5))
    assert weights.dtype == torch.float64
    assert weights.shape == (0,)


# ---------------------------------------------------------------- what argument names say


def test_every_loss_of_pairs_is_an_objective_and_some_need_a_reference():
    defined = {
        name.removesuffix("_loss")
        for module in (losses, related_losses)
        for name, value in vars(module).items()
        if name.endswith("_loss") and inspect.isfunction(value)
    }
    assert set(OBJECTIVES) == defined - {"sft"}
    assert [name for name in OBJECTIVES if not objective_of(name).keep_pairs] == list(LINEAR)
    some = ("redi", "symmetric", "dpo", "simpo", "positives", "topr", "dft")
    assert [name for name in some if objective_of(name).needs_reference] == ["dpo", "topr"]
    assert not sft().needs_reference


def test_a_new_argument_of_a_loss_is_a_reference_or_a_flag_at_once(monkeypatch):
    def dft_loss(chosen_logps, ref_chosen_sum, gamma):
        return ref_chosen_sum * gamma

    monkeypatch.setattr(related_losses, "dft_loss", dft_loss)
    assert loss_parameters("dft") == ["gamma"]
    assert make_objective("dft", gamma=0.5).needs_reference
    with pytest.raises(UserError, match="--gamma is missing: dft needs it"):
        redi_config(objective="dft")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_without_its_own_parameters_is_refused_and_so_is_anothers(name):
    takes = loss_parameters(name)
    for missing in () if name == "redi" else takes:  # redi's alpha has a default
        given = {key: 0.5 for key in takes if key != missing}
        with pytest.raises(UserError, match=f"--{missing} is missing: {name} needs it"):
            redi_config(objective=name, **given)
    for foreign in {"alpha", "beta", "gamma"} - set(takes):
        with pytest.raises(UserError, match=f"--{foreign}: expected none with {name}; got 0.5"):
            redi_config(objective=name, **dict.fromkeys(takes, 0.5), **{foreign: 0.5})


def test_a_source_is_quoted_where_it_settled_on_a_value():
    with pytest.raises(UserError, match=r"needs it \(its own paper's is 5\)$"):
        redi_config(objective="dpo_norm")
    with pytest.raises(UserError, match=r"ipo needs it$"):
        redi_config(objective="ipo")
    for name, values in recipe.SOURCES.items():
        assert set(values) == set(loss_parameters(name))


def test_alpha_is_a_share_in_redi_and_a_weight_elsewhere():
    assert redi_config(objective="dpop", beta=0.3, alpha=50.0).alpha == 50.0
    with pytest.raises(UserError, match=r"--alpha: expected within \[0, 1\]; got 1.5"):
        redi_config(objective="redi_weighted", alpha=1.5, gamma=1.0)
    with pytest.raises(UserError, match="--alpha: expected at least 0; got -1"):
        redi_config(objective="orpo", alpha=-1.0)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_by_its_flags(name, here, monkeypatch, capsys):
    settings = {
        "model": "student", "data": "pairs.jsonl", "out": "run", "lr": 1e-3, "rows-per-step": 5,
        "max-prompt": 100, "max-response": 100, "max-length": 200, "pack-tokens": 150,
        "objective": name, **PARAMETERS[name],
    }  # fmt: skip
    flags = [f"--{flag}={value}" for flag, value in settings.items()]
    monkeypatch.setattr("sys.argv", ["train_redi.py", *flags])
    programs.train_redi()
    *found, last = read_metrics(here / "run")
    assert last["kind"] == "finished"
    assert [record["kind"] for record in found] == ["train", "train"]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in found)
    before = weights("student")
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights("run").items())


# This student's log-probs are below -1 / 0.3 nats per token, where a gamma of 0.3 pulls rejected
# traces up.
WIDENS = {
    name: PARAMETERS[name]
    for name in ("dpo_norm", "irpo", "dpop", "ipo", "apo_zero", "orpo", "npo", "topr")
}
WIDENS["redi_weighted"] = {"alpha": 0.8, "gamma": 0.05}


@pytest.mark.parametrize("name", WIDENS)
def test_what_learns_from_both_traces_widens_the_margin(name, here):
    config = redi_config(objective=name, rows_per_step=10, epochs=8, **WIDENS[name])
    records = steps(run(config))
    assert records[-1]["margin"] > records[0]["margin"] + 0.05


def test_the_gradient_of_simpo_turns_to_that_of_symmetric_as_beta_falls(here):
    """Appendix B, on the toy's rows and student, whose weights are doubled so that pairs differ."""
    model, data = loaded(redi_config())
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)

    def gradient(objective) -> torch.Tensor:
        whole = TrainData(data.dataset, objective, HERE, pack_tokens=10_000)
        step = whole.all_rows()
        totals = whole.totals(step)
        model.zero_grad()
        for batch in whole.batches(step, totals):
            whole.loss(model, batch, totals).loss.backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])

    symmetric = gradient(make_objective("symmetric"))
    cosines = [
        torch.cosine_similarity(
            gradient(make_objective("simpo", beta=beta, gamma=1.0)), symmetric, dim=0
        ).item()
        for beta in (2.0, 1.0, 1e-1, 1e-2, 1e-3)
    ]
    assert cosines[0] < 0.99  # the paper's beta is another direction
    assert cosines == sorted(cosines)
    assert cosines[-1] >= 0.999
    # The angle falls in proportion to beta: 1 - cosine a hundredfold for a tenth.
    assert (1 - cosines[3]) / (1 - cosines[2]) == pytest.approx(0.01, rel=0.3)
