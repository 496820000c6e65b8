"""The objectives as pure functions: worked numbers, the papers' formulas, other people's code.

One pair with log-probs [-.1, -.2, -.3] (chosen) and [-1, -3] (rejected) runs through the file:

    S_w = -.1 - .2 - .3 = -0.6    M_w = -0.6 / 3 = -0.2    S_w_ref -0.9    M_w_ref -0.3
    S_l = -1 - 3        = -4      M_l = -4 / 2   = -2      S_l_ref -3.5    M_l_ref -1.75
"""

import doctest
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from small_step import FORMULAS, PARAMETERS, our_losses

from redi import losses, related_losses, train
from redi.objectives import OBJECTIVES

# ---------------------------------------------------------------- numbers a person can check


@dataclass
class Worked:
    name: str
    parameters: dict[str, float]
    loss: float
    on_chosen: float | Sequence[float]  # d loss / d log-prob, of each token or of all
    on_rejected: float | Sequence[float]
    reference: tuple[float, float] = (-0.9, -3.5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


P_W, P_L = math.exp(-0.2), math.exp(-2.0)
ODDS = math.log(P_W / (1 - P_W)) - math.log(P_L / (1 - P_L))  # 3.362359

WORKED = [
    # .2 + .8 * -2; gradients are constants: -1/|y_w| = -1/3, alpha/|y_l| = .8/2
    Worked("redi", {"alpha": 0.8}, -1.4, -1 / 3, 0.4),
    Worked("symmetric", {}, -1.8, -1 / 3, 0.5),
    Worked("positives", {}, 0.2, -1 / 3, 0.0),
    # margin (-.6 + .9) - (-4 + 3.5) = .3 + .5 = .8; -log sigmoid(.1 * .8) = log(1 + e^-.08)
    # e^-.08 = 0.923116; log 1.923116 = 0.653947
    Worked("dpo", {"beta": 0.1}, 0.653947, -0.1 * sigmoid(-0.08), 0.1 * sigmoid(-0.08)),
    # 2 (-.2 + 2) - 1 = 2.6; log(1 + e^-2.6), e^-2.6 = 0.0742736; log 1.0742736 = 0.071645
    Worked("simpo", {"beta": 2.0, "gamma": 1.0}, 0.071645,
           -2 * sigmoid(-2.6) / 3, 2 * sigmoid(-2.6) / 2),
    # margin (-.2 + .3) - (-2 + 1.75) = .1 + .25 = .35; 5 * .35 = 1.75; log(1 + e^-1.75)
    # e^-1.75 = 0.173774; log 1.173774 = 0.160224
    Worked("dpo_norm", {"beta": 5.0}, 0.160224, -5 * sigmoid(-1.75) / 3, 5 * sigmoid(-1.75) / 2),
    # DPO's 0.653947 + 1 * .2
    Worked("irpo", {"beta": 0.1, "alpha": 1.0}, 0.853947,
           -0.1 * sigmoid(-0.08) - 1 / 3, 0.1 * sigmoid(-0.08)),
    # S_w is above its reference: no penalty. .3 * .8 = .24, e^-.24 = 0.786628, log 1.786628
    Worked("dpop", {"beta": 0.3, "alpha": 50.0}, 0.580330,
           -0.3 * sigmoid(-0.24), 0.3 * sigmoid(-0.24)),
    # Reference -.5 instead: fallen by .1, 50 * .1 = 5; margin (-.6 + .5) - (-.5) = .4;
    # .3 * (.4 - 5) = -1.38; log(1 + e^1.38) = log 4.974902 = 1.604406
    Worked("dpop", {"beta": 0.3, "alpha": 50.0}, 1.604406,
           -0.3 * sigmoid(1.38) * 51, 0.3 * sigmoid(1.38), reference=(-0.5, -3.5)),
    # 1 / (2 * .1) = 5; (.35 - 5)^2 = 4.65^2
    Worked("ipo", {"beta": 0.1}, 21.6225, 2 * (0.35 - 5) / 3, -2 * (0.35 - 5) / 2),
    # log-ratios .3 and -.5: 1 - sigmoid(.03) + sigmoid(-.05) = 1 - 0.507499 + 0.487503
    Worked("apo_zero", {"beta": 0.1}, 0.980003,
           -0.1 * sigmoid(0.03) * sigmoid(-0.03), 0.1 * sigmoid(0.05) * sigmoid(-0.05)),
    # log odds_w = -.2 - log(1 - 0.818731) = -.2 + 1.707771 = 1.507771
    # log odds_l = -2 - log(1 - 0.135335) = -2 + 0.145413 = -1.854587
    # .2 + .1 * log(1 + e^-3.362359) = .2 + .1 * 0.034066
    Worked("orpo", {"alpha": 0.1}, 0.203407,
           -(1 + 0.1 * sigmoid(-ODDS) / (1 - P_W)) / 3, 0.1 * sigmoid(-ODDS) / (1 - P_L) / 2),
    # 2 / .1 * log(1 + e^(.1 * -.5)) = 20 * log 1.9512294 = 20 * 0.66845965; + .2
    Worked("npo", {"beta": 0.1, "alpha": 1.0}, 13.569193, -1 / 3, 2 * sigmoid(-0.05)),
    # ratio e^-.5 = 0.606531; .6 - 4 * 0.606531
    Worked("topr", {}, -1.826123, -1.0, math.exp(-0.5)),
    # More likely than its reference: the ratio stays 1; .6 - 4
    Worked("topr", {}, -3.4, -1.0, 1.0, reference=(-0.9, -4.5)),
    # (.1 e^-.1 + .2 e^-.2 + .3 e^-.3) / 3 = (0.0904837 + 0.1637462 + 0.2222455) / 3
    Worked("dft", {}, 0.158825, [-math.exp(x) / 3 for x in (-0.1, -0.2, -0.3)], 0.0),
    # .2 + .8 * e^-2 * -2 = .2 - 1.6 * 0.135335; alpha e^-2 (1 - 2) / 2: it pulls up below M_l = -1
    Worked("redi_weighted", {"alpha": 0.8, "gamma": 1.0}, -0.016536, -1 / 3, -0.4 * P_L),
    # -.6 * -.6 + .4 * -4 = .36 - 1.6
    Worked("asymre", {"baseline": 0.4}, -1.24, -0.6, 0.4),
    # .1 * .6 - 4
    Worked("w_reinforce", {"alpha": 0.1}, -3.94, -0.1, 1.0),
    # log(1 - e^-1) = -0.458675, log(1 - e^-3) = -0.051069, their mean -0.254872
    # .5 * .2 + .5 * 0.254872; p / (1 - p) is 1 / (e - 1) and 1 / (e^3 - 1), halved twice
    Worked("uft", {"alpha": 0.5}, 0.227436,
           -0.5 / 3, [0.25 / (math.exp(1) - 1), 0.25 / (math.exp(3) - 1)]),
]  # fmt: skip


@pytest.mark.parametrize("worked", WORKED, ids=lambda worked: worked.name)
def test_loss_and_gradient_of_the_worked_pair(worked):
    chosen = torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    traces, reference = [chosen, rejected], torch.tensor(worked.reference, dtype=torch.float64)
    loss = our_losses(worked.name, traces, reference, **worked.parameters)
    assert loss.item() == pytest.approx(worked.loss, abs=6e-7)
    stated = [
        torch.tensor(on, dtype=torch.float64).expand_as(trace)
        for on, trace in zip((worked.on_chosen, worked.on_rejected), traces)
    ]
    torch.testing.assert_close(slopes(loss, traces), torch.cat(stated))


def test_sft_is_the_mean_negative_log_prob_per_token():
    logps = torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64, requires_grad=True)
    loss = losses.sft_loss(logps.sum(), 3)
    loss.backward()
    assert loss.item() == pytest.approx(0.2)  # -S_w / 3 tokens = 0.6 / 3
    torch.testing.assert_close(logps.grad, torch.full_like(logps, -1 / 3))


