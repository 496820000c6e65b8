"""The objectives around the paper's: worked numbers, float64 autograd, TRL's code, whole runs.

    python -m pytest tests/test_related_losses.py

The pair of tests/test_losses.py again: log-probs [-.1, -.2, -.3] (chosen) and [-1, -3] (rejected),
S_w -0.6, M_w -0.2, S_l -4, M_l -2, with references S_w_ref -0.9, S_l_ref -3.5 (means -0.3, -1.75).
"""

import inspect
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import redi_config, run, steps, weights
from small_step import FORMULAS, PARAMETERS

from redi import objectives, programs, recipe, related_losses
from redi import run as run_module
from redi.batches import TrainData
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.distributed import World
from redi.objectives import OBJECTIVES, Totals, loss_parameters, make_objective
from redi.packing import TokenSequence, pack

PAPERS = ("redi", "symmetric", "dpo", "simpo")
RELATED = [name for name in OBJECTIVES if name not in PAPERS]


# ---------------------------------------------------------------- numbers a person can check

S_W, M_W, S_L, M_L = (torch.tensor([x], dtype=torch.float64) for x in (-0.6, -0.2, -4.0, -2.0))
S_W_REF, M_W_REF, S_L_REF, M_L_REF = (
    torch.tensor([x], dtype=torch.float64) for x in (-0.9, -0.3, -3.5, -1.75)
)
SUMS, MEANS = (S_W, S_L, S_W_REF, S_L_REF), (M_W, M_L, M_W_REF, M_L_REF)
LOGPS = [torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64)]

