"""A study: its file, its statistics, its jobs, and one that runs from end to end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from redi import programs
from redi.config import Stopped, UserError
from redi.prepare import __main__ as prepare
from redi.runlog import read_metrics
from redi.study import __main__ as study
from redi.study import jobs as study_jobs
from redi.study.commands import Job, jobs
from redi.study.figures import figures, number
from redi.study.jobs import run_jobs
from redi.study.page import report, table, to_html, to_markdown
from redi.study.plan import read_study
from redi.study.results import (
    STAGE_1,
    Results,
    Run,
    best_of,
    grid_of,
    paired_t_test,
    sem,
    t_tail,
)
from redi.toy import student as toy

ROOT = Path(__file__).parent.parent
STUDY = """
seeds = [1, 2]
[toy]
problems = 40
benchmark = 4
operations = 2
impatience = 0.5
[stage1]
lr = 4e-3
rows_per_step = 32
epochs = 1
max_length = 256
rope_theta = "keep"
max_position_embeddings = "keep"
[stage2]
rows_per_step = 8
max_response = 40
max_length = 256
eval_every = 1
eval_samples = 1
[evaluation]
samples = 2
user_prompt = "plain"
max_new_tokens = 12
graders = 1
[[method]]
name = "REDI"
objective = "redi"
lr = [1e-4, 1e-3]
"""


@pytest.fixture
def write_study(tmp_path):
    def write(*changes: tuple[str, str], more: str = "") -> Path:
        text = STUDY + more
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


def program_of(job: Job) -> str:
    """redi.toy, or the script that the job's first command runs."""
    command = job.commands[0]
    return next((Path(word).name for word in command if word.endswith(".py")), command[2])


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [1, 2]", "seeds = [1, ", "not a readable TOML file"),
        ("seeds = [1, 2]", "", "key 'seeds': expected different whole numbers; got []"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "key 'seeds': expected different whole numbers"),
        ("seeds = [1, 2]", "seeds = 1", "key 'seeds': expected a list; got 1"),
        ("seeds = [1, 2]", "seed = [1]", "unknown key 'seed'; known keys: mislabelled, seeds"),
        ("[toy]", "[game]", "unknown key 'game'"),
        ("[toy]", "mislabelled = [2.0]\n[toy]", "key 'mislabelled': expected different numbers"),
        ("operations = 2", "operations = 2.5", "[toy]: key 'operations': expected a whole number"),
        ("impatience = 0.5", "impatience = 5", "[toy]: --impatience: expected within [0, 1]"),
        ("impatience = 0.5", "seed = 3", "[toy]: key 'seed': the study sets it itself"),
        ("epochs = 1", "epoch = 1", "[stage1]: unknown key 'epoch'"),
        ("epochs = 1", "epochs = 0", "[stage1]: --epochs: expected at least 1; got 0"),
        ("epochs = 1", "data = 'x'", "[stage1]: key 'data': the study sets it itself"),
        ("max_new_tokens = 12", "top_p = 2", "[evaluation]: --top-p: expected within (0, 1]"),
        ('name = "REDI"', "", "[[method]] 1: key 'name': expected a name"),
        ('name = "REDI"', 'name = "..."', "1: key 'name': expected a name with a letter"),
        ('name = "REDI"', 'name = "Stage 1"', "[[method]] 1: key 'name': 'Stage 1' is taken"),
        ("lr = [1e-4, 1e-3]", "lr = []", "'REDI': key 'lr': expected at least one value"),
        ("[toy]", "mislabelled = [0.3, 0.30000001]\n[toy]", "'mislabelled': expected different"),
        (
            "[toy]",
            "[[setting]]\nname = 'A b'\n[[setting]]\nname = 'a-b'\n[toy]",
            "[[setting]] 2: key 'name': 'a-b' is taken",
        ),
        ("[toy]", "[[setting]]\nname = 'done'\n[toy]", "key 'name': 'done' is taken"),
        ("[toy]", "setting = []\n[toy]", "'setting': expected at least one [[setting]]"),
        ("[[method]]", "[method]", "'method': expected tables, [[method]]"),
        ("lr = [1e-4, 1e-3]", "", "[[method]] 'REDI': key 'lr' is missing"),
        ("lr = [1e-4, 1e-3]", "lr = [1e-4, 1e-4]", "[[method]]: 'redi-lr-0.0001' is there twice"),
        ("lr = [1e-4, 1e-3]", "lr = 'fast'", "[[method]] 'REDI': key 'lr': expected a finite"),
        ('"redi"', '"dpo"', "[[method]] 'REDI': --beta is missing: dpo needs it"),
        ('"redi"', '"best"', "[[method]] 'REDI': key 'objective': expected one of redi"),
        ("lr = [1e-4, 1e-3]", "lr = 1.0\nalpha = 3.0", "'REDI': --alpha: expected within [0, 1]"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_file_and_key(write_study, old, new, said):
    path = write_study((old, new))
    with pytest.raises(UserError) as error:
        read_study(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_need_a_toy(write_study):
    path = write_study(more='[[setting]]\nname = "a"\n')
    path.write_text(path.read_text().split("[toy]")[0] + path.read_text().split("0.5\n", 1)[1])
    with pytest.raises(UserError, match=r"\[\[setting\]\] and 'mislabelled' need \[toy\]"):
        read_study(path)


def test_a_path_among_the_settings_of_a_method_stays_within_a_folder_s_name(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(
        'seeds = [1]\n[[method]]\nname = "a"\nobjective = "dft"\nlr = 1e-4\n'
        'data = ["../x/pairs.jsonl", "../x-pairs.jsonl"]\n'
    )
    made = [job for job in jobs(read_study(path, "o")) if program_of(job) == "train_redi.py"]
    assert len({job.name for job in made}) == 2
    assert all(str(Path(job.name).parent) == "o/seed-1" for job in made)


def test_lists_of_a_method_are_multiplied_and_tables_of_one_name_are_one_method(write_study):
    more = """
[[method]]
name = "DPO"
objective = "dpo"
beta = [0.1, 0.5]
lr = [1e-4, 3e-4]
[[method]]
name = "DPO"
objective = "dpo"
beta = 1.0
lr = 1e-4
"""
    found = read_study(write_study(more=more)).variants
    assert [(v.method, v.settings.get("beta"), v.settings["lr"]) for v in found] == [
        ("REDI", None, 1e-4), ("REDI", None, 1e-3),
        ("DPO", 0.1, 1e-4), ("DPO", 0.1, 3e-4), ("DPO", 0.5, 1e-4), ("DPO", 0.5, 3e-4),
        ("DPO", 1.0, 1e-4),
    ]  # fmt: skip


def test_stage_1_is_trained_once_for_all_methods_and_all_shares_of_mislabelled_traces(write_study):
    path = write_study(("[toy]", "mislabelled = [0.0, 0.25]\n[toy]"))
    wanted = jobs(read_study(path, "o"))
    # 2 seeds; 2 shares x 2 learning rates each
    counts = Counter(map(program_of, wanted))
    assert counts == {"redi.toy": 4, "train_sft.py": 2, "train_redi.py": 8, "evaluate.py": 10}
    by_name = {job.name: job for job in wanted}
    noisy = by_name["o/seed-2/redi-lr-0.0001-mislabelled-0.25"]
    assert noisy.needs == ["o/seed-2/sft", "o/seed-2/data-mislabelled-0.25"]
    command = " ".join(noisy.commands[0])
    assert "--model o/seed-2/sft --data o/seed-2/data-mislabelled-0.25/pairs.jsonl" in command
    assert "--seed 2" in command
    names = [job.name for job in wanted]
    assert all(names.index(need) < names.index(job.name) for job in wanted for need in job.needs)


def test_on_several_gpus_torchrun_starts_what_trains_and_what_samples(write_study):
    for gpus in (0, 1, 4):
        for job in jobs(read_study(write_study()), gpus):
            started = "torch.distributed.run" in job.commands[0]
            assert started == (gpus > 1 and program_of(job) != "redi.toy")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("study_*.toml")), ids=lambda p: p.stem
)
def test_the_recipes_can_be_read_and_start_programs_that_are_there(path):
    commands = [command for job in jobs(read_study(path)) for command in job.commands]
    programs = {part for command in commands for part in command if part.endswith(".py")}
    assert {Path(program).resolve().name for program in programs} == {
        "train_sft.py", "train_redi.py", "evaluate.py",
    }  # fmt: skip
    assert all(Path(program).is_file() for program in programs)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("df", "t", "p"),
    [  # the two-sided quantiles of any printed table of Student's distribution
        (1, 12.706, 0.05), (1, 63.657, 0.01), (2, 4.303, 0.05), (2, 9.925, 0.01),
        (3, 3.182, 0.05), (4, 2.776, 0.05), (4, 4.604, 0.01), (4, 8.610, 0.001),
        (5, 2.571, 0.05), (9, 2.262, 0.05), (10, 3.169, 0.01), (15, 4.073, 0.001),
        (30, 2.042, 0.05), (120, 1.980, 0.05), (120, 2.617, 0.01),
    ],
)  # fmt: skip
def test_p_values_are_those_of_the_printed_table(df, t, p):
    # A t rounded in the third decimal moves p by less than 0.3 %.
    assert t_tail(t, df) == pytest.approx(p, rel=3e-3)
    assert t_tail(-t, df) == t_tail(t, df)


def test_p_values_with_one_and_two_degrees_of_freedom_have_a_closed_form():
    for t in (0.0, 0.3, 1.0, 7.0):
        assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t))  # Cauchy
        assert t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_the_paired_t_test_by_hand():
    # differences 1, 2, 3: mean 2, standard deviation 1, SEM 1 / sqrt(3), t = 2 sqrt(3) with 2
    # degrees of freedom, p = 1 - t / sqrt(2 + t^2) = 1 - 2 sqrt(3) / sqrt(14) = 0.0742
    assert paired_t_test([1, 2, 3]) == pytest.approx(0.07418, abs=1e-5)
    assert sem([1, 2, 3]) == pytest.approx(1 / math.sqrt(3))