def test_every_objective_is_worked_and_the_modules_tables_have_these_numbers():
    assert {worked.name for worked in WORKED} == set(OBJECTIVES)
    functions = [f for name, f in vars(related_losses).items() if name.endswith("_loss")]
    text = "\n".join(documented.__doc__ for documented in (losses, *functions))
    table = [float(n) for n in re.findall(r"(-?\d+\.\d+)$", text, re.MULTILINE)]
    assert len(table) >= 16  # SFT's too
    for number in table:
        assert number in [pytest.approx(worked.loss, abs=6e-7) for worked in WORKED], number


@pytest.mark.parametrize("module", [losses, train])
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


# ---------------------------------------------------------------- the papers' formulas


def drawn(pairs: int = 6, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Log-probs of chosen, rejected, chosen, ... of 1 to 9 tokens, and reference sums (P, 2)."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (2 * pairs,), generator=draw).tolist()
    logps = -3 * torch.rand(sum(lengths), generator=draw, dtype=torch.float64) - 1e-3
    traces = [trace.clone().requires_grad_() for trace in logps.split(lengths)]
    sums = torch.stack([trace.detach().sum() for trace in traces])
    # About as often above the trained model's as below: both branches of dpop and topr.
    reference = sums + torch.randn(2 * pairs, generator=draw, dtype=torch.float64)
    return traces, reference.reshape(-1, 2)


def slopes(loss: torch.Tensor, traces: list[torch.Tensor]) -> torch.Tensor:
    """d loss / d log-prob of every token."""
    return torch.cat(torch.autograd.grad(
        loss, traces, retain_graph=True, materialize_grads=True, allow_unused=True
    ))  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_of_each_pair_equal_float64_autograd_of_the_formula(name, seed):
    traces, reference = drawn(seed=seed)
    ours = our_losses(name, traces, reference)
    for loss, w, r, sums in zip(ours, traces[0::2], traces[1::2], reference, strict=True):
        expected = FORMULAS[name](w, r, *sums)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradient = slopes(expected, traces)  # 0 on the other pairs
        assert gradient.abs().max() > 0
        torch.testing.assert_close(slopes(loss, traces), gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_stay_finite_for_traces_of_thousands_of_tokens(name):
    reference = torch.tensor([[-5000.0, -10.0]])
    for lengths in ([6000, 6000], [11_000, 1000], [1000, 11_000]):
        logps = torch.full((12_000,), -1e-4)
        logps[6000:] = -20.0
        for order in (1, -1):  # either trace may be the likely one
            pair = [trace.requires_grad_() for trace in logps.split(lengths)[::order]]
            loss = our_losses(name, pair, reference)
            assert loss.isfinite().all()
            assert slopes(loss, pair).isfinite().all()


@pytest.mark.parametrize("margin", [-1e4, 0.0, 1e4])
def test_a_sigmoid_objective_is_right_at_any_margin(margin):
    # log(1 + e^-x) is ln 2 at 0, 0 for a large x, and -x for a very negative one
    zero, x = torch.zeros(1, dtype=torch.float64), torch.tensor([margin], dtype=torch.float64)
    expected = math.log(2) if margin == 0 else max(0.0, -margin)
    assert losses.dpo_loss(x, zero, zero, zero, 1.0).item() == pytest.approx(expected)
    assert losses.simpo_loss(x, zero, 1.0, 0.0).item() == pytest.approx(expected)


# ---------------------------------------------------------------- other people's code


def trl_dpo(pair, references, beta: float, **losses: float) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss of one pair, without its model, data and accelerator.

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
    model = type("Model", (), {"training": True, "__call__": lambda *_, **__: outputs})()
    trainer = SimpleNamespace(
        model=model, accelerator=same, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=list(losses), loss_weights=list(losses.values()), beta=beta,
        label_smoothing=0.0, use_weighting=False, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": references[:1], "ref_rejected_logps": references[1:],
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_simpo(pair, references, beta: float, gamma: float) -> torch.Tensor:
    from trl.experimental.cpo import CPOTrainer

    settings = SimpleNamespace(
        alpha=0.0, beta=beta, loss_type="simpo", simpo_gamma=gamma, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    loss, *_ = CPOTrainer.cpo_loss(settings, *(p.mean().reshape(1) for p in pair))
    return loss


def trl_orpo(pair, references, alpha: float) -> torch.Tensor:
    from trl.experimental.orpo import ORPOTrainer

    settings = SimpleNamespace(beta=alpha, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (p.mean().reshape(1) for p in pair)
    gain, *_ = ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)
    return -pair[0].mean() - gain.mean()  # as in its get_batch_loss_metrics


TRL = {
    "dpo": lambda p, r, beta: trl_dpo(p, r, beta, sigmoid=1.0),
    "dpo_norm": lambda p, r, beta: trl_dpo(p, r, beta, sigmoid_norm=1.0),
    "ipo": lambda p, r, beta: trl_dpo(p, r, beta, ipo=1.0),
    "apo_zero": lambda p, r, beta: trl_dpo(p, r, beta, apo_zero=1.0),
    "irpo": lambda p, r, beta, alpha: trl_dpo(p, r, beta, sigmoid=1.0, sft=alpha),
    "positives": lambda p, r: trl_dpo(p, r, 1.0, sft=1.0),
    "simpo": trl_simpo,
    "orpo": trl_orpo,
}


@pytest.mark.parametrize("name", TRL)
def test_value_and_gradient_equal_trls(name, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    traces, reference = drawn(seed=4)
    for *pair, sums in zip(traces[0::2], traces[1::2], reference):
        ours = our_losses(name, pair, sums)
        theirs = TRL[name](pair, sums, **PARAMETERS[name])
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-7, abs=1e-7)
        torch.testing.assert_close(slopes(ours, pair), slopes(theirs, pair))
