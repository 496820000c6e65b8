"""A study: its file, its jobs, its statistics, its report, and one that runs from end to end."""

import html
import json
import math
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from processes import ROOT, command, run_command, wait_until
from small_run import refusal

from redi.config import Stopped, to_toml
from redi.study.__main__ import claim
from redi.study.jobs import Job, jobs, run_jobs
from redi.study.plan import STAGE_1, as_text, read_study
from redi.study.report import figures, page, write_reports
from redi.study.results import Results, collect, paired_t_test, sem, t_tail

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
A = "[[teacher]]\nname = "


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
    """The command of `redi`."""
    return job.command[job.command.index("redi") + 1]


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "seeds = [1, ", "not a readable TOML file"),
        ("seeds = [1, 2]", "", "expected at least one seed and one [[method]]"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "2 models would be out/small/seed-1/sft; give each"),
        ("seeds = [1, 2]", "seeds = 1", "key 'seeds': expected a list; got 1"),
        ("seeds = [1, 2]", "seed = [1]", "unknown key 'seed'; known keys: evaluation, method"),
        ("[toy]", "mislabelled = [2.0]\n[toy]", "toy: --mislabelled-rejected: expected within ["),
        ("[toy]", "mislabelled = [0.3, 0.3]\n[toy]", "2 models would be out/small/seed-1/redi-lr"),
        (STUDY[: STUDY.index("[stage1]")], "seeds = [1]\nmislabelled = [0.5]\n", "need [toy]"),
        ("operations = 2", "operations = 2.5", "toy: --operations: expected a whole number"),
        ("impatience = 0.5", "seed = 3", "toy: key 'seed': not one that a study's file can set"),
        ("impatience = 0.5", "right_rows = 3", "toy: key 'right_rows': not one that a study's"),
        ("lr = [1e-4, 1e-3]", "lr = 1e-4\nright_rows = 0", "toy: --right-rows: expected 1 to 9"),
        ("epochs = 1", "epoch = 1", "[stage1]: unrecognized arguments: --epoch 1"),
        ("max_new_tokens = 12", "top_p = 2", "[evaluation]: --top-p: expected within (0, 1]"),
        ('name = "REDI"', "", "[[method]] 1: key 'name': expected a name"),
        ('name = "REDI"', 'name = "..."', "1: key 'name': expected a name with a letter"),
        ('name = "REDI"', 'name = "Stage 1"', "[[method]] 1: key 'name': expected a name"),
        ("lr = [1e-4, 1e-3]", "lr = []", "'REDI': key 'lr': expected a value or a list"),
        ("lr = [1e-4, 1e-3]", "lr = [[1e-4], [1e-3]]", "key 'lr': expected a value or a list of"),
        ("eval_every = 1", "help = true", "[stage2] and [[method]] 'REDI': key 'help': not one"),
        ("lr = [1e-4, 1e-3]", "", "'REDI': key 'lr': expected a value or a list"),
        ("[toy]", f"{A}'A b'\n{A}'a-b'\n[toy]", "2 models would be out/small/a-b/seed-1/sft; "),
        ("[[method]]", "[[teacher]]", "expected at least one seed and one [[method]]"),
        ("lr = [1e-4, 1e-3]", "lr = [1e-4, 1e-4]", "2 models would be out/small/seed-1/redi-lr-1e"),
        ("lr = [1e-4, 1e-3]", "lr = 1e-4\ndata = ['x/y', 'x-y']", "2 models would be"),
        ('"redi"', '"dpo"', "[[method]] 'REDI': --beta is missing: dpo needs it"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_file_and_key(write_study, old, new, message):
    path = write_study((old, new))
    refused = refusal(lambda: jobs(read_study(path)))
    assert refused.startswith(f"{path}: ")
    assert message in refused


def test_lists_of_a_method_are_multiplied_and_tables_of_one_name_are_one_method(write_study):
    table = '[[method]]\nname = "DPO"\nobjective = "dpo"\n'
    more = f"{table}beta = [0.1, 0.5]\nlr = [1e-4, 3e-4]\n{table}beta = 1.0\nlr = 1e-4\n"
    more += f'{table}beta = 2.0\nlr = 1e-4\nprompt = "../x"\n'  # stays within a folder's name
    models = read_study(write_study(more=more), "out").models
    names = dict.fromkeys(model.folder.name for model in models if model.method != STAGE_1)
    assert list(names) == [
        "redi-lr-1e-4", "redi-lr-1e-3",
        "dpo-beta-0.1-lr-1e-4", "dpo-beta-0.1-lr-3e-4",
        "dpo-beta-0.5-lr-1e-4", "dpo-beta-0.5-lr-3e-4",
        "dpo-beta-1-lr-1e-4", "dpo-beta-2-lr-1e-4-prompt-x",
    ]  # fmt: skip


def test_stage_1_is_trained_once_for_all_methods_and_all_shares_of_mislabelled_traces(write_study):
    path = write_study(("[toy]", "mislabelled = [0.0, 0.25]\n[toy]"))
    wanted = jobs(read_study(path, "o"))
    # 2 seeds; 2 shares x 2 learning rates each
    counts = Counter(map(program_of, wanted))
    assert counts == {
        "toy": 4, "prepare": 4, "train-sft": 2, "train-redi": 8, "evaluate": 10,
    }  # fmt: skip
    by_name = {job.name: job for job in wanted}
    noisy = by_name["o/seed-2/redi-lr-1e-4-mislabelled-0.25"]
    data = "o/seed-2/data-mislabelled-0.25"
    assert [*map(str, noisy.needs)] == ["o/seed-2/sft/config.json", f"{data}/card.json"]
    assert str(noisy).startswith("python -m redi train-redi --")
    assert "--seed 2" in str(noisy)
    assert f"--model o/seed-2/sft --data {data}/pairs.jsonl" in str(noisy)
    products = [job.product for job in wanted]
    assert all(products.index(n) < products.index(job.product) for job in wanted for n in job.needs)


def test_a_method_with_right_rows_learns_from_labeled_rows_and_from_the_shared_stage_1(write_study):
    more = '[[method]]\nname = "rows"\nobjective = "asymre"\nbaseline = 0.2\nlr = 1e-4\n'
    wanted = jobs(read_study(write_study(more=f"{more}right_rows = [3, 7]\n"), "o"))
    counts = Counter(map(program_of, wanted))
    assert counts == {"toy": 6, "prepare": 6, "train-sft": 2, "train-redi": 8, "evaluate": 10}
    by_name = {job.name: str(job) for job in wanted}
    data = "o/seed-2/data-right-rows-7"
    train = by_name["o/seed-2/rows-baseline-0.2-lr-1e-4-right_rows-7"]
    assert f"--model o/seed-2/sft --data {data}/rows.jsonl" in train
    assert "right-rows" not in train.replace(data, "")
    assert by_name[f"{data}/student"].endswith("--right-rows 7")
    assert "right-rows" not in by_name["o/seed-2/data/student"] + by_name["o/seed-2/redi-lr-1e-4"]


def test_shares_that_differ_by_little_have_their_own_data_and_models(write_study):
    path = write_study(("[toy]", "mislabelled = [0.2, 0.2000001]\n[toy]"))
    counts = Counter(map(program_of, jobs(read_study(path))))
    assert (counts["toy"], counts["train-redi"]) == (6, 8)


def test_outside_a_clone_redis_own_recipe_is_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = read_study("recipes/study_toy.toml")
    assert study.text == (ROOT / "recipes/study_toy.toml").read_text()
    assert study.out == Path("out/study_toy")


def test_on_several_gpus_torchrun_starts_what_trains_and_what_samples(write_study):
    for gpus in (0, 1, 4):
        for job in jobs(read_study(write_study()), gpus):
            started = "torch.distributed.run" in job.command
            assert started == (gpus > 1 and program_of(job) not in ("toy", "prepare"))


def test_a_folder_that_holds_another_study_is_refused_in_one_line(write_study, tmp_path):
    def start(*changes: tuple[str, str]) -> None:
        study = read_study(write_study(*changes), tmp_path / "out")
        with claim(study, jobs(study)):
            for job in jobs(study):  # leave what its program leaves
                job.product.parent.mkdir(parents=True, exist_ok=True)
                job.product.touch()
                if job.config:
                    Path(job.config.out, "config.toml").write_text(to_toml(job.config))

    start()
    start(("seeds = [1, 2]", "seeds = [3]"), ("[1e-4, 1e-3]", "[1e-3, 2e-3]"))
    start(("graders = 1", "graders = 2"))  # does not affect the result
    for old, new, message in (
        ("s = 40", "s = 50", "seed-1/data: holds another run (problems was 40, now 50)"),
        ("lr = 4e-3", "lr = 5e-3", "seed-1/sft: holds another run (lr was 0.004, now 0.005)"),
        ('"redi"', '"symmetric"', "objective was 'redi', now 'symmetric'"),
        ("samples = 2", "samples = 3", "seed-1/sft/eval: holds another run (samples was 2, now 3)"),
    ):
        refused = refusal(start, (old, new))
        assert "out: holds another study: " in refused
        assert message in refused


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


def test_the_paired_t_test_by_hand_and_those_that_say_nothing():
    # differences 1, 2, 3: mean 2, standard deviation 1, SEM 1 / sqrt(3), t = 2 sqrt(3) with 2
    # degrees of freedom, p = 1 - t / sqrt(2 + t^2) = 1 - 2 sqrt(3) / sqrt(14) = 0.0742
    assert paired_t_test([1, 2, 3]) == pytest.approx(0.07418, abs=1e-5)
    assert sem([1, 2, 3]) == pytest.approx(1 / math.sqrt(3))
    assert paired_t_test([1.0]) is sem([1.0]) is None  # one seed
    assert paired_t_test([1.0, 1.0 + 1e-15]) is None  # all the same, but for rounding


# ---------------------------------------------------------------- results and report

SCORES = {  # setting and model -> pass@1 of seeds 1, 2, 3; all other jobs have failed
    "a/sft": [0.5, 0.6, 0.7],
    "a/redi-lr-1e-4": [0.6, 0.8, 1.0],
    "a/redi-lr-9e-4": [0.9, 0.0, 0.1],
    "a/dpo-lr-1e-4-beta-0.1": [0.5, 0.7],
    "a/redi-lr-1e-4-mislabelled-0.5": [0.4, 0.4, 0.4],
    "b/sft": [0.1, 0.2],
    "b/redi-lr-1e-4-mislabelled-0.5": [0.2, 0.5],
}
METHODS = """
[[teacher]]
name = "a"
[[teacher]]
name = "b"
[[method]]
name = "DPO"
objective = "dpo"
lr = 1e-4
beta = 0.1
"""


def write_run(folder: Path, score: float) -> None:
    """What training and evaluation leave: at step 2 chosen traces become 0.6 nats less likely, and
    step 5 has no chosen traces."""
    benchmark = {"benchmark": "math", "grader": "paper", "pass_at_1": score, "mean_tokens": 7.0}
    report = {"mean_pass_at_1": score, "benchmarks": [benchmark | {"pass_at_k": [score, 1.0]}]}
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/report.json").write_text(json.dumps(report))
    records = [
        {"kind": "train", "step": n, "chosen_logp": -0.1 - 0.6 * (n > 1), "rejected_logp": -0.5}
        for n in range(1, 31)
    ]
    del records[4]["chosen_logp"]
    records += [{"kind": "benchmark", "step": n, "pass_at_1": n / 100} for n in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


@pytest.fixture
def results(write_study, tmp_path) -> Results:
    path = write_study(
        ("seeds = [1, 2]", "seeds = [1, 2, 3]\nmislabelled = [0.0, 0.5]"),
        ("[1e-4, 1e-3]", "[1e-4, 9e-4]"),
        more=METHODS,
    )
    study, missing = read_study(path, tmp_path / "out"), {}
    for model in study.models:
        scores = SCORES.get(f"{model.teacher}/{model.folder.name}", [])
        if model.seed <= len(scores):
            write_run(model.folder, scores[model.seed - 1])
        else:
            missing[str(model.folder / "eval")] = "out of | <luck>"
    return collect(study, missing)


def test_results_are_what_runs_and_evaluations_left_on_disk(results):
    stage_1, redi = results.runs[:2]
    assert (stage_1.method, stage_1.collapsed_at) == (STAGE_1, None)
    assert (redi.grader, redi.pass_at_1, redi.benchmarks) == ("paper", 0.6, {"math": 0.6})
    assert (redi.pass_at_n, redi.mean_tokens) == (1.0, 7.0)
    assert redi.on_the_way == [(10, 0.1), (20, 0.2)]  # the last one is the final evaluation's
    low = [(step, -0.7) for step in (2, 3, 4, *range(6, 31))]
    assert redi.curves == {
        "chosen_logp": [(1, -0.1), *low],
        "rejected_logp": [(step, -0.5) for step in range(1, 31)],
    }
    assert redi.collapsed_at == 22  # the 20th step in a row that is 0.5 lower


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("eval/report.json", "}", "", "report.json: not a report of evaluate.py ("),
        ("eval/report.json", '"benchmarks"', '"x"', "('benchmarks'); `python -m redi.eval.grade"),
        ("eval/report.json", "7.0", "null", "report.json: not a report of evaluate.py ("),
        ("eval/report.json", "[0.5, 1.0]", "[]", "report.json: not a report of evaluate.py ("),
        (
            "eval/report.json",
            '"pass_at_1": 0.5',
            '"pass_at_1": "0.5"',
            "report.json: not a report of evaluate.py (",
        ),
        ("metrics.jsonl", "step", "x", "metrics.jsonl:1: not a record of a run"),
        ("metrics.jsonl", "train", "eval", "metrics.jsonl: no training records"),
    ],
)
def test_a_broken_file_of_a_run_is_one_line_that_names_it(
    write_study, tmp_path, file, old, new, message
):
    study = read_study(write_study(("[1, 2]", "[1]"), ("[1e-4, 1e-3]", "1e-4")), tmp_path)
    for model in study.models:
        write_run(model.folder, 0.5)
    path = tmp_path / "seed-1/sft" / file
    path.write_text(path.read_text().replace(old, new))
    refused = refusal(collect, study, {})
    assert message in refused
    assert refused.startswith(str(path))


