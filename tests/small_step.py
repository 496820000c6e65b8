"""A step of a tiny model over random rows, and what the papers say its loss is."""

import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from redi import objectives
from redi.batches import TrainData
from redi.distributed import World
from redi.model import ModelConfig, RopeScaling, Transformer
from redi.objectives import OBJECTIVES, loss_parameters, make_objective, sft
from redi.packing import StepPlan, TokenSequence

TO_ORACLE = {torch.float64: 1e-12, torch.float32: 5e-6}  # tolerances, of the norm
BETWEEN_CUTS = {torch.float64: 1e-12, torch.float32: 1e-6}
ROWS, VOCABULARY = 7, 48

ALPHA, BETA, GAMMA, V = 0.8, 0.7, 0.3, 0.4
VALUES = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "baseline": V}
PARAMETERS = {name: {p: VALUES[p] for p in loss_parameters(name)} for name in OBJECTIVES}

# ---------------------------------------------------------------- a model and its rows

FAMILIES = {  # facts of ModelConfig
    "qwen2": {},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8)},
}


def tiny(tied: bool, dtype: torch.dtype, seed: int = 0, family: str = "qwen2") -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, rope_theta=1e4, norm_eps=1e-6, tied=tied, max_positions=64,
        **FAMILIES[family],
    )  # fmt: skip
    model = Transformer(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = 0.15 * torch.randn(weight.shape, generator=draw)
            weight.copy_(noise + (1.0 if "norm" in name else 0.0))
    return model.to(dtype)


class Rows:
    """Rows of random tokens, with the fields of data.dataset.Dataset that TrainData reads. Labeled
    rows are those of the pairs, each trace a row, with this weight, or a random one of None."""

    def __init__(self, kind: str, rows: int = ROWS, weight: float | None = None):
        rng = np.random.default_rng(1)
        self.store, self.sequences = SimpleNamespace(paired=kind == "pairs"), []
        for row in range(rows):
            prompt = rng.integers(0, VOCABULARY, rng.integers(1, 6))
            for sign in (1,) if kind == "rows" else (1, -1):
                response = rng.integers(0, VOCABULARY, rng.integers(1, 12))
                tokens = np.concatenate([prompt, response])
                self.sequences.append(TokenSequence(tokens, len(prompt), row, sign))
        if kind == "labeled rows":
            weights = rng.uniform(0.1, 3.0, 2 * rows) if weight is None else [weight] * 2 * rows
            self.sequences = [
                replace(sequence, row=row, weight=weight)
                for row, (sequence, weight) in enumerate(zip(self.sequences, weights))
            ]
        lengths = np.array([len(s.tokens) for s in self.sequences])
        self.lengths = lengths.reshape(-1, 2) if self.store.paired else lengths
        self.response_lengths = np.array([len(s.supervised()) for s in self.sequences])
        self.signs = np.array([s.sign for s in self.sequences])

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, sequence_id: int) -> TokenSequence:
        return self.sequences[sequence_id]


def objective_of(name: str):
    return sft() if name == "sft" else make_objective(name, **PARAMETERS[name])


def rows_of(name: str) -> Rows:
    return Rows("rows" if name == "sft" else "pairs")


def data_of(
    name: str, rank: int = 0, world_size: int = 1, pack_tokens: int = 1000, rows: Rows | None = None
) -> TrainData:
    world = World(rank, world_size, torch.device("cpu"))
    return TrainData(rows or rows_of(name), objective_of(name), world, pack_tokens)


def backward(model: Transformer, data: TrainData, step: StepPlan | None = None) -> float:
    """The loss of a step, by default over all rows, whose gradients are added to the model's."""
    step, loss = step or data.all_rows(), 0.0
    for batch in data.batches(step):
        part = data.objective.loss(model, batch).loss
        part.backward()
        loss += part.item()
    return loss


def row_logps(model: Transformer, sequence: TokenSequence) -> torch.Tensor:
    """Log-probs (|y|,) of a response, the sequence alone, from its whole logits."""
    tokens = torch.from_numpy(sequence.tokens)
    length = len(tokens)
    alone = SimpleNamespace(
        tokens=tokens,
        positions=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        lengths=[length],
        rows=torch.arange(length),  # every position; the response is cut out below
    )
    logits = model(alone, lambda hidden, weight: hidden @ weight.T)  # (L, V)
    logps = F.log_softmax(logits, dim=-1)
    return torch.stack([logps[i - 1, tokens[i]] for i in range(sequence.prompt_length, length)])


# ---------------------------------------------------------------- the papers' formulas


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


def unlikelihood(logps: torch.Tensor) -> torch.Tensor:
    return -mean(torch.log(1 - torch.exp(logps) + 1e-8))


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
    "asymre": lambda w, r, wr, rr: (V - 1) * w.sum() + V * r.sum(),
    "w_reinforce": lambda w, r, wr, rr: r.sum() - ALPHA * w.sum(),
    "uft": lambda w, r, wr, rr: (ALPHA - 1) * mean(w) + ALPHA * unlikelihood(r),
}


def our_losses(
    name: str, traces: list[torch.Tensor], reference: torch.Tensor, **parameters: float
) -> torch.Tensor:
    """NAME_loss of P pairs (P,): the log-probs of chosen, rejected, chosen, ..., and the
    reference's sums (P, 2)."""
    lengths = torch.tensor([len(trace) for trace in traces])
    sums = reference.reshape(-1)
    pairs = SimpleNamespace(
        response_lengths=lengths.tolist(),
        signs=[1, -1] * (len(traces) // 2),
        reference=torch.stack([sums, sums / lengths]),
    )
    values = objectives.loss_arguments(torch.cat(traces), pairs)
    loss = objectives.loss_function(name)
    arguments = {a: values[a] for a in inspect.signature(loss).parameters if a in values}
    losses = loss(**arguments, **(parameters or PARAMETERS[name]))
    return losses.reshape(len(traces) // 2, -1).sum(dim=1)  # some losses are of single traces


def paper_loss(name: str, model: Transformer, reference: Transformer) -> torch.Tensor:
    """The loss of a step over all rows, as its paper states it."""
    rows = rows_of(name).sequences
    logps = [row_logps(model, sequence) for sequence in rows]
    if name == "sft":
        return -sum(part.sum() for part in logps) / sum(len(part) for part in logps)
    with torch.no_grad():
        sums = [row_logps(reference, sequence).sum() for sequence in rows]
    pairs = zip(logps[0::2], logps[1::2], sums[0::2], sums[1::2])
    losses = [FORMULAS[name](*pair) for pair in pairs]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- comparisons


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(grads: dict[str, torch.Tensor], loss: float, wanted, tolerance: float) -> None:
    wanted_loss, wanted_grads = wanted
    assert abs(loss - wanted_loss) <= tolerance * max(1.0, abs(wanted_loss))
    assert grads.keys() == wanted_grads.keys()
    largest = max(grad.norm().item() for grad in wanted_grads.values())
    for name, grad in grads.items():
        size = wanted_grads[name].norm().item()
        # A key bias shifts all scores of a query equally, so its gradient is rounding alone.
        size = largest if name.endswith("k_proj.bias") else size
        assert (grad.double() - wanted_grads[name].double()).norm().item() <= tolerance * size, name