def test_a_test_that_says_nothing_has_no_p_value():
    assert paired_t_test([1.0]) is None  # one seed
    assert paired_t_test([1.0, 1.0 + 1e-15]) is None  # all the same, but for rounding
    assert sem([1.0]) is None


def a_run(
    method: str, seed: int, score: float, setting: str = "", share: float = 0.0, **settings
) -> Run:
    scores = {"pass_at_1": score, "pass_at_n": 1.0, "mean_tokens": 10.0}
    steps = [] if method == STAGE_1 else [(1, score / 2)]
    fall = [-0.1 - 0.2 * k for k in range(3)]
    return Run(
        setting=setting, mislabelled=share, seed=seed, method=method, settings=settings,
        pass_at_1=score, benchmarks={"benchmark": scores}, on_the_way=steps,
        curves={"chosen_logp": fall, "rejected_logp": fall, "grad_norm": [1.0] * 3},
        collapsed_at=None,
    )  # fmt: skip


RUNS = [
    *(a_run(STAGE_1, seed, score) for seed, score in ((1, 0.5), (2, 0.6), (3, 0.7))),
    *(a_run("REDI", s, x, objective="redi", lr=1e-4) for s, x in ((1, 0.6), (2, 0.8), (3, 1.0))),
    *(a_run("REDI", s, x, objective="redi", lr=9e-4) for s, x in ((1, 0.9), (2, 0.0), (3, 0.1))),
    *(a_run("DPO", s, x, objective="dpo", lr=1e-4, beta=0.1) for s, x in ((1, 0.5), (2, 0.7))),
]


