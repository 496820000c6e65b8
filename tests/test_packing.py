"""The step plan uses every row once and balances the ranks; a pack shifts and masks by position.

python -m pytest tests/test_packing.py
"""

import math
import operator
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.packing import TokenSequence, pack, plan

# ---------------------------------------------------------------- the plan, worked by hand


def as_lists(steps) -> list:
    return [[[ids.tolist() for ids in packs] for packs in step] for step in steps]


def test_worked_example_of_the_module():
    # 7, then 5 does not fit beside it (12 > 10), then 3 does (10).
    assert as_lists(plan(np.array([7, 5, 3]), 3, 10)) == [[[[0, 2], [1]]]]


def test_longest_first_to_the_rank_with_least_work():
    # 9 -> rank 0; 8 -> rank 1; 3 -> rank 1 (8 < 9); 2 -> rank 0 (9 < 11).
    [[first, second]] = plan(np.array([9, 3, 8, 2]), 4, 100, world_size=2)
    assert [ids.tolist() for ids in first] == [[0, 3]]
    assert [ids.tolist() for ids in second] == [[2, 1]]


def test_best_fit_takes_the_fullest_pack_that_has_room():
    # 15 -> A (5 left); 10 -> B (10 left); 8 -> B (2 left); 2 -> B, though A was there first.
    [[packs]] = plan(np.array([15, 10, 8, 2]), 4, 20)
    assert [ids.tolist() for ids in packs] == [[0], [1, 2, 3]]


def test_a_pair_is_two_sequences_dealt_apart_or_one_piece():
    lengths = np.array([[5, 4], [3, 2]])  # row 0: ids 0 and 1; row 1: ids 2 and 3
    # Apart, two ranks: 5 -> rank 0, 4 -> rank 1, 3 -> rank 1 (4 < 5), 2 -> rank 0 (5 < 7).
    assert as_lists(plan(lengths, 2, 100, world_size=2)) == [[[[0, 3]], [[1, 2]]]]
    # Together: 9 tokens -> rank 0, 5 tokens -> rank 1.
    together = plan(lengths, 2, 100, world_size=2, keep_pairs=True)
    assert as_lists(together) == [[[[0, 1]], [[2, 3]]]]


def test_a_rank_without_work_gets_empty_packs():
    # One row, three ranks: the pack of the busy one, and an empty array on each of the others.
    assert as_lists(plan(np.array([4]), 1, 10, world_size=3)) == [[[[0]], [[]], [[]]]]


def test_a_sequence_over_the_budget_is_alone_in_its_pack():
    [[packs]] = plan(np.array([25, 1, 10]), 3, 10)
    assert [ids.tolist() for ids in packs] == [[0], [2], [1]]


def test_no_rows_make_no_steps():
    assert plan(np.zeros(0, dtype=np.int64), 4, 10) == []
    assert plan(np.zeros((0, 2), dtype=np.int64), 4, 10) == []


@pytest.mark.parametrize("setting", ["rows_per_step", "pack_tokens", "world_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_are_not_positive_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        plan(np.array([3]), **{"rows_per_step": 1, "pack_tokens": 1, setting: value})


# ---------------------------------------------------------------- the plan, whatever the lengths


@st.composite
def arguments(draw) -> dict:
    rows = draw(st.integers(1, 60))
    paired = draw(st.booleans())
    count = 2 * rows if paired else rows
    lengths = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    return {
        "lengths": np.array(lengths).reshape(rows, 2) if paired else np.array(lengths),
        "rows_per_step": draw(st.integers(1, 70)),
        "pack_tokens": draw(st.integers(1, 120)),
        "world_size": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 5)),
        "epoch": draw(st.integers(0, 5)),
        "keep_pairs": paired and draw(st.booleans()),
    }


def ids_of(step) -> list[int]:
    return [int(i) for packs in step for ids in packs for i in ids]


