"""redi trace: what a run needs, and a bound on how fast it is.

python -m pytest tests/test_trace.py -m slow      the published runs, at their true depth

Fake CUDA changes torch for good, so each trace is a process. TABLE is written by hand from the
rules in redi/trace/costs.py.
"""

import json
import re

import pytest
from processes import ROOT, run_command

from redi.gpus import GPUS, find_gpu
from redi.trace import TESTED, why_unavailable
from redi.trace.costs import TRITON

needs_fake = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
SMALL = {  # the widths of Qwen2.5-Math-1.5B, two blocks
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_936,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 2,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


def trace(folder, *arguments, status=0):
    """What --save wrote, and what was shown."""
    found = folder / "trace.json"
    code, shown, errors = run_command("-m", "redi", "trace", *arguments, "--save", found)
    assert code == status, errors
    return json.loads(found.read_text()) if status == 0 else {}, shown + errors


@pytest.fixture
def small(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "model"


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"), ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA L40", None), ("Tesla V100", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None), ("A100 80GB", "A100"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_the_name_that_cuda_gives_it(device, name):
    gpu = find_gpu(device)
    assert (gpu and gpu.name) == name


def test_every_gpu_is_found_by_its_own_name():
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


# ---------------------------------------------------------------- the rules

OPERATORS = """
import json, torch
from redi import kernels
from redi.trace.fake import FakeCuda
from redi.gpus import find_gpu

def cost(run):
    fake.reset()
    run()
    found = list(fake.costs.by_kind.items())
    return [(kind, c.kernels, c.flops, c.bytes, c.seconds) for kind, c in found]

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")

with FakeCuda(find_gpu("H100")) as fake, torch.no_grad():
    a, b, wide = empty(1000, 1000), empty(1000, 1000), empty(8192, 8192, dtype=torch.bfloat16)
    rows = torch.zeros(10, dtype=torch.int64, device="cuda")
    table, targets = torch.zeros(2, 1000, 1000, dtype=torch.int64, device="cuda")
    targets, weights = targets[0], empty(1000)
    adamw = [[a.clone() for _ in range(2)] for _ in range(4)]
    adamw += [[], [torch.zeros((), device="cuda") for _ in range(2)]]
    rates = dict(lr=1.0, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8)
    out = empty(4000, dtype=torch.bfloat16)
    shards = [empty(600, dtype=torch.bfloat16), empty(400, dtype=torch.bfloat16)]
    print(json.dumps({
        "add": cost(lambda: a + b), "add_": cost(lambda: a.add_(b)),
        "twice": cost(lambda: a * a), "twice_": cost(lambda: a.mul_(a)),
        "copy_": cost(lambda: a.copy_(b)), "zero_": cost(lambda: a.zero_()),
        "zeros_like": cost(lambda: torch.zeros_like(a)),
        "foreach_copy_": cost(lambda: torch._foreach_copy_([a, b], [b.T, a.T])),
        "foreach_zero_": cost(lambda: torch._foreach_zero_([a, b])),
        "view": cost(lambda: a.view(10, -1).T), "empty": cost(lambda: torch.empty_like(a)),
        "broadcast": cost(lambda: a + b[:1].expand(1000, 1000)),
        "lookup": cost(lambda: a[rows]), "store": cost(lambda: a.index_put_((rows,), b[:10])),
        "add rows": cost(lambda: a.index_put_((rows,), b[:10], accumulate=True)),
        "store ids": cost(lambda: table.index_copy_(0, rows, table[10:20])),
        "stored copy": cost(lambda: a.index_put((rows,), b[:10])),
        "mm": cost(lambda: wide @ wide), "out": cost(lambda: torch.add(a, b, out=b)),
        "adamw": cost(lambda: torch._fused_adamw_(*adamw, **rates, amsgrad=False, maximize=False)),
        "gather": cost(lambda: torch.ops.fsdp.all_gather_copy_in(shards, out, [600, 400], 1000, 1)),
        "softmax": cost(lambda: kernels.softmax_gradient_(a, targets)),
        "gradient": cost(lambda: kernels.softmax_gradient_(a, targets, weights, torch.bfloat16)),
    }))
"""
MATRIX = 4 * 1000 * 1000  # bytes
ROWS = 4 * 10 * 1000
TABLE = {  # kind, FLOPs, bytes
    "add": ("elementwise", 0, 3 * MATRIX), "add_": ("elementwise", 0, 3 * MATRIX),
    "twice": ("elementwise", 0, 2 * MATRIX), "twice_": ("elementwise", 0, 2 * MATRIX),
    "copy_": ("elementwise", 0, 2 * MATRIX), "zero_": ("elementwise", 0, MATRIX),
    "zeros_like": ("elementwise", 0, MATRIX),
    "foreach_copy_": ("elementwise", 0, 4 * MATRIX),
    "foreach_zero_": ("elementwise", 0, 2 * MATRIX),
    "broadcast": ("elementwise", 0, 2 * MATRIX + 4000), "out": ("elementwise", 0, 3 * MATRIX),
    "lookup": ("elementwise", 0, 2 * ROWS + 80), "store": ("elementwise", 0, 2 * ROWS + 80),
    "add rows": ("elementwise", 0, 3 * ROWS + 80), "store ids": ("elementwise", 0, 4 * ROWS + 80),
    "stored copy": ("elementwise", 0, 2 * MATRIX + ROWS + 80),
    "mm": ("matmul", 2 * 8192**3, 2 * 2 * 8192**2),
    # two parameters with a gradient and two moments: 4 are read and 3 written
    "adamw": ("elementwise", 0, 2 * (7 * MATRIX + 4)), "gather": ("elementwise", 0, 2 * 2 * 1000),
    # logits and targets; log-probs, entropies, and two unused pointers to the log-probs
    "softmax": ("softmax", 0, MATRIX + 8 * 1000 + 4 * 4 * 1000),
    # logits, targets, weights; log-probs, entropies, gradient in bf16
    "gradient": ("softmax", 0, MATRIX + 8 * 1000 + 3 * 4 * 1000 + MATRIX // 2),
}  # fmt: skip


@needs_fake
def test_bytes_flops_and_seconds_follow_the_rules():
    status, shown, errors = run_command("-c", OPERATORS, TRITON_INTERPRET="")
    assert status == 0, errors
    found, gpu = json.loads(shown), find_gpu("H100")
    assert found.pop("view") == found.pop("empty") == []
    for name, (kind, flops, moved) in TABLE.items():
        seconds = max(flops / gpu.flops, moved / gpu.bandwidth)
        assert found[name] == [[kind, 1, flops, moved, pytest.approx(seconds)]], name


def test_every_triton_kernel_of_redi_has_a_kind():
    sources = [path.read_text("utf-8") for path in ROOT.glob("redi/**/*.py")]
    launched = {name for text in sources for name in re.findall(r"(\w+)\[\(.*\)\]\(", text)}
    assert launched == TRITON.keys()


# ---------------------------------------------------------------- runs


@needs_fake
@pytest.mark.parametrize("program", ["train-sft", "train-redi"])
def test_flops_are_those_of_the_mfu_and_the_peak_is_below_the_formula(program, small, tmp_path):
    found, shown = trace(tmp_path, program, "--model", small, "--checkpoint-blocks", 1)
    assert found["counted_flops"] == pytest.approx(found["model_flops"], rel=1e-9)
    assert 0.8 <= found["peak_gib"] / found["formula_gib"] <= 1.0
    assert "8 x A100, traced, not measured" in shown


@needs_fake
def test_dpo_computes_the_logits_twice_and_the_output_says_so(small, tmp_path):
    dpo = ("--objective", "dpo", "--beta", 0.1)
    found, shown = trace(tmp_path, "train-redi", "--model", small, *dpo)
    per_token = 2 * 1536 * 151_936  # FLOPs
    [tokens] = {found["traced_step"]["tokens"]}
    share = (found["counted_flops"] - found["model_flops"]) / (per_token * tokens)
    assert 0.95 < share < 1.0  # prompts have no logits
    assert "the logits once instead of twice" in shown
    assert "not counted: a forward pass over all rows" in shown


@needs_fake
def test_a_run_grows_by_packs_and_updates_once_per_step(small, tmp_path):
    run = ("train-sft", "--model", small, "--gpus", 1, "--pack-tokens", 32_768)
    found = [trace(tmp_path, *run, "--rows-per-step", rows)[0]["run"] for rows in (64, 128)]
    few, many = ([part["kinds"] for part in found][i] for i in range(2))
    for kind in few:  # 1,213 and 607 steps an epoch
        once = 2.0 if kind == "clip and AdamW" else 1.0
        assert few[kind]["seconds"] == pytest.approx(once * many[kind]["seconds"], rel=0.02)
    assert few["elementwise"]["seconds"] > many["elementwise"]["seconds"]


@needs_fake
def test_of_a_run_with_few_rows_for_many_gpus_no_cost_is_negative(small, tmp_path):
    run = ("train-sft", "--model", small, "--gpus", 64, "--rows-per-step", 1)
    found, _ = trace(tmp_path, *run, "--max-steps", 1)
    for kind, cost in found["run"]["kinds"].items():
        assert min(cost.values()) >= 0, kind
    update = found["run"]["kinds"]["clip and AdamW"]["seconds"]
    assert 0 < update < found["run"]["total"]["seconds"]


@needs_fake
def test_an_evaluation_whose_cache_does_not_fit_says_so(small, tmp_path):
    run = ("evaluate", "--model", small, "--gpu", "RTX 4090", "--gpus", 1, "--slots", 4096)
    _, shown = trace(tmp_path, *run, "--cache-gib", 100)
    assert "of 23.6 GiB (DOES NOT FIT)" in shown


@needs_fake
def test_rows_over_a_limit_are_dropped_and_answers_over_it_are_cut(small, tmp_path):
    found, shown = trace(tmp_path, "train-sft", "--model", small, "--max-length", 600)
    dropped = re.search(r"left out: ([\d,]+) prompt and response over 600 tokens", shown)[1]
    kept = 77_629 - int(dropped.replace(",", ""))
    assert 0 < kept < 1000
    assert found["steps"] == 5 * -(-kept // 128)
    limit = ("--max-new-tokens", 128, "--benchmark", "aime24", "amc", "--samples", 2)
    found, _ = trace(tmp_path, "evaluate", "--model", small, *limit, "--gpus", 1)
    assert 127 < found["mean_answer"] <= 128
    assert found["traced_step"]["tokens"] == found["problems"] * 2 == 226  # fewer than --slots
    assert found["run"]["tokens"] == 226 * found["mean_answer"]


@needs_fake
def test_a_decode_step_reads_weights_cache_and_logits_and_little_else(small, tmp_path):
    greedy = ("--gpu", "H200", "--slots", 8, "--cache-gib", 0.4, "--temperature", 0)
    found, shown = trace(tmp_path, "evaluate", "--model", small, *greedy)
    assert "FIT" not in shown
    step, token = found["traced_step"], found["cached_token_bytes"]
    assert step["tokens"] == 8
    assert token == 2 * 2 * 2 * 128 * 2  # key and value, layers, heads, size, bf16
    assert 0.399 <= found["cache_tokens"] * token / 2**30 <= 0.4
    cached, logits = 8 * (found["context"] + 1) * token, 8 * 151_936 * 4
    parts = 2 * 8 * 12 * 128 * (128 + 1) * 4  # layers, rows, heads, splits, their sums in fp32
    # The logits are written, summed and searched; the parts of attention written and read.
    least = found["weights_gib"] * 2**30 + cached + 3 * logits + 2 * parts
    assert least <= step["total"]["bytes"] <= 1.02 * least
    bound = 8 * find_gpu("H200").bandwidth / least
    assert 0.98 * bound <= step["tokens_per_second"] <= bound


@needs_fake
def test_offload_takes_weights_and_moments_off_the_gpu_and_the_hosts_work_is_not_counted(
    small, tmp_path
):
    block = 2 * 1536**2 + 2 * 1536 * 256 + 1536 + 2 * 256 + 3 * 1536 * 8960 + 2 * 1536
    parameters = 151_936 * 1536 + 2 * block + 1536
    run = ("train-redi", "--model", small, "--gpu", "RTX 4090", "--gpus", 1)
    run += ("--checkpoint-blocks", "all", "--pack-tokens", 16_384)
    plain, offloaded = trace(tmp_path, *run)[0], trace(tmp_path, *run, "--offload")
    found, shown = offloaded
    assert plain["peak_gib"] - found["peak_gib"] == pytest.approx(12 * parameters / 2**30, rel=0.01)
    assert found["copied_gb"] == pytest.approx(4 * parameters / 1e9)
    assert f"offload: {found['host_gib']:.1f} GiB in host memory per GPU" in shown
    before, after = (t["traced_step"]["kinds"]["clip and AdamW"] for t in (plain, found))
    assert before["bytes"] > 50 * parameters
    assert after["bytes"] < 1e6


@needs_fake
def test_a_step_that_does_not_fit_says_so(small, tmp_path):
    machine = ("--gpu", "RTX 4090", "--gpus", 1, "--pack-tokens", 131_072)
    found, shown = trace(tmp_path, "train-sft", "--model", small, *machine)
    assert not found["fits"]
    assert "memory: DOES NOT FIT into 20.06 GiB" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train-sft", "--gpu", "V100"], "--gpu: expected one of A100 40GB, "),
        (["train-sft", "--gpus", "12"], "--gpus: expected 1 to 8, or a multiple of 8; got 12"),
        (["train-dpo"], "trace train-dpo: no such program; there are train-sft, "),
        (["evaluate", "--dtype", "float32"], "--dtype: expected auto or bfloat16"),
        (["evaluate", "--completions", "x.jsonl"], "--completions: expected nothing"),
        (["evaluate", "--export-prompts", "x.jsonl"], "--export-prompts: expected nothing"),
        (["train-sft", "--save", "none/x.json"], "--save: expected a file in a folder"),
        (["train-sft", "--model", "out/mine"], "out/mine: no such file or folder"),
        (["train-sft", "--model", "MODEL", "--data", "data/mine.jsonl"], "a model folder needs"),
        (["train-sft", "--max-length", "8192", "--max-position-embeddings", "1000"],
         "--max-length: rows of 8192 tokens would be let in, but the model's context is 1000"),
        (["train-sft", "--model", "MODEL", "--save", "MODEL/config.json"], "would overwrite "),
        (["train-sft", "--max-length", "64"], "no row is left to train on (77629 prompt and"),
        (["evaluate", "--benchmark", "mine.jsonl"], "mine.jsonl: no such benchmark or file"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(arguments, said, small):
    arguments = [argument.replace("MODEL", str(small)) for argument in arguments]
    status, _, errors = run_command("-m", "redi", "trace", *arguments)
    assert status == 2
    [line] = errors.splitlines()
    assert said in line


@needs_fake
@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"num_attention_heads": 128, "num_key_value_heads": 8}, ["train-sft"], "head size 12; "),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, ["train-sft"], "head size 512; "),
        ({"max_position_embeddings": 120}, ["evaluate"], "leaves no room for an answer"),
        ({}, ["evaluate", "--cache-gib", "0.0001"], "GiB for keys and values are too few"),
        (
            {"intermediate_size": 2_000_000},
            ["evaluate", "--gpu", "RTX 4090"],
            "but the weights take",
        ),
    ],
)
def test_a_model_that_cannot_be_traced_ends_in_one_line(changes, arguments, said, small):
    (small / "config.json").write_text(json.dumps(SMALL | changes))
    status, _, errors = run_command("-m", "redi", "trace", *arguments, "--model", small)
    assert status == 2
    [line] = errors.splitlines()
    assert said in line


