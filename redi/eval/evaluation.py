"""A whole evaluation: benchmarks and a model in; completions, verdicts and a report out.

Under torchrun every rank holds the whole model and makes its share of the completions; the first
rank then grades them and writes the report. Sampling takes hours, so user errors are found before.
"""

import hashlib
import json
from pathlib import Path

import torch

from redi import distributed
from redi.checkpoint.folder import Source, load_model, open_model
from redi.checkpoint.weights import weights_hash
from redi.config import UserError
from redi.distributed import World, local_rank_zero_first, require_same, wait_for_all
from redi.eval import benchmarks, external, report
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Completion, Store, keep_problems
from redi.eval.engine.complete import complete
from redi.eval.grading.grader import Grader, answer_rule, mark_run, report_unreadable
from redi.eval.protocol import Asked, EvalConfig, ask, check_limit
from redi.eval.reporting import tables
from redi.hub import is_hub_id
from redi.model import Transformer
from redi.runlog import NoLog, RunLog, is_finished, read_facts


def run(config: EvalConfig, world: World) -> None:
    """What evaluate.py does with its flags. Raises UserError for everything a user can fix."""
    on_each_node = ("slots", "cache_gib", "graders")  # may differ, as the machines do
    require_same(vars(config) | dict.fromkeys(on_each_node), world)
    default_model = EvalConfig.model
    made_by, given = "python train_redi.py" if config.model == default_model else None, None
    with local_rank_zero_first(world):  # the hub is asked once per node
        tests = benchmarks.load_all(config.benchmark)
    problems = hashlib.sha256(repr(tests).encode()).hexdigest()[:16]
    require_same({"sha256 of --benchmark": problems}, world)
    if config.export_prompts:
        return export(config, tests, made_by)
    if config.completions:
        config.samples, given = external.read_completions(config.completions, tests)
        config.out = config.out or f"out/eval/{Path(config.completions).stem}"
        if config.model == default_model:  # the model that made them was not named
            config.model = config.completions
    elif config.out is None:
        config.out = (
            f"out/eval/{config.model}" if is_hub_id(config.model) else f"{config.model}/eval"
        )
    evaluate(config, world, tests, given, made_by)


def evaluate(
    config: EvalConfig,
    world: World,
    tests: list[Benchmark],
    given: dict[str, list[Completion]] | None = None,
    made_by: str | None = None,
) -> None:
    """Sample, grade and report into config.out; what exists is not made again.

    given: another program's completions by benchmark. made_by: what makes the default model.
    """
    out, first = Path(config.out), world.rank == 0
    finished = is_finished(config.out, config, {"grader": report.OWN_GRADER})
    facts = {"torch": torch.__version__}
    if given is None:
        model, source, contents = load_unchanged(config, world, finished, made_by)
        facts |= {"model": source.name, **contents}
    if finished:
        for test in tests:
            keep_problems(out, test)
        if given is not None:
            external.store_completions(out, given)
        print((out / "report.md").read_text(), f"{out} is finished: nothing to do", sep="\n")
        return

    # ---- grader
    if given is None:
        asked = [one for test in tests for one in ask(test, source, config)]
        firsts = asked[:: config.samples]  # of each problem
        check_limit([one.request.max_new_tokens for one in firsts], source, config)
    rule = answer_rule(config.prefix)
    with Grader(config.graders, config.grade_seconds, answer_from=rule) as grader:
        graders = grader.named(config.grader)
        if first:
            for one in graders:
                report_unreadable(one, tests)  # now, not after hours of sampling
        with local_rank_zero_first(world):
            log = RunLog(config.out, config) if first else NoLog()
            log.start(facts)
            for test in tests:
                keep_problems(out, test)
        # ---- sample: all benchmarks in one queue, each rank its share
        if given is not None:
            external.store_completions(out, given)
        else:
            model.to(world.device, distributed.compute_dtype(config.dtype, world))
            model.requires_grad_(False)
            sample(model, source, asked, tests, config, world)
        if not first:
            return

        # ---- grade and report
        try:
            mark_run(out, graders)
        except KeyboardInterrupt:
            said = f"{out} holds all completions; the same command grades them"
            raise KeyboardInterrupt(said) from None
    written = report.write(out)
    log.finish()
    print(tables.summary(written), f"saved {out}/report.html, .md and .json", sep="\n")


def load_unchanged(
    config: EvalConfig, world: World, finished: bool, made_by: str | None
) -> tuple[Transformer, Source, dict[str, str]]:
    """(the model, its source, hashes of its contents). The weights are not loaded if the evaluation
    is finished.

    Raises UserError if the evaluation in config.out began with a model of other contents, unless it
    recorded no hashes, and if ranks have different models.
    """
    with local_rank_zero_first(world):  # a hub id is downloaded once per node
        model, source = (open_model if finished else load_model)(config.model, made_by=made_by)
        contents = _contents(source)
        begun = Path(config.out, "config.toml").is_file()
        before = read_facts(Path(config.out)) if begun else {}
        changed = [name for name, now in contents.items() if before.get(name, now) != now]
        if changed:
            raise UserError(
                f"--model {config.model}: its {' and its '.join(changed)} changed since "
                f"{config.out} was begun; choose another --out"
            )
    require_same({"torch": torch.__version__, **contents, "finished": finished}, world)
    return model, source, contents


def _contents(source: Source) -> dict[str, str]:
    settings = json.dumps([source.config, source.stop_ids], sort_keys=True)
    return {
        "weights": weights_hash(source.folder),
        "tokenizer": source.chat.fingerprint if source.chat else "none",
        "config.json or stop tokens": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }


def sample(
    model: Transformer,
    source: Source,
    asked: list[Asked],
    tests: list[Benchmark],
    config: EvalConfig,
    world: World,
) -> None:
    """Every completion that is not on disk yet, and each there as soon as it is finished."""
    out = Path(config.out)
    stores = {test.name: Store(out, test, config.samples, world.rank) for test in tests}
    left = [one for one in asked if (one.id, one.sample) not in stores[one.benchmark].done]
    wait_for_all(world)  # before one appends to what another still reads
    if done := len(asked) - len(left):
        print(f"{out} holds {done} of {len(asked)} completions; the rest are made now")
    name = tests[0].name if len(tests) == 1 else f"{len(tests)} benchmarks"
    try:
        for one, completion in complete(model, source, left, config, world, name):
            stores[one.benchmark].append(completion)
    except KeyboardInterrupt:
        made = sum(len(store.done) for store in stores.values())
        said = f"{out} holds {made} of {len(asked)} completions; the same command goes on"
        raise KeyboardInterrupt(said) from None
    wait_for_all(world)
    if world.rank == 0:
        for store in stores.values():
            store.finish()


def export(config: EvalConfig, tests: list[Benchmark], made_by: str | None) -> None:
    """Write what another program is to be asked. Raises UserError as `external.export_prompts`."""
    if config.completions:
        raise UserError("--export-prompts: expected without --completions; one comes first")
    _, source = open_model(config.model, made_by=made_by)
    count = external.export_prompts(config.export_prompts, tests, source, config)
    print(f"saved {config.export_prompts}: {count} prompts, {config.samples} samples of each")
