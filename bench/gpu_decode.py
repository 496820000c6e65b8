"""G7, G8: redi's sampling on a GPU, beside what memory allows and transformers' `generate`.

Random weights of Qwen2.5-Math-1.5B's sizes in bf16, random tokens, temperature 0.6, top-p 0.95;
lengths are log-normal as in bench.plan. The engine is redi.eval.generate whole: prefill, admission,
sampling, and what the host does between steps. A step's time runs from one step to the next.

    G7_4k, G7_8k    256 texts with a mean of 4,096, or 8,192, tokens: tokens/s over the limit, which
                    is a step that reads all weights, and all keys and values, once, at the speed of
                    a copy on this device in this process
    G7_4k_HF, ...   the same tokens/s over transformers' in a batch of texts with the same lengths'
                    law, padded on the left: of 64, or as many as there is memory for
    G7_4k_HF_even   over transformers' best case: 256 texts of one length, no padding, or fewer
    G8_hours        a PROJECTION: 1,517 problems x 16 samples x 8,192 tokens at the tokens/s of a
                    slice of less than a minute

The slice begins in the middle: its first texts stand at a random place of answers drawn in
proportion to their length, as in a queue that has run for long; then fresh prompts follow as rows
end. What the projection leaves out: loading, the emptying queue at the end, grading.
The peer's keys and values are random numbers, not a prefill's: only its steps are timed.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bench.gpu_meter import Entries, free, has, seconds
from bench.gpu_steps import PROMPT, SHAPE, quantiles, random_model
from bench.measure import result
from bench.plan import LONGEST_TRACE, MEDIAN_TRACE, draw
from redi.eval.generate import Request, Usage, generate
from redi.eval.sampling import Sampling
from redi.model import ModelConfig, Transformer

ROWS, PEER_ROWS = 256, 64
CONTEXTS = {"4k": 4096, "8k": 8192}  # mean tokens of the texts
STEPS, PEER_STEPS, WARM = 60, 8, 4  # WARM: of them, not timed: compiled, recorded, allocated
COPY_BYTES = 2 << 30
SAMPLES = 16
COMPLETIONS, MEAN_ANSWER = 1517 * SAMPLES, 8192
MEDIAN_ANSWER = 6750  # its mean is MEAN_ANSWER's, but for a per cent, once cut at the context
SLICE_SECONDS, WINDOWS = 40.0, 5
GOAL_SHARE, GOAL_OVER_PEER, GOAL_HOURS = 0.6, 10.0, 5.0


@dataclass
class Clock(Usage):
    """When each step of decoding was begun, and its rows."""

    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def count_step(self, rows: int, full: bool) -> None:
        super().count_step(rows, full)
        self.times.append(time.perf_counter())
        self.rows.append(rows)

    def tokens_per_second(self, first: int, last: int) -> float:
        return sum(self.rows[first:last]) / (self.times[last] - self.times[first])


def bf16_model(config: ModelConfig, device: torch.device) -> Transformer:
    return random_model(config, device).bfloat16().requires_grad_(False)


def random_ids(rng: np.random.Generator, config: ModelConfig, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(config.vocab_size, size=count).tolist())


def text_lengths(rows: int, mean: int, longest: int) -> np.ndarray:
    """(rows,) quantiles of the law of traces, scaled to a mean and cut."""
    law = quantiles(rows, MEDIAN_TRACE, LONGEST_TRACE)
    return np.clip(law * mean / law.mean(), 1, longest).astype(np.int64)


# ---------------------------------------------------------------- G7


def decode(
    device: torch.device,
    config: ModelConfig = SHAPE,
    contexts: dict[str, int] = CONTEXTS,
    rows: int = ROWS,
    peer_rows: int = PEER_ROWS,
) -> Entries:
    bandwidth = copy_speed(device)
    print(f"a copy moves {bandwidth / 1e12:.2f} TB/s")
    model = bf16_model(config, device)
    weights = sum(p.nbytes for p in model.parameters())
    longest = config.max_positions - STEPS - 1
    found: Entries = {}
    for name, mean in contexts.items():
        lengths = text_lengths(rows, mean, longest)
        took, read = own_steps(model, lengths)
        limits = [(weights + tokens * kv_bytes(config)) / bandwidth for tokens in read]
        shares = [limit / each for limit, each in zip(limits, took)]
        goal = GOAL_SHARE if name in CONTEXTS else None
        found[f"G7_{name}"] = result(shares, goal, "a copy's speed, all read once")
        speeds = [rows / each for each in took]
        found[f"G7_{name}_tok_s"] = result(speeds, None, f"tokens/s, {rows} rows")
        print(f"{name}: {lengths.mean():.0f} tokens a text, {np.median(speeds):,.0f} tokens/s")
    del model
    free(device)
    if has("transformers", "G7"):
        found |= beside_peer(device, config, contexts, rows, peer_rows, found)
    return found


def copy_speed(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes a second, read and written ones together."""
    size = size if device.type == "cuda" else 1 << 20
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = partial(target.copy_, source)
    copy()
    return 2 * size / seconds(copy, device, calls=10)


