"""Does redi compute the right numbers on this machine? `redi doctor` and bench/gpu.py ask this.

    check_step     optimizer steps run, and lower the loss
    check_model    in bf16, sequences in a pack have the log-probs and the gradient that they have
                   alone, and those of float64
    check_head     the log-prob kernels in bf16 against the formula in float64

All inputs are random. Left out: decoding, which bench/gpu.py compares with a CPU's.
Letters: N rows, R supervised tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from redi.batches import TrainData
from redi.distributed import Parallelism, World, compute_dtype, full_tensor, parallelize
from redi.logprobs import reference_token_logps, token_logps, weighted_logp_sum
from redi.model import ModelConfig, Transformer
from redi.objectives import Totals, make_objective, sft
from redi.packing import TokenSequence, pack
from redi.recipe import REDIConfig
from redi.toy import initialize
from redi.train import make_optimizer, train_step

SMALL = ModelConfig(  # with heads like those of Qwen2.5-Math-1.5B
    vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=12,
    num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=512,
)  # fmt: skip
LENGTHS = (41, 130, 50, 100)  # tokens of a pack's sequences

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden (R, D), weight (V, D), targets, weights (R,)
Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple]  # loss, log-probs or None, whatever else
Outcome = tuple[Tensor, Tensor | None, Tensor, Tensor]  # loss, log-probs, d hidden, d weight


@dataclass(frozen=True)
class Check:
    name: str
    error: float
    goal: float
    peer: str  # what was compared with


class RandomRows:
    """Rows of random tokens, with the fields of Dataset that TrainData reads."""

    def __init__(self, lengths: np.ndarray, vocabulary: int, prompt: int = 1):
        """lengths (N,), or (N, 2) of pairs, prompt included; prompt: its tokens, in any row."""
        self.store = SimpleNamespace(paired=lengths.ndim == 2)
        self.lengths, flat = lengths, lengths.reshape(-1)
        self.signs = np.resize([1, -1] if lengths.ndim == 2 else [1], len(flat))
        self.prompts = np.minimum(prompt, flat - 1)
        self.response_lengths = flat - self.prompts
        rng = np.random.default_rng(0)
        self.tokens = [rng.integers(vocabulary, size=length) for length in flat]

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, number: int) -> TokenSequence:
        row, sign = int(number) // (2 if self.store.paired else 1), int(self.signs[number])
        return TokenSequence(self.tokens[number], int(self.prompts[number]), row, sign)


# ---------------------------------------------------------------- a training step


def check_step(device: torch.device) -> Iterator[Check]:
    """Two REDI steps over the same pairs, in the dtype of training on this device."""
    world, config, signals = World(0, 1, device), REDIConfig(lr=1e-3), SimpleNamespace(wanted=False)
    model = Transformer(SMALL)
    initialize(model, seed=0)
    parallelize(model, world, Parallelism(compute_dtype("auto", world)))
    optimizer = make_optimizer(model, config)
    rows = RandomRows(np.array(LENGTHS).reshape(-1, 2), SMALL.vocab_size, prompt=20)
    data = TrainData(rows, make_objective("redi", alpha=0.8), world, pack_tokens=256)
    step = data.all_rows()
    records = [train_step(model, optimizer, data, step, config, signals)[1] for _ in range(2)]
    before, after = (record["loss"] for record in records)
    yield Check("step", after - before, -0.01, "the loss before it")  # it fell by 7.6 on a CPU


# ---------------------------------------------------------------- the model


def check_model(
    device: torch.device, config: ModelConfig = SMALL, lengths: tuple[int, ...] = LENGTHS
) -> Iterator[Check]:
    """The model is distributed as in training. The goals are about twice bf16's errors on a CPU."""
    rows, objective = RandomRows(np.array(lengths), config.vocab_size, prompt=40), sft()
    totals = Totals(len(rows), int(rows.response_lengths.sum()))

    def run(device: torch.device, dtype: torch.dtype, packs: list[list[int]]) -> list[Tensor]:
        """The log-probs (R,) of all supervised tokens, and SFT's gradient of all weights."""
        model, logps = Transformer(config), []
        initialize(model, seed=0)
        model.to(torch.promote_types(dtype, torch.float32))
        parallelize(model, World(0, 1, device), Parallelism(dtype))
        for ids in packs:
            counts = torch.tensor(rows.response_lengths[ids])
            weights = objective.sequence_weights(torch.ones_like(counts), counts, totals)
            batch = pack([rows.sequence(number) for number in ids], weights)
            outcome = objective.loss(model, batch.to(device))
            outcome.loss.backward()
            logps.append(outcome.token_logps.cpu())
        gradients = [full_tensor(p.grad).reshape(-1).cpu() for p in model.parameters()]
        return [torch.cat(logps), torch.cat(gradients)]

    every = [*range(len(lengths))]
    packed = run(device, torch.bfloat16, [every])
    alone = run(device, torch.bfloat16, [[number] for number in every])
    exact = run(torch.device("cpu"), torch.float64, [every])
    for name, expected, peer in (("packed", alone, "alone"), ("model", exact, "float64")):
        logps, gradient = map(relative_error, packed, expected)
        yield Check(f"{name}_logps", logps, 1e-2, peer)
        yield Check(f"{name}_gradient", gradient, 8e-2, peer)