def test_the_table_by_hand(results):
    assert [row.teacher for row in results.table] == ["a", "a", "a", "a", "b", "b"]
    stage_1, redi, dpo, noisy, _, other = results.table
    assert (stage_1.mean, stage_1.gain, stage_1.p_stage_1) == (pytest.approx(0.6), None, None)
    # REDI's best is lr 1e-4: mean 0.8, gains 0.1, 0.2, 0.3, and p as in the test by hand above
    assert redi.settings["lr"] == 1e-4
    assert (redi.mean, len(redi.scores)) == (pytest.approx(0.8), 3)
    assert redi.sem == pytest.approx(0.2 / math.sqrt(3))
    assert redi.gain == pytest.approx(0.2)
    assert redi.p_stage_1 == pytest.approx(0.07418, abs=1e-5)
    # against DPO on the two seeds that both have: differences 0.1, 0.1 but for rounding
    assert redi.p_dpo is None
    # DPO over stage 1: 0, 0.1; mean 0.05, SEM 0.05, t = 1 with 1 degree of freedom: p = 1/2
    assert dpo.p_stage_1 == pytest.approx(0.5)
    assert (dpo.gain, dpo.p_dpo, len(dpo.scores)) == (pytest.approx(0.05), None, 2)
    # Teachers and shares are compared with their own stage 1 and DPO. Gains 0.1 and 0.3: mean 0.2,
    # SEM 0.1, t = 2 with 1 degree of freedom.
    assert (noisy.mislabelled, noisy.p_dpo) == (0.5, None)
    assert (other.mislabelled, other.p_dpo, other.gain) == (0.5, None, pytest.approx(0.2))
    assert other.p_stage_1 == pytest.approx(1 - 2 / math.pi * math.atan(2.0))


