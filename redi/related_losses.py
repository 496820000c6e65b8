"""Objectives of related papers, as pure functions of log-probs.

Letters as in losses.py: S and M are the sum and the mean of a response's token log-probs, w the
chosen and l the rejected trace, _ref the model that stage 2 starts from, P pairs. alpha weighs a
term, beta scales the argument of a sigmoid, gamma is an exponent; where a source uses another
letter, the docstring names it. sg[] (stop gradient) is a constant to the gradient.

"Worked" is the loss of the pair of losses.py: S_w -0.6, M_w -0.2, S_l -4, M_l -2, with S_w_ref -0.9
and S_l_ref -3.5, so M_w_ref -0.3 and M_l_ref -1.75. "Gradient: x on every chosen token" means that
d loss / d logp_t is x there. Sums give long traces more weight; the objectives on sums keep their
sources' scale, which is not REDI's. The last three are of single traces; "labeled rows" is what
they minimize over a step of N such rows. Left out: label smoothing, f-divergences, losses over a
batch's ranking.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redi import losses


def positives_loss(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """-M_w, per pair (P,): REDI with alpha 0. The rejected trace is only logged. Worked: 0.2

    More of stage 1's rejection sampling. Gradient: -1/|y_w| on every chosen token.
    """
    return losses.redi_loss(chosen_mean, rejected_mean, alpha=0.0)


def dpo_norm_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, ref_chosen_mean: Tensor, ref_rejected_mean: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta * [(M_w - M_w_ref) - (M_l - M_l_ref)]), per pair (P,).

    Length-normalized DPO (Tulu 3, arXiv 2411.15124). Worked, beta 5: 0.160224
    Gradient: with s = beta * sigmoid(-beta * margin), -s/|y_w| on every chosen token, +s/|y_l| on
    every rejected one.
    """
    return losses.dpo_loss(chosen_mean, rejected_mean, ref_chosen_mean, ref_rejected_mean, beta)


def irpo_loss(
    chosen_sum: Tensor, rejected_sum: Tensor, ref_chosen_sum: Tensor, ref_rejected_sum: Tensor,
    chosen_mean: Tensor, beta: float, alpha: float,
) -> Tensor:  # fmt: skip
    """DPO - alpha * M_w, per pair (P,). Worked, beta 0.1, alpha 1: 0.853947

    One iteration of iterative reasoning preference optimization (arXiv 2404.19733), also called
    RPO. Gradient: DPO's, plus -alpha/|y_w| on every chosen token.
    """
    dpo = losses.dpo_loss(chosen_sum, rejected_sum, ref_chosen_sum, ref_rejected_sum, beta)
    return dpo - alpha * chosen_mean


