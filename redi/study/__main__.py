"""The paper's study on a toy or on real data: stage 1 once per seed, then every method from it.

    python -m redi.study recipes/study_toy.toml                  the toy, an hour on two CPU cores
    python -m redi.study recipes/study_toy.toml --dry-run true   print the command lines and stop
    python -m redi.study recipes/study_paper.toml                the paper's grid

study/plan.py describes STUDY.toml. The study runs the commands that a user would run: one per CPU
core at a time, or one at a time on all GPUs. Started again after a kill, it resumes; methods,
learning rates and seeds may be added to the file. If a job fails, the others continue, the report
names it, and the exit status is 2.

Writes OUT/study.json (every number), report.html and figures/*.png: the paper's Table 2 with SEM
and paired t-tests over seeds, the whole grid, and the figures.
Left out: choosing a learning rate on other data than it is reported on, as the paper does.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated

import torch

from redi.config import UserError, parse, program, require
from redi.data.files import lock, make_folder
from redi.runlog import is_finished
from redi.study.jobs import Job, jobs, run_jobs
from redi.study.plan import Study, read_study
from redi.study.results import collect
from redi.tables import text_table


@dataclass(kw_only=True)
class StudyConfig:
    study: Annotated[str, "STUDY.toml"]
    out: Annotated[str | None, "folder for everything; none: out/NAME of the file"] = None
    workers: Annotated[int | None, "jobs at a time; none: one on GPUs, else one per core"] = None
    dry_run: Annotated[bool, "print all command lines of the study and stop"] = False

    def __post_init__(self) -> None:
        workers = self.workers
        require(workers is None or workers >= 1, "workers", workers, "at least 1")


@program
def main() -> None:
    from redi.study import report  # imports Matplotlib, which takes a second

    config = parse(StudyConfig, "Compare methods: train, evaluate and report the grid of a study.")
    study, gpus = read_study(config.study, config.out), torch.cuda.device_count()
    wanted = jobs(study, gpus)
    if config.dry_run:
        print(*wanted, sep="\n")
        return
    with claim(study, wanted) as held:
        workers = config.workers or (1 if gpus else len(os.sched_getaffinity(0)))
        missing = run_jobs(wanted, study.out, workers, held)
        results = collect(study, missing)
        report.write_reports(results, study.out)
    table = report.table(results, results.table)
    print(text_table(table), report.summary(results), sep="\n")
    print(f"saved {study.out}/report.html, study.json and figures/")
    if missing:
        first, why = next(iter(missing.items()))
        raise UserError(
            f"{len(missing)} of {len(wanted)} jobs failed or need one that failed; the first was "
            f"{first}: {why}; run the same command to try them again"
        )


@contextmanager
def claim(study: Study, wanted: Sequence[Job]) -> Iterator[IO]:
    """Lock the study's folder, after another study there and its programs have exited.

    Raises UserError if the folder holds another study. Seeds, shares, teachers, methods and their
    values may be added and removed, because the folders of models are named after them.
    """
    make_folder(study.out)
    with open(study.out / "study.lock", "w", encoding="utf-8") as file:
        if not lock(file):
            print(f"{study.out}: programs of a study are running there; waiting", flush=True)
            lock(file, wait=True)
        try:
            for job in wanted:
                if job.config:
                    is_finished(job.config.out, job.config)  # raises for other settings
        except UserError as error:
            raise UserError(f"{study.out}: holds another study: {error}") from None
        yield file


if __name__ == "__main__":
    main()
