"""redi/model.py and redi/attention.py against transformers' Qwen2 and a dense block mask."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import redi.attention
from redi.attention import packed_attention
from redi.checkpoint.config_json import read_config
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.logprobs import reference_token_logps
from redi.packing import PackedBatch, TokenSequence, pack

LENGTHS = [7, 1, 12, 3]
DOCUMENTS = [np.random.default_rng(seed).integers(0, 320, n) for seed, n in enumerate(LENGTHS)]


def packed(parts: list[np.ndarray]) -> PackedBatch:
    sequences = [TokenSequence(part, prompt_length=1, row=0, sign=1) for part in parts]
    return pack(sequences, torch.zeros(len(parts)))


@torch.no_grad()
def assert_same_logits(model, theirs, parts: list[np.ndarray]) -> None:
    batch = packed(parts)
    batch = replace(batch, rows=torch.arange(len(batch.tokens)))
    logits = model(batch, lambda hidden, weight: hidden @ weight.T)  # (T, V)
    # With a cache, transformers ignores the positions, and documents attend to each other.
    tokens, positions = batch.tokens[None], batch.positions[None]
    expected = theirs(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("theta", [10_000.0, 300_000.0])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(save_qwen2, tmp_path, tied, heads, head_dim, theta):
    theirs = save_qwen2(
        tmp_path,
        tie_word_embeddings=tied,
        num_attention_heads=heads,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=1e-3,  # no default, which would hide one that is not read
    )
    model, _ = load_model(tmp_path)
    for parts in (DOCUMENTS, *([part] for part in DOCUMENTS)):
        assert_same_logits(model, theirs, parts)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_transformers_names_and_gradients(save_qwen2, tmp_path, tied):
    theirs = save_qwen2(tmp_path, tie_word_embeddings=tied)
    model, _ = load_model(tmp_path)
    tokens = DOCUMENTS[2]
    logits = theirs(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    F.cross_entropy(logits[:-1], torch.from_numpy(tokens)[1:], reduction="sum").backward()
    batch = packed([tokens])
    (-model(batch, lambda h, w: reference_token_logps(h, w, batch.targets)).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


# ---------------------------------------------------------------- configurations

THETA = {"rope_theta": 10_000.0}
LLAMA3 = {
    **THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
REFUSED = [  # the field that the message names, and changes of config.json; ... removes a field
    ("model_type", {"model_type": "mistral"}),
    ("model_type", {"model_type": ...}),
    ("rope_type", {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope_type", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("rope_theta", {"rope_scaling": {"rope_theta": 1e6, "rope_type": "default"}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}),
    ("use_sliding_window", {"use_sliding_window": True, "sliding_window": 64}),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("attention_bias", {"model_type": "llama", "attention_bias": True}),
    ("mlp_bias", {"model_type": "llama", "mlp_bias": True}),
    ("factor", {"rope_parameters": {**THETA, "rope_type": "llama3"}}),
    ("attention_dropout", {"attention_dropout": 0.1}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("rope_theta", {"rope_theta": 1e6, "rope_parameters": {**THETA, "rope_type": "default"}}),
    ("rope_theta", {"rope_parameters": {"rope_type": "default"}}),
    ("rope_theta", {"rope_parameters": ...}),
    ("hidden_size", {"hidden_size": "large"}),
    ("is_causal", {"is_causal": False}),
    (
        "original_max_position_embeddings",
        {"original_max_position_embeddings": 64, "rope_parameters": LLAMA3},
    ),
    ("full_attention", {"rope_parameters": {"full_attention": {**THETA, "rope_type": "default"}}}),
    ("head_dim", {"head_dim": 15}),
    ("head_dim", {"head_dim": None, "num_attention_heads": 32, "num_key_value_heads": 32}),
    ("key/value heads", {"num_attention_heads": 4, "num_key_value_heads": 3}),
]
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def changed_config(folder, **changes) -> dict:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(
    ("field", "changes"), [*REFUSED, *((field, {field: ...}) for field in REQUIRED)]
)
def test_a_configuration_that_is_not_built_is_refused_by_name(save_qwen2, tmp_path, field, changes):
    save_qwen2(tmp_path)
    with pytest.raises(UserError, match=rf"\Ahere/config.json: .*{field}.*\Z"):
        read_config(changed_config(tmp_path, **changes), "here/config.json")


def test_an_older_configuration_is_read_as_transformers_reads_it(save_qwen2, tmp_path):
    from transformers import Qwen2ForCausalLM

    save_qwen2(tmp_path, num_attention_heads=2, num_key_value_heads=1)
    newer = dict.fromkeys(("rope_parameters", "dtype", "layer_types", "head_dim"), ...)
    older = {
        "rope_theta": 300_000.0, "rope_scaling": None, "torch_dtype": "float32",
        "use_sliding_window": False, "sliding_window": 4096,
    }  # fmt: skip
    config = changed_config(tmp_path, **newer, **older)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, (model, _) = Qwen2ForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    assert_same_logits(model, theirs, DOCUMENTS)


# ---------------------------------------------------------------- attention


def dense_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """The definition: every score, a block mask, softmax. q (T, H, d), k, v (T, K, d)."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    token = torch.arange(len(query))
    seen = (document[:, None] == document) & (token[:, None] >= token)  # (T, T)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_heads(heads: int, kv_heads: int, lengths: list[int], dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, 16) for count in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return [tensor.requires_grad_() for tensor in tensors], cu_seqlens


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1, 1], [33]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (6, 1)])
def test_attention_equals_a_dense_block_mask(heads, kv_heads, lengths):
    tensors, cu_seqlens = random_heads(heads, kv_heads, lengths)
    ours = packed_attention(*tensors, cu_seqlens, lengths)
    expected = dense_attention(*tensors, lengths)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad(ours, tensors, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors, upstream)):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that claims to be on a GPU."""

    is_cuda = True


grouped = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])


@grouped
def test_fp32_on_a_gpu_takes_a_kernel_whose_memory_is_linear(monkeypatch, heads, kv_heads):
    """Torch's fused kernels for fp32 need as many key heads as query heads, and no enable_gqa."""
    fused = F.scaled_dot_product_attention

    def equal_heads(query, key, value, is_causal, enable_gqa):
        assert query.shape == key.shape == value.shape
        assert not enable_gqa
        return fused(query, key, value, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", equal_heads)
    tensors, cu_seqlens = random_heads(heads, kv_heads, LENGTHS)
    ours = packed_attention(*(t.as_subclass(OnCuda) for t in tensors), cu_seqlens, LENGTHS)
    expected = dense_attention(*tensors, LENGTHS)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), expected, atol=1e-12, rtol=0)


