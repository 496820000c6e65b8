"""The paper's objectives: worked numbers, stated gradients, and other people's code.

    python -m pytest tests/test_losses.py

One pair with log-probs [-.1, -.2, -.3] (chosen) and [-1, -3] (rejected) runs through the file:

    S_w = -.1 - .2 - .3 = -0.6    M_w = -0.6 / 3 = -0.2
    S_l = -1 - 3        = -4      M_l = -4 / 2   = -2
"""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch

from redi import losses, train

S_W, M_W, S_L, M_L = -0.6, -0.2, -4.0, -2.0
S_W_REF, S_L_REF = -0.9, -3.5


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# ---------------------------------------------------------------- numbers a person can check


def test_sft_is_the_mean_negative_log_prob_per_token():
    # -S_w / 3 tokens = 0.6 / 3
    assert losses.sft_loss(torch.tensor(S_W, dtype=torch.float64), 3).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.8, -1.4),  # 0.2 + 0.8 * -2 = 0.2 - 1.6
        (0.5, -0.8),  # 0.2 - 1.0
        (0.0, 0.2),  # positives alone
        (1.0, -1.8),  # 0.2 - 2
    ],
)
def test_redi_of_the_worked_pair(alpha, expected):
    assert losses.redi_loss(one(M_W), one(M_L), alpha).item() == pytest.approx(expected)


def test_redi_has_the_papers_alpha_by_default():
    assert losses.redi_loss(one(M_W), one(M_L)).item() == pytest.approx(-1.4)  # 0.2 - 1.6


def test_symmetric_of_the_worked_pair():
    assert losses.symmetric_loss(one(M_W), one(M_L)).item() == pytest.approx(-1.8)  # 0.2 - 2


def test_dpo_of_the_worked_pair():
    # margin (-.6 + .9) - (-4 + 3.5) = .3 + .5 = .8; -log sigmoid(.1 * .8) = log(1 + e^-.08)
    # e^-.08 = 0.923116; log 1.923116 = 0.653947
    loss = losses.dpo_loss(one(S_W), one(S_L), one(S_W_REF), one(S_L_REF), beta=0.1)
    assert loss.item() == pytest.approx(0.653947, abs=5e-7)