def test_the_table_by_hand():
    grid = grid_of(RUNS)
    assert len(grid) == 4
    stage_1, redi, dpo = best_of(grid)
    assert (stage_1.mean, stage_1.gain, stage_1.p_stage_1) == (pytest.approx(0.6), None, None)
    # REDI's best is lr 1e-4: mean 0.8, gains 0.1, 0.2, 0.3, and p as in the test by hand above
    assert redi.settings["lr"] == 1e-4
    assert (redi.mean, redi.seeds) == (pytest.approx(0.8), 3)
    assert redi.sem == pytest.approx(0.2 / math.sqrt(3))
    assert redi.gain == pytest.approx(0.2)
    assert redi.p_stage_1 == pytest.approx(0.07418, abs=1e-5)
    # against DPO on the two seeds that both have: differences 0.1, 0.1 but for rounding
    assert redi.p_dpo is None
    # DPO over stage 1: 0, 0.1; mean 0.05, SEM 0.05, t = 1 with 1 degree of freedom: p = 1/2
    assert dpo.p_stage_1 == pytest.approx(0.5)
    assert (dpo.gain, dpo.p_dpo, dpo.seeds) == (pytest.approx(0.05), None, 2)


def test_settings_and_shares_are_compared_with_their_own_stage_1_and_dpo():
    more = [
        *(a_run(STAGE_1, s, x, "b") for s, x in ((1, 0.1), (2, 0.2))),
        *(
            a_run("REDI", s, x, "b", 0.5, objective="redi", lr=1e-4)
            for s, x in ((1, 0.2), (2, 0.5))
        ),
    ]
    row = best_of(grid_of([*RUNS, *more]))[-1]
    assert (row.setting, row.mislabelled) == ("b", 0.5)
    # gains 0.1 and 0.3: mean 0.2, SEM 0.1, t = 2 with 1 degree of freedom
    assert row.gain == pytest.approx(0.2)
    assert row.p_stage_1 == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert row.p_dpo is None


