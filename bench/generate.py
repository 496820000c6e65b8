"""Sampling completions, ours over transformers' `generate` (C15, C16).

    python -m bench.generate          about six minutes on one core

A model without training (hidden 256, 4 layers, V 8192, fp32), prompts of 16 to 96 random tokens,
one thread, CPU time.

C15    32 prompts, 128 new tokens each, temperature 0.6, top-p 0.95, on flat logits (as the weights
       are) and on sharp ones (the last norm's weight times 8). transformers pads the prompts on
       the left. 200 greedy answers are compared token by token; a difference ends the run.
C16    160 requests through 32 slots, their lengths by the log-normal law of bench/plan.py, scaled
       to a median of 48 new tokens. A static batch writes until its longest answer ends; only the
       tokens of the answers count. Slot use: live rows over slots, until the queue is empty.

Left out: stop tokens (a model without training has nothing to stop for; lengths are limits here).
"""

import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from bench.inputs import FIRST_WORD, VOCABULARY, lengths, write_model
from bench.measure import CPUSeconds, interleave, result, synchronize, write
from redi.checkpoint.folder import load_model
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling

SLOTS, NEW_TOKENS, CONTEXT = 32, 128, 1024
REQUESTS, MEDIAN, LONGEST = 160, 48, 512
ROUNDS, STATIC_ROUNDS = 5, 3
SHARP = 8.0
GREEDY = Sampling(temperature=0.0)
OURS, THEIRS, STATIC = "redi", "transformers generate", "redi in static batches"


# ---------------------------------------------------------------- the two sides


def random_prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(16, 97, count)
    return [tuple(rng.integers(FIRST_WORD, VOCABULARY, size).tolist()) for size in sizes]


def ours(model, requests: list[Request], sampling: Sampling, usage: Usage | None = None):
    """Token ids of every request, in their order."""
    found = generate(model, requests, [], sampling, SLOTS, usage=usage)
    return [result.token_ids for result in sorted(found, key=lambda result: result.key)]


