"""Drawing a next token from the nucleus: exactly, without sorting the vocabulary, and repeatably.

The nucleus is defined by a sort: tokens by falling probability (the first of equals first), kept
while the mass before them is under top_p. A sort costs more than a small model's whole step, so:

    draw        a token from the whole distribution: sums of blocks, a search for the block, a
                search in it
    accept it   if the mass before it in that order is under top_p: one comparison, one sum
    else        draw again, for refused rows only (at top_p 0.95 one in twenty, or fewer)

A refused draw says nothing about the next, so with probabilities 0.5, 0.3, 0.2 and top_p 0.7 the
third token is refused (0.8 is before it), and the others come up as 5 to 3. Random numbers depend
only on (seed, key, position, attempt), not on the other requests of the batch or on evictions.
Letters: B rows, V vocabulary, N blocks of it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redi.config import UserError, require
from redi.packing import to_device

BLOCK = 64  # tokens whose weights are summed before the search
ATTEMPTS = 8  # then sort: only a small top_p gets that far, since it refuses most draws


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn (Section 4: temperature 0.6, top-p 0.95)."""

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises UserError, which names the flag."""
        # Divided by less than 0.001, the rounding errors of logits would decide what is drawn.
        is_sound = self.temperature == 0 or self.temperature >= 1e-3
        require(is_sound, "temperature", self.temperature, "0, or at least 0.001")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "within (0, 1]")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")


def random_numbers(seed: int, keys: np.ndarray, positions: np.ndarray, attempt: int = 0) -> Tensor:
    """(B,) fp64, inside (0, 1): of the tokens at positions[i] of requests keys[i]."""
    # The seed is mixed first, by itself: seed ^ key is the same for many seeds and keys.
    state = _mix(np.array([seed], dtype=np.uint64))
    for word in (keys, positions, np.array(attempt)):
        state = _mix(state ^ word.astype(np.uint64))
    return torch.from_numpy(((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, 2014): every bit of a word moves every bit of the next."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample(
    logits: Tensor, keys: np.ndarray, positions: np.ndarray, sampling: Sampling
) -> list[int]:
    """Draw one token per row of logits (B, V). Row i is at positions[i] of request keys[i].
    Temperature 0 takes the first of the highest. Logits in fp32 are overwritten. Raises UserError
    if logits are not finite."""
    finite = torch.isfinite(logits.sum())
    drawn = _draw(logits, keys, positions, sampling)
    *tokens, finite = torch.cat([drawn, finite[None]]).tolist()  # one copy from the device
    if not finite:
        raise UserError("the model's logits are not finite numbers: its weights are broken")
    return tokens


def _draw(logits: Tensor, keys: np.ndarray, positions: np.ndarray, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    weights = token_weights(logits, sampling.temperature)  # (B, V)
    left = torch.arange(len(weights), device=weights.device)  # rows without a token
    drawn = torch.empty_like(left)

    def numbers(attempt: int) -> Tensor:
        all_rows = random_numbers(sampling.seed, keys, positions, attempt)
        return to_device(all_rows, weights.device)[left]

    for attempt in range(ATTEMPTS):
        tokens = drawn[left] = invert(weights, numbers(attempt))
        if sampling.top_p >= 1:
            return drawn
        rows = refused(weights, tokens, sampling.top_p)
        left, weights = left[rows], weights[rows]
        if not len(left):
            return drawn
    drawn[left] = by_sorting(weights, numbers(ATTEMPTS), sampling.top_p)
    return drawn


def token_weights(logits: Tensor, temperature: float) -> Tensor:
    """exp((logit - highest) / temperature): probabilities up to one factor per row, in fp32."""
    logits, rate = logits.float(), math.log2(math.e) / temperature
    scaled = torch.add(-rate * logits.amax(dim=1, keepdim=True), logits, alpha=rate, out=logits)
    # 2^-115 is 2e-35, never drawn; far below it numbers are denormal, and thirty times slower.
    return scaled.clamp_(min=-115.0).exp2_()  # on a CPU torch's exp takes twice as long


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """weights (B, V), uniforms (B,) fp64 -> (B,): the token at which the cumulative weight passes
    that share of the whole. First the block in which it does, then the token."""
    last = weights.shape[1] - 1
    if padding := -weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, padding))
    blocks = weights.unflatten(1, (-1, BLOCK))  # (B, N, BLOCK)
    sums = blocks.sum(dim=2).double()  # (B, N)
    cumulative = sums.cumsum(dim=1)
    mass = uniforms[:, None] * cumulative[:, -1:]
    block = _passing(cumulative, mass)
    share = (mass - (cumulative - sums).gather(1, block)) / sums.gather(1, block)
    chosen = blocks[torch.arange(len(weights), device=weights.device), block[:, 0]]
    inside = chosen.double().cumsum(dim=1)  # (B, BLOCK)
    return (block * BLOCK + _passing(inside, share * inside[:, -1:]))[:, 0].clamp_(max=last)


def _passing(cumulative: Tensor, mass: Tensor) -> Tensor:
    """The first index of each row whose entry is above the mass; the last, if rounding left none
    above. cumulative (B, n), mass (B, 1) -> (B, 1)."""
    found = torch.searchsorted(cumulative, mass, right=True)
    return found.clamp_(max=cumulative.shape[1] - 1)


def refused(weights: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """The rows of weights (B, V) whose token (B,) is not in the nucleus.

    A sum in fp32 over all tokens as probable as it, or more, clears most rows. Near the edge the
    mass before the token is summed in fp64, so no token depends on the order of additions.
    """
    weight = weights.gather(1, tokens[:, None])
    # 1.0 for tokens as probable or more. As bools they would take three times as long on a CPU.
    at_least = torch.ge(weights, weight, out=torch.empty_like(weights))
    mass = at_least.mul_(weights).sum(dim=1)
    near = mass - weight[:, 0] >= (top_p - 1e-4) * weights.sum(dim=1)
    rows = near.nonzero()[:, 0]
    if not len(rows):
        return rows
    wide = weights[rows].double()
    earlier = torch.arange(weights.shape[1], device=weights.device) < tokens[rows, None]
    weight = wide.gather(1, tokens[rows, None])
    before = ((wide > weight) | ((wide == weight) & earlier)) * wide
    return rows[before.sum(dim=1) >= top_p * wide.sum(dim=1)]


def by_sorting(weights: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """The definition: weights (B, V), uniforms (B,) -> the token of the nucleus, in its order, at
    which the cumulative mass passes that share of the nucleus's."""
    ordered, order = weights.double().sort(dim=1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=1)
    inside = cumulative - ordered < top_p * cumulative[:, -1:]
    last = inside.sum(dim=1, keepdim=True) - 1  # (B, 1)
    drawn = _passing(cumulative, uniforms[:, None] * cumulative.gather(1, last))
    return order.gather(1, drawn.minimum(last))[:, 0]
