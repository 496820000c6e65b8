"""The one train loop, and what the two training programs share around it.

    for step in plan:                      an optimizer step
        for batch in its packs:            forward, loss, backward
        clip, learning rate, AdamW, log

SFT and REDI differ in the objective they hand in and in the shape of their rows, not here. Losses
come out of the objective as shares of the whole step's loss: they are added up, never averaged,
so nothing depends on how the step was cut into packs.

Left out: a Trainer class, callbacks, gradient accumulation as a setting (packs of a step simply
follow each other). Letters: R supervised tokens, S sequences of a pack.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from redi import __version__, distributed
from redi.batches import SequenceLogps, Task, held_out, read, with_reference
from redi.checkpoint import Source, load_model, save_model
from redi.config import UserError, require, to_toml
from redi.data.dataset import Dataset, Limits, describe, load_store, select
from redi.distributed import DTYPES, peak_memory_gib, whole
from redi.flops import peak_flops, training_flops
from redi.hub import dataset_files, is_hub_id
from redi.memory import blocks_to_checkpoint
from redi.model import Transformer
from redi.objectives import Objective
from redi.packing import Step
from redi.runlog import Progress, RunLog, is_finished

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, and the paper's
WARMUP = 0.1  # share of the steps over which the learning rate rises


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
    eval_every: Annotated[int, "optimizer steps between held-out losses"] = 100
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], "of the compute; auto: bf16 on CUDA, fp32 on a CPU"
    ] = "auto"
    checkpoint_blocks: Annotated[str, "blocks run again in backward: auto, all, none, N"] = "auto"
    compile: Annotated[bool, "compile the blocks: a slower start, then faster steps"] = False
    save_dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"], "of the saved weights"
    ] = "source"
    cache: Annotated[str, "folder for tokenised data, kept between runs"] = "out/tokens"
    tracker: Annotated[
        Literal["none", "tensorboard", "wandb"], "where metrics go besides metrics.jsonl"
    ] = "none"
    dry_run: Annotated[bool, "load, check, plan and report, then stop"] = False

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "epochs", "pack_tokens", "eval_every", "max_prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_response", "max_length"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        require(
            self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1"
        )
        require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "above 0")
        require(self.clip > 0, "clip", self.clip, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
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


# ---------------------------------------------------------------- a whole run


def run(config: TrainConfig, objective: Objective, paired: bool, model_made_by: str | None) -> None:
    """Load, look, train, save: what train_sft.py and train_redi.py do.

    paired: rows are pairs. model_made_by: the command that makes the default --model, for the
    error if it is missing. Raises UserError for everything a user can mend, before anything is
    written to --out.
    """
    place = distributed.start()
    if not config.dry_run and is_finished(config.out, config):
        print(f"{config.out} is finished: nothing to do")
        return

    # ---- model and data
    defaults = type(config)
    made_by = model_made_by if config.model == defaults.model else None
    model, source = load_model(
        config.model, config.rope_theta, config.max_position_embeddings, made_by
    )
    made_by = "python -m redi.prepare" if config.data == defaults.data else None
    dataset = load_data(config.data, config, source, paired, made_by)
    task = Task(dataset, objective, place, config.pack_tokens)
    eval_task = None
    if config.eval_data:
        eval_rows = load_data(config.eval_data, config, source, paired)
        eval_task = replace(task, dataset=eval_rows)
        print(f"held out, {config.eval_data}: {describe(eval_rows, source.chat)}\n")
    dtype = distributed.compute_dtype(config.dtype, place)
    checkpointed, why = blocks_to_checkpoint(
        config.checkpoint_blocks, model, longest_pack(dataset, config), place.device, dtype
    )
    print(describe(dataset, source.chat), describe_plan(task, config), why, sep="\n", flush=True)
    if config.dry_run:
        return

    # ---- train and save
    facts = facts_of(source, dataset)
    log = RunLog(config.out, config, facts, config.tracker)
    distributed.place_model(model, place, dtype, checkpointed, config.compile)
    train(model, task, config, log, eval_task)
    try:
        save_model(model, config.out, source, save_dtype(config, source), model_card(config, facts))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while saving; {config.out} holds no whole model") from None
    log.finish()
    print(f"saved {config.out}: a Hugging Face folder, config.toml, metrics.jsonl")


# ---------------------------------------------------------------- before the first step


def load_data(
    path: str, config: TrainConfig, source: Source, paired: bool, made_by: str | None = None
) -> Dataset:
    """The rows of `path`, tokenised for this model, without those over the run's limits.

    Raises UserError for a model without a tokenizer, a limit above its context, a row that cannot
    be trained on, and if no row is left.
    """
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; training needs it")
    context = source.config["max_position_embeddings"]
    longest = min(config.max_length, config.max_prompt + config.max_response)
    if longest > context:
        raise UserError(
            f"--max-length: rows of {longest} tokens would be let in, but the model's context is "
            f"{context}; set --max-length {context}, or raise --max-position-embeddings"
        )
    store = load_store(dataset_files(path, made_by=made_by), source.chat, paired, config.cache)
    limits = Limits(config.max_prompt, config.max_response, config.max_length)
    return select(store, limits, config.over_length, path)


def num_steps(task: Task, config: TrainConfig) -> int:
    """Optimizer steps of the run. The last of an epoch may be smaller; it is run all the same."""
    steps = config.epochs * math.ceil(len(task.dataset) / config.rows_per_step)
    return min(steps, config.max_steps or steps)


def describe_plan(task: Task, config: TrainConfig) -> str:
    """What training will do with the rows, in a line."""
    epoch = task.plan(config.rows_per_step, config.seed, epoch=0)
    packs = sum(len(step[0]) for step in epoch)
    tokens = int(task.dataset.lengths.sum())
    return (
        f"{num_steps(task, config):,} optimizer steps of {config.rows_per_step} rows "
        f"({len(epoch):,} an epoch, {config.epochs} epoch{'s' * (config.epochs > 1)}); an epoch "
        f"is {tokens:,} tokens in {packs:,} packs of {config.pack_tokens:,} (a longer row has its "
        "own), no padding"
    )


def longest_pack(dataset: Dataset, config: TrainConfig) -> int:
    """The most tokens that a pack of this run can hold."""
    longest_row = int(dataset.lengths.max())
    step = config.rows_per_step * longest_row * (2 if dataset.store.paired else 1)
    return max(longest_row, min(config.pack_tokens, step))


def facts_of(source: Source, dataset: Dataset) -> dict[str, str]:
    """What a run was made with and from, for config.toml and the model card."""
    return {
        "redi": __version__,
        "torch": torch.__version__,
        "parent": source.name,
        "data sha256": dataset.store.data_hash,
        "rows": str(len(dataset)),
    }


def model_card(config: TrainConfig, facts: dict[str, str]) -> str:
    """README.md of the saved model: the recipe, the data's hash and the parent."""
    parent = f"base_model: {config.model}\n" if is_hub_id(config.model) else ""
    lines = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [redi]\n{parent}---\n\n"
        f"# {Path(config.out).name}\n\nTrained with redi (Reinforcement Distillation, arXiv "
        f"2505.24850).\n\n{lines}\n```toml\n{to_toml(config)}```\n"
    )


