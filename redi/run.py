"""A whole run of either stage: model and data in, training (train.py), a Hugging Face folder out.

What a user can get wrong is found before anything is written.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from redi import __version__, distributed
from redi.batches import TrainData
from redi.checkpoint.card import model_card
from redi.checkpoint.folder import Source, open_model, save_model
from redi.checkpoint.reference import reference_logps
from redi.checkpoint.resume import Checkpoints, refuse_changed_facts
from redi.checkpoint.weights import fill, weights_hash
from redi.config import UserError
from redi.data.dataset import Dataset, describe, select
from redi.data.store import load_store
from redi.distributed import Parallelism, World, local_rank_zero_first, report_lost_ranks
from redi.hub import dataset_files
from redi.memory import blocks_to_checkpoint, step_memory
from redi.model import Transformer
from redi.objectives import Objective
from redi.recipe import TrainConfig
from redi.runlog import NoLog, RunLog, is_finished, read_facts, read_metrics
from redi.train import Scorer, StopSignals, num_steps, train


def run(
    config: TrainConfig,
    objective: Objective,
    prepare_score: Callable[[TrainConfig, Source, World], Scorer | None],
) -> None:
    """Load, check, train, save: what train_sft.py and train_redi.py do. prepare_score: returns what
    evaluates the model between steps. Raises UserError for what a user can fix, and Stopped after a
    signal."""
    world = distributed.start(config.timeout)
    with report_lost_ranks(world, f"--timeout {config.timeout:g} minutes"):
        distributed.require_same(vars(config) | {"cache": "may differ"}, world)
        finished = not config.dry_run and is_finished(config.out, config)
        with local_rank_zero_first(world):  # downloads and tokenizes once per node
            model, source, dataset, eval_dataset = _load(config, objective)
            score = prepare_score(config, source, world)
        facts = facts_of(source, dataset)
        if eval_dataset:
            facts["held-out data sha256"] = eval_dataset.store.data_hash
        also = {"config.json": model.config, "finished": finished}
        distributed.require_same(facts | also, world)
        if finished:
            refuse_changed_facts(read_facts(Path(config.out)), facts, config.out)
            print(f"{config.out} is finished: nothing to do")
            return
        data = TrainData(dataset, objective, world, config.pack_tokens)
        eval_data = replace(data, dataset=eval_dataset) if eval_dataset else None
        dtype = distributed.compute_dtype(config.dtype, world)
        memory = step_memory(model, longest_pack(data, config), world, dtype, config.offload)
        checkpointed = blocks_to_checkpoint(config.checkpoint_blocks, memory)
        how = Parallelism(dtype, checkpointed, config.reshard_after_forward, config.offload)
        print(describe(dataset, source.chat), describe_plan(data, config), sep="\n")
        print(memory.describe(checkpointed), flush=True)
        if not config.dry_run:
            _train_and_save(config, model, source, data, eval_data, how, score, facts)


def _load(
    config: TrainConfig, objective: Objective
) -> tuple[Transformer, Source, Dataset, Dataset | None]:
    """The model, of which only the sizes are read, and the rows."""
    model, source = open_model(config.model, config.rope_theta, config.max_position_embeddings)
    dataset = load_data(config.data, config, source, objective)
    if not config.eval_data:
        return model, source, dataset, None
    eval_dataset = load_data(config.eval_data, config, source, objective)
    print(f"held out, {config.eval_data}: {describe(eval_dataset, source.chat)}\n")
    return model, source, dataset, eval_dataset


def _train_and_save(
    config: TrainConfig, model: Transformer, source: Source, data: TrainData,
    eval_data: TrainData | None, how: Parallelism, score: Scorer | None, facts: dict[str, str],
) -> None:  # fmt: skip
    world, folder, cache = data.world, source.folder, config.cache
    with local_rank_zero_first(world):
        # Held from here on: another process could remove the checkpoint that is chosen below.
        log = NoLog() if world.rank else RunLog(config.out, config, config.tracker)
    checkpoints = Checkpoints(Path(config.out), world, facts, config.keep)
    history = [r for r in read_metrics(Path(config.out)) if r["kind"] == "train"]
    begin = checkpoints.newest_valid(len(history)) if config.resume == "auto" else 0
    checkpoints.remove_after(begin)  # first, because a checkpoint needs its records
    log.start(facts, begin)
    distributed.parallelize(model, world, how)
    fill(model, folder)
    if data.objective.needs_reference:  # the model before its first step, also when resuming
        data, eval_data = (
            rows and replace(rows, reference=reference_logps(model, rows, folder, how.dtype, cache))
            for rows in (data, eval_data)
        )
    if begin:
        print(f"{config.out}: resumes after step {begin}", flush=True)
    train(model, data, config, log, checkpoints, eval_data, score, history[:begin])
    try:
        with StopSignals():  # a stop is too late now: saving finishes
            save_model(model, config.out, source, card=model_card(config, facts))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while saving; {config.out} holds no whole model") from None
    log.finish()
    print(f"saved {config.out}: a Hugging Face folder, config.toml, metrics.jsonl")


def load_data(path: str, config: TrainConfig, source: Source, objective: Objective) -> Dataset:
    """The rows of `path`, tokenized for this model, without those over the run's limits. Raises
    UserError for a model without a tokenizer, a limit above its context, a row that the objective
    cannot be trained on, and if no row is left."""
    if source.chat is None:
        raise UserError(f"{source.folder / 'tokenizer.json'}: no such file; training needs it")
    check_limits(config, source.config["max_position_embeddings"])
    store = load_store(dataset_files(path), source.chat, objective.takes, config.cache)
    return select(store, config, path)


def check_limits(config: TrainConfig, context: int) -> None:
    """Raise UserError if the run's limits let in rows that are longer than the context."""
    both = config.max_prompt + config.max_response
    longest, why = min((config.max_length, ""), (both, " (--max-prompt plus --max-response)"))
    if longest > context:
        raise UserError(
            f"--max-length: rows of {longest} tokens{why} would be let in, but the model's context "
            f"is {context}; set --max-length {context}, or raise --max-position-embeddings"
        )


