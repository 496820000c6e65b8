"""G4, G5, G6: redi's own training steps at Qwen2.5-Math-1.5B's size.

Random weights, made on the device; random tokens with the lengths of traces. The loop is
redi.train.train on a model after redi.distributed.parallelize, so all is there that a run has: bf16
from fp32 weights, packs of 32,768 tokens, clipping, AdamW, the record of log-probs. Left out: what
comes before and after, that is tokenizing, loading and saving.

    G4_tok_s    SFT, ROWS traces a step            G5_tok_s    REDI, PAIRS pairs a step
    G4_mfu      FLOPs counted by document, of a large matmul's 790 TFLOP/s
    G6_*        the peak of a step over redi.memory's formula: all blocks checkpointed, as many as
                `auto` takes, none

An epoch is one step. Lengths are quantiles of bench.plan's law, so that few rows are as uneven as
many. The clock runs from one step's record to the next one's; the first step is not timed.
Letters: N rows, T tokens, P pairs.
"""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.gpu_attention import TOKENS, pack_lengths
from bench.gpu_loss import DENSE_FLOPS
from bench.gpu_meter import Entries, free, peak
from bench.measure import result
from bench.plan import (
    LONGEST_OF_PAIR,
    LONGEST_TRACE,
    MEDIAN_CHOSEN,
    MEDIAN_REJECTED,
    MEDIAN_TRACE,
    draw,
)
from bench.projection import QWEN
from redi import memory, objectives, recipe
from redi.batches import TrainData
from redi.checkpoint.resume import Checkpoints
from redi.data.dataset import Dataset, TokenStore
from redi.distributed import Parallelism, World, compute_dtype, parallelize
from redi.model import ModelConfig, Transformer
from redi.monitor import training_flops
from redi.objectives import Objective
from redi.recipe import TrainConfig
from redi.train import train

SHAPE = replace(QWEN, max_positions=TOKENS)
ROWS, PAIRS = 17, 8  # a step of about 96,000 and 87,000 tokens
STEPS = 5
PROMPT = 120  # tokens, of any row
ALPHA = 0.8
GOAL_TOK_S = 30_000.0


# ---------------------------------------------------------------- lengths, tokens, weights


def quantiles(count: int, median: float, longest: int) -> np.ndarray:
    """`count` lengths that stand for the whole law, in random order."""
    rng = np.random.default_rng(0)
    law = draw(rng, 100_000, median, longest)
    return rng.permutation(np.quantile(law, (np.arange(count) + 0.5) / count)).astype(np.int64)


def trace_lengths(count: int = ROWS) -> np.ndarray:
    """(N,), prompts included."""
    return quantiles(count, MEDIAN_TRACE, LONGEST_TRACE)


def pair_lengths(count: int = PAIRS) -> np.ndarray:
    """(N, 2): chosen and rejected, one independent of the other."""
    chosen = quantiles(count, MEDIAN_CHOSEN, LONGEST_OF_PAIR)
    rejected = np.sort(quantiles(count, MEDIAN_REJECTED, LONGEST_OF_PAIR))
    return np.stack([chosen, np.random.default_rng(1).permutation(rejected)], axis=1)


def random_rows(folder: Path, lengths: np.ndarray, vocabulary: int) -> Dataset:
    """Rows (N,), or pairs (N, 2), of random tokens, memory-mapped as training has them."""
    flat = lengths.reshape(-1)
    tokens = np.random.default_rng(0).integers(vocabulary, size=flat.sum(), dtype=np.int32)
    tokens.tofile(folder / "tokens.bin")
    prompts = np.minimum(PROMPT, flat - 1).astype(np.int32)
    store = TokenStore(
        folder=folder,
        paired=lengths.ndim == 2,
        data_hash="",
        skipped={},
        tokens=np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r"),
        offsets=np.cumsum([0, *flat]),
        prompt_lengths=prompts,
        response_lengths=(flat - prompts).astype(np.int32),
        row_numbers=np.arange(1, len(lengths) + 1),
    )
    return Dataset(store, np.arange(len(lengths)), {})


