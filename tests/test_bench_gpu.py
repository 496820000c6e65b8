"""The parts of bench.gpu, at tiny sizes on a CPU, and what holds them together.

    python -m pytest tests/test_bench_gpu.py

What a CPU lacks is stood in for (varlen_attn) or left out (events, bytes of the allocator).
"""

import inspect
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import gpu, gpu_attention, gpu_checks, gpu_decode, gpu_loss, gpu_meter, gpu_steps
from bench.gpu import Part, Session, in_process, missed, ratios, table, told
from bench.gpu_steps import Run, pair_lengths, trace_lengths, train_steps
from bench.measure import result
from redi import memory
from redi.distributed import World
from redi.model import ModelConfig, Transformer
from redi.monitor import training_flops

CPU = torch.device("cpu")
# Where there is no GPU, Triton runs in its interpreter (see conftest.py).
TRITON = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORLD = World(0, 1, CPU)
TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=512,
)  # fmt: skip
HEADS = (4, 2, 16)


# ---------------------------------------------------------------- lengths


def test_few_lengths_stand_for_the_law():
    """bench.plan's law: a mean of 5.7k and sum L^2 / sum L of 9.3k; pairs 5.0k and 6.1k."""
    traces, pairs = trace_lengths(1000), pair_lengths(1000)
    assert traces.mean() == pytest.approx(5715, rel=0.02)
    assert (traces**2).sum() / traces.sum() == pytest.approx(9280, rel=0.03)
    assert pairs.mean(axis=0).tolist() == pytest.approx([5000, 6100], rel=0.03)
    assert trace_lengths().max() <= 32_768
    assert pair_lengths().max() <= 19_800
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1


@pytest.mark.parametrize("tokens", [1, 200, 8192, 32_768])
def test_a_pack_is_cut_to_its_tokens(tokens):
    lengths = gpu_attention.pack_lengths(tokens)
    assert sum(lengths) == tokens
    assert min(lengths) > 0


# ---------------------------------------------------------------- G9


def test_the_head_is_right_in_bf16():
    found = gpu_checks.head(CPU, rows=512, size=64, vocabulary=500)
    assert found.keys() >= {"G9_dH", "G9_dW", "G9_logp", "G9_two_passes_loss"}
    assert [name for name in found if missed(name, found[name])] == []


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (lambda loss, logps, _: (loss, logps + 0.01), {"G9_logp"}),
        (lambda loss, logps, _: (loss * 1.01, logps), {"G9_loss", "G9_dH", "G9_dW"}),
    ],
)
def test_a_wrong_head_is_seen(wrong, seen, monkeypatch):
    right = gpu_checks.weighted_logp_sum
    monkeypatch.setattr(gpu_checks, "weighted_logp_sum", lambda *given: wrong(*right(*given)))
    found = gpu_checks.head(CPU, rows=64, size=64, vocabulary=500)
    assert {name for name in found if missed(name, found[name])} >= seen


def test_attention_is_right_in_bf16_and_a_leak_between_documents_is_seen(monkeypatch):
    found = gpu_checks.attention(CPU, [1, 5, 30], HEADS)
    assert not missed("G9_attention", found["G9_attention"])
    right = gpu_checks.packed_attention

    def leaks(query, key, value, cu_seqlens, lengths):
        whole = query.dtype == torch.bfloat16
        return right(query, key, value, cu_seqlens, [sum(lengths)] if whole else lengths)

    monkeypatch.setattr(gpu_checks, "packed_attention", leaks)
    found = gpu_checks.attention(CPU, [1, 5, 30], HEADS)
    assert missed("G9_attention", found["G9_attention"])


def test_a_whole_model_in_bf16_is_close_to_fp32():
    found = gpu_checks.model(CPU)
    assert [name for name in found if missed(name, found[name])] == []
    assert found["G9_model_gradient"]["median"] > 1e-4  # it was bf16 indeed


