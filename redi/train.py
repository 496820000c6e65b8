"""The one train loop.

    for step in plan:                      an optimizer step
        for batch in its packs:            forward, loss, backward
        clip, learning rate, AdamW, log, maybe a checkpoint

SFT and REDI differ in the objective they hand in and in the shape of their rows, not here. Losses
come out of the objective as shares of the whole step's loss: they are added up, never averaged,
so nothing depends on how the step was cut into packs, or dealt to ranks.

Left out: a Trainer class, callbacks, gradient accumulation as a setting (packs of a step simply
follow each other). Letters: R supervised tokens, S sequences of a pack.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from redi import distributed
from redi.batches import SequenceStats, TrainData, held_out, read, with_reference
from redi.checkpoint.resume import Checkpoints
from redi.config import Stopped, UserError, require
from redi.distributed import full_tensor, peak_memory_gib
from redi.eval.in_training import Exam, measure
from redi.model import Transformer
from redi.monitor import CollapseGuard, peak_flops, squared_update_norm, training_flops, watch
from redi.packing import StepPlan
from redi.runlog import NoLog, Progress, RunLog

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, and the paper's
WARMUP = 0.1  # share of the steps over which the learning rate rises
AT_LEAST_1 = (
    "rows_per_step", "epochs", "pack_tokens", "eval_every", "eval_samples", "max_prompt",
    "save_every", "keep", "collapse_steps",
)  # fmt: skip


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of both stages. The programs give those that differ their paper's default."""

    model: Annotated[str, "model to start from: folder or hub id"]
    data: Annotated[str, "training rows: file, folder or hub id"]
    out: Annotated[str, "folder for the trained model and the run's records"]
    lr: Annotated[float, "peak learning rate"]
    rows_per_step: Annotated[int, "rows in an optimizer step"]
    epochs: Annotated[int, "passes over the data"]
    rope_theta: Annotated[float | Literal["keep"], "rotary base of the trained model"]
    max_position_embeddings: Annotated[int | Literal["keep"], "its context, tokens"]
    max_prompt: Annotated[int, "longest prompt, tokens"]
    max_response: Annotated[int, "longest response, tokens with the stop token"]
    max_length: Annotated[int, "longest prompt and response together, tokens"]
    over_length: Annotated[
        Literal["drop", "error"], "rows over a limit: drop and count, or stop"
    ] = "drop"
    max_steps: Annotated[int | None, "stop (and end the schedule) after so many steps"] = None
    pack_tokens: Annotated[int, "tokens in a forward pass; a longer row gets its own"] = 32768
    weight_decay: Annotated[float, "AdamW's, on matrices"] = 1e-4
    clip: Annotated[float, "largest gradient norm"] = 1.0
    seed: Annotated[int, "of the shuffle"] = 42
    eval_data: Annotated[str | None, "held-out rows: their loss is logged"] = None
    eval_benchmark: Annotated[str | None, "benchmark, name or file: pass@1 on it is logged"] = None
    eval_samples: Annotated[int, "completions of each of its problems"] = 4
    eval_temperature: Annotated[float, "of their sampling; 0 is greedy"] = 0.6
    eval_every: Annotated[int, "optimizer steps between held-out losses, and between scores"] = 100
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], "of the compute; auto: bf16 on CUDA, fp32 on a CPU"
    ] = "auto"
    reshard_after_forward: Annotated[
        bool, "free a block's weights after its forward pass (ZeRO-3)"
    ] = False
    checkpoint_blocks: Annotated[str, "blocks run again in backward: auto, all, none, N"] = "auto"
    compile: Annotated[bool, "compile the blocks: a slower start, then faster steps"] = False
    save_dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"], "of the saved weights"
    ] = "source"
    save_every: Annotated[int, "optimizer steps between checkpoints"] = 200
    keep: Annotated[int, "checkpoints kept; the newest"] = 2
    resume: Annotated[
        Literal["auto", "never"], "continue from the newest checkpoint, or begin again"
    ] = "auto"
    timeout: Annotated[float, "minutes a process waits for the others before it gives up"] = 30.0
    collapse_threshold: Annotated[
        float, "warn when chosen log-probs fell by so much, nats per token"
    ] = 0.5
    collapse_steps: Annotated[int, "... and stayed there for so many steps"] = 20
    collapse_stop: Annotated[bool, "... and stop"] = False
    cache: Annotated[str, "folder for tokenised data, kept between runs"] = "out/tokens"
    tracker: Annotated[
        Literal["none", "tensorboard", "wandb"], "where metrics go besides metrics.jsonl"
    ] = "none"
    dry_run: Annotated[bool, "load, check, plan and report, then stop"] = False

    def __post_init__(self) -> None:
        for name in AT_LEAST_1:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_response", "max_length"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        require(
            self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1"
        )
        require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "above 0")
        require(self.clip > 0, "clip", self.clip, "above 0")
        for name in ("timeout", "collapse_threshold"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "eval_temperature"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        for name in ("rope_theta", "max_position_embeddings"):
            value = getattr(self, name)
            require(value == "keep" or value > 0, name, value, "keep, or a number above 0")
        require(
            Path(self.out).resolve() != Path(self.model).resolve(),
            "out",
            self.out,
            "another folder than --model",
        )


# ---------------------------------------------------------------- the loop


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, as the authors' library has it."""
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


def num_steps(task: TrainData, config: TrainConfig) -> int:
    """Optimizer steps of the run. The last of an epoch may be smaller; it is run all the same."""
    steps = config.epochs * math.ceil(len(task.dataset) / config.rows_per_step)
    return min(steps, config.max_steps or steps)


def train(
    model: Transformer,
    task: TrainData,
    config: TrainConfig,
    log: RunLog | NoLog,
    checkpoints: Checkpoints,
    eval_task: TrainData | None = None,
    exam: Exam | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Train `model`, placed and filled already, in place. history: the records of the steps that
    were done before, of a run that goes on from the checkpoint of the last of them.

    Raises Stopped after a step in which SIGTERM or Ctrl-C came, with a checkpoint saved, and
    UserError for a step whose loss or gradient is not finite, and for a collapse if asked to.
    """
    task = with_reference(model, task)  # before a checkpoint: the reference is the model at step 0
    eval_task = with_reference(model, eval_task) if eval_task else None
    optimizer = make_optimizer(model, config)
    total, tokens, seconds = num_steps(task, config), 0, 0.0
    guard, begin = CollapseGuard(config.collapse_threshold, config.collapse_steps), len(history)
    if begin:
        checkpoints.load(begin, model, optimizer)
    for record in history:
        warning = watch(guard, record["step"], record, checkpoints)
        if warning and config.collapse_stop:
            raise UserError(f"--collapse-stop: {warning}; without the flag the run goes on")
    steps = enumerate(islice(_steps(task, config), begin, total), start=begin + 1)
    shown = task.world.rank == 0
    with (
        Progress(total, Path(config.out).name, "step", shown, begin) as progress,
        StopSignals() as signals,
    ):
        for number, step in steps:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(number, total)
            try:
                record, stop = _train_step(model, optimizer, task, step, config, signals)
            except _NotFinite as broken:
                raise _refused(broken, number, task, step, config, checkpoints) from None
            log.record("train", number, **record)
            tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
            progress.update(_shown(record, tokens / seconds))
            look = number % config.eval_every == 0 or number == total
            if eval_task and look:
                log.record("eval", number, **held_out(model, eval_task))
            if exam and look:
                scores = measure(model, exam, number, config.reshard_after_forward)
                log.record("benchmark", number, **scores)
            warning = watch(guard, number, record, checkpoints)
            if warning and shown:
                print(f"warning: {warning}", file=sys.stderr)
            if number == total:
                return
            collapsed = warning and config.collapse_stop
            if stop or collapsed or number % config.save_every == 0:
                saved = checkpoints.save(number, model, optimizer)
            if stop or collapsed:
                log.record("stopped", number)
            if collapsed:
                raise UserError(f"--collapse-stop: stopped after step {number} of {total}")
            if stop:
                left = checkpoints.at(number) if saved else "no checkpoint (it could not be saved)"
                raise Stopped(f"after step {number} of {total}; {left}; the same command goes on")


def _steps(task: TrainData, config: TrainConfig) -> Iterator[StepPlan]:
    """All steps of the run, in order; the one after the one at hand is read ahead."""
    for epoch in range(config.epochs):
        steps = task.plan(config.rows_per_step, config.seed, epoch)
        for step, following in zip(steps, [*steps[1:], None]):
            if following:
                task.read_ahead(following)
            yield step


def _train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    task: TrainData,
    step: StepPlan,
    config: TrainConfig,
    signals: "StopSignals",
) -> tuple[dict[str, float], bool]:
    """One optimizer step: its record for the log, and whether any rank was asked to stop."""
    began = time.perf_counter()
    device, paired = task.world.device, task.dataset.store.paired
    loss, parts = torch.zeros((), device=device, dtype=torch.float64), []
    totals, lengths = task.totals(step), task.dataset.lengths.reshape(-1)[task.ids(step)]

    # ---- forward and backward, pack by pack: gradients add up in .grad
    packs = len(step[task.world.rank])
    for number, batch in enumerate(task.batches(step, totals), start=1):
        distributed.last_pack(model, number == packs, config.reshard_after_forward)
        entropies = torch.zeros_like(batch.token_weights)  # (R,)
        share, logps = task.loss(model, batch, totals, entropies)
        share.backward()
        loss += share.detach()
        parts.append(SequenceStats.of(batch, logps, paired, entropies))
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    update = squared_update_norm(optimizer) / task.world.num_nodes  # each has all the weights

    # ---- the one place in a step where the host waits for the device, and for the other ranks
    add = [loss, float(signals.wanted), update]
    reading = read(task, step, parts, add, replicated=[grad_norm], with_entropies=True)
    [loss, stop, update], [grad_norm] = reading.added, reading.replicated
    if not math.isfinite(loss + grad_norm):
        raise _NotFinite(loss, grad_norm, reading.means)

    # ---- update
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    seconds, lr = time.perf_counter() - began, optimizer.param_groups[0]["lr"]
    record = {"loss": loss, **reading.summary(), "lr": lr, "grad_norm": grad_norm}
    record["update_norm"] = math.sqrt(update)
    record["tokens"] = int(lengths.sum())
    if peak := peak_flops(device):
        flops = training_flops(model.config, lengths.tolist(), totals.num_tokens)
        record["mfu"] = flops / seconds / peak / task.world.world_size
    return record | {"memory_gib": peak_memory_gib(device), "seconds": seconds}, stop > 0


# ---------------------------------------------------------------- when to stop


class StopSignals:
    """SIGTERM (a machine is taken away) and Ctrl-C, noted while the body runs: the loop stops
    after the step at hand. A second Ctrl-C stops at once; a terminal and torchrun may both send
    the first one, so two within a second are one."""

    def __enter__(self) -> "StopSignals":
        self.wanted, self._noted = False, 0.0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.wanted and time.monotonic() - self._noted > 1.0:
            raise KeyboardInterrupt("at once; the newest checkpoint stays")
        self.wanted, self._noted = True, time.monotonic()


class _NotFinite(Exception):
    """The loss or the gradient of a step is not a number: (loss, gradient norm, means by id)."""


def _refused(
    broken: _NotFinite,
    number: int,
    task: TrainData,
    step: StepPlan,
    config: TrainConfig,
    checkpoints: Checkpoints,
) -> UserError:
    """The error for a step that was not applied: which rows, and on which ranks they were."""
    loss, grad_norm, means = broken.args
    guilty = [i for i, mean in means.items() if not math.isfinite(mean)] or list(means)
    sides = 2 if task.dataset.store.paired else 1
    ranks = sorted(
        {r for r, packs in enumerate(step) for ids in packs for i in ids if int(i) in set(guilty)}
    )
    rows = sorted({task.dataset.row_number(i // sides) for i in guilty})
    kept = checkpoints.at(checkpoints.steps()[0]) if checkpoints.steps() else "none yet"
    return UserError(
        f"{config.data}: step {number} has loss {loss} and gradient norm {grad_norm}; it was not "
        f"applied; rank {', '.join(map(str, ranks))}, rows {', '.join(map(str, rows))}; last good "
        f"checkpoint: {kept}"
    )


def _shown(record: dict[str, float], tokens_per_second: float) -> dict[str, str]:
    """The record as the progress line has room for it."""
    names = {"loss": "loss", "chosen_logp": "chosen", "rejected_logp": "rejected"}
    shown = {name: f"{record[key]:.3f}" for key, name in names.items() if key in record}
    shown |= {"lr": f"{record['lr']:.1e}", "grad": f"{record['grad_norm']:.2f}"}
    shown |= {"tok/s": f"{tokens_per_second:,.0f}", "mem": f"{record['memory_gib']:.1f}G"}
    return shown | ({"MFU": f"{record['mfu']:.0%}"} if "mfu" in record else {})
