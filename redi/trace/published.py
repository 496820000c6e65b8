"""The published run: its model's shape, and the lengths of its rows, which are assumed.

The real lengths are not published; these are drawn from a log-normal distribution, again if over
the recipe's limit. So traces have a median of 4.4k tokens and a mean of 5.7k, pairs a mean of
5.0k chosen and 6.1k rejected, and answers of an evaluation a mean of 8.3k.
"""

from pathlib import Path

import numpy as np

from redi.data.store import TokenStore
from redi.eval.benchmarks import KNOWN
from redi.model import ModelConfig

QWEN = ModelConfig(  # Qwen2.5-Math-1.5B
    vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
    num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=32_768,
)  # fmt: skip
TRACES, PAIRS = 77_629, 53_175
SIGMA = 0.75
MEDIAN_TRACE, MEDIAN_CHOSEN, MEDIAN_REJECTED = 4430, 4040, 5260  # before redrawing
LONGEST_TRACE, LONGEST_OF_PAIR = 32_768, 19_800
MEDIAN_ANSWER, PROMPT = 6750, 120
LONGEST_PROMPT = 800  # of pairs, where a trace is longer than a response may be
PROBLEMS = {name: counts[-1] for name, (_, _, counts) in KNOWN.items()}  # of each benchmark


def draw(rng: np.random.Generator, count: int, median: float, longest: int) -> np.ndarray:
    lengths = np.zeros(count)
    while (open_ := (lengths < 1) | (lengths > longest)).any():
        lengths[open_] = median * np.exp(SIGMA * rng.standard_normal(open_.sum()))
    return lengths.astype(np.int64)


def published_rows(paired: bool) -> TokenStore:
    """The rows of a stage, without their tokens. None is over the recipe's limits."""
    rng = np.random.default_rng(0)
    if paired:
        medians, longest = (MEDIAN_CHOSEN, MEDIAN_REJECTED), LONGEST_OF_PAIR
        sides = [draw(rng, PAIRS, median, longest) for median in medians]
        lengths = np.stack(sides, axis=1).reshape(-1)
        prompts = np.maximum(PROMPT, lengths - (longest - LONGEST_PROMPT))
    else:
        lengths = draw(rng, TRACES, MEDIAN_TRACE, LONGEST_TRACE)
        prompts = np.full(TRACES, PROMPT)
    lengths = np.maximum(lengths, prompts + 2)  # the least that a response has
    return TokenStore(
        folder=Path(),
        kind="pairs" if paired else "rows",
        data_hash="",
        skipped={},
        tokens=np.empty(0, dtype=np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=prompts,
        response_lengths=lengths - prompts,
        weights=np.resize([1.0, -1.0] if paired else [1.0], len(lengths)),
        row_numbers=np.arange(PAIRS if paired else TRACES) + 1,
    )