def theirs(model, requests: list[Request], sampling: Sampling) -> list[list[int]]:
    """The same in static batches: each runs on to its longest request."""
    answers = []
    for batch in batches(requests):
        longest = max(len(request.prompt_ids) for request in batch)
        pads = [longest - len(request.prompt_ids) for request in batch]
        prompts = [[0] * pad + list(r.prompt_ids) for pad, r in zip(pads, batch)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        how = (
            {"do_sample": False}
            if sampling.temperature == 0
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        )
        whole = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.tensor(mask),
            max_new_tokens=batch[0].max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
        answers += whole[:, longest:].tolist()
    return answers


@torch.inference_mode()
def transformers_steps(peer, counts: np.ndarray, device: torch.device) -> list[float]:
    """Seconds of each decode step but the first, over texts of `counts` tokens, padded on the left;
    their keys and values are random numbers. For bench/gpu.py."""
    from transformers import DynamicCache

    config, longest, past, times = peer.config, int(counts.max()), DynamicCache(), []
    size = config.hidden_size // config.num_attention_heads
    shape = (2, len(counts), config.num_key_value_heads, longest, size)
    for layer in range(config.num_hidden_layers):
        past.update(*torch.randn(shape, dtype=torch.bfloat16, device=device), layer)
    ids = torch.ones(len(counts), longest + 1, dtype=torch.int64, device=device)
    positions = torch.arange(longest + 1, device=device)
    mask = (positions >= longest - torch.tensor(counts, device=device)[:, None]).long()

    def take_time(ids: torch.Tensor, scores, **others) -> torch.Tensor:
        synchronize(device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=device)

    peer.generate(
        ids, attention_mask=mask, past_key_values=past, max_new_tokens=8, do_sample=True,
        temperature=0.6, top_p=0.95, top_k=0, eos_token_id=None, pad_token_id=0,
        stopping_criteria=[take_time],
    )  # fmt: skip
    assert past.get_seq_length() == longest + 8, "transformers read its texts again"
    return [after - before for before, after in pairwise(times)][1:]


def batches(requests: list[Request]) -> list[list[Request]]:
    """Groups of as many as there are slots; every limit is the longest of the group."""
    groups = [requests[start : start + SLOTS] for start in range(0, len(requests), SLOTS)]
    longest = [max(request.max_new_tokens for request in group) for group in groups]
    return [
        [Request(r.key, r.prompt_ids, limit) for r in group]
        for group, limit in zip(groups, longest)
    ]


# ---------------------------------------------------------------- measures


def ratios(seconds: dict[str, list[CPUSeconds]], peer: str) -> list[float]:
    return [other.total / own.total for own, other in zip(seconds[OURS], seconds[peer])]


def compare_greedy(mine, peer) -> int:
    """Prompts whose greedy answers agree. Raises AssertionError unless all do."""
    requests = [Request(key, prompt, 64) for key, prompt in enumerate(random_prompts(200, seed=1))]
    pairs = list(zip(ours(mine, requests, GREEDY), theirs(peer, requests, GREEDY)))
    same = sum(own == other for own, other in pairs)
    assert same == len(requests), f"{len(requests) - same} of {len(requests)} greedy answers differ"
    return same


def decoding(mine, peer) -> dict[str, dict]:
    """C15, on flat and on sharp logits."""
    requests = [Request(i, p, NEW_TOKENS) for i, p in enumerate(random_prompts(SLOTS, seed=0))]
    found = {"C15_greedy": result([float(compare_greedy(mine, peer))], 200.0, THEIRS)}
    for name, scale in (("flat", 1.0), ("sharp", SHARP)):
        for model in (mine, peer):
            torch.nn.init.constant_(model.model.norm.weight, scale)
        sides = {
            OURS: partial(ours, mine, requests, Sampling()),
            THEIRS: partial(theirs, peer, requests, Sampling()),
        }
        seconds = interleave(sides, ROUNDS)
        for side, rounds in seconds.items():
            speed = SLOTS * NEW_TOKENS / statistics.median(s.total for s in rounds)
            print(f"{name:<7}{side:<24}{speed:>7.0f} tokens/s")
        found[f"C15_{name}"] = result(ratios(seconds, THEIRS), 3.0, THEIRS)
    return found


def refilling(mine, peer) -> dict[str, dict]:
    """C16, on sharp logits."""
    limits = lengths(np.random.default_rng(0), REQUESTS, MEDIAN, LONGEST)
    prompts = random_prompts(REQUESTS, seed=2)
    requests = [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, limits))]
    usage = Usage()
    ours(mine, requests, Sampling(), usage)
    sides = {
        OURS: partial(ours, mine, requests, Sampling()),
        STATIC: lambda: [ours(mine, batch, Sampling()) for batch in batches(requests)],
        THEIRS: partial(theirs, peer, requests, Sampling()),
    }
    seconds = interleave(sides, STATIC_ROUNDS)
    for side, rounds in seconds.items():
        speed = sum(limits) / statistics.median(s.total for s in rounds)
        print(f"{'useful':<7}{side:<24}{speed:>7.0f} tokens/s")
    slot_use = usage.full_row_steps / (usage.full_steps * SLOTS)
    return {
        "C16_slot_use": result([slot_use], 0.98, "all slots"),
        "C16": result(ratios(seconds, THEIRS), 6.0, f"{THEIRS}, static batches"),
        "C16_own_static": result(ratios(seconds, STATIC), None, STATIC),
    }


def main() -> None:
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(
            folder,
            hidden_size=256,
            intermediate_size=1024,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
        )
        mine, _ = load_model(folder)
        peer = Qwen2ForCausalLM.from_pretrained(folder).eval()
    results = decoding(mine, peer) | refilling(mine, peer)
    print()
    for name, entry in results.items():
        spread = f"{entry['min']:.2f} to {entry['max']:.2f}"
        goal = f"  goal {entry['goal']:g}" if entry["goal"] else ""
        print(f"{name:<16}{entry['median']:>7.2f} ({spread}){goal}   over {entry['peer']}")
    write("generate", results)


if __name__ == "__main__":
    main()
