"""Invariant 1: loss and gradients depend only on the rows of a step, not on how it is cut up.

    python -m pytest tests/test_invariance.py

Every cut of a step (packs, order, ranks run one after another and summed, pairs split or together,
a rank without work) is compared with an oracle: each row alone, all its logits in float64, the
paper's formulas written out. Tolerance, relative to the norm of each tensor: 1e-12 in float64. In
float32, 1e-6 between two cuts, and 5e-6 to the oracle, because float32 rounds.
"""

import math
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redi import logprobs
from redi.batches import TrainData
from redi.checkpoint.reference import _score as reference_logp_sums
from redi.distributed import World
from redi.model import ModelConfig, Transformer
from redi.objectives import OBJECTIVES, Totals, make_objective, sft
from redi.packing import PackedBatch, TokenSequence, pack
from redi.train import held_out

ALPHA, BETA, GAMMA = 0.8, 0.7, 0.3
PARAMETERS = {
    "redi": {"alpha": ALPHA},
    "symmetric": {},
    "dpo": {"beta": BETA},
    "simpo": {"beta": BETA, "gamma": GAMMA},
    "positives": {},
    "dpo_norm": {"beta": BETA},
    "irpo": {"beta": BETA, "alpha": ALPHA},
    "dpop": {"beta": BETA, "alpha": ALPHA},
    "ipo": {"beta": BETA},
    "apo_zero": {"beta": BETA},
    "orpo": {"alpha": ALPHA},
    "npo": {"beta": BETA, "alpha": ALPHA},
    "topr": {},
    "dft": {},
    "redi_weighted": {"alpha": ALPHA, "gamma": GAMMA},
}
ROWS, VOCABULARY = 7, 48
# Every code path of objectives.py. The other objectives share these paths, and are cut one way.
NAMES = ["sft", "redi", "symmetric", "dpo", "simpo", "dpo_norm", "topr", "dft"]
OTHERS = [name for name in OBJECTIVES if name not in NAMES]


# ---------------------------------------------------------------- a model and its rows