def results_of(runs: list[Run], **changes) -> Results:
    grid = grid_of(runs)
    values = {
        "title": "a study", "study": "seeds = [1]",
        "machine": {"cpu": "a CPU", "cores": 2}, "versions": {"redi": "0"},
        "job_seconds": 200.0, "samples": 4, "missing": {}, "runs": runs, "grid": grid,
        "table": best_of(grid),
    }  # fmt: skip
    return Results(**{**values, **changes})


def test_a_report_shows_what_is_missing_and_every_figure_that_there_is_something_for(tmp_path):
    noisy = [a_run("REDI", s, 0.4, "", 0.5, objective="redi", lr=1e-4) for s in (1, 2, 3)]
    results = results_of([*RUNS, *noisy], missing={"out/dpo <3>": "out of | luck"})
    drawn = figures(results)
    # neither entropies nor several alphas
    assert sorted(drawn) == ["accuracy", "labels", "log_probs", "lr", "norms"]
    blocks = report(results, list(drawn))
    markdown, page = to_markdown(blocks, "figures"), to_html(blocks, drawn)
    assert "| out/dpo <3>        | out of \\| luck |" in markdown
    assert "out/dpo &lt;3&gt;" in page
    assert page.count("data:image/png") == len(drawn)
    cells = "| REDI | lr 1e-4 | 0 | 0.800 ± 0.115 | 1.000 | +0.200 | 0.074 |"
    assert cells in re.sub(" +", " ", markdown)
    results.write(tmp_path / "study.json")
    assert Results.load(tmp_path / "study.json").table == results.table


def test_numbers_are_written_as_one_writes_them():
    values = (1e-4, 5e-7, 2.5e-3, 0.8, 2.0, 1, "redi")
    assert [number(v) for v in values] == ["1e-4", "5e-7", "2.5e-3", "0.8", "2", "1", "redi"]
    assert table(results_of(RUNS), grid_of(RUNS)).rows[1][1] == "lr 1e-4"


# ---------------------------------------------------------------- jobs, with programs of a line


def shell(tmp_path: Path, name: str, line: str, needs: tuple = ()) -> Job:
    """A job that notes its name, runs a line of shell, and makes its product."""
    noted = f"echo {name} >> {tmp_path}/order; {line}"
    product = tmp_path / "work" / f"{name}.done"
    commands = [["sh", "-c", noted], ["sh", "-c", f"touch {product}"]]
    return Job(
        f"{tmp_path}/work/{name}", commands, [f"{tmp_path}/work/{n}" for n in needs], product
    )


