"""The training loop.

    for step in plan:                      an optimizer step
        for batch in its packs:            forward, loss, backward
        clip, exchange statistics, AdamW, log, maybe a checkpoint

SFT and REDI differ in the objective and in the shape of their rows, not here. Left out: a Trainer
class, callbacks, gradient accumulation as a setting (the packs of a step simply follow each other).
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from redi import distributed, monitor
from redi.batches import TrainData
from redi.checkpoint.resume import Checkpoints
from redi.config import Stopped, UserError
from redi.distributed import full_tensor, peak_memory_gib
from redi.model import Transformer
from redi.monitor import CollapseGuard, StepStats, StepSums
from redi.packing import StepPlan
from redi.recipe import TrainConfig
from redi.runlog import NoLog, Progress, RunLog

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, and the paper's
WARMUP = 0.1  # share of the steps over which the learning rate rises

Scorer = Callable[[Transformer, int], dict[str, float]]  # (model, step) -> a "benchmark" record


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (the authors' code also decays the final norm)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)


def lr_factor(step: int, total: int) -> float:
    """Share of the peak at step k of S (k = 1..S): up to 1 over the first tenth, then to 0.

    >>> [round(lr_factor(k, 20), 3) for k in (1, 2, 3, 11, 20)]
    [0.5, 1.0, 0.944, 0.5, 0.0]
    """
    warmup = math.ceil(WARMUP * total)
    return step / warmup if step <= warmup else (total - step) / (total - warmup)


def num_steps(data: TrainData, config: TrainConfig) -> int:
    """Optimizer steps of the run. The last step of an epoch may have fewer rows; it counts."""
    steps = config.epochs * math.ceil(len(data.dataset) / config.rows_per_step)
    return min(steps, config.max_steps or steps)


def train(
    model: Transformer,
    data: TrainData,
    config: TrainConfig,
    log: RunLog | NoLog,
    checkpoints: Checkpoints,
    eval_data: TrainData | None = None,
    score: Scorer | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Train `model` in place. It is distributed and has its weights already.

    eval_data: held-out rows, whose loss is logged. score: evaluates the model between steps.
    history: the train records of the steps before the checkpoint to resume from. Raises Stopped
    after a step in which SIGTERM or Ctrl-C arrived, with a checkpoint saved; UserError for a loss
    or gradient that is not finite, and for a collapse if asked to.
    """
    optimizer = make_optimizer(model, config)
    total, begin, tokens, seconds = num_steps(data, config), len(history), 0, 0.0
    if begin:
        checkpoints.load(begin, model, optimizer)
    guard = CollapseGuard(config.collapse_threshold, config.collapse_steps)
    for record in history:
        warning = guard.watch(record["step"], record, checkpoints)
        if warning and config.collapse_stop:
            raise UserError(f"--collapse-stop: {warning}; without the flag the run resumes")
    epochs = (data.plan(config.rows_per_step, config.seed, epoch) for epoch in range(config.epochs))
    steps = islice(chain.from_iterable(epochs), begin, total)
    progress = Progress(total, Path(config.out).name, "step", data.world.rank == 0, begin)
    with progress, StopSignals() as signals:
        for number, step in enumerate(steps, start=begin + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(number, total)
            stats, record = train_step(model, optimizer, data, step, config, signals)
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                raise _not_finite(number, record, stats, data, step, config, checkpoints)
            log.record("train", number, **record)
            tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
            progress.update(_progress_values(record, tokens / seconds))
            # ---- once in a while: held-out loss, score, collapse warning, checkpoint
            due = number % config.eval_every == 0 or number == total
            if eval_data and due:
                log.record("eval", number, **held_out(model, eval_data))
            if score and due:
                log.record("benchmark", number, **score(model, number))
            warning = guard.watch(number, record, checkpoints)
            if warning and data.world.rank == 0:
                print(f"warning: {warning}", file=sys.stderr)
            if number == total:
                return
            collapsed = warning and config.collapse_stop
            stopping = collapsed or stats.scalars[STOP] > 0
            if stopping or number % config.save_every == 0:
                saved = checkpoints.save(number, model, optimizer)
            if stopping:
                log.record("stopped", number)
                if collapsed:
                    raise UserError(f"--collapse-stop: stopped after step {number} of {total}")
                kept = checkpoints.at(number) if saved else "no checkpoint (it could not be saved)"
                raise Stopped(f"after step {number} of {total}; {kept}; the same command resumes")


STOP, SQUARED_UPDATE, GRAD_NORM = range(3)  # the scalars that ranks sum in a step


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    data: TrainData,
    step: StepPlan,
    config: TrainConfig,
    signals: "StopSignals",
) -> tuple[StepStats, dict[str, float]]:
    """One optimizer step: its statistics, and its record for the log. A step whose loss or gradient
    is not finite changes no weight."""
    began = time.perf_counter()
    world, sums = data.world, StepSums(data, step)

    # ---- forward and backward, pack by pack: gradients accumulate in .grad
    num_packs = len(step[world.rank])
    for number, batch in enumerate(data.batches(step), start=1):
        distributed.last_pack(model, number == num_packs, config.reshard_after_forward)
        result = data.objective.loss(model, batch)
        result.loss.backward()
        sums.add(batch, result)
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    update = monitor.squared_update_norm(optimizer)

    # ---- one all-reduce for all statistics; the host waits for the device here
    # Every rank has the whole gradient's norm, so only rank 0 contributes it.
    stats = sums.gather([float(signals.wanted), update, grad_norm if world.rank == 0 else 0.0])

    # ---- update
    record = stats.summary() | {"lr": optimizer.param_groups[0]["lr"]}
    record["grad_norm"] = stats.scalars[GRAD_NORM]
    record["update_norm"] = math.sqrt(stats.scalars[SQUARED_UPDATE])
    if math.isfinite(record["loss"] + record["grad_norm"]):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    lengths = data.dataset.lengths.reshape(-1)[stats.ids]  # of each sequence
    seconds, record["tokens"] = time.perf_counter() - began, int(lengths.sum())
    if peak := monitor.peak_flops(world.device):
        num_supervised = int(data.dataset.response_lengths[stats.ids].sum())
        flops = monitor.training_flops(model.config, lengths.tolist(), num_supervised)
        record["mfu"] = flops / seconds / peak / world.world_size
    return stats, record | {"memory_gib": peak_memory_gib(world.device), "seconds": seconds}


