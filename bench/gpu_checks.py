"""G9: what bf16 computes on the device is right, before anything is timed.

    the head          both kernels of redi.logprobs against float64, and Liger's beside: loss, both
                      gradients, log-probs; none may be above 0
    redi.kernels      each Triton kernel against its torch twin in float64
    attention         bf16 over a pack against the per-document path in float64
    a whole model     loss and gradients in bf16, placed as training places it, against fp32 on the
                      CPU
    decoding          greedy answers in fp32, with and without recorded steps, against the CPU's;
                      the logits that bf16 draws from against the training forward in fp32

The head's inputs are like a trained model's: a mean NLL of about 0.6, 59 % of the tokens more
likely than 0.9. Its goals are what fp32 logits, their gradient in bf16 and an fp32 dW reached on a
CPU, with 30 % to spare. The whole model's, and decoding's, are about twice what bf16 does to it on
a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.gpu_meter import Entries, has, relative_error
from bench.measure import result
from redi.attention import packed_attention
from redi.distributed import Parallelism, World, full_tensor, parallelize
from redi.eval import generate as engine
from redi.eval.generate import Request, generate
from redi.eval.sampling import Draws, Sampling
from redi.logprobs import reference_token_logps, token_logps, weighted_logp_sum
from redi.model import ModelConfig, Transformer
from redi.objectives import Totals, sft
from redi.packing import PackedBatch, TokenSequence, pack
from redi.toy.student import initialise

FLOAT64 = "float64"
R, D, V = 4096, 256, 8192
KERNEL_C, KERNEL_V = 256, 151_936
ATTENTION_LENGTHS = [1, 2, 63, 64, 65, 500, 1297, 2104]
ATTENTION_HEADS = (12, 2, 128)  # H, K, d
MODEL = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=64, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=512,
)  # fmt: skip
MODEL_LENGTHS = [100, 37, 256]
DECODER = replace(MODEL, num_heads=12, num_kv_heads=2, head_dim=128)  # Qwen2.5-Math-1.5B's heads
DECODER_ROWS, DECODER_TOKENS, SLOTS = 20, 40, 12

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden (R, D), weight (V, D), targets, weights (R,)
Outcome = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, log-probs (R,), d hidden, d weight


def run(device: torch.device) -> Entries:
    found = head(device)
    if device.type == "cuda":
        found |= triton_kernels(device)
    return found | attention(device) | model(device) | decoding(device)


# ---------------------------------------------------------------- the head


def likely_tokens(rows: int, size: int, vocabulary: int, device: torch.device) -> Given:
    """bf16 hidden states and weight under which most targets are likely; signed token weights."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, size, generator=draw)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    sharpness = 21 * (0.35 + 0.65 * torch.rand(rows, 1, generator=draw)) / size
    hidden = sharpness * weight[targets] + 0.1 * torch.randn(rows, size, generator=draw)
    token_weights = torch.randn(rows, generator=draw) / rows
    leaves = (t.bfloat16().to(device).requires_grad_() for t in (hidden, weight))
    return (*leaves, targets.to(device), token_weights.to(device))


def outcome(loss: Tensor, logps: Tensor, given: Given) -> Outcome:
    gradients = torch.autograd.grad(loss, given[:2])
    return loss.detach(), logps.detach(), *gradients


def head_outcomes(given: Given) -> dict[str, Outcome]:
    hidden, weight, targets, token_weights = given
    logps = token_logps(hidden, weight, targets)
    found = {
        "weighted_logp_sum": outcome(*weighted_logp_sum(*given)[:2], given),
        "token_logps": outcome(logps @ token_weights, logps, given),
    }
    if hidden.is_cuda and has("liger_kernel", "G9"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        logps = -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets)
        found["Liger none"] = outcome(logps.float() @ token_weights, logps, given)
    return found


def head_errors(actual: Outcome, right: Outcome, token_weights: Tensor) -> dict[str, float]:
    loss, logps, d_hidden, d_weight = actual
    terms = (right[1] * token_weights).abs().sum()  # signed weights: the loss itself is nearly 0
    return {
        "loss": ((loss.double() - right[0]).abs() / terms).item(),
        "dH": relative_error(d_hidden, right[2]),
        "dW": relative_error(d_weight, right[3]),
        "logp": (logps.double() - right[1]).abs().max().item(),
        "largest_logp": logps.max().item(),
    }