def rows_of(step, lengths: np.ndarray) -> list[int]:
    ids = ids_of(step)
    return sorted({i // 2 for i in ids}) if lengths.ndim == 2 else sorted(ids)


@given(arguments())
def test_every_sequence_is_used_once_an_epoch(given_arguments):
    used = Counter(i for step in plan(**given_arguments) for i in ids_of(step))
    assert used == Counter(range(given_arguments["lengths"].size))


@given(arguments())
def test_every_step_has_its_rows_and_the_last_one_the_rest(given_arguments):
    lengths, per_step = given_arguments["lengths"], given_arguments["rows_per_step"]
    steps = plan(**given_arguments)
    counts = [len(rows_of(step, lengths)) for step in steps]
    assert len(steps) == math.ceil(len(lengths) / per_step)
    assert counts[:-1] == [per_step] * (len(steps) - 1)
    assert counts[-1] == len(lengths) - per_step * (len(steps) - 1)
    if lengths.ndim == 2:  # both sequences of a row in one step
        for step in steps:
            assert Counter(i // 2 for i in ids_of(step)) == dict.fromkeys(rows_of(step, lengths), 2)


@given(arguments())
def test_a_pack_is_within_the_budget_unless_it_is_one_piece(given_arguments):
    flat = given_arguments["lengths"].reshape(-1)
    largest_piece = 2 if given_arguments["keep_pairs"] else 1
    for step in plan(**given_arguments):
        for packs in step:
            for ids in packs:
                within = flat[ids].sum() <= given_arguments["pack_tokens"]
                assert within or len(ids) == largest_piece


@given(arguments())
def test_all_ranks_run_the_same_number_of_packs(given_arguments):
    for step in plan(**given_arguments):
        assert len(step) == given_arguments["world_size"]
        assert len({len(packs) for packs in step}) == 1
        # and none of them is empty everywhere
        for place in zip(*step):
            assert sum(map(len, place)) > 0


@given(arguments())
def test_packs_are_arrays_of_integers_the_empty_ones_too(given_arguments):
    for step in plan(**given_arguments):
        for packs in step:
            assert all(isinstance(ids, np.ndarray) and ids.dtype == np.int64 for ids in packs)


@given(arguments())
def test_kept_pairs_are_in_one_pack_chosen_then_rejected(given_arguments):
    lengths = (
        given_arguments["lengths"].reshape(-1, 2)
        if (given_arguments["lengths"].size % 2 == 0)
        else np.ones((3, 2), dtype=np.int64)
    )
    for step in plan(**{**given_arguments, "lengths": lengths, "keep_pairs": True}):
        for packs in step:
            for ids in packs:
                assert (ids[0::2] % 2 == 0).all()
                assert (ids[1::2] == ids[0::2] + 1).all()


@given(arguments())
def test_the_same_arguments_give_the_same_plan(given_arguments):
    before = given_arguments["lengths"].copy()
    state = np.random.get_state()[1].copy()
    assert as_lists(plan(**given_arguments)) == as_lists(plan(**given_arguments))
    assert np.array_equal(given_arguments["lengths"], before)
    assert np.array_equal(np.random.get_state()[1], state)


@given(arguments(), st.integers(1, 8), st.integers(1, 200))
def test_which_rows_share_a_step_depends_on_neither_ranks_nor_packs(
    given_arguments, world_size, pack_tokens
):
    lengths = given_arguments["lengths"]
    changed = {**given_arguments, "world_size": world_size, "pack_tokens": pack_tokens}
    assert [rows_of(s, lengths) for s in plan(**given_arguments)] == [
        rows_of(s, lengths) for s in plan(**changed)
    ]


def test_epochs_and_seeds_shuffle_differently():
    lengths = np.ones(64, dtype=np.int64)

    def order(**changes):
        return [rows_of(step, lengths) for step in plan(lengths, 8, 100, **changes)]

    plans = [order(seed=seed, epoch=epoch) for seed in (0, 1, 42) for epoch in (0, 1, 2)]
    for number, one in enumerate(plans):
        assert all(one != other for other in plans[number + 1 :])
    assert order(seed=42, epoch=0) != [list(range(i, i + 8)) for i in range(0, 64, 8)]


# ---------------------------------------------------------------- balance


def cost(length: np.ndarray) -> np.ndarray:
    """Forward and backward FLOPs of a sequence, in tokens: attention 3.5 x 86 kFLOP x L^2 over
    9.26 GFLOP per token of matmuls (Qwen2.5-1.5B)."""
    return length + 3.5 * 86e3 / 9.26e9 * length.astype(np.float64) ** 2


def traces(rows: int, mean: float, longest: int, seed: int) -> np.ndarray:
    """Log-normal lengths, coefficient of variation 0.8: sigma^2 = ln(1 + 0.64)."""
    sigma2 = math.log(1.64)
    draw = np.random.default_rng(seed).lognormal(math.log(mean) - sigma2 / 2, sigma2**0.5, rows)
    return draw.astype(np.int64).clip(50, longest)


def balance(steps, lengths: np.ndarray) -> float:
    """Mean work over the work of the busiest rank, averaged over steps of equal size."""
    flat, ratios = lengths.reshape(-1), []
    for step in steps:
        work = np.array([sum(cost(flat[ids]).sum() for ids in packs) for packs in step])
        ratios.append(work.mean() / work.max())
    return float(np.mean(ratios))


def test_8_ranks_share_128_traces_evenly():
    lengths = traces(128 * 100, 5704, 32_768, seed=0)
    steps = plan(lengths, 128, 32_768, world_size=8)
    assert balance(steps, lengths) >= 0.99


def test_8_ranks_share_32_pairs_evenly():
    lengths = np.stack([traces(32 * 200, mean, 19_100, seed=1) for mean in (4981, 6137)], axis=1)
    rng = np.random.default_rng(2)
    lengths[:, 1] = rng.permutation(lengths[:, 1])
    steps = plan(lengths, 32, 32_768, world_size=8)
    assert balance(steps, lengths) >= 0.98


def test_ranks_run_at_most_one_pack_more_than_the_tokens_need():
    lengths = traces(128 * 100, 5704, 32_768, seed=3)
    for step in plan(lengths, 128, 32_768, world_size=8):
        needed = math.ceil(lengths[ids_of(step)].sum() / 8 / 32_768)
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


def test_documents_of_5_3_and_7_tokens_begin_at_0_5_8_15():
    batch = pack(THREE, WEIGHTS)
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 15]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == [5, 3, 7]
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, *range(30, 37)]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_a_response_is_predicted_one_token_earlier_in_its_own_document():
    batch = pack(THREE, WEIGHTS)
    # Document 0 at 0..4, response 12 13 14 at 2 3 4, predicted at 1 2 3.
    # Document 1 at 5..7, response 21 22 at 6 7, predicted at 5 6.
    # Document 2 at 8..14, response 34 35 36 at 12 13 14, predicted at 11 12 13.
    assert batch.rows.tolist() == [1, 2, 3, 5, 6, 11, 12, 13]
    assert batch.targets.tolist() == [12, 13, 14, 21, 22, 34, 35, 36]
    assert batch.response_lengths == [3, 2, 3]
    # The last tokens of the documents, at 4, 7 and 14, predict nothing.
    assert not {4, 7, 14} & set(batch.rows.tolist())


def test_every_token_of_a_sequence_has_its_weight():
    batch = pack(THREE, WEIGHTS)
    assert batch.token_weights.tolist() == [-0.1] * 3 + [0.2] * 2 + [-0.3] * 3
    assert batch.token_weights.dtype == torch.float64
    assert (batch.row_ids, batch.signs) == ([8, 3, 5], [1, -1, 1])


def test_the_modules_example_of_a_pack():
    # a0 .. a6 and c0 c1 c2; a's response a4 a5 a6 is predicted at rows 3, 4, 5.
    batch = pack([sequence(list(range(7)), 4), sequence([50, 51, 52], 2)], WEIGHTS[:2])
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 7, 10]
    assert batch.rows.tolist() == [3, 4, 5, 8]
    assert batch.targets.tolist() == [4, 5, 6, 52]


