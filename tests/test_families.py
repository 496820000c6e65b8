"""The model families that redi/model.py builds from the facts of config.json, against transformers:
what they compute and learn, what they write with a cache, and what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redi.checkpoint.folder import load_model, save_model
from redi.checkpoint.weights import stored_tensors, weight_files
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.logprobs import reference_token_logps
from redi.packing import TokenSequence, pack

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {  # name -> transformers' class, changes of its configuration; ... removes a field
    "Qwen2.5": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Qwen3, untied": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "Llama 3.2": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "SmolLM2": ("Llama", {"head_dim": ..., "num_attention_heads": 6, "hidden_size": 48}),
}
LENGTHS = [7, 1, 60, 3]  # 60 is beyond the original context of the scaling
DOCUMENTS = [np.random.default_rng(seed).integers(0, 320, n) for seed, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, save_model_of, tmp_path_factory):
    """(the folder, transformers' model, ours)"""
    name, changes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    theirs = save_model_of(name, folder, **changes)
    return folder, theirs, load_model(folder)[0]


def batch_of(parts: list[np.ndarray]):
    """A pack in which all tokens but the first of each document are learned."""
    sequences = [TokenSequence(part, prompt_length=1, row=0, sign=1) for part in parts]
    return pack(sequences, torch.zeros(len(parts)))


def test_logits_equal_transformers_packed_and_alone(family):
    _, theirs, ours = family
    alone = [theirs(torch.from_numpy(part)[None]).logits[0] for part in DOCUMENTS]
    for parts, expected in [(DOCUMENTS, torch.cat(alone)), *zip([[d] for d in DOCUMENTS], alone)]:
        batch = batch_of(parts)
        batch = replace(batch, rows=torch.arange(len(batch.tokens)))
        logits = ours(batch, lambda hidden, weight: hidden @ weight.T)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_gradients_of_an_sft_step_equal_transformers(family):
    _, theirs, ours = family
    theirs.zero_grad()
    for part in DOCUMENTS:
        tokens = torch.from_numpy(part)
        logits = theirs(tokens[None]).logits[0]
        F.cross_entropy(logits[:-1], tokens[1:], reduction="sum").backward()
    ours.zero_grad()
    batch = batch_of(DOCUMENTS)
    (-ours(batch, lambda h, w: reference_token_logps(h, w, batch.targets)).sum()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_greedy_answers_to_ragged_prompts_equal_transformers(family):
    _, theirs, ours = family
    lengths = (1, 2, 5, 5, 9, 17, 30, 44)
    prompts = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in lengths]
    requests = [Request(key, tuple(prompt), 24) for key, prompt in enumerate(prompts)]
    found = generate(ours, requests, [], Sampling(temperature=0.0), slots=3)
    answers = {one.key: one.token_ids for one in found}
    for key, prompt in enumerate(prompts):
        whole = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answers[key] == whole[0, len(prompt) :].tolist()


def test_a_saved_model_is_the_same_in_transformers_with_its_rotation(family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, theirs, ours = family
    save_model(ours, tmp_path, load_model(folder)[1])
    stored = {name: tensor[:] for name, tensor in stored_tensors(weight_files(tmp_path))}
    for name, weight in theirs.state_dict().items():
        if not (theirs.config.tie_word_embeddings and name == "lm_head.weight"):
            assert torch.equal(stored[name], weight), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == theirs.config.rope_parameters
    tokens = torch.from_numpy(DOCUMENTS[2])[None]
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_an_older_configuration_with_a_scaling_is_read_as_transformers_reads_it(
    save_model_of, tmp_path
):
    """`rope_scaling` beside `rope_theta`, as in the folders of Llama 3.2."""
    from transformers import LlamaForCausalLM

    save_model_of("Llama", tmp_path, rope_parameters=LLAMA3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    path.write_text(json.dumps(config))
    assert_logits_are_those_of(LlamaForCausalLM.from_pretrained(tmp_path), tmp_path)


def test_a_qwen3_configuration_without_head_dim_means_128(save_model_of, tmp_path):
    from transformers import Qwen3ForCausalLM

    save_model_of("Qwen3", tmp_path, head_dim=...)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("head_dim") == 128 != config["hidden_size"] // config["num_attention_heads"]
    path.write_text(json.dumps(config))
    assert_logits_are_those_of(Qwen3ForCausalLM.from_pretrained(tmp_path), tmp_path)


def assert_logits_are_those_of(theirs, folder: Path) -> None:
    """Those of transformers' model equal those of the model that we load from the folder."""
    batch = replace(batch_of([DOCUMENTS[2]]), rows=torch.arange(60))
    logits = load_model(folder)[0](batch, lambda hidden, weight: hidden @ weight.T)
    expected = theirs(torch.from_numpy(DOCUMENTS[2])[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
