"""bench.gpu: its parts on a CPU at tiny sizes and on a fake GPU, and what runs them.

    python -m pytest tests/test_bench_gpu.py                  a few seconds
    python -m pytest tests/test_bench_gpu.py -m slow          every part on a fake GPU, and TRL

On the fake GPU (tests/fake_cuda) no number is computed: what breaks there breaks on a real one.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import run_command

from bench import gpu, loss, measure
from bench.gpu import CHECKED, Sizes, missed, run_all
from bench.measure import result
from redi.eval.engine.decoder import Decoder

CPU = torch.device("cpu")
TINY = Sizes(
    model=replace(
        CHECKED, vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=16, max_positions=256,
    ),
    pack_tokens=256, rows=4, pairs=3, train_steps=3, head_rows=64, rounds=2,
    checked=replace(CHECKED, num_layers=2, max_positions=512), checked_lengths=(41, 130, 50, 100),
    answers=5, texts=12, contexts=(40,), decode_steps=9, slice_seconds=0.2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def run_part(name: str) -> dict:
    gpu.run_part(name, CPU, TINY)
    return gpu.saved()


def misses(found) -> set[str]:
    return {key for key, entry in dict(found).items() if missed(key, entry)}


# ---------------------------------------------------------------- the parts


def test_bf16_is_right_on_a_cpu():
    found = run_part("G9")
    assert found.keys() >= {"G9_packed_logps", "G9_model_gradient", "G9_two_passes_dW", "G9_logp"}
    assert misses(found) == set()
    assert found["G9_model_gradient"]["median"] > 1e-4  # it was bf16 indeed


def test_a_decoder_that_is_a_position_late_is_seen(monkeypatch):
    """The other checks of G9 are redi/doctor/checks.py's: tests/test_doctor.py."""
    hidden = Decoder.hidden

    def late(self, ids, where, attend):  # decoding has up to 12 slots
        return hidden(self, ids, where + (len(ids) <= 12), attend)

    monkeypatch.setattr(Decoder, "hidden", late)
    assert misses(gpu.check_decoding(CPU, TINY)) >= {"G9_decode_bf16"}


def test_speed_memory_and_hours_follow_from_what_was_measured(capsys):
    found = run_part("G5_DPO") | run_part("G4") | run_part("G6") | run_part("G7") | run_part("G8")
    assert found["G4_tok_s"]["n"] == 2  # the first step is not timed
    assert found["G4_tok_s"]["max"] == TINY.traces().sum() / found["G4_step"]["min"]
    assert {"G5_DPO_mfu", "G6_all", "G6_none_gib", "G7_0k"} <= found.keys()
    assert "0 of 3 blocks checkpointed" in capsys.readouterr().out
    hours = 1560 * 16 * 8192 / 3600 / found["G8_tok_s"]["min"]
    assert found["G8_hours"]["max"] == pytest.approx(hours)


def test_the_heads_loss_beside_its_peers(monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed")

    def wrong(hidden, weight, targets, token_weights):
        value, logps = loss.plain_in_bf16(hidden, weight, targets, token_weights)
        return 2 * value, logps

    peers = {"plain": loss.plain_in_bf16, "TRL": loss.trl, "missing": loss.liger, "wrong": wrong}
    monkeypatch.setattr(gpu, "PEERS", peers)
    found = run_part("G1")
    assert {"G1_ms", "G1_over_TRL", "G1_share", "G2_gib", "G2_token_logps_gib"} <= found.keys()
    assert not found.keys() & {"G1_missing_ms", "G1_wrong_ms"}
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(":")[0] for line in left_out] == ["missing", "wrong"]
    assert "gradients differ by" in left_out[1]


# ---------------------------------------------------------------- what runs the parts


def test_what_was_measured_before_a_part_failed_is_on_disk(monkeypatch):
    def part(device, sizes):
        yield "G1_ms", result([70.0], 75.0, "milliseconds")
        raise ValueError("x")

    monkeypatch.setitem(gpu.PARTS, "broken", (part, 1))
    with pytest.raises(ValueError, match="x"):
        run_part("broken")
    assert gpu.saved().keys() == {"G1_ms"}


@pytest.mark.parametrize(
    ("key", "value", "status", "last"),
    [
        ("G9_dH", 0.1, 0, "failed: -; goals missed: -"),
        ("G9_dH", 2.0, 1, "failed: -; goals missed: G9_dH"),
        ("G4_tok_s", None, 1, "failed: G4_tok_s; goals missed: -"),
        ("G4_tok_s", 0.8, 0, "failed: -; goals missed: G4_tok_s"),  # more is better
        ("G9_dH", np.nan, 1, "failed: -; goals missed: G9_dH"),
    ],
)
def test_failures_and_wrong_numbers_show_in_the_exit_status(
    key, value, status, last, monkeypatch, capsys
):
    def in_process(command, seconds):
        assert command[-1] == key
        if value is None:
            return "exit status 1"
        measure.save("gpu", {key: result([value], {"G1_ms": 75.0}.get(key, 1.0), "x")})
        return ""

    monkeypatch.setattr(gpu, "PARTS", {key: (gpu.check, 90), "G8": (gpu.check, 90)})
    monkeypatch.setattr(gpu, "in_process", in_process)
    ticks = iter([0.0, 0.0, 100.0])  # the second part would begin after the end
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(ticks))
    assert run_all(total=110.0) == status
    out = capsys.readouterr().out
    assert "G8: skipped: no time is left" in out
    assert out.endswith(last + "\n")


def test_without_cuda_it_says_so_in_a_line():
    status, shown, errors = run_command("-m", "bench.gpu")
    assert (status, shown) == (2, "")
    [line] = errors.splitlines()
    assert line.startswith("error: no CUDA device")


# ---------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu.PARTS if "TRL" not in name])
def test_a_part_runs_on_a_fake_gpu(name, results):
    """TRL is left out: it indexes by a mask, whose result has a size only a device knows."""
    command = ("-m", "fake_cuda.cases", f"bench-part name={name} folder={results}")
    status, shown, errors = run_command(*command, TRITON_INTERPRET="")
    assert status == 0, errors
    assert '"error"' not in shown, shown
    left_out = [line for line in shown.splitlines() if "left out" in line]
    allowed = ("Liger_CuTe: left out: ImplNotAvailable", "torch: left out: AttributeError")
    assert all(line.startswith(allowed) for line in left_out), left_out
    found = json.loads((results / "gpu.json").read_text())["results"]
    assert any(key.startswith(name[:2]) for key in found)
    if name == "G6":  # the peak is known without numbers
        assert not any(missed(key, entry) for key, entry in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["G4", "G5"])
def test_trl_trains_on_rows_of_the_same_lengths(ours, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    measure.save("gpu", {f"{ours}_tok_s": result([100.0], None, "tokens/s")})
    found = run_part(f"{ours}_TRL")  # it asserts that TRL counts our tokens
    assert found[ours]["max"] == pytest.approx(100 / found[f"{ours}_TRL_tok_s"]["min"])
