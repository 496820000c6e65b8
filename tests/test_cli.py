"""A mistake of the user ends in one line that says what to fix, and leaves no files behind.

The mains of the programs run in this process (`program` turns errors into one line and an exit
status); an interrupted run and one error are run as real commands.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redi import programs
from redi.eval import report
from redi.prepare import __main__ as prepare
from redi.runlog import read_metrics
from redi.toy import student as toy

ROOT = Path(__file__).parent.parent
LIMITS = ["--max-length", "256"]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A small toy: raw.parquet, student/, benchmark.jsonl, positives.jsonl, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("toy")
    run(toy.main, str(folder), "--problems", "60", "--benchmark", "4")
    run(prepare.main, str(folder / "raw.parquet"), "--out", str(folder))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working folder with its own copy of the toy, to be broken."""
    shutil.copytree(made, tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(main, *arguments: str) -> int:
    """The exit status of a program."""
    before, sys.argv = sys.argv, ["program", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def sft(*arguments: str) -> int:
    keep = ["--rope-theta", "keep", "--max-position-embeddings", "keep"]
    given = ["--model", "toy/student", "--data", "toy/positives.jsonl", "--out", "run"]
    return run(programs.train_sft, *keep, *LIMITS, *given, *arguments)


def redi(*arguments: str) -> int:
    given = ["--model", "toy/student", "--data", "toy/pairs.jsonl", "--out", "run"]
    return run(programs.train_redi, *LIMITS, *given, *arguments)


def evaluated(*arguments: str) -> int:
    given = ["--model", "toy/student", "--benchmark", "toy/benchmark.jsonl", "--out", "run"]
    return run(programs.evaluate, "--samples", "1", "--max-new-tokens", "8", *given, *arguments)


# ---------------------------------------------------------------- ways to break an input


def edit_json(path: str, **changes) -> None:
    content = json.loads(Path(path).read_text())
    content |= changes
    Path(path).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_line(path: str, number: int, line: str) -> None:
    lines = Path(path).read_text().splitlines()
    lines[number - 1] = line
    Path(path).write_text("\n".join(lines) + "\n")


def row(path: str, number: int) -> dict:
    return json.loads(Path(path).read_text().splitlines()[number - 1])


def remove_config():
    Path("toy/student/config.json").unlink()


def truncate_weights():
    path = Path("toy/student/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def reshape_weight():
    weights = load_file("toy/student/model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, "toy/student/model.safetensors", metadata={"format": "pt"})


def remove_stop_token():
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    Path("toy/student/chat_template.jinja").write_text(plain)


def shrink_embedding():
    edit_json("toy/student/config.json", vocab_size=256)
    weights = load_file("toy/student/model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:256].clone()
    save_file(weights, "toy/student/model.safetensors", metadata={"format": "pt"})


def empty_data():
    Path("toy/positives.jsonl").write_text("")


def break_line():
    edit_line("toy/positives.jsonl", 7, '{"prompt": [')


def drop_field():
    content = row("toy/positives.jsonl", 5)
    del content["completion"]
    edit_line("toy/positives.jsonl", 5, json.dumps(content))


def control_token_as_role():
    content = row("toy/positives.jsonl", 4)
    content["prompt"][0]["role"] = "user<|im_end|>"
    edit_line("toy/positives.jsonl", 4, json.dumps(content))


def broken_weights():
    weights = load_file("toy/student/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "toy/student/model.safetensors", metadata={"format": "pt"})


def same_names():
    Path("other").mkdir()
    shutil.copy("toy/benchmark.jsonl", "other/benchmark.jsonl")


def empty_response():
    content = row("toy/positives.jsonl", 3)
    content["completion"][0]["content"] = " \n"
    edit_line("toy/positives.jsonl", 3, json.dumps(content))


def other_run():
    assert sft("--max-steps", "1", "--rows-per-step", "4") == 0


def foreign_files():
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("precious")


def no_answers():
    Path("toy/benchmark.jsonl").write_text('{"problem": "1+1?"}\n')


def write_recipe():
    Path("recipe.toml").write_text("lr = 1e-3\nlearnig_rate = 1e-3\n")


NOTHING = None
BAD_INPUTS = {
    "missing model": (NOTHING, sft, ["--model", "nowhere"], ["nowhere"]),
    "missing stage 1": (NOTHING, redi, ["--model", "out/sft"], ["out/sft", "train_sft.py"]),
    "no config.json": (remove_config, sft, [], ["student/config.json"]),
    "truncated weights": (truncate_weights, sft, [], ["model.safetensors"]),
    "wrong shape": (reshape_weight, sft, [], ["model.norm.weight", "[7]", "[96]"]),
    "no stop token": (remove_stop_token, sft, [], ["student", "no stop token"]),
    "small embedding": (shrink_embedding, sft, [], ["tokenizer.json", "256"]),
    "missing data": (NOTHING, sft, ["--data", "no.jsonl"], ["no.jsonl"]),
    "missing pairs": (NOTHING, redi, ["--data", "data/pairs.jsonl"], ["redi.prepare"]),
    "empty data": (empty_data, sft, [], ["positives.jsonl"]),
    "broken line": (break_line, sft, [], ["positives.jsonl:7"]),
    "lacking a field": (drop_field, sft, [], ["positives.jsonl:5", "completion"]),
    "a role of no template": (control_token_as_role, sft, [], ["positives.jsonl:4", "prompt"]),
    "not finite": (NOTHING, sft, ["--rope-theta", "nan"], ["--rope-theta"]),
    "a name too long": (NOTHING, sft, ["--out", "o" * 300], ["o" * 300]),
    "empty response": (empty_response, sft, [], ["positives.jsonl:3", "completion"]),
    "pairs as positives": (NOTHING, sft, ["--data", "toy/pairs.jsonl"], [":1", "completion"]),
    "unknown flag": (NOTHING, sft, ["--learning-rate", "1"], ["--learning-rate"]),
    "not a number": (NOTHING, sft, ["--lr", "fast"], ["--lr", "fast"]),
    "unknown key": (write_recipe, sft, ["--config", "recipe.toml"], ["recipe.toml", "learnig"]),
    "missing recipe": (NOTHING, sft, ["--config", "no.toml"], ["no.toml"]),
    "alpha": (NOTHING, redi, ["--alpha", "1.5"], ["--alpha", "[0, 1]"]),
    "alpha with dpo": (NOTHING, redi, ["--objective", "dpo", "--alpha", "0.5"], ["--alpha", "dpo"]),
    "dpo without beta": (NOTHING, redi, ["--objective", "dpo"], ["--beta", "0.001"]),
    "simpo without gamma": (
        NOTHING, redi, ["--objective", "simpo", "--beta", "2"], ["--gamma", "1"],
    ),
    "every row too long": (NOTHING, sft, ["--max-response", "3"], ["positives.jsonl", "60"]),
    "one row too long": (
        NOTHING, sft, ["--max-response", "30", "--over-length", "error"], ["positives.jsonl", "30"],
    ),
    "beyond the context": (NOTHING, sft, ["--max-length", "9999"], ["--max-length", "256"]),
    "beyond any memory": (
        NOTHING, sft, ["--max-position-embeddings", "999999999999"], ["max_position_", "2097152"],
    ),
    "another run": (other_run, sft, ["--lr", "0.5"], ["--out", "lr"]),
    "foreign files": (foreign_files, sft, [], ["--out", "run"]),
    "out is a file": (NOTHING, sft, ["--out", "toy/raw.parquet"], ["--out", "raw.parquet"]),
    "a wait beyond a year": (NOTHING, sft, ["--timeout", "1e300"], ["--timeout", "525600"]),
    "too many blocks": (  # found before the data is read
        empty_data, sft, ["--checkpoint-blocks", "99"], ["--checkpoint-blocks 99", "0 to"],
    ),
    "no tracker": (NOTHING, sft, ["--tracker", "wandb"], ["wandb", "install"]),
    "no answers": (no_answers, evaluated, [], ["benchmark.jsonl:1", "answer"]),
    "two of one name": (
        same_names, evaluated,
        ["--benchmark", "toy/benchmark.jsonl", "--benchmark", "other/benchmark.jsonl"],
        ["--benchmark", "'benchmark'"],
    ),
    "unknown benchmark": (NOTHING, evaluated, ["--benchmark", "math"], ["math500"]),
    "evaluate a missing model": (NOTHING, evaluated, ["--model", "out/redi"], ["train_redi.py"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_naming_what_to_fix(case, here, capsys):
    prepare_it, program, arguments, named = BAD_INPUTS[case]
    if prepare_it is not NOTHING:
        prepare_it()
    before = files_under(here)
    capsys.readouterr()
    status = program(*arguments)
    errors = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(errors) == 1, errors
    for text in named:
        assert text in errors[0]
    assert files_under(here) == before


def files_under(folder: Path) -> set[Path]:
    """Every file outside the token cache, which a bad flag may leave behind for good data."""
    cache = folder / "out" / "tokens"
    return {p for p in folder.rglob("*") if p.is_file() and cache not in p.parents}


def test_a_pair_of_equal_traces_is_dropped_and_counted(here, capsys):
    pair = row("toy/pairs.jsonl", 2)
    pair["rejected"] = pair["chosen"]
    edit_line("toy/pairs.jsonl", 2, json.dumps(pair))
    pairs = len(Path("toy/pairs.jsonl").read_text().splitlines())
    assert redi("--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{pairs - 1} pairs to train on, 1 left out" in shown
    assert "1 chosen equals rejected" in shown


def test_a_step_that_is_not_finite_is_not_applied_and_names_its_rows(here, capsys):
    broken_weights()
    assert sft("--rows-per-step", "4") == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "step 1 has loss nan" in error
    assert "rank 0, rows " in error
    assert error.endswith("last good checkpoint: none yet")
    assert not Path("run/model.safetensors").exists()


def test_a_model_whose_logits_are_not_finite_is_not_scored(here, capsys):
    broken_weights()
    assert evaluated("--user-prompt", "plain") == 2
    assert "logits are not finite" in capsys.readouterr().err
    assert not Path("run/report.json").exists()


def test_one_sample_per_problem_can_be_compared(here, capsys):
    assert evaluated("--user-prompt", "plain") == 0
    assert run(report.main, "run") == 0
    assert "(n = 1)" in capsys.readouterr().out


def test_a_finished_run_started_again_says_so(here, capsys):
    arguments = ["--max-steps", "1", "--rows-per-step", "4"]
    assert sft(*arguments) == 0
    weights = Path("run/model.safetensors").read_bytes()
    capsys.readouterr()
    assert sft(*arguments) == 0
    assert "run is finished" in capsys.readouterr().out
    assert Path("run/model.safetensors").read_bytes() == weights


def test_a_dry_run_reports_and_writes_nothing(here, capsys):
    before = files_under(here)
    assert sft("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "60 rows to train on" in shown
    assert "optimizer steps" in shown
    assert "<|im_end|>" in shown  # a row as the model sees it
    assert files_under(here) == before


def test_help_fits_a_screen_and_states_defaults(capsys):
    assert run(programs.train_redi, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    assert any("--lr 1e-06" in line for line in lines)
    assert any("--max-response 19000" in line and "tokens" in line for line in lines)


def test_several_processes_need_torchrun(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sft() == 2
    assert "torchrun did not start" in capsys.readouterr().err
    assert evaluated() == 2
    assert "torchrun did not start" in capsys.readouterr().err


# ---------------------------------------------------------------- as real commands


def command(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


TRAIN = [
    "--model", "toy/student", "--data", "toy/positives.jsonl", "--out", "run", *LIMITS,
    "--rope-theta", "keep", "--max-position-embeddings", "keep",
]  # fmt: skip


def test_ctrl_c_ends_training_in_one_line_that_says_what_is_on_disk(here):
    training = command("train_sft.py", *TRAIN, "--rows-per-step", "2", "--epochs", "1000")
    wait_for(here / "run" / "metrics.jsonl")
    training.send_signal(signal.SIGINT)
    _, errors = training.communicate(timeout=60)
    assert training.returncode == 75
    [line] = errors.splitlines()
    last = list(read_metrics(here / "run"))[-1]
    assert last["kind"] == "stopped"
    saved = f"run/checkpoints/step-{last['step']:06d}"
    assert f"after step {last['step']} of " in line
    assert line.endswith(f"{saved}; the same command resumes")
    assert {p.name for p in (here / "run").iterdir()} == {
        "config.toml", "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    assert [str(p.relative_to(here)) for p in (here / "run/checkpoints").iterdir()] == [saved]


def test_an_error_of_a_real_command_is_one_line_on_stderr(here):
    failing = command("train_sft.py", "--model", "nowhere")
    _, errors = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("program", ["train_sft.py", "train_redi.py", "evaluate.py"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    started = [sys.executable, str(ROOT / program)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(started, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (130, "")
