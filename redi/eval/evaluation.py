"""A whole evaluation: benchmarks and a model in; completions, verdicts and a report out.

Under torchrun every rank holds the whole model and samples part of the completions; rank 0 then
grades them and writes the report. Sampling takes hours, so user errors are found before.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from redi import distributed
from redi.checkpoint.folder import Source, load_model, open_model
from redi.checkpoint.weights import weights_hash
from redi.config import UserError, require
from redi.distributed import World, all_ranks_ok, local_rank_zero_first, require_same
from redi.eval import external, report
from redi.eval.benchmarks import Benchmark, load_all
from redi.eval.completions import Completion, Store, store_inputs
from redi.eval.engine.complete import complete
from redi.eval.grade import grade_evaluation
from redi.eval.grading.grader import answer_rule, report_unreadable
from redi.eval.grading.workers import Pool
from redi.eval.protocol import EvalConfig, PromptedSample, prompt_samples
from redi.hub import is_hub_id
from redi.model import Transformer
from redi.runlog import NoLog, RunLog, is_finished, read_facts


def run(config: EvalConfig, world: World) -> None:
    """The program evaluate.py. Raises UserError for everything a user can fix."""
    may_differ = dict.fromkeys(("slots", "cache_gib", "graders"))  # as the machines do
    require_same(vars(config) | may_differ, world)
    with local_rank_zero_first(world):  # one download per node
        benchmarks = load_all(config.benchmark)
    require_same({"sha256 of --benchmark": _hash(repr(benchmarks))}, world)
    if config.export_prompts:
        return external.export_prompts(config, benchmarks) if world.rank == 0 else None
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
    require_same({**facts, "finished": finished}, world)
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
        try:
            if completions is None:
                model.to(world.device, distributed.compute_dtype(config.dtype, world))
                sample(model.requires_grad_(False), source, prompted, benchmarks, config, world)
            if first:
                grade_evaluation(out, config.grader, answer_rule(config.prefix), pool)
        except KeyboardInterrupt:
            text = f"{out} holds what is done; the same command resumes"
            raise KeyboardInterrupt(text) from None
    if first:
        written = report.write(out)
        log.finish()
        print(written)


def load_unchanged(
    config: EvalConfig, world: World, finished: bool
) -> tuple[Transformer, Source, dict[str, str]]:
    """(the model, without weights if the evaluation is finished; its source; hashes of its
    contents). Raises UserError if the hashes differ from those that config.out recorded."""
    with local_rank_zero_first(world):  # one download per node
        load = open_model if finished else load_model
        model, source = load(config.model)
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
    return model, source, contents


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    for benchmark, completion in complete(model, source, left, config, world, ", ".join(stores)):
        stores[benchmark].append(completion)
    all_ranks_ok(True, world)  # waits for all
    if world.rank == 0:
        for store in stores.values():
            store.finish()