def test_masks_are_by_position_though_all_tokens_are_equal():
    # All ids equal, the stop token's included: only positions can tell prompt from response.
    batch = pack([sequence([7] * 6, 4), sequence([7] * 3, 1)], WEIGHTS[:2])
    assert batch.rows.tolist() == [3, 4, 6, 7]
    assert batch.targets.tolist() == [7, 7, 7, 7]


documents = st.lists(
    st.integers(1, 12).flatmap(lambda p: st.tuples(st.just(p), st.integers(1, 12))),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(documents)
def test_rows_and_targets_are_those_of_each_document_alone(shapes):
    sequences = [
        sequence(list(range(100 * i, 100 * i + p + r)), p, row=i) for i, (p, r) in enumerate(shapes)
    ]
    batch = pack(sequences, torch.arange(len(shapes), dtype=torch.float64))
    # Token ids name document and place, so the next token of a row is one more.
    predicted_from = batch.tokens[batch.rows]
    assert torch.equal(predicted_from + 1, batch.targets)
    assert torch.equal(batch.targets // 100, predicted_from // 100)
    ends = [sum(p + r for p, r in shapes[: i + 1]) for i in range(len(shapes))]
    assert batch.cu_seqlens.tolist() == [0, *ends]
    assert len(batch.tokens) == ends[-1]
    for (begin, end), (p, _), weight in zip(
        pairwise(batch.cu_seqlens.tolist()), shapes, range(len(shapes))
    ):
        mine = (batch.rows >= begin) & (batch.rows < end)
        assert batch.rows[mine].tolist() == list(range(begin + p - 1, end - 1))
        assert set(batch.token_weights[mine].tolist()) == {float(weight)}


def test_a_sequence_without_a_prompt_is_refused():
    """Its first token would be predicted by the last one of the document before it."""
    headless = TokenSequence(tokens=np.arange(3), prompt_length=0, row=0, sign=1)
    with pytest.raises(ValueError, match="prompt"):
        pack([headless], torch.ones(1))


def test_a_pack_of_nothing_is_one_token_that_teaches_nothing():
    batch = pack([], torch.zeros(0, dtype=torch.float64))
    assert len(batch.tokens) == len(batch.positions) == 1
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.lengths == [1]
    for tensor in (batch.rows, batch.targets, batch.token_weights):
        assert tensor.shape == (0,)
    assert batch.row_ids == batch.signs == batch.response_lengths == []
    full = pack(THREE, WEIGHTS)
    for name, value in vars(full).items():
        if isinstance(value, torch.Tensor):
            assert getattr(batch, name).dtype == value.dtype


def test_to_a_device_keeps_everything():
    batch = pack(THREE, WEIGHTS)
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert same(getattr(moved, name), value)


def test_a_pack_of_pairs_has_the_sums_and_means_of_the_reference():
    lengths = [[2, 4], [5, 8]]  # |y| of the chosen and the rejected trace of rows 2 and 0
    pairs = [
        TokenSequence(np.zeros(n + 1, dtype=np.int32), 1, row, sign)
        for row, both in zip([2, 0], lengths)
        for n, sign in zip(both, [1, -1])
    ]
    reference = torch.tensor([[-10.0, -20.0], [7.0, 7.0], [-1.0, -3.0]], dtype=torch.float64)
    batch = pack(pairs, torch.zeros(4), reference)
    assert batch.reference.tolist() == [[-1.0, -3.0, -10.0, -20.0], [-0.5, -0.75, -2.0, -2.5]]
    assert pack(pairs, torch.zeros(4)).reference is None


def test_of_several_turns_only_the_answers_are_predicted():
    """Prompt 10 11, answer 12 13, a question 14 15, answer 16 17; after a document of 3 tokens."""
    learned = np.array([True, True, False, False, True, True])
    turns = TokenSequence(np.arange(10, 18), prompt_length=2, row=1, sign=1, learned=learned)
    first = TokenSequence(np.array([1, 2, 3]), prompt_length=1, row=0, sign=1)
    batch = pack([first, turns], torch.tensor([1.0, 0.5]))
    assert batch.targets.tolist() == [2, 3, 12, 13, 16, 17]
    assert batch.rows.tolist() == [0, 1, 3 + 1, 3 + 2, 3 + 5, 3 + 6]
    assert batch.tokens[batch.rows].tolist() == [1, 2, 11, 12, 15, 16]
    assert batch.response_lengths == [2, 4] == [first.response_length, turns.response_length]
    assert batch.token_weights.tolist() == [1.0] * 2 + [0.5] * 4
