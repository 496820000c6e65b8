"""Activation checkpointing changes memory and nothing else, and is chosen by what memory allows.
FLOPs are counted by document."""

import pytest
import torch
from small_step import backward, data_of, gradients, tiny

from redi import memory
from redi.distributed import Parallelism, World, parallelize
from redi.logprobs import CHUNK_BYTES
from redi.memory import blocks_to_checkpoint, saved_bytes_per_token, step_memory
from redi.model import ModelConfig, Transformer
from redi.monitor import peak_flops, training_flops

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
QWEN = ModelConfig(
    vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
    num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=32_768,
)  # fmt: skip


def loss_and_gradients(how: Parallelism, pack_tokens: int = 40) -> tuple[float, dict]:
    model = tiny(True, torch.float32)
    parallelize(model, WORLD, how)
    return backward(model, data_of("redi", pack_tokens=pack_tokens)), gradients(model)


def assert_as_plain(how: Parallelism, within: float) -> None:
    """Loss and gradients are those without checkpointing and compilation."""
    found, (loss, expected) = loss_and_gradients(how), loss_and_gradients(Parallelism())
    assert found[0] == pytest.approx(loss, rel=within, abs=0)
    assert found[1].keys() == expected.keys()  # the names in a checkpoint are unchanged
    for name, gradient in expected.items():
        torch.testing.assert_close(found[1][name], gradient, rtol=10 * within, atol=within)


@pytest.mark.parametrize("checkpointed", [1, 2])  # of 2 blocks
def test_checkpointed_blocks_give_the_same_bits(checkpointed):
    assert_as_plain(Parallelism(checkpointed=checkpointed), within=0)


def test_a_checkpointed_block_saves_only_what_goes_in():
    model, saved = tiny(True, torch.float32), []
    parallelize(model, WORLD, Parallelism(checkpointed=1))
    x, cos = torch.ones(6, 16, requires_grad=True), torch.ones(6, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.model.layers[0](x, cos, cos, lambda q, k, v: q)
    assert sum(t.numel() for t in saved) <= x.numel() + 2 * cos.numel()


@pytest.fixture(scope="module")
def qwen() -> Transformer:
    with torch.device("meta"):
        return Transformer(QWEN)


@pytest.mark.parametrize(
    ("gib", "least", "most", "fits"),
    [
        (36, 28, 28, "more than 30.600 GiB (85% of memory)"),
        (40, 27, 27, "within 34.000 GiB (85% of memory)"),
        (80, 10, 26, "within 68.000 GiB (85% of memory)"),
        (130, 1, 9, "within 110.500 GiB (85% of memory)"),
        (400, 0, 0, "within 340.000 GiB (85% of memory)"),
    ],
)
def test_auto_checkpoints_as_few_blocks_as_memory_allows_and_its_table_adds_up(
    qwen, monkeypatch, gib, least, most, fits
):
    monkeypatch.setattr(memory, "total_memory", lambda world: gib << 30)
    needs = step_memory(qwen, 32_768, WORLD, torch.bfloat16)
    count = blocks_to_checkpoint("auto", needs)
    assert least <= count <= most
    assert count == 28 or needs.total(count) <= needs.planned
    assert count in (0, 28) or needs.total(count - 1) > needs.planned
    title, _, *lines = needs.describe(count).splitlines()
    assert f"{count} of 28 blocks" in title
    *parts, total = [float(line.split()[0]) for line in lines]
    assert total == pytest.approx(sum(parts), abs=0.01)
    assert total == pytest.approx(needs.total(count) / 2**30, abs=0.001)
    assert fits in lines[-1]


def test_bytes_of_a_step_of_the_published_model_by_hand(qwen):
    n, t, d, saved = 1_543_714_304, 32_768, 1536, saved_bytes_per_token(QWEN, torch.bfloat16, "cpu")
    inputs = 28 * t * d * 2
    # Head: a chunk (32 MiB on a CPU), dW in fp32, five (T, D). Backward: two (T, I + D) in
    # bf16, and the tied weight's gradient.
    head = CHUNK_BYTES["cpu"] + 4 * 151_936 * d + 5 * 4 * t * d
    backward = 2 * (2 * t * (8960 + d) + 151_936 * d)
    alone = 12 * n + 4 * n + 2 * n + inputs + max(head, backward)
    one = step_memory(qwen, t, WORLD, torch.bfloat16)
    assert one.total(checkpointed=28) == pytest.approx(alone + t * saved)
    assert one.total(checkpointed=27) == one.total(checkpointed=28)
    assert one.total(checkpointed=20) == pytest.approx(alone + 8 * t * saved)
    two_nodes = World(3, 16, CPU, 8)
    many = step_memory(qwen, t, two_nodes, torch.bfloat16)
    assert many.total(28) == pytest.approx(alone - 12 * n * 15 / 16 + t * saved)
    # One process in fp32 has no second copy of the weights.
    in_fp32 = [step_memory(qwen, t, world, torch.float32).fixed for world in (WORLD, two_nodes)]
    copies = [fixed.get("whole weights in the compute dtype") for fixed in in_fp32]
    assert copies == [None, 4 * n]


def test_with_offload_the_gpu_holds_no_moments_and_the_host_16_bytes_per_parameter_and_more(
    qwen, monkeypatch
):
    monkeypatch.setattr(memory, "total_memory", lambda world: 24 << 30)
    n, world = sum(p.numel() for p in qwen.parameters()), World(0, 4, torch.device("cuda", 0), 4)
    plain, offloaded = (
        step_memory(qwen, 32_768, world, torch.bfloat16, offload) for offload in (False, True)
    )
    assert plain.total(28) - offloaded.total(28) == 12 * n // 4
    assert plain.host == 0
    # Of 4 ranks. Weights and gradients are pinned, in blocks of a power of two.
    assert 16 * n / 4 < offloaded.host < 24 * n / 4
    [line] = [line for line in offloaded.describe(28).splitlines() if "in host memory" in line]
    assert line.split()[0] == f"{offloaded.host / 2**30:.3f}"
    assert "in host memory" not in plain.describe(28)


@pytest.mark.parametrize(("setting", "count"), [("all", 28), ("none", 0), (0, 0), (7, 7), (99, 28)])
def test_a_setting_is_all_none_or_at_most_a_number_of_blocks(qwen, setting, count):
    needs = step_memory(qwen, 100, WORLD, torch.bfloat16)
    assert blocks_to_checkpoint(setting, needs) == count


def test_flops_of_the_published_model_by_hand_with_attention_by_document():
    # Weights of a block: q and o 1536^2 each, k and v 1536 * 256 each, MLP 3 * 1536 * 8960.
    block = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960
    head = 151_936 * 1536
    # Scores and their use, forward: 2 matmuls of 2 * L^2 / 2 * (12 * 128); backward twice that.
    attention = 28 * 3 * 2 * 8192**2 * 1536
    expected = 6 * (28 * block + head) * 8192 + attention
    assert training_flops(QWEN, [8192], 8192) == pytest.approx(expected)
    assert expected / 8192 == pytest.approx(11.4e9, rel=0.01)
    whole = training_flops(QWEN, [4096], 4096)
    cut = training_flops(QWEN, [1024] * 4, 4096)
    # Four quarters do a quarter of the attention.
    assert whole - cut == pytest.approx(6 * 28 * 1536 * (4096**2 - 4 * 1024**2))


def test_the_peak_is_that_of_the_variant_and_unknown_for_a_cpu(monkeypatch):
    peaks = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "GeForce RTX 3090": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(CPU) is None