def tiny(tied: bool, dtype: torch.dtype, seed: int = 0) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, rope_theta=1e4, norm_eps=1e-6, tied=tied, max_positions=64,
    )  # fmt: skip
    model = Transformer(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = 0.15 * torch.randn(weight.shape, generator=draw)
            weight.copy_(noise + (1.0 if "norm" in name else 0.0))
    return model.to(dtype)


@dataclass
class Rows:
    """Rows of random tokens, with the fields of data.dataset.Dataset that TrainData reads."""

    sequences: list[TokenSequence]
    store: SimpleNamespace

    @classmethod
    def draw(cls, paired: bool, rows: int = ROWS, seed: int = 1) -> "Rows":
        rng = np.random.default_rng(seed)
        sequences = []
        for row in range(rows):
            prompt = rng.integers(0, VOCABULARY, rng.integers(1, 6))
            for sign in (1, -1) if paired else (1,):
                response = rng.integers(0, VOCABULARY, rng.integers(1, 12))
                tokens = np.concatenate([prompt, response])
                sequences.append(TokenSequence(tokens, len(prompt), row, sign))
        return cls(sequences, SimpleNamespace(paired=paired))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> np.ndarray:
        lengths = np.array([len(s.tokens) for s in self.sequences])
        return lengths.reshape(-1, 2) if self.store.paired else lengths

    @property
    def response_lengths(self) -> np.ndarray:
        return np.array([s.response_length for s in self.sequences])

    def sequence(self, sequence_id: int) -> TokenSequence:
        return self.sequences[sequence_id]


def objective_of(name: str):
    return sft() if name == "sft" else make_objective(name, **PARAMETERS[name])


def data_of(name: str, rank: int = 0, world_size: int = 1, pack_tokens: int = 1000) -> TrainData:
    world = World(rank, world_size, torch.device("cpu"))
    return TrainData(Rows.draw(paired=name != "sft"), objective_of(name), world, pack_tokens)


# ---------------------------------------------------------------- the oracle


def row_logps(model: Transformer, sequence: TokenSequence) -> torch.Tensor:
    """Log-probs (|y|,) of a response, the sequence alone, from its whole logits."""
    tokens = torch.from_numpy(sequence.tokens)
    length = len(tokens)
    alone = PackedBatch(
        tokens=tokens,
        positions=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        lengths=[length],
        rows=torch.arange(length),  # every row: the cut is made here, below
        targets=tokens,
        token_weights=torch.zeros(length),
        row_ids=[0],
        signs=[1],
        response_lengths=[length],
    )
    logits = model(alone, lambda hidden, weight: hidden @ weight.T)  # (L, V)
    logps = F.log_softmax(logits, dim=-1)
    places = range(sequence.prompt_length, length)
    return torch.stack([logps[at - 1, tokens[at]] for at in places])


def softplus(x: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(-x)."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0.0)


def mean(logps: torch.Tensor) -> torch.Tensor:
    return logps.sum() / len(logps)


def gain(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Log-ratio of a whole response to the reference."""
    return logps.sum() - reference


def per_token(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return gain(logps, reference) / len(logps)


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    p = torch.exp(mean(logps))
    return torch.log(p / (1 - p))


# Loss of a pair: w (|y_w|,) and r (|y_l|,) are the token log-probs of its chosen and rejected
# trace, wr and rr the reference's sums. Section 3 of the paper, then the papers that
# redi/related_losses.py names.
FORMULAS = {
    "redi": lambda w, r, wr, rr: -mean(w) + ALPHA * mean(r),
    "symmetric": lambda w, r, wr, rr: -mean(w) + mean(r),
    "dpo": lambda w, r, wr, rr: softplus(-BETA * (gain(w, wr) - gain(r, rr))),
    "simpo": lambda w, r, wr, rr: softplus(-(BETA * (mean(w) - mean(r)) - GAMMA)),
    "positives": lambda w, r, wr, rr: -mean(w) + 0 * r.sum(),
    "dpo_norm": lambda w, r, wr, rr: softplus(-BETA * (per_token(w, wr) - per_token(r, rr))),
    "irpo": lambda w, r, wr, rr: softplus(-BETA * (gain(w, wr) - gain(r, rr))) - ALPHA * mean(w),
    "dpop": lambda w, r, wr, rr: softplus(
        -BETA * (gain(w, wr) - gain(r, rr) - ALPHA * torch.relu(-gain(w, wr)))
    ),
    "ipo": lambda w, r, wr, rr: (per_token(w, wr) - per_token(r, rr) - 1 / (2 * BETA)).pow(2),
    "apo_zero": lambda w, r, wr, rr: (
        1 - 1 / (1 + torch.exp(-BETA * gain(w, wr))) + 1 / (1 + torch.exp(-BETA * gain(r, rr)))
    ),
    "orpo": lambda w, r, wr, rr: -mean(w) + ALPHA * softplus(log_odds(r) - log_odds(w)),
    "npo": lambda w, r, wr, rr: (
        2 / BETA * torch.log(1 + (torch.exp(r.sum()) / torch.exp(rr)) ** BETA) - ALPHA * mean(w)
    ),
    "topr": lambda w, r, wr, rr: -w.sum() + min(1.0, math.exp(gain(r, rr).item())) * r.sum(),
    "dft": lambda w, r, wr, rr: (
        -sum(math.exp(logp.item()) * logp for logp in w) / len(w) + 0 * r.sum()
    ),
    "redi_weighted": lambda w, r, wr, rr: -mean(w) + ALPHA * torch.exp(GAMMA * mean(r)) * mean(r),
}


def paper_loss(name: str, model: Transformer, reference: Transformer) -> torch.Tensor:
    """The loss of a step over all rows, as its paper states it."""
    rows = Rows.draw(paired=name != "sft").sequences
    logps = [row_logps(model, sequence) for sequence in rows]
    if name == "sft":
        return -sum(part.sum() for part in logps) / sum(len(part) for part in logps)
    with torch.no_grad():
        sums = [row_logps(reference, sequence).sum() for sequence in rows]
    pairs = zip(logps[0::2], logps[1::2], sums[0::2], sums[1::2])
    losses = [FORMULAS[name](*pair) for pair in pairs]
    return sum(losses) / len(losses)


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


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


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


def assert_close(grads: dict[str, torch.Tensor], loss: float, wanted, tolerance: float) -> None:
    wanted_loss, wanted_grads = wanted
    assert abs(loss - wanted_loss) <= tolerance * max(1.0, abs(wanted_loss))
    assert grads.keys() == wanted_grads.keys()
    largest = max(grad.norm().item() for grad in wanted_grads.values())
    for name, grad in grads.items():
        size = wanted_grads[name].norm().item()
        # A key bias moves all scores of a query alike: its gradient is zero but for rounding.
        size = largest if name.endswith("k_proj.bias") else size
        assert (grad.double() - wanted_grads[name].double()).norm().item() <= tolerance * size, name


TO_ORACLE = {torch.float64: 1e-12, torch.float32: 5e-6}
BETWEEN_CUTS = {torch.float64: 1e-12, torch.float32: 1e-6}
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
