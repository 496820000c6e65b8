"""A mistake of the user ends in one line that says what to fix, and leaves no files behind.

    python -m pytest tests/test_cli.py

The mains of the programs run in this process, which turns errors into one line and an exit status;
one error and an interrupted start are real commands. Left out: what the tests of each module show
for every kind of broken model, data, recipe and flag.
"""

from functools import partial
from pathlib import Path

import pytest
from processes import ROOT, main_in_this_process, run_command
from safetensors.torch import save_file
from small_run import OF_REDI, OF_SFT, files_in, flags, weights, write_jsonl

from redi import programs

PROBLEM = {"problem": "Compute 1+1=?", "answer": "2"}
EVALUATION = {"model": "student", "benchmark": "benchmark.jsonl", "out": "run"}
TWICE = ["--benchmark", "benchmark.jsonl", "--benchmark", "other/benchmark.jsonl"]


@pytest.fixture(autouse=True)
def inputs(here) -> None:
    """Broken rows and two benchmarks beside the student and its data."""
    for folder in (here, here / "other"):
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / "benchmark.jsonl", [PROBLEM])
    lines = Path("positives.jsonl").read_text().splitlines()
    Path("broken.jsonl").write_text("\n".join([*lines[:6], '{"prompt": [', *lines[7:]]))


sft = partial(main_in_this_process, programs.train_sft, *flags(OF_SFT))
redi = partial(main_in_this_process, programs.train_redi, *flags(OF_REDI))
evaluate = partial(main_in_this_process, programs.evaluate, *flags(EVALUATION))


def files_outside_the_cache() -> set[Path]:
    """A bad flag may leave good tokens in the cache."""
    return {path for path in files_in(".") if Path("out/tokens") not in path.parents}


BAD_INPUTS = {  # program, flags, what the line names
    "missing model": (sft, ["--model", "nowhere"], ["nowhere"]),
    "missing stage 1": (redi, ["--model", "out/sft"], ["out/sft", "redi train-sft"]),
    "missing stage 2": (evaluate, ["--model", "out/redi"], ["redi train-redi"]),
    "missing data": (sft, ["--data", "no.jsonl"], ["no.jsonl"]),
    "missing pairs": (redi, ["--data", "data/pairs.jsonl"], ["redi prepare"]),
    "broken line": (sft, ["--data", "broken.jsonl"], ["broken.jsonl:7"]),
    "a name too long": (sft, ["--out", "o" * 300], ["o" * 300]),
    "not a number": (sft, ["--lr", "fast"], ["--lr", "fast"]),
    "dpo without beta": (redi, ["--objective", "dpo"], ["--beta", "0.001"]),
    "simpo without gamma": (redi, ["--objective", "simpo", "--beta", "2"], ["--gamma", "1"]),
    "beyond the context": (
        sft, ["--max-length", "9999", "--max-response", "9999"],
        ["--max-length", "9999", "256"],
    ),
    "prompt and response beyond it": (
        sft, ["--max-length", "9999", "--max-prompt", "8", "--max-response", "999"],
        ["--max-length", "1007 tokens (--max-prompt plus --max-response)"],
    ),
    "beyond any memory": (
        sft, ["--max-position-embeddings", "999999999999"], ["max_position_", "2097152"],
    ),
    "a wait beyond a year": (sft, ["--timeout", "1e300"], ["--timeout", "525600"]),
    "blocks below 0": (sft, ["--checkpoint-blocks", "-1"], ["--checkpoint-blocks", "at least 0"]),
    "blocks by another word": (
        sft, ["--checkpoint-blocks", "most"], ["a whole number or one of auto, all, none"],
    ),
    "two of one name": (evaluate, TWICE, ["--benchmark", "'benchmark'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_naming_what_to_fix(case, capsys):
    program, more, named = BAD_INPUTS[case]
    before = files_outside_the_cache()
    assert program(*more) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert [text for text in named if text not in error] == []
    assert files_outside_the_cache() == before


def test_a_model_whose_logits_are_not_finite_is_not_scored(save_tokenizer, save_qwen2, capsys):
    save_qwen2(save_tokenizer(Path("broken")), max_position_embeddings=256)
    tensors = weights("broken")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    assert evaluate("--model", "broken", "--max-new-tokens", "8", "--user-prompt", "plain") == 2
    assert "logits are not finite" in capsys.readouterr().err
    assert not Path("run/report.json").exists()


def test_several_processes_need_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for program in (sft, evaluate):
        assert program() == 2
        assert "torchrun did not start" in capsys.readouterr().err


# ---------------------------------------------------------------- what is shown


def test_a_dry_run_reports_and_writes_nothing(capsys):
    before = files_outside_the_cache()
    assert sft("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "10 rows to train on" in shown
    assert "optimizer steps" in shown
    assert "<|im_end|>" in shown  # a row as the model sees it
    assert files_outside_the_cache() == before


def test_help_fits_a_screen_and_states_defaults(capsys):
    assert redi("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert any("--lr 1e-06" in line for line in lines)
    assert any("--max-response 19000" in line and "tokens" in line for line in lines)


# ---------------------------------------------------------------- real commands


def test_an_error_of_a_real_command_is_one_line_on_stderr():
    status, _, errors = run_command(ROOT / "train_sft.py", "--model", "nowhere")
    assert status == 2
    [line] = errors.splitlines()
    assert line.startswith("error: nowhere: ")


@pytest.mark.parametrize("program", ["train_sft.py", "train_redi.py", "evaluate.py"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    status, _, errors = run_command(ROOT / program, PYTHONPATH=tmp_path)
    assert (status, errors) == (130, "")


@pytest.mark.parametrize(("chosen", "spins"), [({}, "0"), ({"OMP_WAIT_POLICY": "active"}, "3")])
def test_waiting_threads_do_not_spin_unless_the_user_wants_it(chosen, spins, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    shown = {"OMP_DISPLAY_ENV": "verbose", **chosen}  # GNU's OpenMP says what it has read
    status, _, errors = run_command(ROOT / "train_sft.py", "--help", **shown)
    assert status == 0
    assert f"GOMP_SPINCOUNT = '{spins}" in errors
