"""A whole run of either stage: model and data in, training, a Hugging Face folder out.

train_sft.py and train_redi.py give their stage's defaults and objective and call `run`. What a
user can get wrong is found here before anything is written. The loop itself is train.py.
Letters: N rows.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from redi import __version__, distributed
from redi.batches import TrainData
from redi.checkpoint.folder import Source, open_model, save_model
from redi.checkpoint.reference import reference_path
from redi.checkpoint.resume import Checkpoints
from redi.checkpoint.weights import fill, fingerprint
from redi.config import UserError, to_toml
from redi.data.dataset import Dataset, Limits, describe, hash_files, load_store, select
from redi.distributed import DTYPES, Parallelism, World, local_rank_zero_first, report_lost_ranks
from redi.eval.in_training import prepare
from redi.eval.protocol import EvalConfig
from redi.hub import CARD, dataset_files, is_hub_id
from redi.memory import blocks_to_checkpoint
from redi.objectives import Objective
from redi.runlog import NoLog, RunLog, is_finished, read_metrics
from redi.train import StopSignals, TrainConfig, num_steps, train


def run(config: TrainConfig, objective: Objective, paired: bool, model_made_by: str | None) -> None:
    """Load, look, train, save: what train_sft.py and train_redi.py do.

    paired: rows are pairs. model_made_by: the command that makes the default --model, for the
    error if it is missing. Raises UserError for everything a user can mend, before anything is
    written to --out; config.Stopped if it was asked to stop.
    """
    world = distributed.start(config.timeout)
    with report_lost_ranks(world, f"--timeout {config.timeout:g} minutes"):
        _run(config, objective, paired, model_made_by, world)


def _run(
    config: TrainConfig,
    objective: Objective,
    paired: bool,
    model_made_by: str | None,
    world: World,
) -> None:
    finished = not config.dry_run and is_finished(config.out, config)

    # ---- model and data; of the model only the sizes
    defaults = type(config)
    made_by = model_made_by if config.model == defaults.model else None
    with local_rank_zero_first(world):  # a hub id is downloaded, data is tokenised: once a node
        model, source = open_model(
            config.model, config.rope_theta, config.max_position_embeddings, made_by
        )
        made_by = "python -m redi.prepare" if config.data == defaults.data else None
        dataset = load_data(config.data, config, source, paired, made_by, world.is_local_rank_zero)
        eval_rows = None
        if config.eval_data:
            eval_rows = load_data(
                config.eval_data, config, source, paired, verify=world.is_local_rank_zero
            )
            print(f"held out, {config.eval_data}: {describe(eval_rows, source.chat)}\n")
        exam = None
        if config.eval_benchmark:
            exam = prepare(benchmark_config(config), source, world)
    facts = facts_of(source, dataset, config.data)
    if finished:
        check_facts(config, facts)
        print(f"{config.out} is finished: nothing to do")
        return
    task = TrainData(dataset, objective, world, config.pack_tokens)
    eval_task = replace(task, dataset=eval_rows) if eval_rows else None
    dtype = distributed.compute_dtype(config.dtype, world)
    checkpointed, why = blocks_to_checkpoint(
        config.checkpoint_blocks, model, longest_pack(dataset, config), world, dtype
    )
    print(describe(dataset, source.chat), describe_plan(task, config), why, sep="\n", flush=True)
    if config.dry_run:
        return
    if objective.needs_reference:
        where = partial(reference_path, config.cache, source.folder, model.config, dtype)
        task = replace(task, cache_path=where(dataset))
        eval_task = replace(eval_task, cache_path=where(eval_rows)) if eval_task else None

    # ---- train and save
    checkpoints = Checkpoints(Path(config.out), world, compared(facts), config.keep)
    history = [r for r in read_metrics(Path(config.out)) if r["kind"] == "train"]
    begin = checkpoints.newest_whole(len(history)) if config.resume == "auto" else 0
    log = NoLog()
    if world.rank == 0:
        log = RunLog(config.out, config, facts, config.tracker, begin)
        checkpoints.forget_after(begin)
    how = Parallelism(dtype, checkpointed, config.compile, config.reshard_after_forward)
    distributed.parallelize(model, world, how)
    fill(model, source.folder)
    if begin:
        print(f"{config.out}: goes on after step {begin}", flush=True)
    train(model, task, config, log, checkpoints, eval_task, exam, history[:begin])
    try:
        with StopSignals():  # too late to stop in good order
            card = model_card(config, facts)
            save_model(model, config.out, source, save_dtype(config, source), card)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while saving; {config.out} holds no whole model") from None
    log.finish()
    print(f"saved {config.out}: a Hugging Face folder, config.toml, metrics.jsonl")


# ---------------------------------------------------------------- before the first step


def load_data(
    path: str,
    config: TrainConfig,
    source: Source,
    paired: bool,
    made_by: str | None = None,
    verify: bool = True,
) -> Dataset:
    """The rows of `path`, tokenised for this model, without those over the run's limits.

    verify: compare tokens that are there already with their sha256; once a node is enough.
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
    files = dataset_files(path, made_by=made_by)
    store = load_store(files, source.chat, paired, config.cache, verify)
    limits = Limits(config.max_prompt, config.max_response, config.max_length)
    return select(store, limits, config.over_length, path)


