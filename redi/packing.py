"""Which sequences share a step, a rank and a pack; and a pack as tensors.

Inside a step, any sequence can be in any pack on any rank, because losses are sums with whole-step
weights. So, step by step:

    1. shuffle the rows by (seed, epoch) and cut them into steps of `rows_per_step`
    2. deal the step's sequences to ranks, longest first, each to the rank with the least work
    3. on each rank, put them into packs of at most `pack_tokens`, longest first, best fit
    4. give every rank the same number of packs, which collectives need; some may be empty

Worked example: rows of 7, 5 and 3 tokens, one step, one rank, packs of 10:

    plan    [[ [array([0, 2]), array([1])] ]]                    step, rank, pack
    pack 0  tokens     a0 a1 a2 a3 a4 a5 a6 c0 c1 c2             T = 10
            positions   0  1  2  3  4  5  6  0  1  2
            cu_seqlens [0, 7, 10]

For pairs, row p has two sequences: 2p is the chosen one, 2p + 1 the rejected one. They are dealt
separately, unless `keep_pairs`: a sigmoid over the pair needs both in one pack.

If a has 4 prompt tokens, its response a4 a5 a6 is predicted at rows 3, 4, 5. Targets are shifted
within a sequence before it is packed, so no document predicts the next one's first token.

Every rank computes the same plan, and a resumed run needs no saved state. Left out: packing across
steps (it would change which rows share a step). Letters: N rows, T packed tokens, S sequences of a
pack, L tokens of a sequence, R supervised (response) tokens.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

StepPlan = list[list[np.ndarray]]  # rank -> packs (ids of sequences), as many on every rank

# Work of a sequence in units of one token: L + ATTENTION * L^2, by FLOPs of Qwen2.5-1.5B: attention
# 3.5 * 2 * D * layers per token pair (86e3 = 2 * 1,536 * 28), matmuls 9.26e9 per token.
ATTENTION = 3.5 * 86e3 / 9.26e9


def plan(
    lengths: np.ndarray,
    rows_per_step: int,
    pack_tokens: int,
    world_size: int = 1,
    seed: int = 42,
    epoch: int = 0,
    keep_pairs: bool = False,
) -> list[StepPlan]:
    """plan[step][rank] = list of packs, each an array of sequence ids.

    lengths (N,): tokens of each row, whose sequence id is the row; or (N, 2): tokens of the chosen
    and the rejected sequence, with ids 2 * row and 2 * row + 1. A pack holds at most pack_tokens; a
    longer sequence (with keep_pairs: pair) gets a pack of its own. Every row is used exactly once;
    the last step may be smaller, and some packs may be empty arrays.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    starts = range(0, len(order), rows_per_step)
    all_ids = np.arange(lengths.size).reshape(lengths.shape)  # (N,) or (N, 2)
    steps = []
    for start in starts:
        ids = all_ids[order[start : start + rows_per_step]]
        ids = ids.reshape(len(ids) if keep_pairs else ids.size, -1)  # one piece in each row
        sizes = lengths.reshape(-1)[ids].sum(axis=1)
        # Longest first; ties by id, so the order is unique.
        pieces = sorted(zip(sizes.tolist(), ids.tolist()), key=lambda piece: (-piece[0], piece[1]))
        steps.append(_plan_step(pieces, pack_tokens, world_size))
    return steps


def _plan_step(pieces: list[tuple[int, list]], pack_tokens: int, world_size: int) -> StepPlan:
    """Deal (length, sequence ids) pieces, longest first, to ranks and packs."""
    dealt: list[list] = [[] for _ in range(world_size)]
    work = [(0.0, rank) for rank in range(world_size)]  # a heap
    for length, ids in pieces:
        so_far, rank = heapq.heappop(work)
        dealt[rank].append((length, ids))
        heapq.heappush(work, (so_far + length + ATTENTION * length**2, rank))
    packed = [_best_fit(of_rank, pack_tokens) for of_rank in dealt]
    most = max(len(packs) for packs in packed)
    return [
        [np.array(ids, dtype=np.int64) for ids in packs + [[]] * (most - len(packs))]
        for packs in packed
    ]