WORKED = {
    "positives": (lambda: related_losses.positives_loss(M_W, M_L), 0.2),
    # margin (-.2 + .3) - (-2 + 1.75) = .1 + .25 = .35; 5 * .35 = 1.75; log(1 + e^-1.75)
    # e^-1.75 = 0.173774; log 1.173774 = 0.160224
    "dpo_norm": (lambda: related_losses.dpo_norm_loss(*MEANS, 5.0), 0.160224),
    # DPO 0.653947 (tests/test_losses.py), + 1 * .2
    "irpo": (lambda: related_losses.irpo_loss(*SUMS, M_W, 0.1, 1.0), 0.853947),
    # S_w is above its reference: no penalty. .3 * .8 = .24, e^-.24 = 0.786628, log 1.786628
    "dpop": (lambda: related_losses.dpop_loss(*SUMS, 0.3, 50.0), 0.580330),
    # Reference -.5 instead: fallen by .1, 50 * .1 = 5; margin (-.6 + .5) - (-.5) = .4;
    # .3 * (.4 - 5) = -1.38; log(1 + e^1.38) = log 4.974902 = 1.604406
    "dpop, fallen": (
        lambda: related_losses.dpop_loss(S_W, S_L, S_W_REF + 0.4, S_L_REF, 0.3, 50.0), 1.604406,
    ),
    # 1 / (2 * .1) = 5; (.35 - 5)^2 = 4.65^2
    "ipo": (lambda: related_losses.ipo_loss(*MEANS, 0.1), 21.6225),
    # log-ratios .3 and -.5: 1 - sigmoid(.03) + sigmoid(-.05) = 1 - 0.507499 + 0.487503
    "apo_zero": (lambda: related_losses.apo_zero_loss(*SUMS, 0.1), 0.980003),
    # log odds_w = -.2 - log(1 - 0.818731) = -.2 + 1.707771 = 1.507771
    # log odds_l = -2 - log(1 - 0.135335) = -2 + 0.145413 = -1.854587
    # .2 + .1 * log(1 + e^-3.362359) = .2 + .1 * 0.034066
    "orpo": (lambda: related_losses.orpo_loss(M_W, M_L, 0.1), 0.203407),
    # 2 / .1 * log(1 + e^(.1 * -.5)) = 20 * log 1.9512294 = 20 * 0.66845965; + .2
    "npo": (lambda: related_losses.npo_loss(M_W, S_L, S_L_REF, 0.1, 1.0), 13.569193),
    # ratio e^-.5 = 0.606531; .6 - 4 * 0.606531
    "topr": (lambda: related_losses.topr_loss(S_W, S_L, S_L_REF), -1.826123),
    # More likely than its reference (-4.5): the ratio stays 1; .6 - 4
    "topr, risen": (lambda: related_losses.topr_loss(S_W, S_L, S_L_REF - 1.0), -3.4),
    # (.1 e^-.1 + .2 e^-.2 + .3 e^-.3) / 3 = (0.0904837 + 0.1637462 + 0.2222455) / 3
    "dft": (lambda: related_losses.dft_loss(LOGPS), 0.158825),
    # .2 + .8 * e^-2 * -2 = .2 - 1.6 * 0.135335
    "redi_weighted": (lambda: related_losses.redi_weighted_loss(M_W, M_L, 0.8, 1.0), -0.016536),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_the_worked_pair(name):
    loss, expected = WORKED[name]
    assert loss().item() == pytest.approx(expected, abs=6e-7)


def test_every_related_objective_is_worked_by_hand():
    assert set(RELATED) <= set(WORKED)


def test_the_table_in_the_module_docstring_has_these_numbers():
    at_line_ends = re.findall(r"(-?\d+\.\d+)$", related_losses.__doc__, re.MULTILINE)
    table = [float(number) for number in at_line_ends]
    for name in RELATED:
        assert any(number == pytest.approx(WORKED[name][1], abs=6e-7) for number in table), name


# ---------------------------------------------------------------- float64 autograd of the formula


def drawn(pairs: int = 6, seed: int = 0) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Log-probs (R,) of chosen, rejected, chosen, ..., their lengths, references (N, 2)."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (2 * pairs,), generator=draw).tolist()
    logps = -3 * torch.rand(sum(lengths), generator=draw, dtype=torch.float64) - 1e-3
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    # About as often above the trained model's as below: both branches of dpop and topr.
    reference = sums + torch.randn(2 * pairs, generator=draw, dtype=torch.float64)
    return logps.requires_grad_(), lengths, reference.reshape(-1, 2)


def loss_of(name: str, logps, lengths, reference, **parameters) -> torch.Tensor:
    """The objective's loss of one step, its model's log-probs given: the mean over pairs."""
    objective = make_objective(name, **(parameters or PARAMETERS[name]))
    signs = torch.tensor([1, -1] * (len(lengths) // 2))
    totals = Totals(len(lengths) // 2, sum(lengths))
    weights = objective.token_weights(signs, torch.tensor(lengths), totals)
    rows = [
        TokenSequence(np.zeros(n + 1, dtype=np.int64), 1, i // 2, int(sign))
        for i, (n, sign) in enumerate(zip(lengths, signs))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "token_logps_and_entropies", lambda *_: (logps, None))
        patch.setattr(
            objectives, "weighted_logp_sum", lambda *given: (logps.double() @ given[3], logps, None)
        )
        model = lambda batch, head: head(None, None)  # noqa: E731
        return objective.loss(model, pack(rows, weights, reference), totals).loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RELATED)
def test_value_and_gradient_equal_float64_autograd_of_the_formula(name, seed):
    logps, lengths, reference = drawn(seed=seed)
    ours = loss_of(name, logps, lengths, reference)
    parts = logps.split(lengths)
    losses = [
        FORMULAS[name](w, r, *refs) for w, r, refs in zip(parts[0::2], parts[1::2], reference)
    ]
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (ours, expected)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


# Per token: d loss / d log-prob of the worked pair's 3 chosen and 2 rejected tokens, as stated.
def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


P_W, P_L = math.exp(-0.2), math.exp(-2.0)
ODDS = math.log(P_W / (1 - P_W)) - math.log(P_L / (1 - P_L))
STATED = {
    "positives": ({}, [-1 / 3] * 3, 0.0),
    "dpo_norm": ({"beta": 5.0}, [-5 * sigmoid(-1.75) / 3] * 3, 5 * sigmoid(-1.75) / 2),
    "irpo": (
        {"beta": 0.1, "alpha": 1.0}, [-0.1 * sigmoid(-0.08) - 1 / 3] * 3, 0.1 * sigmoid(-0.08),
    ),
    "dpop": ({"beta": 0.3, "alpha": 50.0}, [-0.3 * sigmoid(-0.24)] * 3, 0.3 * sigmoid(-0.24)),
    "ipo": ({"beta": 0.1}, [2 * (0.35 - 5) / 3] * 3, -2 * (0.35 - 5) / 2),
    "apo_zero": (
        {"beta": 0.1},
        [-0.1 * sigmoid(0.03) * sigmoid(-0.03)] * 3, 0.1 * sigmoid(0.05) * sigmoid(-0.05),
    ),
    "orpo": (
        {"alpha": 0.1},
        [-(1 + 0.1 * sigmoid(-ODDS) / (1 - P_W)) / 3] * 3, 0.1 * sigmoid(-ODDS) / (1 - P_L) / 2,
    ),
    "npo": ({"beta": 0.1, "alpha": 1.0}, [-1 / 3] * 3, 2 * sigmoid(-0.05)),
    "topr": ({}, [-1.0] * 3, math.exp(-0.5)),
    "dft": ({}, [-math.exp(x) / 3 for x in (-0.1, -0.2, -0.3)], 0.0),
    "redi_weighted": ({"alpha": 0.8, "gamma": 0.3}, [-1 / 3] * 3, 0.8 * math.exp(-0.6) * 0.4 / 2),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_gradient_of_every_token_is_the_stated_one(name):
    parameters, on_chosen, on_rejected = STATED[name]
    logps = torch.tensor([-0.1, -0.2, -0.3, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-0.9, -3.5]], dtype=torch.float64)
    loss_of(name, logps, [3, 2], reference, **parameters).backward()
    expected = torch.tensor([*on_chosen, on_rejected, on_rejected], dtype=torch.float64)
    torch.testing.assert_close(logps.grad, expected)


@pytest.mark.parametrize("name", RELATED)
def test_losses_and_gradients_stay_finite_for_traces_of_thousands_of_tokens(name):
    logps = torch.full((12_000,), -1e-4)
    logps[6000:] = -20.0
    logps.requires_grad_()
    reference = torch.tensor([[-5000.0, -10.0]])
    for sides in ([6000, 6000], [11_000, 1000]):
        loss = loss_of(name, logps, sides, reference)
        [gradient] = torch.autograd.grad(loss, logps)
        assert loss.isfinite()
        assert gradient.isfinite().all()


# ---------------------------------------------------------------- TRL on the same log-probs


def trl_dpo(pair, references, beta: float, **losses: float) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss of one pair, with stand-ins for its model, data
    and accelerator.

    losses: weight of each of its loss types.
    """
    from trl import DPOTrainer

    width = max(map(len, pair))
    padded = torch.stack([torch.cat([p, p.new_zeros(width - len(p))]) for p in pair])  # (2, L)
    mask = torch.tensor([[0] + [1] * len(p) + [0] * (width - len(p)) for p in pair])
    nothing = torch.zeros_like(padded.detach())
    outputs = SimpleNamespace(
        log_probs=padded, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=list(losses), loss_weights=list(losses.values()), beta=beta,
        label_smoothing=0.0, use_weighting=False, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": references[:1], "ref_rejected_logps": references[1:],
    }  # fmt: skip
    trainer.model = type("Model", (), {"training": True, "__call__": lambda *_, **__: outputs})()
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def trl_orpo(pair, references, alpha: float) -> torch.Tensor:
    from trl.experimental.orpo import ORPOTrainer

    settings = SimpleNamespace(beta=alpha, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (p.mean().reshape(1) for p in pair)
    gain, *_ = ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)
    return -pair[0].mean() - gain.mean()  # as in its get_batch_loss_metrics


def trl_dft(pair, references) -> torch.Tensor:
    """The lines of TRL's SFTTrainer that compute DFT's loss, on one row."""
    from trl import SFTTrainer

    outputs = SimpleNamespace(log_probs=pair[0], label_mask=torch.ones(len(pair[0])))
    source = inspect.getsource(SFTTrainer.compute_loss)
    begin = source.index("per_token_loss = -outputs.log_probs")
    end = source.index("if self.aux_loss_enabled", begin)
    first = source.rindex("\n", 0, begin) + 1
    names = {
        "self": SimpleNamespace(args=SimpleNamespace(loss_type="dft")), "torch": torch,
        "outputs": outputs, "num_items_in_batch": None,
    }  # fmt: skip
    exec(inspect.cleandoc("\n" + source[first:end]), names)
    return names["loss"]


TRL = {
    "dpo": lambda p, r, beta: trl_dpo(p, r, beta, sigmoid=1.0),
    "dpo_norm": lambda p, r, beta: trl_dpo(p, r, beta, sigmoid_norm=1.0),
    "ipo": lambda p, r, beta: trl_dpo(p, r, beta, ipo=1.0),
    "apo_zero": lambda p, r, beta: trl_dpo(p, r, beta, apo_zero=1.0),
    "irpo": lambda p, r, beta, alpha: trl_dpo(p, r, beta, sigmoid=1.0, sft=alpha),
    "positives": lambda p, r: trl_dpo(p, r, 1.0, sft=1.0),
    "orpo": trl_orpo,
    "dft": trl_dft,
}


@pytest.mark.parametrize("name", TRL)
def test_value_and_gradient_equal_trls(name, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    logps, lengths, reference = drawn(seed=4)
    parts = logps.split(lengths)
    for row, refs in enumerate(reference):
        pair, sides = parts[2 * row : 2 * row + 2], lengths[2 * row : 2 * row + 2]
        ours = loss_of(name, torch.cat(pair), sides, refs[None])
        theirs = TRL[name](pair, refs, **PARAMETERS[name])
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
        mine, right = (
            torch.autograd.grad(x, pair, retain_graph=True, materialize_grads=True)
            for x in (ours, theirs)
        )
        for a, b in zip(mine, right):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["train", "train", "finished"]
    for record in records[:-1]:
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
    before = weights("student")
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights("run").items())


@pytest.mark.parametrize("name", RELATED)
def test_an_objective_without_its_own_parameters_is_refused_and_so_is_anothers(name):
    takes = loss_parameters(name)
    for missing in takes:
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


def test_positives_is_redi_with_alpha_0_to_the_bit(here):
    run(redi_config(objective="positives", out="positives"))
    run(redi_config(alpha=0.0, out="redi"))
    for name, tensor in weights("positives").items():
        assert torch.equal(tensor, weights("redi")[name])


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


# ---------------------------------------------------------------- Appendix B


def test_the_gradient_of_simpo_turns_to_that_of_symmetric_as_beta_falls(here):
    """On the toy's rows and student, whose weights are made larger so that pairs differ."""
    config = redi_config()
    model, source = load_model(config.model)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    dataset = run_module.load_data(config.data, config, source, paired=True)

    def gradient(objective) -> torch.Tensor:
        data = TrainData(dataset, objective, World(0, 1, torch.device("cpu")), 10_000)
        step = data.all_rows()
        totals = data.totals(step)
        model.zero_grad()
        for batch in data.batches(step, totals):
            data.loss(model, batch, totals).loss.backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])

    symmetric = gradient(make_objective("symmetric"))
    betas = (2.0, 1.0, 1e-1, 1e-2, 1e-3)
    cosines = [
        torch.cosine_similarity(
            gradient(make_objective("simpo", beta=beta, gamma=1.0)), symmetric, dim=0
        ).item()
        for beta in betas
    ]
    assert cosines[0] < 0.99  # the paper's beta is another direction
    assert cosines == sorted(cosines)
    assert cosines[-1] >= 0.999
    # The angle falls in proportion to beta: 1 - cosine a hundredfold for a tenth.
    assert (1 - cosines[3]) / (1 - cosines[2]) == pytest.approx(0.01, rel=0.3)
