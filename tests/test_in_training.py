"""A benchmark between training steps: evaluate.py's scores, and unchanged training."""

import json
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from processes import main_in_this_process, run_ranks
from small_run import SFT, records, run, sft_config, steps, weights, write_jsonl

from redi import programs
from redi.config import UserError
from redi.eval import in_training

SETTINGS = {
    "eval_benchmark": "benchmark.jsonl", "eval_samples": 3, "eval_temperature": 0.8,
    "eval_every": 2,
}  # fmt: skip
FLAGS = [part for k, v in SETTINGS.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture
def problems(here) -> Path:
    """The working folder with benchmark.jsonl."""
    rows = [{"problem": f"Compute {number}-1=?", "answer": "1"} for number in range(5)]
    write_jsonl(here / "benchmark.jsonl", rows)
    return here


def test_scores_are_those_of_evaluate_and_training_does_not_notice(problems):
    plain = run(sft_config(out="plain", epochs=2))
    scored = run(sft_config(out="scored", epochs=2, checkpoint_blocks="all", **SETTINGS))
    assert [record["loss"] for record in steps(scored)] == [r["loss"] for r in steps(plain)]
    assert all((weights("scored")[name] == w).all() for name, w in weights("plain").items())
    scores = steps(scored, "benchmark")
    assert [score["step"] for score in scores] == [2, 4, 6]
    assert len({score["mean_tokens"] for score in scores}) == 3  # the model has changed

    flags = ["--model", "scored", "--benchmark", "benchmark.jsonl", "--samples", 3,
             "--temperature", 0.8, "--user-prompt", "plain", "--max-new-tokens", 100]  # fmt: skip
    assert main_in_this_process(programs.evaluate, *flags) == 0
    [score] = json.loads(Path("scored/eval/report.json").read_text())["benchmarks"]
    for name in ("pass_at_1", "mean_tokens", "truncated", "no_answer"):
        assert scores[-1][name] == pytest.approx(score[name], abs=1e-12)


def test_two_ranks_score_and_train_as_without_a_benchmark_or_a_second_rank(problems):
    run(sft_config(out="alone", epochs=2, cache="tokens", **SETTINGS))
    alone = steps(records("alone"), "benchmark")
    for setting in ("--reshard-after-forward=false", "--reshard-after-forward", "--offload"):
        for out, more in (("scored", FLAGS), ("plain", [])):
            run_ranks(problems, [*SFT, "--out", f"{out} {setting}", setting, *more])
        together = records(f"scored {setting}")
        assert steps(together) == steps(records(f"plain {setting}"))
        for one, other in zip(steps(together, "benchmark"), alone, strict=True):
            assert one == pytest.approx(other)


def test_training_gets_its_memory_back_and_logs_its_own_peak(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Mock())
    with in_training.allocator_emptied(torch.device("cpu")):
        assert torch.cuda.mock_calls == []
    cuda = torch.device("cuda", 0)
    with in_training.allocator_emptied(cuda):
        torch.cuda.evaluate()
    around = [call.empty_cache(), call.evaluate(), call.empty_cache()]
    assert torch.cuda.mock_calls == [*around, call.reset_peak_memory_stats(cuda)]


def test_a_missing_benchmark_is_found_before_training(here):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such benchmark or file"):
        run(sft_config(eval_benchmark="nothing.jsonl"))
    assert not Path("run").exists()