def dpop_loss(
    chosen_sum: Tensor, rejected_sum: Tensor, ref_chosen_sum: Tensor, ref_rejected_sum: Tensor,
    beta: float, alpha: float,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta * [DPO's margin - alpha * max(0, S_w_ref - S_w)]), per pair (P,).

    DPO-Positive (Smaug, arXiv 2402.13228; its lambda is alpha here): DPO with a penalty where the
    chosen trace has become less likely. Worked, beta 0.3, alpha 50: 0.580330
    Gradient: with s = beta * sigmoid(-beta * [..]), -s on every chosen token, -s (1 + alpha) if the
    trace is below the reference; +s on every rejected token.
    """
    fallen = (ref_chosen_sum - chosen_sum).clamp(min=0.0)  # (P,)
    # The penalty is inside the bracket, so it is subtracted from the chosen trace's log-ratio.
    return losses.dpo_loss(
        chosen_sum - alpha * fallen, rejected_sum, ref_chosen_sum, ref_rejected_sum, beta
    )


def ipo_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, ref_chosen_mean: Tensor, ref_rejected_mean: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """([(M_w - M_w_ref) - (M_l - M_l_ref)] - 1 / (2 * beta))^2, per pair (P,).

    IPO (arXiv 2310.12036, Eq. 17; its tau is beta here), over means as in TRL, so that one beta
    suits all lengths. Worked, beta 0.1: 21.6225
    Gradient: with d = 2 * (margin - 1 / (2 * beta)), negative until the margin is reached, d/|y_w|
    on every chosen token and -d/|y_l| on every rejected one.
    """
    margin = (chosen_mean - ref_chosen_mean) - (rejected_mean - ref_rejected_mean)  # (P,)
    return (margin - 1.0 / (2.0 * beta)) ** 2


def apo_zero_loss(
    chosen_sum: Tensor, rejected_sum: Tensor, ref_chosen_sum: Tensor, ref_rejected_sum: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """1 - sigmoid(beta * (S_w - S_w_ref)) + sigmoid(beta * (S_l - S_l_ref)), per pair (P,).

    APO-zero (arXiv 2408.06266, Eq. 7): each trace against its own reference, so the chosen one must
    rise, not only lead. Worked, beta 0.1: 0.980003
    Gradient: with g(x) = beta * sigmoid(x) * sigmoid(-x), -g(beta (S_w - S_w_ref)) on every chosen
    token, +g(beta (S_l - S_l_ref)) on every rejected one: at most beta/4.
    """
    chosen = torch.sigmoid(beta * (ref_chosen_sum - chosen_sum))
    return chosen + torch.sigmoid(beta * (rejected_sum - ref_rejected_sum))


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, alpha: float) -> Tensor:
    """-M_w - alpha * log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(M); (P,).

    ORPO (arXiv 2403.07691, Eq. 6 and 7; its lambda is alpha here). Worked, alpha 0.1: 0.203407
    Gradient: with s = alpha * sigmoid(log odds_l - log odds_w), -(1 + s / (1 - p_w)) / |y_w| on
    every chosen token and +s / (1 - p_l) / |y_l| on every rejected one.
    """
    # log(1 - exp(M)), exact for M near 0 as well
    log_odds = [mean - torch.log(-torch.expm1(mean)) for mean in (chosen_mean, rejected_mean)]
    return -chosen_mean - alpha * F.logsigmoid(log_odds[0] - log_odds[1])


def npo_loss(
    chosen_mean: Tensor, rejected_sum: Tensor, ref_rejected_sum: Tensor, beta: float, alpha: float
) -> Tensor:
    """-(2 / beta) * log sigmoid(-beta * (S_l - S_l_ref)) - alpha * M_w, per pair (P,).

    Negative preference optimization (arXiv 2404.05868) of the rejected trace, plus the NLL of the
    chosen one. Worked, beta 0.1, alpha 1: 13.569193
    Gradient: +2 sigmoid(beta (S_l - S_l_ref)) on every rejected token, 1 at the start and smaller
    as the trace becomes unlikely; -alpha/|y_w| on every chosen one.
    """
    negative = -(2.0 / beta) * F.logsigmoid(-beta * (rejected_sum - ref_rejected_sum))
    return negative - alpha * chosen_mean


def topr_loss(chosen_sum: Tensor, rejected_sum: Tensor, ref_rejected_sum: Tensor) -> Tensor:
    """-S_w + sg[min(1, exp(S_l - S_l_ref))] * S_l, per pair (P,). Worked: -1.826123

    Tapered off-policy REINFORCE (arXiv 2503.14286) with rewards +1 and -1: a rejected trace counts
    as far as the model would still write it. The paper's mu is the policy that wrote the traces;
    the teacher's log-probs are not in the data, so the model that stage 2 starts from takes its
    place. Gradient: -1 on every chosen token, +min(1, ratio) on every rejected one.
    """
    ratio = (rejected_sum - ref_rejected_sum).detach().clamp(max=0.0).exp()  # (P,), in [0, 1]
    return -chosen_sum + ratio * rejected_sum


def dft_loss(chosen_logps: Sequence[Tensor]) -> Tensor:
    """-mean_t sg[exp(logp_t)] * logp_t over each chosen trace's tokens, (P,). Worked: 0.158825

    chosen_logps: P tensors (|y_w|,). Dynamic fine-tuning (arXiv 2508.05629), averaged as in REDI:
    over a trace, then over pairs. The rejected trace is only logged. Gradient: -pi_t/|y_w| on a
    chosen token of probability pi_t, so unlikely tokens are hardly learned.
    """
    return -torch.stack([(logps.detach().exp() * logps).mean() for logps in chosen_logps])


def redi_weighted_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, alpha: float, gamma: float
) -> Tensor:
    """-M_w + alpha * exp(gamma * M_l) * M_l, (P,). Worked, alpha 0.8, gamma 1: -0.016536

    A variant in the authors' code, not in the paper: the weight fades as the rejected trace becomes
    unlikely, and the whole product is differentiated. Gradient: -1/|y_w| on every chosen token,
    +alpha exp(gamma M_l) (1 + gamma M_l) / |y_l| on every rejected one: 0 at M_l = -1/gamma and
    negative below, so unlike REDI this is bounded in M_l. gamma 0 is REDI.
    """
    return -chosen_mean + alpha * torch.exp(gamma * rejected_mean) * rejected_mean


def asymre_loss(chosen_sum: Tensor, rejected_sum: Tensor, baseline: float) -> Tensor:
    """-(1 - V) * S_w + V * S_l, per pair (P,); V is the baseline. Worked, baseline 0.4: -1.24

    Asymmetric REINFORCE (arXiv 2506.20520): -(r - V) * S of a trace of reward r, 1 if right, else
    0. In theory the model improves while V is below the share of right traces; from there on it
    ends with a single trace. Gradient: -(1 - V) on every chosen token, +V on every rejected one;
    with means it would be REDI's at alpha V / (1 - V), up to a factor. Labeled rows: sum / (N / 2),
    twice the paper's mean.
    """
    return -(1.0 - baseline) * chosen_sum + baseline * rejected_sum


def w_reinforce_loss(chosen_sum: Tensor, rejected_sum: Tensor, alpha: float) -> Tensor:
    """-alpha * S_w + S_l, per pair (P,). Worked, alpha 0.1: -3.94

    Weighted REINFORCE (arXiv 2506.01347; its lambda is alpha here). Its traces are samples of the
    model in training; here they are given. Gradient: -alpha on every chosen token, +1 on every
    rejected one. Labeled rows: (sum of -alpha * S over right rows + sum of S over wrong ones) /
    (N / 2); the authors' code divides by the number of response tokens instead.
    """
    return -alpha * chosen_sum + rejected_sum


def uft_loss(logps: Sequence[Tensor], signs: Sequence[int], alpha: float) -> Tensor:
    """-(1 - alpha) * M of a right trace, -alpha * mean_t log(1 - pi_t) of a wrong one; (S,).

    logps: S tensors (|y|,); signs: S, +1 right, -1 wrong. Unlikelihood fine-tuning (arXiv
    2504.11364), with 1e-8 added to 1 - pi_t, as in its code. Worked, alpha 0.5, both: 0.227436
    Gradient: -(1 - alpha)/|y| on every right token, +alpha pi_t / (1 - pi_t) / |y| on a wrong one.
    Labeled rows: sum / (N / 2); the authors' code takes the mean over all tokens of a batch's right
    rows, and adds the same mean over an equal number of wrong rows.
    """
    of_sign = {
        1: lambda trace: -(1.0 - alpha) * trace.mean(),
        -1: lambda trace: -alpha * torch.log(1e-8 - torch.expm1(trace)).mean(),
    }
    return torch.stack([of_sign[sign](trace) for sign, trace in zip(signs, logps)])
