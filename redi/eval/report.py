r"""Write the report of an evaluation; show several evaluations side by side.

    python -m redi.eval.report out/sft/eval out/redi/eval --out results.json --page both.html

A report needs only problems, completions and marks, so it can be written again at any time:
report.json for programs, report.md for people, report.html to read completions in.
"""

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from redi.config import UserError, parse, program
from redi.data.files import make_folder, refuse_overwriting, write_aside
from redi.eval.grading.grader import GraderChoice, GraderName
from redi.eval.reporting import paper_results, scores, tables
from redi.eval.reporting.compare import compare
from redi.eval.reporting.page import evaluation_page
from redi.eval.reporting.scores import BenchmarkScore
from redi.eval.reporting.stored import load, run_names
from redi.tables import markdown_table


def write(out: Path, grader: GraderChoice | None = None) -> str:
    """Write report.json, report.md and report.html, of the verdicts that the run's settings name,
    or of another grader beside its verdicts. Returns what to print: the score table, and what was
    saved. Raises UserError as `load`."""
    evaluation = load(out, grader)
    is_own = evaluation.grader == evaluation.settings["grader"]
    folder = out if is_own else out / "verdicts" / evaluation.grader
    report = scores.report(evaluation)
    table = tables.score_table(report)
    make_folder(folder)
    _write(folder / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    _write(folder / "report.md", tables.markdown(report))
    # The page moves with its folder, so it names the model instead.
    _write(folder / "report.html", evaluation_page({report.model: evaluation}, table))
    return f"{tables.for_screen(table)}\nsaved {folder}/report.html, .md and .json"


def _write(path: str | Path, content: str) -> None:
    with write_aside(path) as file:
        file.write(content)


@dataclass(kw_only=True)
class ReportConfig:
    runs: Annotated[list[str], "folders that evaluate.py wrote; each is named by its last part"]
    grader: Annotated[GraderName | None, "whose verdicts; none: what each report puts first"] = None
    out: Annotated[str | None, "JSON file for the tables"] = None
    page: Annotated[str | None, "HTML file to read the completions of two runs side by side"] = None
    card: Annotated[bool, "put the score tables into the README.md of the models"] = False


@program
def main() -> None:
    config = parse(ReportConfig, "Put evaluations side by side.")
    runs = [Path(run) for run in config.runs]
    for flag, path in (("--out", config.out), ("--page", config.page)):
        if path and any(run.resolve() in Path(path).resolve().parents for run in runs):
            raise UserError(f"{flag} {path}: expected a file outside the evaluations")
    refuse_overwriting("page", config.page, [config.out] if config.out else [])
    evaluations = dict(zip(run_names(runs), (load(run, config.grader) for run in runs)))
    comparisons = compare(evaluations)
    reports = {name: scores.report(evaluation) for name, evaluation in evaluations.items()}
    rows = [(name, score) for name, report in reports.items() for score in report.benchmarks]
    table = tables.side_by_side(reports)
    print(tables.for_screen(table))
    for one in comparisons:
        print("", textwrap.fill(one.sentence(), 100, break_long_words=False), sep="\n")
    if published := paper_results.rows([score.benchmark for _, score in rows]):
        print("", tables.PUBLISHED, "", markdown_table(published), sep="\n")
    if config.out:
        content = {
            "rows": [_row(name, score) for name, score in rows],
            "paired": [asdict(comparison) for comparison in comparisons],
        }
        _write(config.out, json.dumps(content, indent=2) + "\n")
        print(f"\nsaved {config.out}")
    if config.page:
        _write(config.page, evaluation_page(evaluations, table))
        print(f"saved {config.page}")
    if config.card:
        from redi.checkpoint.card import add_scores  # imports torch, which reports do not need

        for model in dict.fromkeys(one.model for one in reports.values()):
            own = (tables.card(one) for one in reports.values() if one.model == model)
            print(f"saved {add_scores(Path(model), own)}")


def _row(model: str, score: BenchmarkScore) -> dict[str, Any]:
    """The fields of the score, the main ones also under the names of the tables."""
    n = score.num_samples
    named = {"model": model, "problems": score.num_problems, "samples": n}
    return named | {f"pass@{k}": score.pass_at_k[k - 1] for k in (1, n)} | asdict(score)


if __name__ == "__main__":
    main()
