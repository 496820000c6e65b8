"""The step plan uses every row once and balances the ranks; a pack shifts and masks by position."""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.packing import TokenSequence, pack, plan

# ---------------------------------------------------------------- the plan, worked by hand


def as_lists(steps) -> list:
    return [[[ids.tolist() for ids in packs] for packs in step] for step in steps]


PAIRS = np.array([[5, 4], [3, 2]])  # row 0: ids 0 and 1; row 1: ids 2 and 3
WORKED = {
    # 7, then 5 does not fit beside it (12 > 10), then 3 does (10).
    "the module's example": ((np.array([7, 5, 3]), 3, 10), [[[[0, 2], [1]]]]),
    # 9 -> rank 0; 8 -> rank 1; 3 -> rank 1 (8 < 9); 2 -> rank 0 (9 < 11).
    "longest first, to the rank with least work": (
        (np.array([9, 3, 8, 2]), 4, 100, 2), [[[[0, 3]], [[2, 1]]]],
    ),
    # 15 -> A (5 left); 10 -> B (10 left); 8 -> B (2 left); 2 -> B, though A was there first.
    "the fullest pack that has room": ((np.array([15, 10, 8, 2]), 4, 20), [[[[0], [1, 2, 3]]]]),
    # 5 -> rank 0, 4 -> rank 1, 3 -> rank 1 (4 < 5), 2 -> rank 0 (5 < 7).
    "pairs apart": ((PAIRS, 2, 100, 2), [[[[0, 3]], [[1, 2]]]]),
    # 9 tokens -> rank 0, 5 tokens -> rank 1.
    "pairs together": ((PAIRS, 2, 100, 2, 42, 0, True), [[[[0, 1]], [[2, 3]]]]),
    "ranks without work": ((np.array([4]), 1, 10, 3), [[[[0]], [[]], [[]]]]),
    "a sequence over the budget is alone": ((np.array([25, 1, 10]), 3, 10), [[[[0], [2], [1]]]]),
    "no rows": ((np.zeros(0, dtype=np.int64), 4, 10), []),
    "no pairs": ((np.zeros((0, 2), dtype=np.int64), 4, 10), []),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKED)
def test_a_step_worked_by_hand(case):
    arguments, steps = WORKED[case]
    assert as_lists(plan(*arguments)) == steps


# ---------------------------------------------------------------- the plan for any lengths


LENGTH = st.integers(1, 50)
ROWS = st.lists(LENGTH, min_size=1, max_size=60)
PAIRED_ROWS = st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=60)
ARGUMENTS = st.fixed_dictionaries(
    {
        "lengths": st.one_of(ROWS, PAIRED_ROWS).map(np.array),
        "rows_per_step": st.integers(1, 70),
        "pack_tokens": st.integers(1, 120),
        "world_size": st.integers(1, 5),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 5),
        "keep_pairs": st.booleans(),
    }
)


def ids_of(step) -> list[int]:
    return [int(i) for packs in step for ids in packs for i in ids]


