"""Invariant 1: loss and gradients depend only on the rows of a step, not on how it is cut up.

    python -m pytest tests/test_invariance.py

Every cut of a step (packs, order, ranks run one after another and summed, pairs split or together,
a rank without work) is compared with an oracle: each row alone, all its logits in float64, the
paper's formulas written out. Tolerance, relative to the norm of each tensor: 1e-12 in float64. In
float32, 1e-6 between two cuts, and 5e-6 to the oracle, because float32 rounds.
"""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from small_step import (
    BETWEEN_CUTS,
    ROWS,
    TO_ORACLE,
    VOCABULARY,
    Rows,
    assert_close,
    data_of,
    gradients,
    objective_of,
    paper_loss,
    row_logps,
    tiny,
)

from redi import logprobs
from redi.batches import TrainData
from redi.checkpoint.reference import _score as reference_logp_sums
from redi.distributed import World
from redi.model import Transformer
from redi.objectives import OBJECTIVES, Totals, make_objective
from redi.packing import pack
from redi.train import held_out

# Every code path of objectives.py. The other objectives share these paths, and are cut one way.
NAMES = ["sft", "redi", "symmetric", "dpo", "simpo", "dpo_norm", "topr", "dft"]
OTHERS = [name for name in OBJECTIVES if name not in NAMES]


# ---------------------------------------------------------------- a model and its rows


# ---------------------------------------------------------------- the oracle


@pytest.fixture(scope="module")
def expected():
    """expected(name, tied) -> (loss, gradients by name) of the oracle, computed once for each."""
    known = {}

    def get(name: str, tied: bool):
        if (name, tied) not in known:
            model, reference = tiny(tied, torch.float64), tiny(tied, torch.float64, seed=9)
            loss = paper_loss(name, model, reference)
            loss.backward()
            known[name, tied] = loss.item(), gradients(model)
        return known[name, tied]

    return get


# ---------------------------------------------------------------- the same step, cut up


def reference_sums(name: str, tied: bool, dtype: torch.dtype) -> torch.Tensor | None:
    data = data_of(name)
    if not data.objective.needs_reference:
        return None
    return reference_logp_sums(tiny(tied, dtype, seed=9), data)


def planned(name: str, model: Transformer, reference, world_size: int, pack_tokens: int) -> float:
    """Loss of the step, gradients left in the model: every rank's share, one after another."""
    loss = 0.0
    for rank in range(world_size):
        data = replace(data_of(name, rank, world_size, pack_tokens), reference=reference)
        step = data.all_rows()
        totals = data.totals(step)
        for batch in data.batches(step, totals):
            result = data.loss(model, batch, totals)
            result.loss.backward()
            assert not result.token_logps.requires_grad
            loss += result.loss.item()
    return loss


def by_hand(name: str, model: Transformer, reference, packs: list[list[int]]) -> float:
    """The same for packs of given sequence ids."""
    data = data_of(name)
    rows, objective = data.dataset, data.objective
    totals = Totals(ROWS, int(rows.response_lengths.sum()))
    loss = 0.0
    for ids in packs:
        sequences = [rows.sequence(i) for i in ids]
        signs = torch.tensor([s.sign for s in sequences])
        lengths = torch.tensor([s.response_length for s in sequences])
        batch = pack(sequences, objective.token_weights(signs, lengths, totals), reference)
        result = objective.loss(model, batch, totals)
        result.loss.backward()
        loss += result.loss.item()
    return loss


def in_one_pack(name: str, tied: bool, dtype: torch.dtype):
    """(loss, gradients) of the step as a single pack."""
    model = tiny(tied, dtype)
    loss = planned(name, model, reference_sums(name, tied, dtype), 1, 1000)
    return loss, gradients(model)


def assert_equal(model: Transformer, loss: float, wanted, tolerance: float) -> None:
    assert_close(gradients(model), loss, wanted, tolerance)


every_precision = pytest.mark.parametrize("dtype", TO_ORACLE, ids=str)
every_objective = pytest.mark.parametrize("name", NAMES)
every_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@every_precision
@every_head
@every_objective
@pytest.mark.parametrize(
    ("world_size", "pack_tokens"),
    [(1, 1000), (1, 40), (1, 1), (2, 1000), (2, 30), (3, 25), (20, 1000)],
    ids=["one pack", "packs", "a pack a piece", "2 ranks", "2 ranks packs", "3 ranks", "20 ranks"],
)
def test_any_plan_gives_the_papers_loss_and_gradients(
    name, tied, dtype, world_size, pack_tokens, expected
):
    model = tiny(tied, dtype)
    loss = planned(name, model, reference_sums(name, tied, dtype), world_size, pack_tokens)
    assert_equal(model, loss, expected(name, tied), TO_ORACLE[dtype])
    assert_equal(model, loss, in_one_pack(name, tied, dtype), BETWEEN_CUTS[dtype])


@every_precision
@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_cut_into_packs_on_two_ranks(name, dtype, expected):
    model = tiny(True, dtype)
    loss = planned(name, model, reference_sums(name, True, dtype), 2, 30)
    assert_equal(model, loss, expected(name, True), TO_ORACLE[dtype])
    assert_equal(model, loss, in_one_pack(name, True, dtype), BETWEEN_CUTS[dtype])


