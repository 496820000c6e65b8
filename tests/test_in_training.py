"""A benchmark asked between training steps: evaluate.py's numbers, and a training left alone.

python -m pytest tests/test_in_training.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import ranks
from small_run import SFT, records, sft_config, steps, weights

from redi import programs
from redi import run as run_module
from redi.config import UserError
from redi.eval import in_training
from redi.objectives import sft
from redi.runlog import read_metrics

PROBLEMS = 5
EXAM = {
    "eval_benchmark": "benchmark.jsonl",
    "eval_samples": 3,
    "eval_temperature": 0.8,
    "eval_every": 2,
}
FLAGS = ["--eval-benchmark", "benchmark.jsonl", "--eval-samples", "3",
         "--eval-temperature", "0.8", "--eval-every", "2"]  # fmt: skip


def write_benchmark(folder: Path) -> None:
    rows = [{"problem": f"Compute {number}-1=?", "answer": "1"} for number in range(PROBLEMS)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "benchmark.jsonl").write_text("".join(lines))


def run(config) -> list[dict]:
    """Train with what train_sft.py joins to it; the records."""
    run_module.run(config, sft(), False, None, prepare_score=programs.prepare_score)
    return list(read_metrics(Path(config.out)))


def without_time(out: str | Path) -> list[dict]:
    return [record for record in records(out) if record["kind"] == "benchmark"]


def test_scores_are_those_of_evaluate_and_training_does_not_notice(here, monkeypatch):
    write_benchmark(here)
    plain = run(sft_config(out="plain", epochs=2))
    asked = run(sft_config(out="asked", epochs=2, checkpoint_blocks="all", **EXAM))
    assert [record["loss"] for record in steps(asked)] == [r["loss"] for r in steps(plain)]
    assert all((weights("asked")[name] == w).all() for name, w in weights("plain").items())
    scores = steps(asked, "benchmark")
    assert [score["step"] for score in scores] == [2, 4, 6]
    assert len({score["mean_tokens"] for score in scores}) == 3  # the model has changed

    arguments = ["--model", "asked", "--benchmark", "benchmark.jsonl", "--samples", 3,
                 "--temperature", 0.8, "--user-prompt", "plain",
                 "--max-new-tokens", 100]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    programs.evaluate()
    [of_saved] = json.loads(Path("asked/eval/report.json").read_text())["benchmarks"]
    for name in ("pass_at_1", "mean_tokens", "truncated", "no_answer"):
        assert scores[-1][name] == pytest.approx(of_saved[name], abs=1e-12)


def test_ranks_make_a_share_each_and_add_up(here):
    write_benchmark(here)
    run(sft_config(out="alone", epochs=2, cache="tokens", **EXAM))
    alone = without_time("alone")
    for out, flags in (("zero-2", []), ("zero-3", ["--reshard-after-forward", "true"])):
        for rank in ranks(here, [*SFT, *FLAGS, "--out", out, *flags], None, None):
            rank.ends(0)
        together = without_time(out)
        assert [r["step"] for r in together] == [r["step"] for r in alone]
        for one, other in zip(together, alone):
            assert one == pytest.approx(other)
        for rank in ranks(here, [*SFT, "--out", f"plain {out}", *flags], None, None):
            rank.ends(0)
        trained = [r for r in records(out) if r["kind"] == "train"]
        assert trained == [r for r in records(f"plain {out}") if r["kind"] == "train"]


def test_training_gets_its_memory_back_and_logs_its_own_peak(monkeypatch):
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(
            torch.cuda, name, lambda *given, name=name: calls.append((name, *given))
        )
    with in_training.memory_lent(torch.device("cpu")):
        assert calls == []
    cuda = torch.device("cuda", 0)
    with in_training.memory_lent(cuda):
        calls.append("evaluation")
    cache = ("empty_cache",)
    assert calls == [cache, "evaluation", cache, ("reset_peak_memory_stats", cuda)]


def test_a_benchmark_that_is_not_there_is_found_before_training(here, capsys):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such benchmark or file"):
        run(sft_config(eval_benchmark="nothing.jsonl"))
    assert not Path("run").exists()