def order(tmp_path: Path) -> list[str]:
    return (tmp_path / "order").read_text().split()


def test_jobs_wait_for_what_they_need_and_are_not_run_twice(tmp_path):
    found = [shell(tmp_path, "a", "sleep 0.3"), shell(tmp_path, "b", "true", ("a",)),
             shell(tmp_path, "c", "true")]  # fmt: skip
    assert run_jobs(found, tmp_path / "work", 2) == {}
    first = order(tmp_path)
    assert sorted(first[:2]) == ["a", "c"]  # side by side
    assert first[2:] == ["b"]
    run_jobs(found, tmp_path / "work", 2)
    assert order(tmp_path) == first
    # What a product was made with changed: it and what was made of it are made again.
    run_jobs([shell(tmp_path, "a", "sleep 0"), *found[1:]], tmp_path / "work", 2)
    assert order(tmp_path) == [*first, "a", "b"]
    # So is one that somebody removed.
    (tmp_path / "work" / "c.done").unlink()
    run_jobs([shell(tmp_path, "a", "sleep 0"), *found[1:]], tmp_path / "work", 2)
    assert order(tmp_path) == [*first, "a", "b", "c"]


def test_a_failed_job_takes_along_those_that_need_it_and_no_others(tmp_path, capsys):
    found = [shell(tmp_path, "a", "echo 'error: no luck'; exit 3"),
             shell(tmp_path, "b", "true", ("a",)), shell(tmp_path, "c", "true", ("b",)),
             shell(tmp_path, "d", "true")]  # fmt: skip
    failed = run_jobs(found, tmp_path / "work", 1)
    assert [Path(name).name for name in failed] == ["a", "b", "c"]
    assert failed[found[0].name].startswith("error: no luck (all of it: ")
    assert failed[found[1].name] == f"needs {found[0].name}"
    assert "error: no luck" in capsys.readouterr().err
    assert order(tmp_path) == ["a", "d"]
    run_jobs([shell(tmp_path, "a", "true"), *found[1:]], tmp_path / "work", 1)
    assert order(tmp_path) == ["a", "d", "a", "b", "c"]


def test_a_program_that_ends_well_without_its_product_has_failed(tmp_path):
    job = Job("work/x", [["true"]], [], tmp_path / "never")
    assert list(run_jobs([job], tmp_path / "work", 1)) == ["work/x"]


def test_cores_are_shared_between_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    run_jobs(
        [shell(tmp_path, "a", f"echo $OMP_NUM_THREADS >> {tmp_path}/order")], tmp_path / "w", 4
    )
    assert order(tmp_path) == ["a", "2"]


def test_asked_to_stop_it_asks_its_programs_and_goes_on_when_started_again(tmp_path):
    asked = f"trap 'echo asked >> {tmp_path}/order; exit 75' TERM"
    stopping = f"{asked}; kill -TERM $PPID; while true; do sleep 0.1; done"
    line = f"test -e {tmp_path}/again || {{ {stopping}; }}"
    found = [shell(tmp_path, "a", "true"), shell(tmp_path, "b", line, ("a",))]
    with pytest.raises(Stopped, match="1 of 2 jobs are done; the same command resumes them"):
        run_jobs(found, tmp_path / "work", 1)
    assert order(tmp_path) == ["a", "b", "asked"]
    (tmp_path / "again").touch()
    assert run_jobs(found, tmp_path / "work", 1) == {}
    assert order(tmp_path) == ["a", "b", "asked", "b"]