def test_a_compiler_that_fails_ends_in_one_line(tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'guard.cpp:1: error: no C++20' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    code = "from redi.trace import guard\nfrom redi.config import program\nprogram(guard.load)()"
    status, _, errors = run_command("-c", code, PATH=tmp_path, XDG_CACHE_HOME=tmp_path)
    assert status == 2
    [line] = errors.splitlines()
    assert "g++ cannot compile guard.cpp" in line
    assert line.endswith("error: no C++20")


def test_an_untested_torch_ends_in_one_line_that_names_those_tested():
    code = (
        "import sys, torch; torch.__version__ = '2.99.0'; sys.argv = ['redi trace', 'train-sft']\n"
        "from redi.trace.__main__ import main; main()"
    )
    status, _, errors = run_command("-c", code)
    assert status == 2
    [line] = errors.splitlines()
    assert line.endswith(f"is tested with torch {', '.join(TESTED)}, not 2.99")


# ---------------------------------------------------------------- slow


@needs_fake
@pytest.mark.slow
def test_eight_ranks_share_the_bytes_of_the_update(small, tmp_path):
    def of_update(gpus):
        found, _ = trace(tmp_path, "train-sft", "--model", small, "--gpus", gpus)
        return found["traced_step"]["kinds"]["clip and AdamW"]["bytes"]

    assert 8 * of_update(8) == pytest.approx(of_update(1), rel=0.02)


@needs_fake
@pytest.mark.slow
@pytest.mark.parametrize("program", ["train-sft", "train-redi"])
def test_the_published_run_fits_one_gpu_of_24_gb_with_offload_and_not_without(program, tmp_path):
    machine = ("--gpu", "RTX 4090", "--gpus", 1)
    found, _ = trace(tmp_path, program, *machine, "--offload")
    assert found["fits"]
    assert 0.85 <= found["peak_gib"] / found["formula_gib"] <= 1.0
    without, shown = trace(tmp_path, program, *machine)
    assert without["peak_gib"] > 24
    assert "DOES NOT FIT" in shown


@needs_fake
@pytest.mark.slow
@pytest.mark.parametrize("program", ["train-sft", "train-redi"])
@pytest.mark.parametrize("machine", [("A100", 8), ("H200", 1)])
def test_the_published_run_is_within_15_percent_of_the_formula(program, machine, tmp_path):
    gpu, gpus = machine
    found, _ = trace(tmp_path, program, "--gpu", gpu, "--gpus", gpus)
    assert found["counted_flops"] == pytest.approx(found["model_flops"], rel=1e-9)
    assert 0.85 <= found["peak_gib"] / found["formula_gib"] <= 1.0
    assert found["peak_gib"] < find_gpu(gpu).memory_gib