def save_dtype(config: TrainConfig, source: Source) -> torch.dtype:
    return source.dtype if config.save_dtype == "source" else DTYPES[config.save_dtype]


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


def train(
    model: Transformer, task: Task, config: TrainConfig, log: RunLog, eval_task: Task | None = None
) -> None:
    """Train `model`, placed already (distributed.place_model), in place.

    Ctrl-C ends it with a KeyboardInterrupt that says what is on disk.
    """
    task = with_reference(model, task)
    eval_task = with_reference(model, eval_task) if eval_task else None
    optimizer = make_optimizer(model, config)
    total, done = num_steps(task, config), 0
    tokens, seconds = 0, 0.0
    try:
        with Progress(total, Path(config.out).name, unit="step") as progress:
            for number, step in enumerate(islice(_steps(task, config), total), start=1):
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * lr_factor(number, total)
                record = _train_step(model, optimizer, task, step, config.clip)
                log.record("train", number, **record)
                tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
                progress.update(_shown(record, tokens / seconds))
                if eval_task and (number % config.eval_every == 0 or number == total):
                    log.record("eval", number, **held_out(model, eval_task))
                done = number
    except _NotFinite as broken:
        loss, grad_norm, rows = broken.args
        numbers = ", ".join(str(task.dataset.row_number(row)) for row in sorted(set(rows)))
        raise UserError(
            f"{config.data}: step {done + 1} has loss {loss} and gradient norm {grad_norm}; it was "
            f"not applied, and no model was saved; its rows are {numbers}"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"after step {done} of {total}; {log.folder} holds config.toml and metrics.jsonl, "
            "no model was saved"
        ) from None


def _steps(task: Task, config: TrainConfig) -> Iterator[Step]:
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
    task: Task,
    step: Step,
    clip: float,
) -> dict[str, float]:
    """One optimizer step; its record for the log."""
    began = time.perf_counter()
    device, config = task.place.device, model.config
    loss, parts = torch.zeros((), device=device, dtype=torch.float64), []
    totals, num_tokens, flops = task.totals(step), 0, 0.0

    # ---- forward and backward, pack by pack: gradients add up in .grad
    for batch in task.batches(step, totals):
        share, logps = task.loss(model, batch, totals)
        share.backward()
        loss += share.detach()
        parts.append(SequenceLogps.of(batch, logps))
        num_tokens += len(batch.tokens)
        flops += training_flops(config, batch.lengths, len(batch.targets))
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), clip))

    # ---- the one place in a step where the host waits for the device
    [loss, grad_norm], summary = read([loss, grad_norm], parts)
    if not math.isfinite(loss + grad_norm):
        raise _NotFinite(loss, grad_norm, [row for part in parts for row in part.row_ids])

    # ---- update
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    seconds, lr = time.perf_counter() - began, optimizer.param_groups[0]["lr"]
    record = {"loss": loss, **summary, "lr": lr, "grad_norm": grad_norm, "tokens": num_tokens}
    if peak := peak_flops(device):
        record["mfu"] = flops / seconds / peak
    return record | {"memory_gib": peak_memory_gib(device), "seconds": seconds}


class _NotFinite(Exception):
    """The loss or the gradient of a step is not a number: (loss, gradient norm, rows)."""


def _shown(record: dict[str, float], tokens_per_second: float) -> dict[str, str]:
    """The record as the progress line has room for it."""
    names = {"loss": "loss", "chosen_logp": "chosen", "rejected_logp": "rejected"}
    shown = {name: f"{record[key]:.3f}" for key, name in names.items() if key in record}
    shown |= {"lr": f"{record['lr']:.1e}", "grad": f"{record['grad_norm']:.2f}"}
    shown |= {"tok/s": f"{tokens_per_second:,.0f}", "mem": f"{record['memory_gib']:.1f}G"}
    return shown | ({"MFU": f"{record['mfu']:.0%}"} if "mfu" in record else {})