def test_a_report_names_the_grader_and_what_is_missing_and_shows_its_figures(results):
    drawn = figures(results)
    assert list(drawn) == ["accuracy", "log_probs", "gains"]
    text = page(results, drawn)
    assert "graded by paper" in text
    assert "seed-3/dpo-lr-1e-4-beta-0.1/eval</td><td>out of | &lt;luck&gt;</td>" in text
    assert text.count("data:image/png") == len(drawn)
    cells = "REDI lr 1e-4 a 0 0.800 ± 0.115 1.000 +0.200 0.074 7.0 3 3"
    assert cells in re.sub(r"(<[^>]*>\s*)+", " ", text)


def test_names_of_methods_are_no_formulas_and_numbers_are_written_before_figures(
    write_study, tmp_path, monkeypatch
):
    study = read_study(write_study(('"REDI"', '"_cost $x_{$ <b>"')), tmp_path)
    for model in study.models:
        write_run(model.folder, 0.5)
    found = collect(study, {})
    assert list(figures(found)) == ["accuracy", "log_probs", "gains"]
    monkeypatch.setattr("redi.study.report.figures", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_reports(found, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["title"] == "small"


def test_settings_are_written_as_people_type_them_and_exactly():
    values = {1e-4: "1e-4", 5e-7: "5e-7", 2.5e-3: "2.5e-3", 0.8: "0.8", 2.0: "2", 1: "1",
              1.2345678901e-5: "1.2345678901e-5", "redi": "redi"}  # fmt: skip
    assert {value: as_text(value) for value in values} == values


# ---------------------------------------------------------------- jobs, with programs of a line


class Shell:
    """Jobs a, b, c, ... that note their name in `order`, run a line and make their product."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.notes = folder, folder / "work", folder / "order"

    def __call__(self, name: str, line: str, *needs: str) -> Job:
        product, *needed = (self.out / one / "done" for one in (name, *needs))
        note = f"mkdir -p {product.parent}; echo {name} >> {self.notes}"
        return Job(["sh", "-ec", f"{note}; {line}; touch {product}"], needed, product)

    def run(self, jobs: list[Job], workers: int = 1) -> dict[str, str]:
        return run_jobs(jobs, self.out, workers)

    def order(self) -> str:
        return "".join(self.notes.read_text().split()) if self.notes.exists() else ""


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)


def test_jobs_wait_for_what_they_need_share_the_cores_and_are_not_run_twice(shell, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = shell.folder / "cores"
    write_cores = f"echo $OMP_NUM_THREADS > {cores}"
    found = [shell("a", "sleep 0.3"), shell("b", write_cores, "a"), shell("c", "true")]
    assert shell.run(found, 2) == {}
    first = shell.order()
    assert first in ("acb", "cab")  # a and c at the same time
    assert cores.read_text() == "4\n"
    shell.run(found, 2)
    assert shell.order() == first
    found[2].product.unlink()
    shell.run(found, 2)
    assert shell.order() == f"{first}c"


def test_a_failed_job_is_named_with_its_log_and_only_those_that_need_it_are_not_run(shell, capsys):
    a, others = shell("a", "echo 'error: no luck'; exit 3"), [("b", "a"), ("c", "b"), ("d",)]
    b, c, d = (shell(name, "true", *needs) for name, *needs in others)
    no_product = Job(["true"], [], shell.out / "e/never")  # exits with 0
    missing = shell.run([a, b, c, d, no_product])
    assert list(missing) == [job.name for job in (a, no_product, b, c)]
    assert missing[a.name] == f"error: no luck (all of it: {shell.out}/logs/a.log)"
    assert missing[a.name] in capsys.readouterr().err
    assert missing[b.name] == missing[c.name] == "not run, because it needs a job that failed"
    assert shell.order() == "ad"
    shell.run([shell("a", "true"), b, c, d, no_product])
    assert shell.order() == "adabc"


def test_a_study_that_is_stopped_stops_its_programs_and_the_same_command_resumes(shell):
    note = f"trap 'echo stopped >> {shell.notes}; exit 75' TERM"
    stop = f"{note}; kill -TERM $PPID; while true; do sleep 0.1; done"
    again = shell.folder / "again"
    found = [shell("a", "true"), shell("b", f"test -e {again} || {{ {stop}; }}", "a")]
    with pytest.raises(Stopped, match="1 of 2 jobs are done; the same command resumes the others"):
        shell.run(found)
    assert shell.order() == "abstopped"
    again.touch()
    assert shell.run(found) == {}
    assert shell.order() == "abstoppedb"


def test_after_a_kill_a_study_waits_for_the_program_that_is_left_and_then_resumes(
    shell, write_study, capsys
):
    study = read_study(write_study(), shell.out)
    found = [shell("a", "true"), shell("b", "sleep 1", "a")]

    def start() -> dict[str, str]:
        with claim(study, found) as held:
            return run_jobs(found, study.out, 1, held)

    child = os.fork()  # a process that can be killed, without importing torch again
    if child == 0:
        start()
        os._exit(0)
    wait_until(lambda: "b" in shell.order())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert start() == {}
    assert shell.order() == "ab"  # the program that was left has finished b
    assert "programs of a study are running there; waiting" in capsys.readouterr().out


# ---------------------------------------------------------------- from end to end


@pytest.mark.slow
def test_a_small_study_from_end_to_end(write_study, tmp_path):
    path, out = write_study(("lr = [1e-4, 1e-3]", "lr = 1e-4")), tmp_path / "out"
    start = ("-m", "redi.study", path, "--out", out, "--workers", 1)

    # ---- Ctrl-C, then SIGKILL, then to the end
    for what, signal_number in (("sft", signal.SIGINT), ("redi-lr-1e-4", signal.SIGKILL)):
        process = command(*start)
        wait_until((out / f"seed-1/{what}/metrics.jsonl").exists, process, 120)
        process.send_signal(signal_number)
        message = process.communicate(timeout=60)[1]
        if signal_number == signal.SIGINT:
            assert process.returncode == 75
            assert "jobs are done; the same command resumes the others" in message
    status, shown, errors = run_command(*start, seconds=300)
    assert status == 0, errors
    assert "REDI" in shown

    results = json.loads((out / "study.json").read_text())
    assert [len(row["scores"]) for row in results["table"]] == [2, 2]
    run = results["runs"][1]
    steps = len(run["curves"]["chosen_logp"])
    assert [step for step, _ in run["on_the_way"]] == list(range(1, steps))
    report = json.loads((out / "seed-1/redi-lr-1e-4/eval/report.json").read_text())
    assert run["pass_at_1"] == report["mean_pass_at_1"]
    assert (out / "figures/log_probs.png").stat().st_size > 1000
    assert html.escape(path.read_text().strip()) in (out / "report.html").read_text()
    for name, different in (("benchmark.jsonl", 1), ("pairs.jsonl", 2)):
        files = {(out / f"seed-{seed}/data/{name}").read_bytes() for seed in (1, 2)}
        assert len(files) == different

    # ---- one more learning rate, and one more method that fails: nothing else is run again
    logs = {log: log.stat().st_size for log in (out / "logs").iterdir()}
    more = '[[method]]\nname = "none left"\nobjective = "redi"\nlr = 1e-4\nmax_response = 2\n'
    write_study(("lr = [1e-4, 1e-3]", "lr = [1e-4, 2e-3]"), more=more)
    status, _, errors = run_command(*start, seconds=300)
    assert status == 2
    assert "4 of 20 jobs failed or need one that failed; the first was" in errors
    assert logs == {log: log.stat().st_size for log in logs}
    assert "not run, because it needs a job that failed" in (out / "report.html").read_text()
    grid = json.loads((out / "study.json").read_text())["grid"]
    assert [row["settings"].get("lr") for row in grid] == [None, 1e-4, 2e-3]
