"""Sampling completions: ours over transformers' `generate` (C15, C16).

    python -m bench.generate          about twelve minutes on one core

Random weights in fp32, one thread, CPU time.

C15_0.5B, C15_135M  The shapes of Qwen2.5-0.5B and SmolLM2-135M: 24 prompts of 20 to 60 tokens, 24
       new tokens each, greedy. The two sides share their weights, and must give the same answers.
C15    A toy shape (hidden 256, 4 layers, V 8192): 32 prompts of 16 to 96 tokens, 128 new tokens
       each, temperature 0.6, top-p 0.95, on flat logits (as the weights are) and on sharp ones (the
       last norm's weight times 8). transformers pads the prompts on the left. 200 greedy answers
       are compared token by token; a difference ends the run.
C16    160 requests through 32 slots at the toy shape, lengths by the law of bench/plan.py scaled
       to a median of 48 new tokens. A static batch writes until its longest answer ends; only the
       answers' tokens count. Slot use: live rows over slots, until the queue is empty.

Left out: stop tokens (an untrained model has nothing to stop for; lengths are limits here).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.inputs import FIRST_WORD, SMOLLM2_135M, VOCABULARY, lengths, random_model
from bench.measure import interleave, ratios, result, write
from redi.checkpoint.config_json import read_config
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling
from redi.toy import initialize

SLOTS, NEW_TOKENS, CONTEXT = 32, 128, 1024
REQUESTS, MEDIAN, LONGEST = 160, 48, 512
ROUNDS, STATIC_ROUNDS = 5, 3
SHARP = 8.0
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
PUBLISHED = {  # name -> config.json
    "0.5B": {  # of Qwen/Qwen2.5-0.5B
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
        **ROPE,
    },
    "135M": {**SMOLLM2_135M, "max_position_embeddings": 8192, **ROPE},
}  # fmt: skip
TOY = {
    "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, **ROPE,
}  # fmt: skip
GREEDY = Sampling(temperature=0.0)
OURS, THEIRS, STATIC = "redi", "transformers generate", "redi in static batches"


# ---------------------------------------------------------------- the two sides


def two_models(sizes: dict[str, Any]):
    """Ours and transformers', of these sizes, with the same random weights in the same memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = random_model(read_config(sizes, "bench"), torch.device("cpu"))
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).eval()
    peer.load_state_dict(model.state_dict(), assign=True, strict=False)  # the output weight is tied
    peer.tie_weights()
    return model, peer