def benchmark_config(config: TrainConfig) -> EvalConfig:
    """How the benchmark is asked between steps: like the training rows are."""
    return EvalConfig(
        benchmark=[config.eval_benchmark],
        samples=config.eval_samples,
        temperature=config.eval_temperature,
        user_prompt="plain",
        max_new_tokens=config.max_response,
        seed=config.seed,
    )


def describe_plan(task: TrainData, config: TrainConfig) -> str:
    """What training will do with the rows, in a line."""
    epoch = task.plan(config.rows_per_step, config.seed, epoch=0)
    packs, ranks = sum(len(step[0]) for step in epoch), task.world.world_size
    dealt = f" on each of {ranks} processes" if ranks > 1 else ""
    tokens = int(task.dataset.lengths.sum())
    return (
        f"{num_steps(task, config):,} optimizer steps of {config.rows_per_step} rows "
        f"({len(epoch):,} an epoch, {config.epochs} epoch{'s' * (config.epochs > 1)}); an epoch "
        f"is {tokens:,} tokens in {packs:,} pack{'s' * (packs != 1)} of {config.pack_tokens:,}"
        f"{dealt} (a longer row has its own), no padding"
    )


def longest_pack(dataset: Dataset, config: TrainConfig) -> int:
    """The most tokens that a pack of this run can hold."""
    longest_row = int(dataset.lengths.max())
    step = config.rows_per_step * longest_row * (2 if dataset.store.paired else 1)
    return max(longest_row, min(config.pack_tokens, step))


def facts_of(source: Source, dataset: Dataset, data: str) -> dict[str, str]:
    """What a run was made with and from, for config.toml and the model card."""
    card = (Path(data) if Path(data).is_dir() else Path(data).parent) / CARD
    made_by_prepare = {"data card sha256": hash_files([card])} if card.is_file() else {}
    return {
        "redi": __version__,
        "torch": torch.__version__,
        "parent": source.name,
        "parent's weights": fingerprint(source.folder),
        "tokenizer": source.chat.fingerprint,
        "data sha256": dataset.store.data_hash,
        "rows": str(len(dataset)),
        **made_by_prepare,
    }


COMPARED = ("parent's weights", "tokenizer", "data sha256")  # must not change under a run


def compared(facts: dict[str, str]) -> dict[str, str]:
    return {name: facts[name] for name in COMPARED}


def check_facts(config: TrainConfig, facts: dict[str, str]) -> None:
    """Raises UserError if a finished run was made from something else."""
    lines = (Path(config.out) / "config.toml").read_text(encoding="utf-8").splitlines()
    recorded = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    for name, now in compared(facts).items():
        if recorded.get(name, now) != now:
            raise UserError(
                f"--out {config.out}: holds a finished run whose {name} was {recorded[name]}; it "
                f"is {now} now; choose another --out"
            )


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