HEAD_GOALS = {"loss": 1e-5, "dH": 1.3 * 2.3e-3, "dW": 1.3 * 1.5e-3, "logp": 1e-4}
HEAD_GOALS |= {"largest_logp": 0.0}
HEAD_NAMES = {"weighted_logp_sum": "G9", "token_logps": "G9_two_passes", "Liger none": "G9_Liger"}


def head(device: torch.device, rows: int = R, size: int = D, vocabulary: int = V) -> Entries:
    given = likely_tokens(rows, size, vocabulary, device)
    hidden, weight = (t.detach().double().requires_grad_() for t in given[:2])
    exact = (hidden, weight, given[2], given[3].double())
    logps = reference_token_logps(*exact[:3])
    right = outcome(logps @ exact[3], logps, exact)
    sure = (logps.exp() > 0.9).double().mean().item()
    print(f"bf16 head: mean NLL {-logps.mean().item():.2f}, {sure:.0%} of the tokens above 0.9")
    outcomes = head_outcomes(given)
    print(f"{'error against float64':<24}" + "".join(f"{name:>14}" for name in HEAD_GOALS))
    found = {}
    for name, actual in outcomes.items():
        errors = head_errors(actual, right, exact[3])
        print(f"{name:<24}" + "".join(f"{error:>14.1e}" for error in errors.values()))
        for part, error in errors.items():
            goal = None if name.startswith("Liger") else HEAD_GOALS[part]
            found[f"{HEAD_NAMES[name]}_{part}"] = result([error], goal, FLOAT64)
    return found


# ---------------------------------------------------------------- the kernels


def triton_kernels(
    device: torch.device, rows: int = KERNEL_C, vocabulary: int = KERNEL_V
) -> Entries:
    """Each against its twin; logits and weights in fp32, targets at both ends."""
    from redi import kernels

    draw = torch.Generator().manual_seed(0)
    logits = (4.0 * torch.randn(rows, vocabulary, generator=draw)).to(device)
    targets = torch.randint(vocabulary, (rows,), generator=draw).to(device)
    targets[0], targets[-1] = 0, vocabulary - 1
    weights = torch.randn(rows, generator=draw).to(device)
    logits[0, 0] += 40.0  # a token that is nearly certain
    right, right_logps, _ = kernels.softmax_gradient_reference(
        logits.double(), targets, weights.double(), torch.float64
    )
    logps = [kernels.target_logps(logits, targets)]
    found = {}
    for name, dtype, goal in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 2e-3)):
        gradient, again, _ = kernels.softmax_gradient_(logits.clone(), targets, weights, dtype)
        logps.append(again)
        error = relative_error(gradient, right)
        found[f"G9_kernel_{name}"] = result([error], goal, "its torch twin in float64")
    error = max((these.double() - right_logps).abs().max().item() for these in logps)
    found["G9_kernel_logp"] = result([error], 1e-4, "its torch twin in float64, nats")
    return found


# ---------------------------------------------------------------- attention


