"""An evaluation of redi as raw data: the student's own traces, right and wrong.

    redi evaluate --model out/redi --benchmark problems.jsonl --user-prompt plain --out out/own
    redi prepare out/own --out data/own

A problem's samples are its traces, in their order; the verdict of the leading grader is the vote on
a trace. Left out of the traces, and counted: those cut off at the limit of tokens, unless
`keep_truncated` is given, and those whose grading timed out.

A row's prompt is what the evaluation asked, the paper's evaluation prompt included if it was used:
the model learns to answer what its traces are answers to. A trace begins with the evaluation's
prefix, as in training. Another program's completions come without the prefix, which ended their
prompts; it is put before them.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from redi.config import UserError
from redi.data.files import Row
from redi.eval.benchmarks import KNOWN
from redi.eval.completions import Completion, completions_file, marks_file, read_lines
from redi.eval.protocol import USER_PROMPTS
from redi.eval.reporting.stored import Evaluation, load, settings_of
from redi.prepare.raw import EVALUATION, Form, RawRow, Trace
from redi.prepare.traces import PrepareConfig


def read(out: Path, config: PrepareConfig) -> tuple[list[Path], Form, Iterator[RawRow]]:
    """The files of the evaluation in `out`, their form, and its problems. Raises UserError: a known
    benchmark, an evaluation that is unfinished or not graded, `relabel`."""
    if config.relabel:
        raise UserError(f"--relabel: {out} has a grader's verdicts; `redi regrade` makes new ones")
    settings = settings_of(out)
    names = [Path(name).stem for name in settings["benchmark"]]
    if known := [name for name in names if name in KNOWN and not config.allow_benchmarks]:
        raise UserError(
            f"{out}: {known[0]} is a benchmark, and training on its problems is training on the "
            "test; evaluate on other problems, or pass --allow-benchmarks"
        )
    for name in names:
        if not completions_file(out, name).is_file():
            raise UserError(
                f"{out}: {name} is not finished; `redi evaluate --config {out / 'config.toml'}` "
                "samples the rest"
            )
    evaluation = load(out)
    files = [out / "config.toml"]
    for name, (graded, *_) in evaluation.benchmarks.items():
        files += [out / "problems" / f"{name}.jsonl", completions_file(out, name)]
        files += [marks_file(out, graded.grader, name)]
    prompt, prefix = USER_PROMPTS[settings["user_prompt"]], settings["prefix"]
    reader = partial(_raw_row, prompt=prompt, prefix=prefix, keep_truncated=config.keep_truncated)
    form = Form(EVALUATION, (), reader, one_trace=True)
    return files, form, map(form.read, _problems(evaluation))


def _problems(evaluation: Evaluation) -> Iterator[Row]:
    """Each problem, with a (completion, mark) per sample. Raises UserError if the completions are
    not those that were graded."""
    for name, (graded, *_) in evaluation.benchmarks.items():
        path = completions_file(evaluation.out, name)
        completions = read_lines(path, Completion)
        others = UserError(
            f"{path}: holds other samples than were graded; `redi regrade {evaluation.out}` first"
        )
        for problem, marks in zip(graded.benchmark.problems, graded.rows):
            samples = list(zip(islice(completions, len(marks)), marks))
            if [c.key for c, _ in samples] != [mark.key for mark in marks]:
                raise others
            yield {"problem": problem, "source": name, "samples": samples}
        if next(completions, None):
            raise others


def _raw_row(row: Row, prompt: str, prefix: str, keep_truncated: bool) -> RawRow:
    traces, left_out = [], Counter()
    for completion, mark in row["samples"]:
        is_complete, text = completion.finish_reason != "length", completion.text
        if not is_complete and not keep_truncated:
            left_out["truncated"] += 1
        elif mark.verdict == "timeout":
            left_out["grading timed out"] += 1
        else:
            text = text if text.startswith(prefix.rstrip()) else prefix + text
            traces.append(Trace(text, (mark.verdict == "correct",), is_complete))
    return RawRow(
        problem=prompt + row["problem"].problem,
        traces=traces,
        source=row["source"],
        id=row["problem"].id,
        left_out=left_out,
    )