def test_a_study_that_was_killed_waits_for_the_program_it_left_and_then_goes_on(tmp_path, capsys):
    found = [shell(tmp_path, "a", "true"), shell(tmp_path, "b", "sleep 1", ("a",))]
    child = os.fork()  # a process of its own to kill, without importing torch again
    if child == 0:
        run_jobs(found, tmp_path / "work", 1)
        os._exit(0)
    until = time.monotonic() + 30
    while "b" not in ((tmp_path / "order").read_text() if (tmp_path / "order").exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run_jobs(found, tmp_path / "work", 1) == {}
    assert order(tmp_path) == ["a", "b", "b"]  # a was done; b was not yet
    assert "another study, or a program of one, is running; waiting" in capsys.readouterr().out


# ---------------------------------------------------------------- from end to end


class InThisProcess:
    """In place of subprocess: Popen runs a program of redi without importing torch once more."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT
    PROGRAMS: ClassVar = {
        "redi.toy": toy.main, "redi.prepare": prepare.main,
        "train_sft.py": programs.train_sft, "train_redi.py": programs.train_redi,
        "evaluate.py": programs.evaluate,
    }  # fmt: skip
    ran: ClassVar[list[str]] = []

    def __init__(self, command: list[str], stdout, **_: object):
        words = [word for word in command[1:] if word != "-m"]
        name = Path(words[0]).name
        InThisProcess.ran.append(name)
        before, sys.argv, sys.stdout = (sys.argv, sys.stdout), words, stdout
        try:
            self.PROGRAMS[name]()
            self.status = 0
        except SystemExit as end:
            self.status = end.code
        finally:
            sys.argv, sys.stdout = before

    def poll(self) -> int:
        return self.status


InThisProcess.Popen = InThisProcess


def run_study(path: Path, out: Path) -> int:
    before, sys.argv = sys.argv, ["study", str(path), "--out", str(out), "--workers", "1"]
    try:
        study.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def test_a_miniature_study_from_end_to_end(write_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_jobs, "subprocess", InThisProcess)  # graders have the real one
    monkeypatch.setattr(study_jobs, "POLL_SECONDS", 0.0)
    monkeypatch.chdir(ROOT)
    InThisProcess.ran.clear()
    path, out = write_study(), tmp_path / "out"
    assert run_study(path, out) == 0
    assert "REDI" in capsys.readouterr().out
    results = Results.load(out / "study.json")
    assert len(results.runs) == 2 * (1 + 2)
    assert [row.seeds for row in results.table] == [2, 2]
    run = results.runs[1]
    steps = len(run.curves["chosen_logp"])
    assert [step for step, _ in run.on_the_way] == list(range(1, steps))
    metrics = list(read_metrics(out / "seed-1/redi-lr-0.0001"))
    assert steps == sum(record["kind"] == "train" for record in metrics)
    said = json.loads((out / "seed-1/redi-lr-0.0001/eval/report.json").read_text())
    assert run.pass_at_1 == said["mean_pass_at_1"]
    for name in ("report.md", "report.html", "figures/log_probs.png"):
        assert (out / name).stat().st_size > 1000
    assert path.read_text().strip() in (out / "report.md").read_text()
    benchmarks = {(out / f"seed-{s}/data/benchmark.jsonl").read_bytes() for s in (1, 2)}
    assert len(benchmarks) == 1
    pairs = {(out / f"seed-{s}/data/pairs.jsonl").read_bytes() for s in (1, 2)}
    assert len(pairs) == 2

    # ---- again: nothing to do; with a learning rate more: only that
    ran = list(InThisProcess.ran)
    assert run_study(path, out) == 0
    assert InThisProcess.ran == ran
    write_study(("lr = [1e-4, 1e-3]", "lr = [1e-4, 1e-3, 2e-3]"))
    assert run_study(path, out) == 0
    added = InThisProcess.ran[len(ran) :]
    assert added.count("train_redi.py") == 2
    assert set(added) == {"train_redi.py", "evaluate.py"}

    # ---- a run that fails: the others' results are there, and the report names it
    write_study(("lr = [1e-4, 1e-3]", "lr = 1e-4\nmax_response = 2"), ('"REDI"', '"none left"'))
    path.write_text(path.read_text() + STUDY[STUDY.index("[[method]]") :])
    assert run_study(path, out) == 2
    assert "jobs failed, the first was" in capsys.readouterr().err
    assert (
        "no row is left" in (out / "report.md").read_text()
        or "rows" in (out / "report.md").read_text().split("## Methods")[0]
    )
    assert {row.method for row in Results.load(out / "study.json").table} == {STAGE_1, "REDI"}