def _best_fit(pieces: list[tuple[int, list]], pack_tokens: int) -> list[list]:
    """Put each piece, longest first, into the fullest pack that still has room for it."""
    packs: list[list] = []
    free: list[tuple[int, int]] = []  # (room, index), sorted: a whole epoch may be one step
    for length, ids in pieces:
        fitting = bisect.bisect_left(free, (length,))
        if fitting < len(free):
            room, index = free.pop(fitting)
        else:
            room, index = pack_tokens, len(packs)
            packs.append([])
        packs[index].extend(ids)
        bisect.insort(free, (room - length, index))
    return packs


@dataclass(frozen=True)
class PackedBatch:
    """One pack, as the model and the loss see it. Lists are on the host, where reading them does
    not wait for the device."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in every document
    cu_seqlens: Tensor  # (S+1,) int32, where each document begins, and T
    lengths: list[int]  # S, tokens of each document
    rows: Tensor  # (R,) int64, the position before each supervised token: it predicts the token
    targets: Tensor  # (R,) int64
    token_weights: Tensor  # (R,) float64, d loss / d log-prob for a linear objective
    sequence_weights: Tensor  # (S,) float64, the objective's, times that of the sequence's row
    row_ids: list[int]  # S, the row of the Dataset that each sequence comes from
    signs: list[int]  # S, +1 chosen or right, -1 rejected or wrong
    response_lengths: list[int]  # S, |y|: supervised tokens of each sequence
    reference: Tensor | None = None  # (2, S) float64: the reference model's log-prob sums and means

    def to(self, device: torch.device) -> "PackedBatch":
        """The same pack with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: to_device(value, device) for name, value in tensors.items()})


def to_device(values: Tensor | np.ndarray | Sequence, device: torch.device) -> Tensor:
    """Copy host values to the device (a CPU shares their memory). Copying from memory that is not
    pinned would make the host wait for all work launched before."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class TokenSequence:
    """A tokenized prompt and response, the stop token last."""

    tokens: np.ndarray  # (L,)
    prompt_length: int
    row: int
    sign: int  # +1 chosen or right (and every SFT trace), -1 rejected or wrong
    learned: np.ndarray | None = None  # (L - prompt_length,) bool; None: the whole response
    weight: float = 1.0  # of its row

    def supervised(self) -> np.ndarray:
        """(|y|,) positions of the supervised tokens."""
        positions = np.arange(self.prompt_length, len(self.tokens))
        return positions if self.learned is None else positions[self.learned]


def pack(
    sequences: list[TokenSequence], weights: Tensor, reference_sums: Tensor | None = None
) -> PackedBatch:
    """Concatenate sequences. weights (S,): the objective's weight of each sequence, which pack
    multiplies by that of its row. reference_sums (N, 2): the reference model's log-prob sums of all
    N pairs; then sequences are whole pairs, and the pack's `reference` is their sums and means,
    (2, S). An empty list gives an empty pack: one token, not supervised. Raises ValueError for a
    sequence without a prompt: the document before it would predict its first token."""
    if any(s.prompt_length < 1 for s in sequences):
        raise ValueError("a sequence needs a prompt of at least one token")
    tokens = [s.tokens for s in sequences] or [np.zeros(1, dtype=np.int64)]
    lengths = [len(document) for document in tokens]
    cu_seqlens = np.cumsum([0, *lengths])
    supervised = [s.supervised() for s in sequences]
    response_lengths = [len(positions) for positions in supervised]
    rows = [start + positions - 1 for positions, start in zip(supervised, cu_seqlens)]
    targets = [s.tokens[positions] for s, positions in zip(sequences, supervised)]
    row_ids = [s.row for s in sequences]
    weights = weights * torch.tensor([s.weight for s in sequences], dtype=torch.float64)
    repeats = torch.tensor(response_lengths, dtype=torch.int64)
    reference = None
    if reference_sums is not None:
        sums = reference_sums[row_ids[0::2]].reshape(-1)  # (S,)
        reference = torch.stack([sums, sums / repeats])
    return PackedBatch(
        tokens=_concatenate(tokens),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths=lengths,
        rows=_concatenate(rows),
        targets=_concatenate(targets),
        token_weights=weights.repeat_interleave(repeats),
        sequence_weights=weights,
        row_ids=row_ids,
        signs=[s.sign for s in sequences],
        response_lengths=response_lengths,
        reference=reference,
    )


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    """As int64; of no parts, an empty tensor."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))