# ---------------------------------------------------------------- the head


def check_head(
    device: torch.device, rows: int = 64, size: int = 64, vocabulary: int = 5000
) -> Iterator[Check]:
    """Goals of dH and dW: 1.3 times the errors of a CPU, with only the logits' gradient in bf16."""
    given = likely_tokens(rows, size, vocabulary, device)
    exact = in_float64(given)
    terms = (exact[1] * given[3]).abs().sum()  # the loss itself is nearly 0: weights are signed
    for prefix, run in (("", weighted_logp_sum), ("two_passes_", two_passes)):
        value, logps, d_hidden, d_weight = loss_and_gradients(run, given)
        errors = {
            "loss": (((value.double() - exact[0]).abs() / terms).item(), 1e-5),
            "dH": (relative_error(d_hidden, exact[2]), 1.3 * 2.3e-3),
            "dW": (relative_error(d_weight, exact[3]), 1.3 * 1.5e-3),
            "logp": ((logps.double() - exact[1]).abs().max().item(), 1e-4),
            "largest_logp": (logps.max().item(), 0.0),
        }
        for part, (error, goal) in errors.items():
            yield Check(prefix + part, error, goal, "float64")


def two_passes(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss and the log-probs (R,). exact: by the definition, in float64, with all logits."""
    logps = (reference_token_logps if exact else token_logps)(hidden, weight, targets)
    return logps @ token_weights.to(logps.dtype), logps


def loss_and_gradients(run: Run, given: Given) -> Outcome:
    """Forward and backward; no gradient stays in .grad, where the next step would add to it."""
    loss, logps, *_ = run(*given)
    d_hidden, d_weight = torch.autograd.grad(loss, given[:2])
    return loss.detach(), None if logps is None else logps.detach(), d_hidden, d_weight


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def likely_tokens(
    rows: int = 4096, size: int = 256, vocabulary: int = 8192, device: torch.device | str = "cpu"
) -> Given:
    """bf16 hidden states and weight as a trained model has them: a mean NLL of about 0.6, 59 % of
    the tokens above 0.9; signed token weights."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, size, generator=draw)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    sharpness = 21 * (0.35 + 0.65 * torch.rand(rows, 1, generator=draw)) / size
    hidden = sharpness * weight[targets] + 0.1 * torch.randn(rows, size, generator=draw)
    token_weights = torch.randn(rows, generator=draw) / rows
    rounded = (tensor.bfloat16().to(device).requires_grad_() for tensor in (hidden, weight))
    return (*rounded, targets.to(device), token_weights.to(device))


def in_float64(given: Given) -> Outcome:
    exact = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    return loss_and_gradients(partial(two_passes, exact=True), (*exact, *given[2:]))


CLAIMS: dict[Callable[[torch.device], Iterator[Check]], str] = {
    check_step: "training steps lower the loss",
    check_model: "a packed sequence is as it is alone, and as in float64",
    check_head: "the log-prob kernels are as in float64",
}