def describe_plan(data: TrainData, config: TrainConfig) -> str:
    """What training will do with the rows, in two lines."""
    epoch = data.plan(config.rows_per_step, config.seed, epoch=0)
    packs, ranks = sum(len(step[0]) for step in epoch), data.world.world_size
    dealt = f" on each of {ranks} processes" if ranks > 1 else ""
    return (
        f"{num_steps(data, config):,} optimizer steps of {config.rows_per_step} rows "
        f"({len(epoch):,} per epoch, {config.epochs} epoch{'s' * (config.epochs > 1)});\n"
        f"an epoch has {data.dataset.lengths.sum():,} tokens in {packs:,} pack{'s' * (packs != 1)} "
        f"of at most {longest_pack(data, config):,}{dealt}, no padding"
    )


def longest_pack(data: TrainData, config: TrainConfig) -> int:
    """The most tokens that a pack of this run can hold."""
    lengths = data.dataset.lengths.reshape(len(data.dataset), -1)  # of one or two traces per row
    pieces = lengths.sum(axis=1) if data.objective.keep_pairs else lengths
    step = config.rows_per_step * lengths.sum(axis=1).max()
    return int(max(pieces.max(), min(config.pack_tokens, step)))


def facts_of(source: Source, dataset: Dataset) -> dict[str, str]:
    """What a run was made with and from, for config.toml and the model card."""
    return {
        "redi": __version__,
        "torch": torch.__version__,
        "parent": source.name,
        "parent's weights sha256": weights_hash(source.folder),
        "tokenizer": source.chat.fingerprint,
        "data sha256": dataset.store.data_hash,
        "rows": str(len(dataset)),
    }
