"""The paper's study on a toy or on real data: stage 1 once per seed, then every method from it.

    python -m redi.study recipes/study_toy.toml                  the toy, an hour on two CPU cores
    python -m redi.study recipes/study_toy.toml --dry-run true   print the command lines and stop
    python -m redi.study recipes/study_paper.toml                the paper's grid

study/plan.py describes STUDY.toml. The study runs the commands that a user would run: one per CPU
core at a time, or one at a time on all GPUs. Started again after a kill, it resumes; methods,
learning rates and seeds may be added to the file. If a job fails, the others continue, the report
names it, and the exit status is 2.

Writes OUT/study.json (every number), report.md, report.html and figures/*.png: the paper's Table 2
with SEM and paired t-tests over seeds, the whole grid, and the figures.
Left out: choosing a learning rate on other data than it is reported on, as the paper does.
"""

import os
from dataclasses import dataclass
from typing import Annotated

import torch

from redi.config import UserError, parse, positional, program, require
from redi.data.files import make_folder, write_aside
from redi.study.commands import jobs
from redi.study.jobs import run_jobs, shown
from redi.study.page import as_markdown, report, summary, table, to_html, to_markdown
from redi.study.plan import Study, read_study
from redi.study.results import Results, collect


@dataclass(kw_only=True)
class StudyConfig:
    study: Annotated[str, "STUDY.toml", positional] = "recipes/study_toy.toml"
    out: Annotated[str | None, "folder for everything; none: out/NAME of the file"] = None
    workers: Annotated[int | None, "jobs at a time; none: one on GPUs, else one per core"] = None
    dry_run: Annotated[bool, "print all command lines of the study and stop"] = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            require(self.workers >= 1, "workers", self.workers, "at least 1")


@program
def main() -> None:
    config = parse(StudyConfig, "Compare methods: train, evaluate and report the grid of a study.")
    study, gpus = read_study(config.study, config.out), torch.cuda.device_count()
    wanted = jobs(study, gpus)
    if config.dry_run:
        for job in wanted:
            print(*map(shown, job.commands), sep="\n")
        return
    places = config.workers or (1 if gpus else len(os.sched_getaffinity(0)))
    failed = run_jobs(wanted, study.out, places)
    results = write_reports(study, failed)
    print(as_markdown(table(results, results.table)))
    print(f"{summary(results)}\nsaved {study.out}/report.md, report.html, study.json and figures/")
    if failed:
        first, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(wanted)} jobs failed, the first was {first}: {why}; run the "
            "same command to try them again"
        )


def write_reports(study: Study, failed: dict[str, str]) -> Results:
    """Write study.json, the figures and both reports from the files of the runs."""
    from redi.study.figures import figures  # matplotlib takes a second to import

    results = collect(study, failed)
    results.write(study.out / "study.json")
    drawn = figures(results)
    make_folder(study.out / "figures")
    for name, picture in drawn.items():
        with write_aside(study.out / "figures" / f"{name}.png", binary=True) as file:
            file.write(picture)
    blocks = report(results, list(drawn))
    with write_aside(study.out / "report.md") as file:
        file.write(to_markdown(blocks, "figures"))
    with write_aside(study.out / "report.html") as file:
        file.write(to_html(blocks, drawn))
    return results


if __name__ == "__main__":
    main()