def rows_of(step, lengths: np.ndarray) -> list[int]:
    ids = ids_of(step)
    return sorted({i // 2 for i in ids}) if lengths.ndim == 2 else sorted(ids)


@given(ARGUMENTS)
def test_every_sequence_is_used_once_in_full_steps_of_packs_within_the_budget(drawn):
    lengths, per_step = drawn["lengths"], drawn["rows_per_step"]
    kept = drawn["keep_pairs"] and lengths.ndim == 2
    steps, flat = plan(**drawn), lengths.reshape(-1)
    assert Counter(i for step in steps for i in ids_of(step)) == Counter(range(lengths.size))
    counts = [len(rows_of(step, lengths)) for step in steps]
    assert len(steps) == math.ceil(len(lengths) / per_step)
    assert counts[:-1] == [per_step] * (len(steps) - 1)
    # Both sequences of a row are in one step.
    assert [len(ids_of(step)) for step in steps] == [n * lengths.ndim for n in counts]
    for step in steps:
        assert len(step) == drawn["world_size"]
        assert len({len(packs) for packs in step}) == 1
        assert all(sum(map(len, same_place)) > 0 for same_place in zip(*step))  # one has work
        for ids in (ids for packs in step for ids in packs):
            assert ids.dtype == np.int64
            assert flat[ids].sum() <= drawn["pack_tokens"] or len(ids) == 1 + kept
            if kept:  # chosen, then rejected
                assert (ids[0::2] % 2 == 0).all()
                assert (ids[1::2] == ids[0::2] + 1).all()


@given(ARGUMENTS, st.integers(1, 8), st.integers(1, 200))
def test_a_plan_depends_on_its_arguments_and_a_steps_rows_on_neither_ranks_nor_packs(
    drawn, world_size, pack_tokens
):
    lengths, before = drawn["lengths"], drawn["lengths"].copy()
    first = plan(**drawn)
    assert as_lists(first) == as_lists(plan(**drawn))
    assert np.array_equal(lengths, before)
    changed = plan(**{**drawn, "world_size": world_size, "pack_tokens": pack_tokens})
    assert [rows_of(step, lengths) for step in first] == [rows_of(s, lengths) for s in changed]


def test_epochs_and_seeds_shuffle_differently():
    lengths = np.ones(64, dtype=np.int64)

    def order(**changes):
        return [rows_of(step, lengths) for step in plan(lengths, 8, 100, **changes)]

    plans = [order(seed=seed, epoch=epoch) for seed in (0, 1, 42) for epoch in (0, 1, 2)]
    assert all(one != other for one, other in combinations(plans, 2))
    assert order(seed=42, epoch=0) != [list(range(i, i + 8)) for i in range(0, 64, 8)]


# ---------------------------------------------------------------- balance


def work(packs: list[np.ndarray], lengths: np.ndarray) -> float:
    """Forward and backward FLOPs, in tokens: attention 3.5 x 86 kFLOP x L^2 over 9.26 GFLOP per
    token of matmuls (Qwen2.5-1.5B)."""
    held = lengths.reshape(-1)[np.concatenate(packs)].astype(np.float64)
    return (held + 3.5 * 86e3 / 9.26e9 * held**2).sum()


def traces(rows: int, mean: float, longest: int, seed: int) -> np.ndarray:
    """Log-normal lengths, coefficient of variation 0.8: sigma^2 = ln(1 + 0.64)."""
    sigma2 = math.log(1.64)
    draw = np.random.default_rng(seed).lognormal(math.log(mean) - sigma2 / 2, sigma2**0.5, rows)
    return draw.astype(np.int64).clip(50, longest)


CHOSEN, REJECTED = (traces(32 * 200, mean, 19_100, seed=1) for mean in (4981, 6137))


@pytest.mark.parametrize(
    ("lengths", "rows_per_step", "even"),
    [
        (traces(128 * 100, 5704, 32_768, seed=0), 128, 0.99),
        (traces(128 * 100, 5704, 32_768, seed=3), 128, 0.99),
        (np.stack([CHOSEN, np.random.default_rng(2).permutation(REJECTED)], axis=1), 32, 0.98),
    ],
    ids=["traces", "other traces", "pairs"],
)
def test_8_ranks_share_a_step_evenly_in_at_most_one_pack_more_than_tokens_need(
    lengths, rows_per_step, even
):
    steps = plan(lengths, rows_per_step, 32_768, world_size=8)
    works = np.array([[work(packs, lengths) for packs in step] for step in steps])
    assert (works.mean(axis=1) / works.max(axis=1)).mean() >= even
    for step in steps:
        needed = math.ceil(lengths.reshape(-1)[ids_of(step)].sum() / 8 / 32_768)
        assert len(step[0]) <= needed + 1


# ---------------------------------------------------------------- a pack as tensors


def sequence(tokens: list[int], prompt_length: int, row: int = 0, sign: int = 1) -> TokenSequence:
    return TokenSequence(np.array(tokens, dtype=np.int32), prompt_length, row, sign)


# 5, 3 and 7 tokens; prompts of 2, 1 and 4.
THREE = [
    sequence([10, 11, 12, 13, 14], 2, row=8),
    sequence([20, 21, 22], 1, row=3, sign=-1),
    sequence([30, 31, 32, 33, 34, 35, 36], 4, row=5),
]
WEIGHTS = torch.tensor([-0.1, 0.2, -0.3], dtype=torch.float64)


def test_documents_of_5_3_and_7_tokens_begin_at_0_5_8_15_and_predict_their_own():
    batch = pack(THREE, WEIGHTS)
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 15]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == [5, 3, 7]
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, *range(30, 37)]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    # Document 0 at 0..4, response 12 13 14 at 2 3 4, predicted at 1 2 3.
    # Document 1 at 5..7, response 21 22 at 6 7, predicted at 5 6.
    # Document 2 at 8..14, response 34 35 36 at 12 13 14, predicted at 11 12 13.
    # The last tokens of the documents, at 4, 7 and 14, predict nothing.
    assert batch.rows.tolist() == [1, 2, 3, 5, 6, 11, 12, 13]
    assert batch.targets.tolist() == [12, 13, 14, 21, 22, 34, 35, 36]
    assert batch.response_lengths == [3, 2, 3]
    assert batch.token_weights.tolist() == [-0.1] * 3 + [0.2] * 2 + [-0.3] * 3
    assert batch.token_weights.dtype == torch.float64
    assert (batch.row_ids, batch.signs) == ([8, 3, 5], [1, -1, 1])


