"""The paper's study on a toy or on real data: stage 1 once a seed, then every method on it.

    python -m redi.study recipes/study_toy.toml                  the toy, an hour on two CPU cores
    python -m redi.study recipes/study_toy.toml --dry-run true   the command lines, and no more
    python -m redi.study recipes/study_paper.toml                the paper's grid

study/plan.py says what stands in a STUDY.toml. The study starts the same programs as a user would,
as many at a time as there are cores, or on GPUs one at a time on all of them; OUT/done/ has every
command line. Started again after a kill, it resumes; methods, learning rates and seeds may be added
to the file. A run that fails is named, the others continue, and the exit status is 2.

Writes OUT/study.json (every number), report.md, report.html and figures/*.png: a table in the shape
of the paper's Table 2 with SEM and paired t-tests over seeds, the whole grid, and the figures.
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
    workers: Annotated[int | None, "jobs at a time; none: one on GPUs, else one a core"] = None
    dry_run: Annotated[bool, "print all command lines of the study, and stop"] = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            require(self.workers >= 1, "workers", self.workers, "at least 1")


@program
def main() -> None:
    config = parse(
        StudyConfig,
        "Compare methods: train, evaluate, test and draw the whole grid that STUDY.toml states "
        "(redi/study/plan.py says how).",
    )
    study, gpus = read_study(config.study, config.out), torch.cuda.device_count()
    wanted = jobs(study, gpus)
    if config.dry_run:
        for job in wanted:
            print(*map(shown, job.commands), sep="\n")
        return
    places = config.workers or (1 if gpus else len(os.sched_getaffinity(0)))
    failed = run_jobs(wanted, study.out, places)
    results = write(study, failed)
    print(as_markdown(table(results, results.table)))
    print(f"{summary(results)}\nsaved {study.out}/report.md, report.html, study.json and figures/")
    if failed:
        first, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(wanted)} jobs failed, the first was {first}: {why}; the same "
            "command tries them again"
        )


def write(study: Study, failed: dict[str, str]) -> Results:
    """study.json, the figures and both reports, from what is on disk."""
    from redi.study.figures import figures  # matplotlib takes a second to import

    results = collect(study, failed)
    results.write(study.out / "study.json")
    drawn = figures(results)
    make_folder(study.out / "figures")
    for name, picture in drawn.items():
        with write_aside(study.out / "figures" / f"{name}.png", binary=True) as file:
            file.write(picture)
    blocks = report(results, list(drawn))
    for name, text in (
        ("report.md", to_markdown(blocks, "figures")),
        ("report.html", to_html(blocks, drawn)),
    ):
        with write_aside(study.out / name) as file:
            file.write(text)
    return results


if __name__ == "__main__":
    main()