def kv_bytes(config: ModelConfig) -> int:
    """Of a token, in bf16."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def own_steps(model: Transformer, lengths: np.ndarray) -> tuple[list[float], list[int]]:
    """Seconds of each timed step, and the tokens whose keys and values it read. Raises
    AssertionError if the texts were not all written side by side."""
    rng, clock = np.random.default_rng(0), Clock()
    asked = [
        Request(key, random_ids(rng, model.config, length), STEPS + 1)
        for key, length in enumerate(lengths.tolist())
    ]
    list(generate(model, asked, [], Sampling(), len(asked), usage=clock))
    assert clock.rows == [len(asked)] * STEPS, "the texts did not fit side by side"
    took = [after - before for before, after in pairwise(clock.times)][WARM:]
    read = [int(lengths.sum()) + len(lengths) * (WARM + 1 + step) for step in range(len(took))]
    return took, read


# ---------------------------------------------------------------- transformers, beside


def beside_peer(
    device: torch.device,
    config: ModelConfig,
    contexts: dict[str, int],
    rows: int,
    peer_rows: int,
    ours: Entries,
) -> Entries:
    from bench import gpu_trl

    peer = gpu_trl.random_model(config, "sdpa", device).bfloat16().eval()
    found: Entries = {}
    for name, mean in contexts.items():
        longest = config.max_positions - PEER_STEPS - 1
        own = ours[f"G7_{name}_tok_s"]
        ragged = partial(text_lengths, mean=mean, longest=longest)
        even = partial(np.full, fill_value=mean)
        for kind, most, make, goal in (
            ("HF", peer_rows, ragged, GOAL_OVER_PEER),
            ("HF_even", rows, even, None),
        ):
            batch, took = peer_steps(peer, most, make, device)
            speed = batch / float(np.median(took))
            ratios = [own[key] / speed for key in ("median", "min", "max")]
            said = f"transformers generate, {batch} rows, {speed:,.0f} tokens/s"
            found[f"G7_{name}_{kind}"] = result(ratios, goal, said)
    return found


def peer_steps(peer: Any, rows: int, make: Any, device: torch.device) -> tuple[int, list[float]]:
    """Rows, and seconds of each timed step: with `rows` texts, or half as many until they fit.
    make: rows -> their lengths."""
    while True:
        free(device)
        try:
            return rows, their_steps(peer, make(rows), device)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2


@torch.inference_mode()
def their_steps(peer: Any, lengths: np.ndarray, device: torch.device) -> list[float]:
    from transformers import DynamicCache

    config, longest = peer.config, int(lengths.max())
    past = DynamicCache()
    shape = (len(lengths), config.num_key_value_heads, longest)
    size = peer.model.layers[0].self_attn.head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(*shape, size, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        past.update(keys, values, layer)
        del keys, values
    ids = torch.ones(len(lengths), longest + 1, dtype=torch.int64, device=device)
    places = torch.arange(longest + 1, device=device)
    mask = (places >= longest - torch.tensor(lengths, device=device)[:, None]).long()
    times: list[float] = []

    def clock(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=device)

    peer.generate(
        ids,
        attention_mask=mask,
        past_key_values=past,
        max_new_tokens=PEER_STEPS,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    assert past.get_seq_length() == longest + PEER_STEPS, "transformers read its texts again"
    return [after - before for before, after in pairwise(times)][1:]


# ---------------------------------------------------------------- G8


def evaluation(
    device: torch.device,
    config: ModelConfig = SHAPE,
    slots: int = ROWS,
    median: float = MEDIAN_ANSWER,
    lasts: float = SLICE_SECONDS,
) -> Entries:
    """Hours of the whole evaluation, from the tokens/s of each window of the slice."""
    asked, mean = under_way(config, slots, median)
    model, clock = bf16_model(config, device), Clock()
    for _ in generate(model, asked, [], Sampling(), slots, usage=clock):
        if len(clock.times) > WARM and clock.times[-1] - clock.times[WARM] > lasts:
            break
    edges = np.linspace(WARM, len(clock.times) - 1, WINDOWS + 1).astype(int).tolist()
    speeds = [clock.tokens_per_second(*window) for window in pairwise(edges)]
    hours = [COMPLETIONS * MEAN_ANSWER / speed / 3600 for speed in speeds]
    print(
        f"PROJECTION from {clock.times[-1] - clock.times[WARM]:.0f} s: answers of {mean:,.0f} "
        f"tokens, {np.mean(clock.rows):.0f} rows a step, {np.median(speeds):,.0f} tokens/s, "
        f"{clock.evictions} texts set aside"
    )
    return {
        "G8_hours": result(hours, GOAL_HOURS, "hours, PROJECTION: 1,517 x 16 x 8,192 tokens"),
        "G8_tok_s": result(speeds, None, f"tokens/s of the slice, {slots} slots"),
    }


def under_way(config: ModelConfig, slots: int, median: float) -> tuple[list[Request], float]:
    """Requests of an evaluation that has run for long, and the mean length of its answers."""
    rng = np.random.default_rng(0)
    prompt = min(PROMPT, config.max_positions // 4)
    law = draw(rng, 100_000, median, config.max_positions - prompt)
    met = rng.choice(law, slots, p=law / law.sum())  # who looks in meets long ones more often
    written = (rng.random(slots) * met).astype(np.int64)
    requests = [
        Request(key, random_ids(rng, config, prompt + done), total - done)
        for key, (done, total) in enumerate(zip(written.tolist(), met.tolist()))
    ]
    for key, limit in enumerate(rng.choice(law, 4 * slots).tolist(), start=slots):
        if (key - slots) % SAMPLES == 0:
            ids = random_ids(rng, config, prompt)
        requests.append(Request(key, ids, limit))
    return requests, float(law.mean())