def test_simpo_of_the_worked_pair():
    # 2 (-.2 + 2) - 1 = 2.6; log(1 + e^-2.6), e^-2.6 = 0.0742736; log 1.0742736 = 0.071645
    loss = losses.simpo_loss(one(M_W), one(M_L), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(0.071645, abs=5e-7)


def test_dpo_of_the_reference_itself_is_ln_2_whatever_beta():
    for beta in (0.001, 0.1, 10.0):  # margin 0: -log sigmoid(0) = log 2
        loss = losses.dpo_loss(one(S_W), one(S_L), one(S_W), one(S_L), beta)
        assert loss.item() == pytest.approx(math.log(2))


def test_losses_are_per_pair_and_pairs_do_not_mix():
    chosen, rejected = one(M_W).repeat(3), torch.tensor([M_L, -1.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([-1.4, -0.6, 0.2], dtype=torch.float64)  # 0.2 + 0.8 * M_l
    torch.testing.assert_close(losses.redi_loss(chosen, rejected), expected)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_a_sigmoid_objective_stays_finite_at_any_margin(margin):
    # log(1 + e^-x) is 0 for a large x, and -x for a very negative one
    zero, expected = one(0.0), max(0.0, -margin)
    assert losses.dpo_loss(one(margin), zero, zero, zero, 1.0).item() == pytest.approx(expected)
    assert losses.simpo_loss(one(margin), zero, 1.0, 0.0).item() == pytest.approx(expected)


# ---------------------------------------------------------------- gradients, as stated


def worked_logps() -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    return chosen, rejected


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Per token: d loss / d chosen log-prob (3 tokens), d loss / d rejected log-prob (2 tokens).
GRADIENTS = {
    # constants: -1/|y_w| = -1/3, alpha/|y_l| = .8/2
    "redi": (lambda w, r: losses.redi_loss(w.mean(), r.mean(), 0.8), -1 / 3, 0.4),
    "positives": (lambda w, r: losses.redi_loss(w.mean(), r.mean(), 0.0), -1 / 3, 0.0),
    "symmetric": (lambda w, r: losses.symmetric_loss(w.mean(), r.mean()), -1 / 3, 0.5),
    # s = beta sigmoid(-beta * margin) = .1 sigmoid(-.08)
    "dpo": (
        lambda w, r: losses.dpo_loss(w.sum(), r.sum(), S_W_REF, S_L_REF, 0.1),
        -0.1 * sigmoid(-0.08),
        0.1 * sigmoid(-0.08),
    ),
    # s = beta sigmoid(gamma - beta (M_w - M_l)) = 2 sigmoid(-2.6)
    "simpo": (
        lambda w, r: losses.simpo_loss(w.mean(), r.mean(), 2.0, 1.0),
        -2 * sigmoid(-2.6) / 3,
        2 * sigmoid(-2.6) / 2,
    ),
    # -1/N on all 3 tokens; SFT has no rejected trace
    "sft": (lambda w, r: losses.sft_loss(w.sum(), 3) + 0 * r.sum(), -1 / 3, 0.0),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_of_every_token_is_the_stated_one(name):
    loss, on_chosen, on_rejected = GRADIENTS[name]
    chosen, rejected = worked_logps()
    loss(chosen, rejected).backward()
    torch.testing.assert_close(chosen.grad, torch.full_like(chosen, on_chosen))
    torch.testing.assert_close(rejected.grad, torch.full_like(rejected, on_rejected))


# ---------------------------------------------------------------- Appendix B


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_simpo_becomes_symmetric_as_beta_falls(gamma):
    # d SimPO = -beta sigmoid(gamma - beta x) d(M_w - M_l): over beta sigmoid(gamma), as a step
    # with lr ~ 1/beta takes it, it nears d symmetric, and the error falls with beta.
    errors = []
    for beta in (1e-1, 1e-2, 1e-3, 1e-4):
        chosen, rejected = worked_logps()
        losses.simpo_loss(chosen.mean(), rejected.mean(), beta, gamma).backward()
        scale = beta * sigmoid(gamma)
        difference = chosen.grad / scale + 1 / 3  # symmetric's: -1/3
        errors.append(difference.abs().max().item())
        torch.testing.assert_close(
            rejected.grad / scale, torch.full_like(rejected, 0.5), rtol=beta * 2, atol=0
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


# ---------------------------------------------------------------- other people's code


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(3)
    return -10 * torch.rand(4, 16, generator=generator, dtype=torch.float64)  # 4 kinds, 16 pairs


def test_simpo_equals_trl(pairs, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    settings = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=1.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected, *_ = CPOTrainer.cpo_loss(settings, pairs[0], pairs[1])
    torch.testing.assert_close(losses.simpo_loss(pairs[0], pairs[1], 2.0, 1.0), expected)


def test_dpo_and_simpo_equal_liger(pairs):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    both = torch.zeros(32)  # liger's mean is over half of it
    dpo, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        pairs[0], pairs[1], both, pairs[2], pairs[3], beta=0.1
    )
    torch.testing.assert_close(losses.dpo_loss(*pairs, beta=0.1).mean(), dpo)
    simpo, *_ = LigerFusedLinearSimPOFunction.preference_loss_fn(
        pairs[0], pairs[1], both, beta=2.0, gamma=1.0
    )
    torch.testing.assert_close(losses.simpo_loss(pairs[0], pairs[1], 2.0, 1.0).mean(), simpo)


# ---------------------------------------------------------------- examples in the text


@pytest.mark.parametrize("module", [losses, train])
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