def held_out(model: Transformer, data: TrainData) -> dict[str, float]:
    """The loss over all rows of `data` as one step, and their mean log-probs."""
    step = data.all_rows()
    sums = StepSums(data, step)
    with distributed.without_gradients(model):
        for batch in data.batches(step):
            sums.add(batch, data.objective.loss(model, batch))
    return sums.gather().summary(entropies=False)


class StopSignals:
    """Notes SIGTERM (the machine is taken away) and Ctrl-C while the body runs, so that the loop
    can stop after the current step. A second Ctrl-C stops at once. A terminal and torchrun may both
    deliver the first one, so two within a second count as one."""

    def __enter__(self) -> "StopSignals":
        self.wanted, self._noted = False, 0.0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.wanted and time.monotonic() - self._noted > 1.0:
            raise KeyboardInterrupt("immediately; the newest checkpoint is kept")
        self.wanted, self._noted = True, time.monotonic()


def _not_finite(
    number: int, record: dict[str, float], stats: StepStats, data: TrainData, step: StepPlan,
    config: TrainConfig, checkpoints: Checkpoints,
) -> UserError:  # fmt: skip
    """Names the rows whose log-probs are not finite (or all rows), and the ranks that had them."""
    guilty = set(stats.ids[~np.isfinite(stats.mean_logps)].tolist()) or set(stats.ids.tolist())
    ranks = [r for r, packs in enumerate(step) if any(guilty & set(ids.tolist()) for ids in packs)]
    rows = sorted({data.dataset.row_number(i // data.dataset.per_row) for i in guilty})
    kept = checkpoints.at(checkpoints.steps()[0]) if checkpoints.steps() else "none yet"
    return UserError(
        f"{config.data}: step {number} has loss {record['loss']} and gradient norm "
        f"{record['grad_norm']}; the update was not applied; rank {', '.join(map(str, ranks))}, "
        f"rows {', '.join(map(str, rows))}; last good checkpoint: {kept}"
    )


def _progress_values(record: dict[str, float], tokens_per_second: float) -> dict[str, str]:
    """The part of a record that fits on the progress line."""
    names = {"loss": "loss", "chosen_logp": "chosen", "rejected_logp": "rejected"}
    shown = {name: f"{record[key]:.3f}" for key, name in names.items() if key in record}
    shown |= {"lr": f"{record['lr']:.1e}", "grad": f"{record['grad_norm']:.2f}"}
    shown |= {"tok/s": f"{tokens_per_second:,.0f}", "mem": f"{record['memory_gib']:.1f}G"}
    return shown | ({"MFU": f"{record['mfu']:.0%}"} if "mfu" in record else {})
