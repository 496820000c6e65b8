"""Sample a model on benchmarks and grade what it says (Section 4 of arXiv 2505.24850).

    python evaluate.py                                        the published protocol
    python evaluate.py --benchmark aime24 --samples 64
    python evaluate.py --config recipes/toy_eval.toml --model out/demo/sft --out out/demo/eval/sft
    python evaluate.py --completions made.jsonl               made by vLLM, SGLang, an API

Every problem is asked `--samples` times at temperature 0.6, top-p 0.95. Completions are on disk as
they are finished: a killed evaluation, started again, makes the rest. Writes completions/ and
verdicts/, a line a completion, and report.json, .md and .html: pass@1 with its SEM and interval,
pass@k, majority vote, lengths and failures, and a page to read completions in.
`python -m redi.eval.grade regrade OUT --grader paper` grades the same completions by other rules.
"""

from pathlib import Path

import torch

from redi import distributed
from redi.checkpoint import load_model, open_model
from redi.config import UserError, parse, program
from redi.eval import benchmarks, elsewhere, report, tables
from redi.eval.completions import Store, keep_problems
from redi.eval.grade import Grader, mark_run, report_unreadable
from redi.eval.protocol import EvalConfig, complete, make_requests
from redi.hub import is_hub_id
from redi.runlog import RunLog, is_finished


@program
def main() -> None:
    config = parse(EvalConfig, "Sample a model on benchmarks, and grade its answers.")
    if config.export_prompts:
        return export(config)
    tests = given = None
    if config.completions:  # a model made them, but which is not known here
        tests = benchmarks.load_all(config.benchmark)
        config.samples, given = elsewhere.read_completions(config.completions, tests)
        config.out = config.out or f"out/eval/{Path(config.completions).stem}"
        if config.model == EvalConfig.model:
            config.model = config.completions
    elif config.out is None:
        config.out = ("out/eval/{}" if is_hub_id(config.model) else "{}/eval").format(config.model)
    place, out = distributed.alone(), Path(config.out)
    if is_finished(config.out, config):
        if given is not None:
            elsewhere.store_completions(out, given)
        print((out / "report.md").read_text(), f"{out} is finished: nothing to do", sep="\n")
        return

    # ---- benchmarks, grader and model
    tests = tests or benchmarks.load_all(config.benchmark)
    notes = {"torch": torch.__version__}
    if given is None:
        model, source = load_model(config.model, made_by=made_by(config))
        model.to(place.device, distributed.compute_dtype(config.dtype, place))
        model.requires_grad_(False)
        requests = [make_requests(test, source, config) for test in tests]
        notes["model"] = source.name
    with Grader(config.graders, config.grade_seconds, config.grader) as grader:
        report_unreadable(grader, tests)  # now, not after hours of sampling

        # ---- sample, a benchmark at a time
        log = RunLog(config.out, config, notes)
        for test in tests:
            keep_problems(out, test)
        if given is not None:
            elsewhere.store_completions(out, given)
        else:
            stores = [Store(out, test, config.samples) for test in tests]
            try:
                for test, asked, store in zip(tests, requests, stores):
                    complete(model, source, test, asked, store, config)
            except KeyboardInterrupt:
                made, wanted = sum(len(s.done) for s in stores), sum(map(len, requests))
                said = f"{out} holds {made} of {wanted} completions; the same command goes on"
                raise KeyboardInterrupt(said) from None

        # ---- grade and report
        mark_run(out, grader)
    written = report.write(out)
    log.finish()
    print(tables.summary(written), f"saved {out}/report.html, .md and .json", sep="\n")


def export(config: EvalConfig) -> None:
    if config.completions:
        raise UserError("--export-prompts: expected without --completions; one comes first")
    tests = benchmarks.load_all(config.benchmark)
    _, source = open_model(config.model, made_by=made_by(config))
    count = elsewhere.export_prompts(config.export_prompts, tests, source, config)
    print(f"saved {config.export_prompts}: {count} prompts, {config.samples} samples of each")


def made_by(config: EvalConfig) -> str | None:
    return "python train_redi.py" if config.model == EvalConfig.model else None


if __name__ == "__main__":
    main()
