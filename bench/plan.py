"""The step plan: micro-batches above the lower bound (C11), balance of the ranks (C12), seconds.

    python -m bench.plan               about a quarter of a minute on one core

An epoch of the paper's stage 1: 77,629 traces, 128 a step, 8 ranks, packs of 32,768 tokens; and
of stage 2: 53,175 pairs, 32 a step, chosen and rejected dealt apart, or kept together as DPO and
SimPO need it. Lengths are log-normal, cut at the recipe's longest by drawing again: traces with a
median of 4.4k tokens and a mean of 5.7k, pairs a mean of 5.0k chosen and 6.1k rejected. The law is
an assumption: the real lengths are not published.

    C11           over all steps of stage 1, the most micro-batches of a rank above
                  ceil(tokens of the step / (ranks * pack_tokens)), which no plan can go below
    C11_seconds   CPU seconds for the plan of that epoch
    C12_*         mean over ranks / maximum over ranks of the cost of a step, averaged over steps;
                  the peer deals rows, or pairs, round-robin in the same shuffled order

The cost of a sequence of L tokens is L + 3.25e-5 L^2, Qwen2.5-1.5B's ratio of attention to matmuls.
Every plan is checked before it counts: each sequence once, no pack over the budget unless it is
one sequence (or pair), as many packs on every rank.
"""

import math
from functools import partial

import numpy as np

from bench.measure import cpu_seconds, result, write
from redi.packing import StepPlan, plan
from redi.trace.published import (
    LONGEST_OF_PAIR,
    LONGEST_TRACE,
    MEDIAN_CHOSEN,
    MEDIAN_REJECTED,
    MEDIAN_TRACE,
    PAIRS,
    TRACES,
    draw,
)  # fmt: skip

RANKS, PACK_TOKENS = 8, 32_768
ROWS_PER_STEP, PAIRS_PER_STEP = 128, 32
ATTENTION = 3.5 * 86e3 / 9.26e9
ROUNDS = 5


# ---------------------------------------------------------------- lengths and plans


def round_robin(ids: np.ndarray, group: int) -> list[np.ndarray]:
    """Sequence ids of a step (shuffled) -> those of each rank, `group` of them at a time."""
    rows = ids.reshape(-1, group)
    return [rows[rank::RANKS].reshape(-1) for rank in range(RANKS)]


def check(steps: list[StepPlan], lengths: np.ndarray, piece: int) -> None:
    """Raises AssertionError unless the plan keeps its promises. lengths: of every sequence id."""
    packs = [ids for step in steps for rank in step for ids in rank]
    used = np.sort(np.concatenate(packs))
    assert np.array_equal(used, np.arange(len(lengths))), "a sequence is missing or used twice"
    over = [ids for ids in packs if len(ids) > piece and lengths[ids].sum() > PACK_TOKENS]
    assert not over, f"{len(over)} packs are over the budget"
    assert all(len({len(rank) for rank in step}) == 1 for step in steps), "uneven ranks"


# ---------------------------------------------------------------- measures


def above_bound(steps: list[StepPlan], lengths: np.ndarray) -> list[int]:
    """Micro-batches of every step over what its tokens need at least."""
    tokens = [sum(lengths[ids].sum() for rank in step for ids in rank) for step in steps]
    bounds = [math.ceil(total / (RANKS * PACK_TOKENS)) for total in tokens]
    return [len(step[0]) - bound for step, bound in zip(steps, bounds)]


def balances(steps: list[list[np.ndarray]], lengths: np.ndarray) -> np.ndarray:
    """Mean over maximum of the ranks' costs; steps[step][rank] = all its sequence ids."""
    cost = lengths + ATTENTION * lengths**2.0
    per_rank = np.array([[cost[ids].sum() for ids in step] for step in steps])
    return per_rank.mean(axis=1) / per_rank.max(axis=1)


def by_rank(steps: list[StepPlan]) -> list[list[np.ndarray]]:
    return [[np.concatenate(rank) for rank in step] for step in steps]


def dealt_round_robin(count: int, per_step: int, group: int) -> list[list[np.ndarray]]:
    """The same steps as `plan` makes, without its dealing; group: sequences of a row."""
    rows = np.random.default_rng([42, 0]).permutation(count)
    ids = (group * rows[:, None] + np.arange(group)).reshape(-1)
    size = per_step * group
    return [round_robin(ids[start : start + size], group) for start in range(0, len(ids), size)]


def main() -> None:
    rng = np.random.default_rng(0)
    traces = draw(rng, TRACES, MEDIAN_TRACE, LONGEST_TRACE)
    medians = (MEDIAN_CHOSEN, MEDIAN_REJECTED)
    pairs = np.stack([draw(rng, PAIRS, median, LONGEST_OF_PAIR) for median in medians], axis=1)
    print(f"traces: mean {traces.mean():.0f}, median {np.median(traces):.0f}", end="; ")
    print(f"pairs: mean {pairs[:, 0].mean():.0f} chosen, {pairs[:, 1].mean():.0f} rejected")

    plan_sft = partial(plan, traces, ROWS_PER_STEP, PACK_TOKENS, RANKS)
    seconds = [cpu_seconds(plan_sft).total for _ in range(ROUNDS)]
    steps = plan_sft()
    results = {
        "C11": result(above_bound(steps, traces), 1, "ceil(tokens / (ranks * pack_tokens))"),
        "C11_seconds": result(seconds, 1.0, "a second"),
    }
    # The goal is about the worst step, so that is what the entry leads with.
    results["C11"]["median"] = results["C11"]["max"]
    check(steps, traces, piece=1)
    peers = {"C12_sft": balances(dealt_round_robin(TRACES, ROWS_PER_STEP, 1), traces)}
    ours = {"C12_sft": balances(by_rank(steps), traces)}

    flat = pairs.reshape(-1)
    for name, kept in (("C12_redi", False), ("C12_pairs_kept", True)):
        steps = plan(pairs, PAIRS_PER_STEP, PACK_TOKENS, RANKS, keep_pairs=kept)
        check(steps, flat, piece=2 if kept else 1)
        ours[name] = balances(by_rank(steps), flat)
        peers[name] = balances(dealt_round_robin(PAIRS, PAIRS_PER_STEP, 2), flat)
    print()
    goals = {"C12_sft": 0.99, "C12_redi": 0.98, "C12_pairs_kept": None}
    for name, found in ours.items():
        peer = float(peers[name].mean())
        results[name] = {
            **result(found.tolist(), goals[name], f"round-robin: {peer:.3f}"),
            "mean": float(found.mean()),
        }
    write("plan", results)


if __name__ == "__main__":
    main()
