"""A mistake of the user ends in one line that says what to fix, and leaves no files behind.

    python -m pytest tests/test_cli.py

The mains of the programs run in this process, which turns errors into one line and an exit status;
one error and an interrupted start are real commands. Left out: what the tests of each module show
for every kind of broken model, data, recipe and flag.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import finished, main_in_this_process
from safetensors.torch import load_file, save_file
from small_run import LENGTHS

from redi import programs
from redi.eval import report

ROOT = Path(__file__).parent.parent
KEEP = ["--rope-theta", "keep", "--max-position-embeddings", "keep"]
PROBLEM = {"problem": "Compute 1+1=?", "answer": "2"}


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working folder with its own copy of the student and its data, to be broken."""
    shutil.copytree(made, tmp_path / "toy")
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "benchmark.jsonl").write_text(json.dumps(PROBLEM))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sft(*flags: str) -> int:
    given = ["--model", "toy/student", "--data", "toy/positives.jsonl", "--out", "run"]
    return main_in_this_process(programs.train_sft, *KEEP, *LENGTHS, *given, *flags)


def redi(*flags: str) -> int:
    given = ["--model", "toy/student", "--data", "toy/pairs.jsonl", "--out", "run"]
    return main_in_this_process(programs.train_redi, *LENGTHS, *given, *flags)


def evaluate(*flags: str) -> int:
    given = ["--model", "toy/student", "--benchmark", "benchmark.jsonl", "--out", "run"]
    return main_in_this_process(programs.evaluate, *given, *flags)


def files_under(folder: Path) -> set[Path]:
    """Every file outside the token cache, where a bad flag may leave good data."""
    cache = folder / "out" / "tokens"
    return {p for p in folder.rglob("*") if p.is_file() and cache not in p.parents}


# ---------------------------------------------------------------- bad inputs


def truncate_weights() -> None:
    os.truncate("toy/student/model.safetensors", 1000)


def empty_data() -> None:
    Path("toy/positives.jsonl").write_text("")


def break_line() -> None:
    path = Path("toy/positives.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], '{"prompt": [', *lines[7:]]))


BAD_INPUTS: dict[str, tuple[Callable[[], None] | None, Callable, list[str], list[str]]] = {
    "missing model": (None, sft, ["--model", "nowhere"], ["nowhere"]),
    "missing stage 1": (None, redi, ["--model", "out/sft"], ["out/sft", "train_sft.py"]),
    "missing stage 2": (None, evaluate, ["--model", "out/redi"], ["train_redi.py"]),
    "missing data": (None, sft, ["--data", "no.jsonl"], ["no.jsonl"]),
    "missing pairs": (None, redi, ["--data", "data/pairs.jsonl"], ["redi.prepare"]),
    "truncated weights": (truncate_weights, sft, [], ["model.safetensors"]),
    "empty data": (empty_data, sft, [], ["positives.jsonl"]),
    "broken line": (break_line, sft, [], ["positives.jsonl:7"]),
    "a name too long": (None, sft, ["--out", "o" * 300], ["o" * 300]),
    "not a number": (None, sft, ["--lr", "fast"], ["--lr", "fast"]),
    "alpha": (None, redi, ["--alpha", "1.5"], ["--alpha", "[0, 1]"]),
    "alpha with dpo": (None, redi, ["--objective", "dpo", "--alpha", "0.5"], ["--alpha", "dpo"]),
    "dpo without beta": (None, redi, ["--objective", "dpo"], ["--beta", "0.001"]),
    "simpo without gamma": (
        None, redi, ["--objective", "simpo", "--beta", "2"], ["--gamma", "1"],
    ),
    "one row too long": (
        None, sft, ["--max-response", "22", "--over-length", "error"], ["positives.jsonl", "22"],
    ),
    "beyond the context": (
        None, sft, ["--max-length", "9999", "--max-response", "9999"], ["--max-length", "256"],
    ),
    "beyond any memory": (
        None, sft, ["--max-position-embeddings", "999999999999"], ["max_position_", "2097152"],
    ),
    "a wait beyond a year": (None, sft, ["--timeout", "1e300"], ["--timeout", "525600"]),
    "too many blocks": (  # found before the data is read
        empty_data, sft, ["--checkpoint-blocks", "99"], ["--checkpoint-blocks 99", "0 to"],
    ),
    "two of one name": (
        None, evaluate, ["--benchmark", "benchmark.jsonl", "--benchmark", "other/benchmark.jsonl"],
        ["--benchmark", "'benchmark'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_naming_what_to_fix(case, here, capsys):
    break_it, program, flags, named = BAD_INPUTS[case]
    if break_it:
        break_it()
    before = files_under(here)
    assert program(*flags) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert [text for text in named if text not in error] == []
    assert files_under(here) == before


def test_a_model_whose_logits_are_not_finite_is_not_scored(here, capsys):
    weights = load_file("toy/student/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "toy/student/model.safetensors", metadata={"format": "pt"})
    assert evaluate("--samples", "1", "--max-new-tokens", "8", "--user-prompt", "plain") == 2
    assert "logits are not finite" in capsys.readouterr().err
    assert not Path("run/report.json").exists()


def test_several_processes_need_torchrun(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for program in (sft, evaluate):
        assert program() == 2
        assert "torchrun did not start" in capsys.readouterr().err


def test_one_sample_per_problem_can_be_compared(here, capsys):
    assert evaluate("--user-prompt", "plain") == 0
    assert main_in_this_process(report.main, "run") == 0
    assert "| run   | benchmark |" in capsys.readouterr().out


# ---------------------------------------------------------------- what is shown


def test_a_dry_run_reports_and_writes_nothing(here, capsys):
    before = files_under(here)
    assert sft("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "10 rows to train on" in shown
    assert "optimizer steps" in shown
    assert "<|im_end|>" in shown  # a row as the model sees it
    assert files_under(here) == before


def test_help_fits_a_screen_and_states_defaults(capsys):
    assert main_in_this_process(programs.train_redi, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    assert any("--lr 1e-06" in line for line in lines)
    assert any("--max-response 19000" in line and "tokens" in line for line in lines)


# ---------------------------------------------------------------- real commands


def test_an_error_of_a_real_command_is_one_line_on_stderr(here):
    status, _, errors = finished(ROOT / "train_sft.py", "--model", "nowhere")
    assert status == 2
    [line] = errors.splitlines()
    assert line.startswith("error: nowhere: ")


@pytest.mark.parametrize("program", ["train_sft.py", "train_redi.py", "evaluate.py"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    status, _, errors = finished(ROOT / program, PYTHONPATH=tmp_path)
    assert (status, errors) == (130, "")