def attention(
    device: torch.device,
    lengths: list[int] = ATTENTION_LENGTHS,
    heads: tuple[int, int, int] = ATTENTION_HEADS,
) -> Entries:
    queries, keys, size = heads
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (queries, keys, keys, queries)]
    *given, upstream = (torch.randn(s, generator=draw).bfloat16().to(device) for s in shapes)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)

    def outcome(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        output = packed_attention(*leaves, cu_seqlens, lengths)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    errors = map(relative_error, outcome(torch.bfloat16), outcome(torch.float64))
    return {"G9_attention": result([max(errors)], 1e-2, "each document in float64")}


# ---------------------------------------------------------------- a whole model


def model(
    device: torch.device, config: ModelConfig = MODEL, lengths: list[int] = MODEL_LENGTHS
) -> Entries:
    here = loss_and_gradients(config, lengths, device, torch.bfloat16)
    there = loss_and_gradients(config, lengths, torch.device("cpu"), torch.float32)
    errors = [relative_error(a, b) for a, b in zip(here, there)]
    return {
        "G9_model_loss": result(errors[:1], 2e-3, "fp32 on the CPU"),
        "G9_model_gradient": result(errors[1:], 8e-2, "fp32 on the CPU"),
    }


def loss_and_gradients(
    config: ModelConfig, lengths: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """SFT's loss over a pack, and all gradients in one row, on the host."""
    model = Transformer(config)
    initialise(model, seed=0)
    parallelize(model, World(0, 1, device), Parallelism(dtype))
    loss = sft().loss(model, sft_pack(config, lengths).to(device), None).loss
    loss.backward()
    gradients = [full_tensor(p.grad).reshape(-1).float().cpu() for p in model.parameters()]
    return loss.detach().cpu(), torch.cat(gradients)


def sft_pack(config: ModelConfig, lengths: list[int]) -> PackedBatch:
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(rng.integers(config.vocab_size, size=length), length // 4, row, 1)
        for row, length in enumerate(lengths)
    ]
    responses = torch.tensor([s.response_length for s in sequences])
    totals = Totals(len(lengths), int(responses.sum()))
    return pack(sequences, sft().token_weights(torch.ones_like(responses), responses, totals))


# ---------------------------------------------------------------- decoding


def decoding(device: torch.device, config: ModelConfig = DECODER) -> Entries:
    """Through refills, and as rows end through recorded steps of several sizes."""
    from redi.eval import kernel_steps

    model = Transformer(config).requires_grad_(False)
    initialise(model, seed=0)
    rng = np.random.default_rng(0)
    asked = [
        Request(key, tuple(rng.integers(config.vocab_size, size=1 + 19 * key).tolist()), limit)
        for key, limit in enumerate(rng.integers(DECODER_TOKENS // 2, DECODER_TOKENS, DECODER_ROWS))
    ]
    right = greedy(model, asked)
    model.to(device)
    found = {}
    for name, sizes in (("recorded", kernel_steps.SIZES), ("launched", ())):
        with patch.object(kernel_steps, "SIZES", sizes):
            answers = greedy(model, asked)
        wrong = sum(a != b for a, b in zip(answers, right))
        found[f"G9_greedy_{name}"] = result([wrong], 0.0, f"answers of {len(asked)}, not the CPU's")
    model.bfloat16()
    with drawn_from() as seen:
        answers = greedy(model, asked)
    model.float()  # the same weights
    errors = []
    for request, answer in zip(asked, answers):
        expected = forward_logits(model, [*request.prompt_ids, *answer])[-len(answer) - 1 : -1]
        own = torch.stack([seen[request.key, world] for world in range(len(answer))])
        errors.append(relative_error(own, expected))
    found["G9_decode_logits"] = result([max(errors)], 4e-2, "the training forward in fp32")
    return found


def greedy(model: Transformer, asked: list[Request]) -> list[list[int]]:
    answers = generate(model, asked, [], Sampling(temperature=0.0), SLOTS)
    return [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.key)]


@contextmanager
def drawn_from() -> Iterator[dict[tuple[int, int], Tensor]]:
    """(request, position) -> the logits (V,) that the engine draws from, while it runs."""
    seen: dict[tuple[int, int], Tensor] = {}
    sample = engine.sample

    def keeping(logits: Tensor, draws: Draws, sampling: Sampling) -> Tensor:
        names = zip(draws.keys.tolist(), draws.positions.tolist())
        seen.update(zip(names, logits.clone()))
        return sample(logits, draws, sampling)

    with patch.object(engine, "sample", keeping):
        yield seen


@torch.no_grad()
def forward_logits(model: Transformer, tokens: list[int]) -> Tensor:
    """(T, V) of a text from the training forward, in the weights' dtype."""
    weight, length = model.output_weight, len(tokens)
    ends = torch.tensor([0, length], dtype=torch.int32, device=weight.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, ends, [length])

    ids, positions = torch.tensor(tokens), torch.arange(length)
    hidden = model.model(ids.to(weight.device), positions.to(weight.device), repeat(attend))
    return hidden @ weight.T
