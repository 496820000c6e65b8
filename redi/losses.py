"""The paper's objectives, as pure functions of summed or averaged token log-probs.

For a prompt x with a correct trace y_w (chosen) and an incorrect one y_l (rejected), write

    S = sum_t log pi(y_t | x, y_<t)        M = S / |y|        |y| counts the stop token

and, for one worked pair with log-probs [-.1, -.2, -.3] (chosen) and [-1, -3] (rejected),

    S_w = -0.6   M_w = -0.2   S_l = -4   M_l = -2

    stage 1   SFT        Eq. 1   -S_w / N_tokens, over a whole step                  0.2
    stage 2   REDI       Eq. 5   -M_w + alpha M_l              alpha 0.8            -1.4
              symmetric  Eq. 4   -M_w + M_l                                         -1.8
              DPO        Eq. 2   -log sigmoid(beta [(S_w - S_w_ref) - (S_l - S_l_ref)])
                                 beta 0.1, S_w_ref -0.9, S_l_ref -3.5                0.653947
              SimPO      Eq. 3   -log sigmoid(beta (M_w - M_l) - gamma)
                                 beta 2, gamma 1                                     0.071645

SFT, REDI and the symmetric objective are linear in the log-probs: their slopes are constants.
Training derives the weight of every token from the functions below by autograd (objectives.py), so
a change of an equation here changes what trains.

REDI's loss has no lower bound, because it is linear and a rejected token's log-prob can go to minus
infinity. DPO and SimPO flatten where a pair is well separated; nothing in REDI does, so watch the
curves. Objectives outside the paper are in related_losses.py. Letters: P pairs.
"""

import torch  # noqa: F401 (the example uses it)
import torch.nn.functional as F
from torch import Tensor


def sft_loss(logp_sum: Tensor, num_tokens: int) -> Tensor:
    """Eq. 1: mean negative log-likelihood per response token, in nats.

    logp_sum: scalar, the sum of log-probs over all response tokens of the optimizer step.
    num_tokens: their number. Gradient: -1 / num_tokens on every token.
    """
    return -logp_sum / num_tokens


def redi_loss(chosen_mean: Tensor, rejected_mean: Tensor, alpha: float = 0.8) -> Tensor:
    """Eq. 5: -M_w + alpha * M_l, per pair (P,), in nats per token.

    Gradient: -1/|y_w| on every chosen token, +alpha/|y_l| on every rejected token: constants.
    alpha 0 trains on positives alone, alpha 1 is the symmetric objective.

    >>> round(redi_loss(torch.tensor([-0.2]), torch.tensor([-2.0])).item(), 6)
    -1.4
    """
    return -chosen_mean + alpha * rejected_mean


def symmetric_loss(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """Eq. 4: -M_w + M_l, per pair (P,): REDI with alpha 1, and its gradient."""
    return redi_loss(chosen_mean, rejected_mean, alpha=1.0)


def dpo_loss(
    chosen_sum: Tensor, rejected_sum: Tensor, ref_chosen_sum: Tensor, ref_rejected_sum: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """Eq. 2: -log sigmoid(beta * [(S_w - S_w_ref) - (S_l - S_l_ref)]), per pair (P,).

    The reference sums come from the model that stage 2 starts from. Gradient: with
    s = beta * sigmoid(-margin), -s on every chosen token and +s on every rejected one.
    """
    margin = (chosen_sum - ref_chosen_sum) - (rejected_sum - ref_rejected_sum)  # (P,)
    return -F.logsigmoid(beta * margin)


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """Eq. 3: -log sigmoid(beta * (M_w - M_l) - gamma), per pair (P,).

    Gradient: with s = beta * sigmoid(gamma - beta (M_w - M_l)), -s/|y_w| on every chosen token
    and +s/|y_l| on every rejected one. As beta -> 0 its direction becomes Eq. 4's (Appendix B).
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)