def test_decoding_is_right_and_a_wrong_position_is_seen(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(gpu_checks, "DECODER_ROWS", 5)
    found = gpu_checks.decoding(CPU)
    ways = {f"G9_greedy_{way}" for way in ("recorded", "launched")}
    assert found.keys() == ways | {"G9_decode_logits"}
    assert [name for name in found if missed(name, found[name])] == []
    assert found["G9_decode_logits"]["median"] > 1e-4  # it was bf16 indeed
    hidden = gpu_checks.engine.Decoder.hidden

    def late(self, tokens, positions, attend):
        return hidden(self, tokens, positions + 1, attend)

    monkeypatch.setattr(gpu_checks.engine.Decoder, "hidden", late)
    assert missed("G9_decode_logits", gpu_checks.decoding(CPU)["G9_decode_logits"])


def test_the_triton_kernels_equal_their_twins():
    pytest.importorskip("triton", reason="triton is not installed")
    found = gpu_checks.triton_kernels(TRITON, rows=3, vocabulary=300)
    if TRITON == CPU:
        found.pop("G9_kernel_bf16")  # the interpreter has no bf16
    assert [name for name in found if missed(name, found[name])] == []


# ---------------------------------------------------------------- G1, G2


def test_the_losses_of_ours_and_plain_have_the_same_gradients():
    hidden, weight, *rest = gpu_loss.inputs(48, 16, 200, CPU)
    given = (*(t.detach().float().requires_grad_() for t in (hidden, weight)), *rest)
    expected = gpu_loss.step(gpu_loss.plain, given)
    for loss in (gpu_loss.ours, gpu_loss.two_passes):
        for a, b in zip(gpu_loss.step(loss, given), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_liger_takes_the_signed_weights_as_we_hand_them_over():
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    hidden, weight, *rest = gpu_loss.inputs(48, 16, 200, TRITON)
    given = (*(t.detach().float().requires_grad_() for t in (hidden, weight)), *rest)
    of_none = lambda *given: gpu_loss.liger(*given, reduction="none")  # noqa: E731
    gpu_loss.compare(gpu_loss.step(gpu_loss.ours, given), gpu_loss.step(of_none, given))
    of_mean = gpu_loss.liger(*given, reduction="mean")
    uniform = torch.full((48,), -1 / 48, device=TRITON)
    assert of_mean.item() == pytest.approx(gpu_loss.ours(*given[:3], uniform).item(), rel=1e-5)


def test_gradients_that_differ_from_ligers_end_the_part():
    mine = torch.ones(4, 4), torch.ones(4, 4)
    with pytest.raises(AssertionError, match="d weight differs from Liger's by"):
        gpu_loss.compare(mine, (mine[0], -mine[1]))


def test_the_part_of_the_loss_runs():
    found = gpu_loss.run(CPU, rows=64, size=16, vocabulary=200, rounds=3)
    assert found["G1_ms"]["n"] == 3
    flops = 3 * 2 * 64 * 16 * 200  # three products of (64, 16), (16, 200)
    share = flops / (found["G1_ms"]["median"] / 1e3) / 790e12
    assert found["G1_share"]["median"] == pytest.approx(share)
    assert {"G2", "G2_gib"} <= found.keys()
    assert "G1" not in found  # no Liger on a CPU


def test_a_peer_that_is_not_there_is_told_in_a_line(capsys):
    assert gpu_meter.has("torch", "G1")
    assert capsys.readouterr().out == ""
    assert not gpu_meter.has("no_such_package", "G1")
    assert capsys.readouterr().out == (
        "G1: no_such_package is not installed: nothing of its beside ours\n"
    )


def test_variants_are_timed_by_turns():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    found = gpu_meter.interleave(works, CPU, rounds=2)
    assert "".join(order) == "aabb" + "ab" + "ba"  # each twice before, then two rounds
    assert {name: len(taken) for name, taken in found.items()} == {"a": 2, "b": 2}


# ---------------------------------------------------------------- G3


def test_the_part_of_attention_runs_and_agrees_with_a_dense_mask(monkeypatch):
    monkeypatch.setattr(gpu_attention, "pack_lengths", lambda tokens: [3, tokens - 10, 7])
    found = gpu_attention.run(CPU, tokens=60, dense_tokens=40, heads=HEADS, rounds=2)
    assert found.keys() == {"G3_tflops", "G3_dense_8k"}


def test_flex_with_our_mask_sees_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    lengths = [3, 120, 7, 70]
    query, key, value, _ = (t.detach().float() for t in gpu_attention.inputs(200, HEADS, CPU))
    expected = gpu_attention.ours(lengths, CPU)(query, key, value)
    with torch.no_grad():
        actual = gpu_attention.flex(lengths, CPU)(query, key, value)
    torch.testing.assert_close(actual, expected)


def stand_in(takes_fewer_heads: bool, named: bool):
    """varlen_attn as torch 2.13 has it (named: with enable_gqa), or 2.11."""

    def attend(query, key, value, cu_q, cu_k, max_q, max_k, enable_gqa):
        lengths = cu_q.diff().tolist()
        assert max(lengths) == max_q == max_k
        if query.shape[1] != key.shape[1] and not (
            takes_fewer_heads and enable_gqa in (True, None)
        ):
            raise RuntimeError("heads differ")
        return gpu_attention.packed_attention(query, key, value, cu_q, lengths)

    if named:

        def varlen_attn(*given, window_size, enable_gqa=False):
            assert window_size == (-1, 0)
            return attend(*given, enable_gqa)
    else:

        def varlen_attn(*given, window_size):
            assert window_size == (-1, 0)
            return attend(*given, None)

    return varlen_attn


@pytest.mark.parametrize(
    ("takes_fewer_heads", "named", "copies"),
    [(True, True, False), (True, False, False), (False, False, True)],
)
def test_the_raw_op_gets_copies_only_where_it_needs_them(
    takes_fewer_heads, named, copies, monkeypatch, capsys
):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", stand_in(takes_fewer_heads, named))
    lengths, given = [5, 11], gpu_attention.inputs(16, HEADS, CPU)
    mine = gpu_attention.step(gpu_attention.ours(lengths, CPU), given)
    gradients = gpu_attention.raw_step(lengths, given, mine)()
    assert gradients[2].shape == (16, 4 if copies else 2, 16)
    assert ("copies" in capsys.readouterr().out) == copies


def test_the_real_op_has_the_arguments_that_we_give():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in names


# ---------------------------------------------------------------- G4, G5, G6


def test_our_steps_train_on_every_row_of_every_step():
    run = Run(TINY, np.array([30, 20, 50]), pack_tokens=64, steps=3)
    log, checkpointed = train_steps(run, CPU)
    assert [record["tokens"] for record in log.records] == [100] * 3
    assert log.records[2]["loss"] < log.records[0]["loss"]
    assert len(log.tokens_per_second()) == 2  # the first is not timed
    assert checkpointed == 0


def test_an_entry_of_speed(capsys):
    run = Run(TINY, np.array([[30, 20], [50, 14]]), pack_tokens=64, steps=3)
    found = gpu_steps.speed("G5", run, CPU, 30_000.0)
    assert found["G5_tok_s"]["n"] == 2
    json.dumps(found)
    # 114 tokens, of which all but one of each sequence's first is at most PROMPT: min(120, L - 1)
    flops = training_flops(TINY, [30, 20, 50, 14], supervised=4)
    expected = flops * found["G5_tok_s"]["median"] / 114 / 790e12
    assert found["G5_mfu"]["median"] == pytest.approx(expected, rel=0.05)
    assert "114 tokens a step, 0 of 3 blocks checkpointed" in capsys.readouterr().out


def test_the_clock_takes_the_time_between_records():
    log = gpu_steps.Clock(Path(), times=[1.0, 3.0, 4.0], records=[{"tokens": 100}] * 3)
    assert log.tokens_per_second() == [50.0, 100.0]


def test_the_published_shape_reaches_the_end_of_a_pack():
    assert gpu_steps.SHAPE.max_positions == gpu_attention.TOKENS
    with torch.device("meta"):
        model = Transformer(gpu_steps.SHAPE)
    assert sum(p.numel() for p in model.parameters()) == 1_543_714_304  # Qwen2.5-Math-1.5B's


def test_memory_is_measured_for_each_setting_that_fits(monkeypatch, capsys):
    found = gpu_steps.peaks(CPU, TINY, [30, 20])
    json.dumps(found)
    assert {"G6_all", "G6_auto", "G6_none"} <= found.keys()
    assert found["G6_all"]["goal"] == 0.15
    monkeypatch.setattr(memory, "total_memory", lambda world: 1 << 20)
    assert gpu_steps.peaks(CPU, TINY, [30, 20]) == {}
    assert capsys.readouterr().out.count("skipped") == 3


def test_trl_trains_on_rows_of_the_same_lengths(monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    from bench import gpu_trl

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lengths = np.array([40, 24, 60])
    tokenizer = gpu_trl.number_tokenizer(512)
    for length, row in zip(lengths, gpu_trl.text_rows(lengths, 512)):
        text = row["prompt"] + row["completion"] + gpu_trl.STOP
        assert len(tokenizer(text)["input_ids"]) == length
    peer = gpu_trl.Peer(TINY, lengths, "sdpa", liger=False, steps=3, pack_tokens=64)
    assert len(gpu_trl.train_steps(peer, CPU)) == 2  # it counts the tokens itself
    pairs = np.array([[40, 24], [60, 20]])
    peer = replace(peer, lengths=pairs, checkpointing=True)
    assert str(peer) == "TRL DPO, padded, sdpa, activation checkpointing"
    assert len(gpu_trl.train_steps(peer, CPU)) == 2


# ---------------------------------------------------------------- G7, G8


def test_texts_have_the_mean_asked_for_and_fit_the_context():
    for mean in (4096, 8192):
        lengths = gpu_decode.text_lengths(256, mean, 32_700)
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert lengths.max() <= 32_700


def test_the_part_of_decoding_runs(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(gpu_decode, "STEPS", 8)
    monkeypatch.setattr(gpu_decode, "copy_speed", lambda device: 1e9)
    found = gpu_decode.decode(CPU, TINY, {"4k": 40}, rows=6, peer_rows=3)
    json.dumps(found)
    assert found.keys() == {"G7_4k", "G7_4k_tok_s", "G7_4k_HF", "G7_4k_HF_even"}
    assert found["G7_4k"]["n"] == 8 - 1 - gpu_decode.WARM
    assert found["G7_4k_HF"]["goal"] == 10
    assert "3 rows" in found["G7_4k_HF"]["peer"]
    # A step reads 2 bytes a weight and 2 x 2 x 3 layers x 2 heads x 16 numbers a token.
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in Transformer(TINY).parameters())
    limit = (weights + 6 * 46 * 384) / 1e9
    share = limit * found["G7_4k_tok_s"]["median"] / 6
    assert found["G7_4k"]["median"] == pytest.approx(share, rel=0.05)


def test_the_peer_takes_fewer_rows_where_memory_ends(monkeypatch):
    tried = []

    def steps(peer, lengths, device):
        tried.append(len(lengths))
        if len(lengths) > 20:
            raise torch.OutOfMemoryError
        return [1.0]

    monkeypatch.setattr(gpu_decode, "their_steps", steps)
    assert gpu_decode.peer_steps(None, 64, np.ones, CPU) == (16, [1.0])
    assert tried == [64, 32, 16]


def test_the_slice_begins_in_the_middle_of_an_evaluation():
    asked, mean = gpu_decode.under_way(gpu_steps.SHAPE, 256, gpu_decode.MEDIAN_ANSWER)
    assert mean == pytest.approx(gpu_decode.MEAN_ANSWER, rel=0.02)
    first, fresh = asked[:256], asked[256:]
    done = np.array([len(request.prompt_ids) - 120 for request in first])
    left = np.array([request.max_new_tokens for request in first])
    assert done.mean() == pytest.approx(left.mean(), rel=0.15)
    assert (done + left).mean() > 1.4 * mean  # E[L^2] / E[L] of the law
    assert {len(request.prompt_ids) for request in fresh} == {120}
    assert len({request.prompt_ids for request in fresh}) == len(fresh) / 16


def test_hours_follow_from_the_slices_speed(capsys):
    found = gpu_decode.evaluation(CPU, TINY, slots=4, median=12, lasts=0.3)
    hours, speed = found["G8_hours"], found["G8_tok_s"]
    assert hours["n"] == gpu_decode.WINDOWS
    assert hours["median"] == pytest.approx(1517 * 16 * 8192 / 3600 / speed["median"], rel=1e-6)
    assert hours["goal"] == 5
    assert "PROJECTION" in hours["peer"]
    assert capsys.readouterr().out.startswith("PROJECTION from")


# ---------------------------------------------------------------- parts


def session(seconds_left: float = 100.0) -> Session:
    return Session({}, [], time.monotonic() + seconds_left)


def test_a_part_that_does_not_fit_is_skipped(capsys):
    session(50.0).take("G1", Part("gpu_loss.run", 90))
    assert capsys.readouterr().out == "G1: skipped: may take 90 s, and 50 s are left\n"


def test_a_part_without_its_peer_is_skipped(capsys):
    session().take("G4_TRL", Part("gpu_trl.sft", 90, ("torch", "no_such_package")))
    assert capsys.readouterr().out == "G4_TRL: skipped: no_such_package not installed\n"


def test_a_part_that_breaks_is_told_and_the_next_one_runs(monkeypatch, capsys):
    outcomes = [{"failed": "ValueError: x (gpu_loss.py:7)"}, {"results": {"G3": {"median": 2.0}}}]
    monkeypatch.setattr(gpu, "in_process", lambda command, seconds: outcomes.pop(0))
    found = session()
    found.take("G1", Part("gpu_loss.run", 90))
    found.take("G3", Part("gpu_attention.run", 90))
    assert found.failed == ["G1"]
    assert found.results == {"G3": {"median": 2.0}}
    assert "G1: failed: ValueError: x (gpu_loss.py:7)\n" in capsys.readouterr().out


def test_a_part_by_itself_prints_its_results_last(monkeypatch, capsys):
    def part(device):
        print("a table")
        return {"G1": {"median": 2.0}}

    monkeypatch.setattr(gpu, "function_of", lambda name: part)
    assert gpu.run_here("G1") == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert shown == ["a table"]
    assert json.loads(last) == {"results": {"G1": {"median": 2.0}}}
    monkeypatch.setattr(gpu, "function_of", lambda name: lambda device: 1 / 0)
    assert gpu.run_here("G1") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failed"].startswith("ZeroDivisionError: division by zero (")
    assert "Traceback" in captured.err


@pytest.mark.parametrize(
    ("outcome", "status", "last"),
    [
        ({"results": {"G9_dH": result([0.1], 1.0, "x"), "G1": result([2.0], 1.0, "x")}}, 0, ""),
        ({"results": {"G9_dH": result([2.0], 1.0, "x")}}, 1, "not right: G9_dH\n"),
        ({"failed": "ValueError: x"}, 1, "failed: G9\n"),
    ],
)
def test_what_breaks_or_is_wrong_shows_in_the_exit_status(
    outcome, status, last, monkeypatch, capsys
):
    written = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu, "PARTS", {"G9": Part("gpu_checks.run", 90)})
    monkeypatch.setattr(gpu, "in_process", lambda command, seconds: outcome)
    monkeypatch.setattr(gpu, "write", lambda name, results: written.update({name: results}))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == status
    assert capsys.readouterr().out.endswith(last)
    assert written == ({"gpu": outcome["results"]} if "results" in outcome else {})


def python(code: str, seconds: float = 30.0) -> dict:
    return in_process([sys.executable, "-c", code], seconds)


def test_a_process_hands_back_its_last_line(capsys):
    found = python("""print('a table'); print('{"results": {"G1": {"median": 2}}}')""")
    assert found == {"results": {"G1": {"median": 2}}}
    assert capsys.readouterr().out == "a table\n"


def test_a_process_that_dies_is_told_with_its_last_word():
    code = "import os, sys; print('{', flush=True); sys.stderr.write('a\\nno room'); sys.exit(7)"
    assert python(code) == {"failed": "exit status 7: no room"}


def test_a_process_that_takes_too_long_is_ended():
    began = time.monotonic()
    assert python("import time; time.sleep(60)", 1.0) == {
        "failed": "took more than 1 s and was ended"
    }
    assert time.monotonic() - began < 20


def test_a_result_counts_though_its_process_hangs_on_its_way_out():
    code = """import time; print('{"results": {}}', flush=True); time.sleep(60)"""
    assert python(code, 2.0) == {"results": {}}


def test_an_error_is_told_in_a_line_with_its_place():
    try:
        gpu_loss.compare((torch.ones(1),), (torch.zeros(1) + 2,))
    except AssertionError as error:
        text = told(error)
    assert text.startswith("AssertionError: d hidden differs from Liger's by 5.0e-01 (gpu_loss.py:")
    assert told(ValueError("a\nb")) == "ValueError: a b"


def test_every_part_names_a_function():
    pytest.importorskip("trl", reason="trl is not installed")
    for name in gpu.PARTS:
        assert callable(gpu.function_of(name))
    first = gpu.PARTS["G9"], gpu.PARTS["G1"], gpu.PARTS["G3"], gpu.PARTS["G4"], gpu.PARTS["G5"]
    assert sum(part.seconds for part in first) <= gpu.TOTAL_SECONDS < 600


# ---------------------------------------------------------------- table


def test_ratios_are_over_the_fastest_peer():
    results = {
        "G4_tok_s": result([30.0, 32.0, 34.0], 30.0, "x"),
        "G4_TRL_tok_s": result([9.0, 10.0], None, "TRL, sdpa"),
        "G4_TRL_flex_tok_s": result([15.0, 16.0, 17.0], None, "TRL, flex"),
        "G5_tok_s": result([30.0], 30.0, "x"),
    }
    assert ratios(results) == {
        "G4": {
            "median": 2.0, "min": 30 / 17, "max": 34 / 15, "n": 3, "goal": 1.5, "peer": "TRL, flex",
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "is_missed"),
    [
        ("G1", 0.7, False),
        ("G1", 0.8, True),
        ("G3", 1.2, False),
        ("G3", 1.1, True),
        ("G1", float("nan"), True),
        ("G3", float("nan"), True),
    ],
)
def test_goals_have_a_direction(name, value, is_missed):
    entry = result([value], {"G1": 0.75, "G3": 1.15}[name], "x")
    assert missed(name, entry) == is_missed
    assert not missed(name, entry | {"goal": None})


def test_the_table_says_what_is_missed():
    text = table({"G1": result([0.8, 0.9], 0.75, "Liger none"), "G3": result([2.0], 1.15, "flex")})
    _, first, second = text.splitlines()
    assert first.split() == ["G1", "0.85", "0.8", "0.9", "<=", "0.75", "Liger", "none", "MISSED"]
    assert second.split() == ["G3", "2", "2", "2", ">=", "1.15", "flex"]


def test_without_cuda_it_says_so_in_a_line():
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu"],
        cwd=gpu.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert line.startswith("error: no CUDA device")
