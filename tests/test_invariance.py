"""Invariant 1: loss and gradients depend only on the rows of a step, not on how it is cut up.

Every cut of a step (packs, order, ranks run one after another and summed, pairs split or together,
a rank without work) is compared with an oracle: each row alone, all its logits in float64, the
paper's formulas written out. Tolerance, relative to the norm of each tensor: 1e-12 in float64. In
float32, 1e-6 between two cuts, and 5e-6 to the oracle, because float32 rounds.
"""

from dataclasses import replace
from functools import cache
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from small_step import (
    BETWEEN_CUTS,
    ROWS,
    TO_ORACLE,
    assert_close,
    backward,
    data_of,
    gradients,
    objective_of,
    paper_loss,
    row_logps,
    rows_of,
    tiny,
)

from redi.batches import TrainData
from redi.checkpoint.reference import _score as reference_logp_sums
from redi.model import Transformer
from redi.objectives import OBJECTIVES
from redi.packing import StepPlan
from redi.train import held_out

# Every code path of objectives.py. The other objectives share these paths, and are cut one way.
NAMES = ["sft", "redi", "symmetric", "dpo", "simpo", "dpo_norm", "topr", "dft", "asymre", "uft"]
OTHERS = [name for name in OBJECTIVES if name not in NAMES]


@cache
def oracle(name: str, tied: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name, as the paper states them."""
    model, reference = tiny(tied, torch.float64), tiny(tied, torch.float64, seed=9)
    loss = paper_loss(name, model, reference)
    loss.backward()
    return loss.item(), gradients(model)


@cache
def in_one_pack(name: str, tied: bool, dtype: torch.dtype) -> tuple[float, dict]:
    model = tiny(tied, dtype)
    return on_ranks(name, model, 1, 1000), gradients(model)


def assert_invariant(name: str, model: Transformer, loss: float) -> None:
    """The model's gradients and this loss are those of the oracle, and of a single pack."""
    tied, dtype = model.config.tied, model.output_weight.dtype
    assert_close(gradients(model), loss, oracle(name, tied), TO_ORACLE[dtype])
    assert_close(gradients(model), loss, in_one_pack(name, tied, dtype), BETWEEN_CUTS[dtype])


# ---------------------------------------------------------------- a step, cut up


@cache
def reference_sums(tied: bool, dtype: torch.dtype) -> torch.Tensor:
    return reference_logp_sums(tiny(tied, dtype, seed=9), data_of("dpo"))


def on_ranks(name: str, model: Transformer, world_size: int, pack_tokens: int) -> float:
    """Loss of the step as it is planned: every rank's share, one after another."""
    ranks = [data_of(name, rank, world_size, pack_tokens) for rank in range(world_size)]
    return sum(summed(model, data, data.all_rows()) for data in ranks)


def summed(model: Transformer, data: TrainData, step: StepPlan) -> float:
    """Loss of one rank's packs of a step. Gradients are left in the model."""
    if data.objective.needs_reference:
        reference = reference_sums(model.config.tied, model.output_weight.dtype)
        data = replace(data, reference=reference)
    return backward(model, data, step)


every_precision = pytest.mark.parametrize("dtype", TO_ORACLE, ids=str)
every_objective = pytest.mark.parametrize("name", NAMES)
every_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


PLANS = {  # ranks, pack_tokens
    "one pack": (1, 1000), "packs": (1, 40), "a pack per piece": (1, 1), "2 ranks": (2, 1000),
    "2 ranks packs": (2, 30), "3 ranks": (3, 25), "20 ranks": (20, 1000),
}  # fmt: skip


@every_precision
@every_head
@every_objective
@pytest.mark.parametrize("ranks_and_tokens", PLANS)
def test_any_plan_gives_the_papers_loss_and_gradients(name, tied, dtype, ranks_and_tokens):
    model = tiny(tied, dtype)
    assert_invariant(name, model, on_ranks(name, model, *PLANS[ranks_and_tokens]))


@every_precision
@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_cut_into_packs_on_two_ranks(name, dtype):
    model = tiny(True, dtype)
    assert_invariant(name, model, on_ranks(name, model, 2, 30))


@every_precision
@every_objective
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_order_and_grouping_equals_the_paper_with_pairs_split_if_the_loss_is_linear(
    name, seed, dtype
):
    rng = np.random.default_rng(seed)
    pieces = [[i] for i in range(ROWS if name == "sft" else 2 * ROWS)]
    if objective_of(name).keep_pairs:
        pieces = [[2 * row, 2 * row + 1] for row in range(ROWS)]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    cuts = np.sort(rng.integers(0, len(pieces) + 1, 3))  # may give empty packs
    packs = [np.array([*chain(*pieces[a:b])], int) for a, b in pairwise([0, *cuts, len(pieces)])]
    model = tiny(True, dtype)
    assert_invariant(name, model, summed(model, data_of(name), [packs]))


@every_objective
def test_held_out_loss_is_the_papers_loss_over_all_rows(name):
    model, data = tiny(True, torch.float64), data_of(name, pack_tokens=30)
    if data.objective.needs_reference:
        data = replace(data, reference=reference_sums(True, torch.float64))
    assert held_out(model, data)["loss"] == pytest.approx(oracle(name, True)[0], rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reference_log_probs_are_those_of_each_row_alone_whatever_the_packs():
    model = tiny(True, torch.float64, seed=9)
    wanted = [row_logps(model, s).sum().item() for s in rows_of("dpo").sequences]
    for pack_tokens in (1, 40, 1000):
        sums = reference_logp_sums(model, data_of("dpo", pack_tokens=pack_tokens))
        np.testing.assert_allclose(sums.reshape(-1).tolist(), wanted, rtol=1e-12)