def random_requests(
    count: int, seed: int, new_tokens: Sequence[int], sizes: tuple[int, int] = (16, 96)
) -> list[Request]:
    """sizes: the fewest and the most tokens of a prompt; new_tokens: of each answer."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(sizes[0], sizes[1] + 1, count)
    prompts = [tuple(rng.integers(FIRST_WORD, VOCABULARY, size).tolist()) for size in counts]
    return [Request(i, *pair) for i, pair in enumerate(zip(prompts, new_tokens))]


def ours(model, requests: list[Request], sampling: Sampling, usage: Usage | None = None):
    """Token ids of every request, in their order."""
    found = generate(model, requests, [], sampling, SLOTS, usage=usage)
    return [result.token_ids for result in sorted(found, key=lambda result: result.key)]


def theirs(model, requests: list[Request], sampling: Sampling) -> list[list[int]]:
    """The same in static batches: each runs until its longest request ends."""
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        settings = {"do_sample": True, **drawn}
    answers = []
    for batch in batches(requests):
        longest = max(len(request.prompt_ids) for request in batch)
        pads = [longest - len(request.prompt_ids) for request in batch]
        prompts = [[0] * pad + list(r.prompt_ids) for pad, r in zip(pads, batch)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        whole = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.tensor(mask),
            max_new_tokens=batch[0].max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
        answers += whole[:, longest:].tolist()
    return answers


def batches(requests: list[Request]) -> list[list[Request]]:
    """Groups of as many as there are slots; every limit is the longest of the group."""
    groups = [requests[start : start + SLOTS] for start in range(0, len(requests), SLOTS)]
    longest = [max(request.max_new_tokens for request in group) for group in groups]
    return [[replace(r, max_new_tokens=n) for r in group] for group, n in zip(groups, longest)]


# ---------------------------------------------------------------- measures


@dataclass
class SlotUse(Usage):
    rows: list[int] = field(default_factory=list)  # of each step while requests wait

    def count_step(self, rows: int, queued: bool) -> None:
        if queued:
            self.rows.append(rows)


def measured(sides: dict[str, Callable], rounds: int, tokens: int, name: str):
    """CPU seconds of each side and round; prints tokens/s of the median round."""
    seconds = interleave(sides, rounds)
    for side, taken in seconds.items():
        speed = tokens / statistics.median(each.total for each in taken)
        print(f"{name:<7}{side:<24}{speed:>7.0f} tokens/s")
    return seconds


def published_shape(name: str) -> dict[str, dict]:
    """C15_0.5B, C15_135M."""
    model, peer = two_models(PUBLISHED[name])
    requests = random_requests(24, 3, [24] * 24, sizes=(20, 60))
    answers: dict[str, list] = {OURS: [], THEIRS: []}
    sides = {
        OURS: lambda: answers[OURS].append(ours(model, requests, GREEDY)),
        THEIRS: lambda: answers[THEIRS].append(theirs(peer, requests, GREEDY)),
    }
    seconds = measured(sides, ROUNDS, 24 * 24, name)
    assert answers[OURS] == answers[THEIRS], "greedy answers differ"
    return {f"C15_{name}": result(ratios(seconds[THEIRS], seconds[OURS]), 1.0, THEIRS)}


def decoding(model, peer) -> dict[str, dict]:
    """C15 at the toy shape, on flat and on sharp logits."""
    compared = random_requests(200, 1, [64] * 200)
    pairs = list(zip(ours(model, compared, GREEDY), theirs(peer, compared, GREEDY)))
    same = sum(own == other for own, other in pairs)
    assert same == len(pairs), f"{len(pairs) - same} of {len(pairs)} greedy answers differ"
    found = {"C15_greedy": result([float(same)], 200.0, THEIRS)}
    requests = random_requests(SLOTS, 0, [NEW_TOKENS] * SLOTS)
    for name, scale in (("flat", 1.0), ("sharp", SHARP)):
        torch.nn.init.constant_(model.model.norm.weight, scale)
        sides = {
            OURS: partial(ours, model, requests, Sampling()),
            THEIRS: partial(theirs, peer, requests, Sampling()),
        }
        seconds = measured(sides, ROUNDS, SLOTS * NEW_TOKENS, name)
        found[f"C15_{name}"] = result(ratios(seconds[THEIRS], seconds[OURS]), 2.5, THEIRS)
    return found


def refilling(model, peer) -> dict[str, dict]:
    """C16, on sharp logits."""
    limits = lengths(np.random.default_rng(0), REQUESTS, MEDIAN, LONGEST)
    requests = random_requests(REQUESTS, 2, limits)
    use = SlotUse()
    ours(model, requests, Sampling(), use)
    sides = {
        OURS: partial(ours, model, requests, Sampling()),
        STATIC: lambda: [ours(model, batch, Sampling()) for batch in batches(requests)],
        THEIRS: partial(theirs, peer, requests, Sampling()),
    }
    seconds = measured(sides, STATIC_ROUNDS, sum(limits), "useful")
    return {
        "C16_slot_use": result([statistics.mean(use.rows) / SLOTS], 0.98, "all slots"),
        "C16": result(ratios(seconds[THEIRS], seconds[OURS]), 6.0, f"{THEIRS}, static batches"),
        "C16_own_static": result(ratios(seconds[STATIC], seconds[OURS]), None, STATIC),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = published_shape("0.5B") | published_shape("135M")
    model, peer = two_models(TOY)
    initialize(model, seed=0)  # the weights are peer's too
    write("generate", results | decoding(model, peer) | refilling(model, peer))


if __name__ == "__main__":
    main()
