"""A whole evaluation: benchmarks and a model in; completions, verdicts and a report out.

Under torchrun every rank holds the whole model and samples part of the completions; rank 0 then
grades them and writes the report. Sampling takes hours, so user errors are found before.
"""

import hashlib
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from redi import distributed
from redi.checkpoint.folder import Source, load_model, open_model
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, require
from redi.data.files import refuse_overwriting
from redi.distributed import World, all_ranks_ok, local_rank_zero_first, require_same
from redi.eval import external, report
from redi.eval.benchmarks import Benchmark, load_all
from redi.eval.completions import Completion, Store, store_inputs
from redi.eval.engine.complete import complete
from redi.eval.grading.grader import answer_rule, grade_evaluation, report_unreadable
from redi.eval.grading.workers import Pool
from redi.eval.protocol import EvalConfig, PromptedSample, prompt_samples
from redi.hub import is_hub_id
from redi.model import Transformer
from redi.runlog import NoLog, RunLog, is_finished, read_facts


def run(config: EvalConfig, world: World) -> None:
    """The program evaluate.py. Raises UserError for everything a user can fix."""
    per_node = dict.fromkeys(("slots", "cache_gib", "graders"))  # may differ, as the machines do
    require_same(vars(config) | per_node, world)
    with local_rank_zero_first(world):  # one download per node
        benchmarks = load_all(config.benchmark)
    require_same({"sha256 of --benchmark": _hash(repr(benchmarks))}, world)
    if config.export_prompts:
        return export(config, benchmarks) if world.rank == 0 else None
    model, samples, completions = config.model, config.samples, None
    out = f"out/eval/{model}" if is_hub_id(model) else f"{model}/eval"
    if config.completions:
        samples, completions = external.read_completions(config.completions, benchmarks)
        agrees = config.samples in (samples, EvalConfig.samples)
        require(agrees, "samples", config.samples, f"{samples}, as in {config.completions}")
        out = f"out/eval/{Path(config.completions).stem}"
        if model == EvalConfig.model:  # the user did not name the model that made them
            model = config.completions
    config = replace(config, model=model, samples=samples, out=config.out or out)
    evaluate(config, world, benchmarks, completions)


def export(config: EvalConfig, benchmarks: list[Benchmark]) -> None:
    """Write the prompts for another program."""
    if config.completions:
        raise UserError("--export-prompts: expected without --completions, which come later")
    _, source = open_model(config.model, made_by=_made_by(config))
    given = [Path(name).expanduser() for name in config.benchmark]
    inputs = [*given, *chain(*(path.rglob("*") for path in given)), *source.folder.iterdir()]
    refuse_overwriting("export-prompts", config.export_prompts, inputs)
    prompted = prompt_samples(benchmarks, source, config)
    external.export_prompts(config.export_prompts, prompted, source, config)
    count = len(prompted) // config.samples
    print(f"saved {config.export_prompts}: {count} prompts, {config.samples} samples of each")


def evaluate(
    config: EvalConfig,
    world: World,
    benchmarks: list[Benchmark],
    completions: dict[str, list[Completion]] | None,
) -> None:
    """Sample, grade and report into config.out; existing completions are kept. completions: another
    program's, by benchmark; they are graded instead of sampled ones."""
    out, first = Path(config.out), world.rank == 0
    finished = is_finished(config.out, config)
    facts = {"torch": torch.__version__}
    if completions is None:
        model, source, contents = load_unchanged(config, world, finished)
        facts |= {"model": source.name, **contents}
    if finished:
        store_inputs(out, benchmarks, completions)
        print((out / "report.md").read_text("utf-8"), f"{out} is finished: nothing to do", sep="\n")
        return

    if completions is None:
        prompted = prompt_samples(benchmarks, source, config)
    with Pool(config.graders, config.grade_seconds) as pool:
        if first:
            report_unreadable(pool, benchmarks)  # now, not after hours of sampling
        with local_rank_zero_first(world):
            log = RunLog(config.out, config) if first else NoLog()
            log.start(facts)
            store_inputs(out, benchmarks, completions)
        if completions is None:
            model.to(world.device, distributed.compute_dtype(config.dtype, world))
            model.requires_grad_(False)
            sample(model, source, prompted, benchmarks, config, world)
        if not first:
            return
        try:
            grade_evaluation(out, config.grader, answer_rule(config.prefix), pool)
        except KeyboardInterrupt:
            text = f"{out} holds all completions; the same command grades them"
            raise KeyboardInterrupt(text) from None
    written = report.write(out)
    log.finish()
    print(written)


def load_unchanged(
    config: EvalConfig, world: World, finished: bool
) -> tuple[Transformer, Source, dict[str, str]]:
    """(the model, without weights if the evaluation is finished; its source; hashes of its
    contents). Raises UserError if the hashes differ from those that the evaluation in config.out
    recorded, and if ranks have different models."""
    with local_rank_zero_first(world):  # one download per node
        load = open_model if finished else load_model
        model, source = load(config.model, made_by=_made_by(config))
        settings = json.dumps([source.config, source.stop_ids], sort_keys=True)
        contents = {
            "weights": weights_hash(source.folder),
            "tokenizer": source.chat.fingerprint if source.chat else "none",
            "config.json or stop tokens": _hash(settings),
        }
        out = Path(config.out)
        before = read_facts(out) if (out / "config.toml").is_file() else {}
        changed = [name for name, now in contents.items() if before.get(name, now) != now]
        if changed:
            raise UserError(
                f"--model {config.model}: its {' and its '.join(changed)} changed since "
                f"{config.out} was started; choose another --out"
            )
    require_same({"torch": torch.__version__, **contents, "finished": finished}, world)
    return model, source, contents


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made_by(config: EvalConfig) -> str | None:
    """The command that makes the default model, for the error if it does not exist."""
    return "python -m redi train-redi" if config.model == EvalConfig.model else None


def sample(
    model: Transformer,
    source: Source,
    prompted: list[PromptedSample],
    benchmarks: list[Benchmark],
    config: EvalConfig,
    world: World,
) -> None:
    """Sample every completion that is not on disk yet; each is written when it is finished."""
    out = Path(config.out)
    stores = {b.name: Store(out, b, config.samples, world.rank) for b in benchmarks}
    left = [p for p in prompted if (p.problem.id, p.sample) not in stores[p.benchmark].done]
    all_ranks_ok(True, world)  # waits before a rank appends to what another still reads
    if done := len(prompted) - len(left):
        print(f"{out} holds {done} of {len(prompted)} completions; the rest are sampled now")
    name = benchmarks[0].name if len(benchmarks) == 1 else f"{len(benchmarks)} benchmarks"
    try:
        for benchmark, completion in complete(model, source, left, config, world, name):
            stores[benchmark].append(completion)
    except KeyboardInterrupt:
        done = sum(len(store.done) for store in stores.values())
        message = f"{out} holds {done} of {len(prompted)} completions; the same command resumes"
        raise KeyboardInterrupt(message) from None
    all_ranks_ok(True, world)  # waits for all
    if world.rank == 0:
        for store in stores.values():
            store.finish()