def newer_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    """As in torch 2.12: it groups the query heads itself, if enable_gqa is set."""
    lengths = cu_seq_q.diff().tolist()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(lengths)
    assert window_size == (-1, 0)  # causal
    return dense_attention(query, key, value, lengths)


def older_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    """As in torch 2.11: as many key heads as query heads."""
    lengths = cu_seq_q, cu_seq_k, max_q, max_k
    return newer_varlen_attn(query, key, value, *lengths, window_size=window_size)


@grouped
@pytest.mark.parametrize("varlen_attn", [newer_varlen_attn, older_varlen_attn])
def test_the_fast_path_calls_either_form_of_varlen_attn(monkeypatch, varlen_attn, heads, kv_heads):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(redi.attention, "takes_gqa", redi.attention.takes_gqa.__wrapped__)
    tensors, cu_seqlens = random_heads(heads, kv_heads, LENGTHS)
    ours = redi.attention._varlen(*tensors, cu_seqlens, max(LENGTHS))
    expected = dense_attention(*tensors, LENGTHS)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@grouped
def test_the_two_paths_agree_on_a_gpu(heads, kv_heads):
    lengths = [257, 1, 64, 130]
    tensors, cu_seqlens = random_heads(heads, kv_heads, lengths, torch.float32)
    low = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in tensors]
    wide = [t.detach().cpu().double().requires_grad_() for t in low]
    fast = packed_attention(*low, cu_seqlens.cuda(), lengths)
    expected = dense_attention(*wide, lengths)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(fast, low, upstream.cuda())
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for got, want in zip((fast, *gradients), (expected, *wanted)):
        error = (got.cpu().double() - want).norm() / want.norm()
        assert error < 2**-7  # bf16 has 8 bits