def test_the_cuts_above_are_what_they_say():
    def cut(world_size: int, pack_tokens: int, name: str = "redi"):
        return data_of(name, 0, world_size, pack_tokens).all_rows()

    assert len(cut(1, 1000)[0]) == 1
    assert len(cut(1, 40)[0]) > 1
    assert len(cut(1, 1)[0]) == 2 * ROWS
    assert any(len(packs[-1]) == 0 for packs in cut(20, 1000))  # ranks without work
    where = {int(i): rank for rank, packs in enumerate(cut(2, 30)) for ids in packs for i in ids}
    assert any(where[2 * row] != where[2 * row + 1] for row in range(ROWS))  # a pair split
    sizes = {len(ids) for packs in cut(3, 25) for ids in packs}
    assert len(sizes) > 1  # ragged


@every_precision
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_order_and_any_grouping_equals_the_paper(name, seed, dtype, expected):
    rng = np.random.default_rng(seed)
    objective = objective_of(name)
    pieces = [[i] for i in range(ROWS if name == "sft" else 2 * ROWS)]
    if objective.keep_pairs:
        pieces = [[2 * row, 2 * row + 1] for row in range(ROWS)]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    cuts = np.sort(rng.integers(0, len(pieces) + 1, 3))  # may give empty packs
    packs = [list(chain(*pieces[a:b])) for a, b in zip([0, *cuts], [*cuts, len(pieces)])]
    model = tiny(True, dtype)
    loss = by_hand(name, model, reference_sums(name, True, dtype), packs)
    assert_equal(model, loss, expected(name, True), TO_ORACLE[dtype])
    assert_equal(model, loss, in_one_pack(name, True, dtype), BETWEEN_CUTS[dtype])


@pytest.mark.parametrize("name", ["redi", "symmetric"])
@pytest.mark.parametrize(
    "packs",
    [
        [[2 * r, 2 * r + 1] for r in range(ROWS)],
        [[2 * r for r in range(ROWS)], [2 * r + 1 for r in range(ROWS)]],
        [[i] for i in reversed(range(2 * ROWS))],
    ],
    ids=["pairs together", "chosen here, rejected there", "all apart, backwards"],
)
def test_a_pair_may_be_split_when_the_objective_is_linear(name, packs, expected):
    model = tiny(True, torch.float64)
    assert_equal(model, by_hand(name, model, None, packs), expected(name, True), 1e-12)


@every_objective
def test_chunks_of_the_head_change_nothing(name, expected, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 3 * VOCABULARY * 8)  # 3 rows
    model = tiny(True, torch.float64)
    loss = planned(name, model, reference_sums(name, True, torch.float64), 1, 40)
    assert_equal(model, loss, expected(name, True), 1e-12)


@every_objective
def test_held_out_loss_is_the_papers_loss_over_all_rows(name, expected):
    model = tiny(True, torch.float64)
    reference = reference_sums(name, True, torch.float64)
    data = replace(data_of(name, pack_tokens=30), reference=reference)
    assert held_out(model, data)["loss"] == pytest.approx(expected(name, True)[0], rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reference_log_probs_are_each_rows_own_whatever_the_packs():
    model = tiny(True, torch.float64, seed=9)
    wanted = [row_logps(model, s).sum().item() for s in Rows.draw(paired=True).sequences]
    for pack_tokens in (1, 40, 1000):
        sums = reference_logp_sums(model, data_of("dpo", pack_tokens=pack_tokens))
        np.testing.assert_allclose(sums.reshape(-1).tolist(), wanted, rtol=1e-12)


def test_a_packed_sequence_has_the_log_probs_it_has_alone():
    model = tiny(True, torch.float64)
    data = data_of("redi")
    step = data.all_rows()
    totals = data.totals(step)
    [batch] = data.batches(step, totals)
    logps = data.loss(model, batch, totals).token_logps
    ids = step[0][0]
    for part, i in zip(logps.split(batch.response_lengths), ids):
        alone = row_logps(model, data.dataset.sequence(int(i))).detach()
        torch.testing.assert_close(part, alone, rtol=1e-12, atol=1e-12)


def test_alpha_0_has_no_gradient_from_rejected_traces_but_their_log_probs():
    model = tiny(True, torch.float64)
    objective = make_objective("redi", alpha=0.0)
    data = TrainData(Rows.draw(paired=True), objective, World(0, 1, torch.device("cpu")), 1000)
    step = data.all_rows()
    totals = data.totals(step)
    [batch] = data.batches(step, totals)
    loss, logps, _ = data.loss(model, batch, totals)
    loss.backward()
    rejected = [s for s in data.dataset.sequences if s.sign < 0]
    chosen = [s for s in data.dataset.sequences if s.sign > 0]
    other = tiny(True, torch.float64)
    (-sum(row_logps(other, s).mean() for s in chosen) / ROWS).backward()
    for one, two in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-14)
    assert len(logps) == sum(s.response_length for s in chosen + rejected)
    assert (logps < 0).all()