document = st.tuples(st.integers(1, 12), st.integers(1, 12))  # lengths of prompt and response


@settings(max_examples=60)
@given(st.lists(document, min_size=1, max_size=8))
def test_rows_and_targets_are_those_of_each_document_alone(shapes):
    sequences = [
        sequence(list(range(100 * i, 100 * i + p + r)), p, row=i) for i, (p, r) in enumerate(shapes)
    ]
    batch = pack(sequences, torch.arange(len(shapes), dtype=torch.float64))
    # Token ids name document and position, so the next token of a row is one more.
    predicted_from = batch.tokens[batch.rows]
    assert torch.equal(predicted_from + 1, batch.targets)
    assert torch.equal(batch.targets // 100, predicted_from // 100)
    ends = [sum(p + r for p, r in shapes[: i + 1]) for i in range(len(shapes))]
    assert batch.cu_seqlens.tolist() == [0, *ends]
    assert len(batch.tokens) == ends[-1]
    for weight, ((begin, end), (p, _)) in enumerate(zip(pairwise([0, *ends]), shapes)):
        inside = (batch.rows >= begin) & (batch.rows < end)
        assert batch.rows[inside].tolist() == list(range(begin + p - 1, end - 1))
        assert set(batch.token_weights[inside].tolist()) == {float(weight)}


def test_a_sequence_without_a_prompt_is_refused():
    """Its first token would be predicted by the last one of the document before it."""
    with pytest.raises(ValueError, match="prompt"):
        pack([sequence([0, 1, 2], prompt_length=0)], torch.ones(1))


def test_a_pack_of_nothing_is_one_token_that_teaches_nothing():
    batch = pack([], torch.zeros(0, dtype=torch.float64))
    assert len(batch.tokens) == len(batch.positions) == 1
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.lengths == [1]
    for tensor in (batch.rows, batch.targets, batch.token_weights):
        assert tensor.shape == (0,)
    assert batch.row_ids == batch.signs == batch.response_lengths == []
    for name, value in vars(pack(THREE, WEIGHTS)).items():
        if isinstance(value, torch.Tensor):
            assert getattr(batch, name).dtype == value.dtype


def test_a_pack_of_pairs_has_the_sums_and_means_of_the_reference():
    # |y| 2 and 4 in row 2, 5 and 8 in row 0
    shapes = [(2, 2, 1), (4, 2, -1), (5, 0, 1), (8, 0, -1)]
    pairs = [sequence([0] * (n + 1), 1, row, sign) for n, row, sign in shapes]
    reference = torch.tensor([[-10.0, -20.0], [7.0, 7.0], [-1.0, -3.0]], dtype=torch.float64)
    batch = pack(pairs, torch.zeros(4), reference)
    assert batch.reference.tolist() == [[-1.0, -3.0, -10.0, -20.0], [-0.5, -0.75, -2.0, -2.5]]
    assert pack(pairs, torch.zeros(4)).reference is None
    # All tokens are equal: only positions can tell a prompt from a response.
    assert batch.rows.tolist() == [0, 1, *range(3, 7), *range(8, 13), *range(14, 22)]


def test_of_several_turns_only_the_answers_are_predicted():
    """Prompt 10 11, answer 12 13, a question 14 15, answer 16 17; after a document of 3 tokens."""
    learned = np.array([True, True, False, False, True, True])
    turns = TokenSequence(np.arange(10, 18), prompt_length=2, row=1, sign=1, learned=learned)
    first = sequence([1, 2, 3], prompt_length=1)
    batch = pack([first, turns], torch.tensor([1.0, 0.5]))
    assert batch.targets.tolist() == [2, 3, 12, 13, 16, 17]
    assert batch.rows.tolist() == [0, 1, 3 + 1, 3 + 2, 3 + 5, 3 + 6]
    assert batch.tokens[batch.rows].tolist() == [1, 2, 11, 12, 15, 16]
    assert batch.response_lengths == [2, 4] == [len(s.supervised()) for s in (first, turns)]
    assert batch.token_weights.tolist() == [1.0] * 2 + [0.5] * 4
