"""Real weights, vocabularies and templates against transformers, where the environment names them:

    REDI_REAL_MODELS=FOLDER python -m pytest -m slow tests/test_real_models.py

FOLDER holds Hugging Face model folders. Every test runs on each of them, in fp32 on the CPU.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import assistant, user

from redi.checkpoint.folder import load_model, save_model
from redi.checkpoint.weights import stored_tensors, weight_files
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.objectives import Totals, make_objective, sft
from redi.packing import TokenSequence, pack

FOLDERS = sorted(
    path.parent
    for path in Path(os.environ.get("REDI_REAL_MODELS", "/dev/null")).glob("*/config.json")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDERS, reason="REDI_REAL_MODELS names no folder of models"),
]
QUESTIONS = [
    f"{task} {thing}?"
    for task in ("What is", "Write a haiku about", "Who invented", "Explain in one sentence")
    for thing in ("a prime", "rain", "the zip", "tea", "snow", "12*12", "a loop", "the moon")
]
ANSWERS = ["<think>\n2 and 3 make 5.\n</think>\n\nIt is 5.", "It is 6, for sure.", "5"]
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def models(request):
    """(folder, transformers' model and tokenizer, our model and its source)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32).eval()
    # It drops the gradient of one token's embedding; SmolLM2 ends every turn with that token.
    theirs.model.embed_tokens.padding_idx = None
    tokenizer = AutoTokenizer.from_pretrained(request.param)
    return request.param, theirs, tokenizer, *load_model(request.param)


def test_rows_and_prompts_have_transformers_tokens(models):
    _, _, tokenizer, _, source = models
    turns = [user("2+3?"), assistant(ANSWERS[0]), user("Sure?"), assistant(ANSWERS[2])]
    for messages in (turns[:2], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        [row] = source.chat.encode_rows([(messages[:-1], messages[-1])])
        ids = row.prompt_ids + row.response_ids
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"][: len(ids)]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert row.prompt_ids == source.chat.encode_prompt(messages[:-1]) == prompt["input_ids"]


@torch.no_grad()
def test_logits_equal_transformers(models):
    _, theirs, _, ours, source = models
    ids = source.chat.encode_prompt([user(" ".join(QUESTIONS))])
    tokens = torch.tensor(ids)
    batch = pack([TokenSequence(tokens.numpy(), 1, row=0, sign=1)], torch.zeros(1))
    logits = ours(replace(batch, rows=torch.arange(len(ids))), lambda h, w: h @ w.T)
    expected = theirs(tokens[None]).logits[0]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_greedy_answers_equal_transformers(models):
    _, theirs, tokenizer, ours, source = models
    prompts = [source.chat.encode_prompt([user(question)]) for question in QUESTIONS]
    requests = [Request(key, tuple(ids), NEW_TOKENS) for key, ids in enumerate(prompts)]
    found = generate(ours, requests, source.stop_ids, Sampling(temperature=0.0), slots=32)
    answers = {one.key: source.chat.decode(one.token_ids) for one in found}
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    whole = theirs.generate(
        **padded,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=source.stop_ids,
    )
    for key, row in enumerate(whole[:, padded["input_ids"].shape[1] :].tolist()):
        ends = [i for i, token in enumerate(row) if token in source.stop_ids]
        assert answers[key] == tokenizer.decode(row[: min(ends, default=len(row))])


def test_a_saved_model_has_the_same_bits(models, tmp_path):
    folder, _, _, ours, source = models
    save_model(ours, tmp_path, source)
    before, after = (
        {name: tensor[:] for name, tensor in stored_tensors(weight_files(path))}
        for path in (folder, tmp_path)
    )
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_gradients_of_a_step_equal_autograd_through_transformers(models, alpha):
    """Stage 1 on four rows, or stage 2 on two pairs of them, from all logits."""
    _, theirs, _, ours, source = models
    rows = source.chat.encode_rows(
        [([user(question)], assistant(text)) for question in QUESTIONS[:2] for text in ANSWERS[:2]]
    )
    signs = [1, 1, 1, 1] if alpha is None else [1, -1, 1, -1]
    num_tokens = sum(len(row.response_ids) for row in rows)
    loss = 0.0
    for row, sign in zip(rows, signs):
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        logps = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        logps = logps[len(row.prompt_ids) - 1 :]
        if alpha is None:
            loss = loss - logps.sum() / num_tokens
        else:
            loss = loss + (-1 if sign > 0 else alpha) * logps.mean() / 2
    theirs.zero_grad()
    loss.backward()

    objective = sft() if alpha is None else make_objective("redi", alpha=alpha)
    totals = Totals(num_pairs=2, num_tokens=num_tokens)
    sequences = [
        TokenSequence(
            np.array(row.prompt_ids + row.response_ids), len(row.prompt_ids), number, sign
        )
        for number, (row, sign) in enumerate(zip(rows, signs))
    ]
    lengths = torch.tensor([len(row.response_ids) for row in rows])
    weights = objective.sequence_weights(torch.tensor(signs), lengths, totals)
    ours.zero_grad()
    result = objective.loss(ours, pack(sequences, weights))
    result.loss.backward()

    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * norm, name