def random_model(config: ModelConfig, device: torch.device) -> Transformer:
    """Matrices and embedding from N(0, 0.02^2), as Qwen2 begins; norms 1, biases 0; fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
    return model


# ---------------------------------------------------------------- a few steps of the real loop


@dataclass
class Clock:
    """A log that keeps the records, and the time of each."""

    folder: Path
    times: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def record(self, kind: str, step: int, **values: Any) -> None:
        self.times.append(time.perf_counter())
        self.records.append(values)

    def tokens_per_second(self) -> list[float]:
        """Of every step but the first."""
        taken = np.diff(self.times).tolist()
        return [record["tokens"] / s for record, s in zip(self.records[1:], taken)]


@dataclass(frozen=True)
class Run:
    """What is trained, and how it is placed."""

    model: ModelConfig
    lengths: np.ndarray  # (N,) of rows, (N, 2) of pairs: those of every step
    pack_tokens: int = TOKENS
    steps: int = STEPS
    blocks: str = "auto"  # to checkpoint
    compiled: bool = False

    @property
    def paired(self) -> bool:
        return self.lengths.ndim == 2

    @property
    def longest_pack(self) -> int:
        return max(int(self.lengths.max()), min(self.pack_tokens, int(self.lengths.sum())))


def settings(run: Run, folder: Path) -> tuple[TrainConfig, Objective]:
    """Of the programs, but for the size of a step."""
    few = {
        "model": "random",
        "data": "random",
        "out": str(folder / "run"),
        "rows_per_step": len(run.lengths),
        "epochs": run.steps,
        "pack_tokens": run.pack_tokens,
    }
    if run.paired:
        config = recipe.REDIConfig(**few, alpha=ALPHA)
        return config, config.make_objective()
    return recipe.SFTConfig(**few), objectives.sft()


def train_steps(run: Run, device: torch.device) -> tuple[Clock, int]:
    """The steps' records, and how many blocks were checkpointed. What it prints is lost."""
    world = World(0, 1, device)
    dtype = compute_dtype("auto", world)
    model = random_model(run.model, device)
    needs = memory.step_memory(model, run.longest_pack, world, dtype)
    checkpointed = memory.blocks_to_checkpoint(run.blocks, needs)
    parallelize(model, world, Parallelism(dtype, checkpointed, run.compiled))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config, objective = settings(run, folder)
        dataset = random_rows(folder, run.lengths, run.model.vocab_size)
        data = TrainData(dataset, objective, world, run.pack_tokens)
        log = Clock(folder)
        with redirect_stdout(sys.stderr):
            train(model, data, config, log, Checkpoints(folder / "run", world, {}, config.keep))
    return log, checkpointed


def flops_of_step(run: Run) -> float:
    flat = run.lengths.reshape(-1)
    supervised = int((flat - np.minimum(PROMPT, flat - 1)).sum())
    return training_flops(run.model, flat.tolist(), supervised)


# ---------------------------------------------------------------- measures


def speed(name: str, run: Run, device: torch.device, goal: float | None) -> Entries:
    log, checkpointed = train_steps(run, device)
    speeds = log.tokens_per_second()
    tokens, last = log.records[-1]["tokens"], log.records[-1]
    assert tokens == run.lengths.sum(), f"{tokens} tokens a step, not {run.lengths.sum()}"
    mfu = [flops_of_step(run) * each / tokens / DENSE_FLOPS for each in speeds]
    print(
        f"{tokens:,} tokens a step, {checkpointed} of {run.model.num_layers} blocks checkpointed, "
        f"{last['memory_gib']:.1f} GiB; losses "
        + ", ".join(f"{record['loss']:.4f}" for record in log.records)
    )
    return {
        f"{name}_tok_s": result(speeds, goal, "real tokens per second"),
        f"{name}_mfu": result(mfu, None, "790 TFLOP/s, by document"),
        f"{name}_gib": result([last["memory_gib"]], None, "GiB, the process's peak"),
    }


def sft(device: torch.device) -> Entries:
    return speed("G4", Run(SHAPE, trace_lengths()), device, GOAL_TOK_S)


def sft_compiled(device: torch.device) -> Entries:
    return speed("G4_compiled", Run(SHAPE, trace_lengths(), compiled=True), device, None)


def redi(device: torch.device) -> Entries:
    return speed("G5", Run(SHAPE, pair_lengths()), device, GOAL_TOK_S)


# ---------------------------------------------------------------- memory against the formula


def peaks(
    device: torch.device, config: ModelConfig = SHAPE, lengths: list[int] | None = None
) -> Entries:
    """Two steps for each setting, of one pack; in the second the optimizer's state is there."""
    lengths = lengths or pack_lengths(TOKENS)
    world, tokens = World(0, 1, device), sum(lengths)
    dtype = compute_dtype("auto", world)
    with torch.device("meta"):
        sizes = Transformer(config)
    found: Entries = {}
    print(f"{'blocks checkpointed':<22}{'peak GiB':>10}{'formula':>10}{'ratio':>8}")
    for setting in ("all", "auto", "none"):
        free(device)
        needs = memory.step_memory(sizes, tokens, world, dtype)
        count = memory.blocks_to_checkpoint(setting, needs)
        expected = needs.total(count)
        if expected > 0.97 * memory.total_memory(world):
            print(f"{setting:<22} skipped: {expected / 2**30:.1f} GiB by the formula do not fit")
            continue
        run = Run(config, np.array(lengths), tokens, steps=2, blocks=setting)
        try:
            taken, _ = peak(partial(train_steps, run, device), device)
        except torch.OutOfMemoryError:
            print(f"{setting:<22} out of memory; the formula says {expected / 2**30:.1f} GiB")
            continue
        name = f"{setting}, {count} of {config.num_layers}"
        print(
            f"{name:<22}{taken / 2**30:>10.1f}{expected / 2**30:>10.1f}{taken / expected:>8.2f}",
            flush=True,
        )
        off = abs(taken / expected - 1)
        found[f"G6_{setting}"] = result([off], 0.15, "|peak / redi.memory's formula - 1|")
        found[f"G6_{setting}_gib"] = result([taken / 2**30], None, "GiB")
    return found
