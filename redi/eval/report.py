r"""Write the report of an evaluation; show several evaluations side by side.

    python -m redi.eval.report out/sft/eval out/redi/eval --out results.json --page both.html

A report needs only problems, completions and marks, so it can be written again at any time:
report.json for programs, report.md for people, report.html to read completions in. Where both
graders judged the completions, the paper's leads for its five benchmarks, Math-Verify's for others.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from redi.config import UserError, parse, program
from redi.data.files import make_folder, write_aside
from redi.eval.grading.grader import GraderName
from redi.eval.reporting import compare, paper_results, tables
from redi.eval.reporting.page import evaluation_page
from redi.eval.reporting.scores import Report, Score
from redi.eval.reporting.stored import folder, read, run_names
from redi.tables import markdown_table


def write(out: Path, grader: str | None = None) -> Report:
    """Write report.json, report.md and report.html of an evaluation's verdicts. Raises UserError as
    `read`."""
    report = read(out, grader)
    target = folder(out, report.grader)
    make_folder(target)
    _write(target / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    _write(target / "report.md", tables.markdown(report))
    _write(target / "report.html", evaluation_page([out], report.grader))
    return report


def _write(path: str | Path, content: str) -> None:
    with write_aside(path) as file:
        file.write(content)


@dataclass(kw_only=True)
class ReportConfig:
    runs: Annotated[list[str], "folders that evaluate.py wrote; each is named by its last part"]
    grader: Annotated[GraderName | None, "whose verdicts; none: what each report puts first"] = None
    out: Annotated[str | None, "JSON file for the tables"] = None
    page: Annotated[str | None, "HTML file to read the completions of two runs side by side"] = None


@program
def main() -> None:
    config = parse(ReportConfig, "Put evaluations side by side.")
    runs = [Path(run) for run in config.runs]
    for flag, path in (("--out", config.out), ("--page", config.page)):
        if path and any(run.resolve() in Path(path).resolve().parents for run in runs):
            raise UserError(f"{flag} {path}: expected a file outside the evaluations")
    names, reports = run_names(runs), [read(run, config.grader) for run in runs]
    scores = [(name, score) for name, report in zip(names, reports) for score in report.benchmarks]
    print(tables.side_by_side(scores))
    if comparisons := compare.compare(runs, config.grader):
        print("", *(comparison.sentence() for comparison in comparisons), sep="\n")
    if published := paper_results.rows([score.benchmark for _, score in scores]):
        print("", tables.PUBLISHED, "", markdown_table(published), sep="\n")
    if config.out:
        rows = [_row(name, score) for name, score in scores]
        content = {"rows": rows, "paired": [asdict(c) for c in comparisons]}
        _write(config.out, json.dumps(content, indent=2) + "\n")
        print(f"\nsaved {config.out}")
    if config.page:
        _write(config.page, evaluation_page(runs, config.grader))
        print(f"saved {config.page}")


def _row(model: str, score: Score) -> dict[str, Any]:
    return {
        "model": model,
        "benchmark": score.benchmark,
        "grader": score.grader,
        "answer_from": score.answer_from,
        "problems": score.num_problems,
        "samples": score.num_samples,
        "pass@1": score.pass_at_1,
        "sem": score.sem,
        f"pass@{score.num_samples}": score.pass_at_k[-1],
        "majority": score.majority,
        "mean_tokens": score.mean_tokens,
        "truncated": score.truncated,
    }


if __name__ == "__main__":
    main()
