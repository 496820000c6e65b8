"""Sample a model on benchmarks and grade what it says (Section 4 of arXiv 2505.24850).

    python evaluate.py                                        the published protocol
    python evaluate.py --benchmark aime24 --samples 64
    python evaluate.py --config recipes/toy_eval.toml --model out/demo/sft --out out/demo/eval/sft

Every problem is asked `--samples` times at temperature 0.6, top-p 0.95. Writes, for each
benchmark, completions/NAME.jsonl with every completion, its length, finish reason, extracted
answer and verdict; and report.json and report.md with pass@1 and its SEM, pass@k, lengths and
failures.
"""

from pathlib import Path

import torch

from redi import distributed
from redi.checkpoint import load_model
from redi.config import parse, program
from redi.data.files import make_folder, write_aside
from redi.eval import benchmarks, report
from redi.eval.protocol import EvalConfig, check_grader, complete, graded, make_requests
from redi.eval.report import Completion
from redi.hub import is_hub_id
from redi.runlog import RunLog, is_finished


@program
def main() -> None:
    config = parse(EvalConfig, "Sample a model on benchmarks, and grade its answers.")
    if config.out is None:
        config.out = ("out/eval/{}" if is_hub_id(config.model) else "{}/eval").format(config.model)
    place, out = distributed.alone(), Path(config.out)
    if is_finished(config.out, config):
        print((out / "report.md").read_text(), f"{out} is finished: nothing to do", sep="\n")
        return

    # ---- benchmarks and model
    tests = benchmarks.load_all(config.benchmark)
    made_by = "python train_redi.py" if config.model == EvalConfig.model else None
    model, source = load_model(config.model, made_by=made_by)
    model.to(place.device, distributed.compute_dtype(config.dtype, place)).requires_grad_(False)
    requests = [make_requests(test, source, config) for test in tests]
    check_grader(config)  # now, not after hours of sampling

    # ---- sample and grade, a benchmark at a time
    log = RunLog(config.out, config, {"torch": torch.__version__, "model": source.name})
    completions: list[Completion] = []
    folder = out / "completions"
    make_folder(folder)
    try:
        for test, asked in zip(tests, requests):
            generated = complete(model, source, asked, test.name, config)
            answers = graded(test, generated, source, config)
            write_text(folder / f"{test.name}.jsonl", "".join(a.to_json() + "\n" for a in answers))
            completions += answers
    except KeyboardInterrupt:
        done = ", ".join(dict.fromkeys(c.benchmark for c in completions)) or "no benchmark"
        raise KeyboardInterrupt(f"{out} holds the completions of {done}") from None

    # ---- report
    summary = report.summary(completions)
    write_text(out / "report.md", report.table(summary) + "\n")
    write_text(out / "report.json", report.to_json(summary))
    log.finish()
    print(report.table(summary), f"saved {out}/report.json and every completion", sep="\n")


def write_text(path: Path, text: str) -> None:
    with write_aside(path) as file:
        file.write(text)


if __name__ == "__main__":
    main()
