"""The training loop against a plain one, what it logs, and the rows it trains on.

    python -m pytest tests/test_train.py

The model is a random Qwen2 of two layers, the data one-line arithmetic problems. Losses are checked
against transformers, which runs every row alone; the optimizer against a loop written here.
"""

import math
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_run import (
    HERE,
    PAIRS,
    Oracle,
    conversation,
    loaded,
    read_jsonl,
    redi_config,
    refusal,
    run,
    sft_config,
    steps,
    write_jsonl,
)
from small_step import backward
from torch.distributed import fsdp

from redi import train
from redi.checkpoint.folder import load_model
from redi.checkpoint.resume import Checkpoints, load_weights
from redi.data.dataset import Dataset, describe, select
from redi.data.store import load_store
from redi.data.tokenizer import ChatTokenizer, TokenizedRow
from redi.monitor import training_flops
from redi.runlog import RunLog, read_metrics

DPO = {"objective": "dpo", "beta": 0.1}


def test_offload_is_what_fsdp_is_asked_for_and_nothing_else_changes(here, monkeypatch):
    policy = Mock(wraps=fsdp.CPUOffloadPolicy)
    monkeypatch.setattr(fsdp, "CPUOffloadPolicy", policy)
    plain = losses_and_norms(run(sft_config(out="plain")))
    assert not policy.called
    assert losses_and_norms(run(sft_config(offload=True))) == plain
    policy.assert_called_once_with(pin_memory=False)  # there is no GPU


def losses_and_norms(records: list[dict]) -> list[tuple]:
    return [(r["loss"], r["grad_norm"], r["update_norm"]) for r in steps(records)]


# ---------------------------------------------------------------- transformers as the oracle


def test_first_step_of_sft_has_the_loss_and_gradient_norm_of_transformers(here):
    [record] = steps(run(sft_config(rows_per_step=PAIRS)))
    oracle = Oracle("student")  # loaded after the run, which must leave it as it was
    rows = read_jsonl("positives.jsonl")
    loss = -torch.cat([oracle.logps(row, "completion") for row in rows]).mean()
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(oracle.gradient_norm(), rel=1e-5)


@pytest.mark.parametrize("pack_tokens", [10_000, 1])
def test_first_step_of_redi_has_the_loss_and_gradient_norm_of_transformers(here, pack_tokens):
    [record] = steps(run(redi_config(rows_per_step=PAIRS, pack_tokens=pack_tokens)))
    oracle = Oracle("student")
    rows = read_jsonl("pairs.jsonl")
    chosen, rejected = (
        torch.stack([oracle.logps(row, side).mean() for row in rows])
        for side in ("chosen", "rejected")
    )
    loss = (-chosen + 0.8 * rejected).mean()
    loss.backward()
    expected = {
        "loss": loss.item(),
        "grad_norm": oracle.gradient_norm(),
        "chosen_logp": chosen.mean().item(),
        "rejected_logp": rejected.mean().item(),
        "chosen_entropy": np.mean([oracle.entropy(row, "chosen") for row in rows]),
        "rejected_entropy": np.mean([oracle.entropy(row, "rejected") for row in rows]),
    }
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert record["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert record["ranked_right"] == (chosen > rejected).double().mean().item()


def test_the_held_out_loss_is_of_the_saved_model_and_the_dpo_reference_of_the_first(here):
    rows = [conversation(100 + number) for number in range(5)]
    write_jsonl(here / "held_out.jsonl", rows)
    dpo = redi_config(objective="dpo", beta=0.5, epochs=3, eval_data="held_out.jsonl", eval_every=4)
    records = run(dpo)
    # At first every pair's margin over the reference is 0, and -log sigmoid(0) = ln 2.
    assert steps(records)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluations = steps(records, "eval")
    assert [record["step"] for record in evaluations] == [4, 8, 9]  # every fourth, and the last
    start, end, gains = Oracle("student"), Oracle("run"), {}
    for field in ("chosen", "rejected"):
        now, before = ([model.logps(row, field) for row in rows] for model in (end, start))
        logp = np.mean([logps.mean().item() for logps in now])
        assert evaluations[-1][f"{field}_logp"] == pytest.approx(logp, rel=1e-5)
        gains[field] = [(a.sum() - b.sum()).item() for a, b in zip(now, before)]
    losses = np.log1p(np.exp(-0.5 * np.subtract(gains["chosen"], gains["rejected"])))
    assert evaluations[-1]["loss"] == pytest.approx(losses.mean(), rel=1e-5)


# ---------------------------------------------------------------- the optimizer and its schedule


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_training_equals_a_plain_loop_of_adamw_with_clipping(here, clip):
    config = redi_config(epochs=2, clip=clip, weight_decay=0.1, pack_tokens=60, seed=7)
    model, data = loaded(config)
    checkpoints = Checkpoints(Path(config.out), HERE, {}, keep=1)
    train.train(model, data, config, RunLog(config.out, config), checkpoints)

    plain, data = loaded(config)
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.999), eps=1e-8, foreach=False,
    )  # fmt: skip
    # 10 pairs, 4 per step, 2 epochs: 3 + 3 steps, W = 1.
    rates = [1e-3 * share for share in (1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0)]
    plans = [step for epoch in (0, 1) for step in data.plan(4, 7, epoch)]
    assert len(plans) == len(rates)
    norms = []
    for step, rate in zip(plans, rates):
        optimizer.zero_grad()
        backward(plain, data, step)
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in plain.parameters()))
        norms.append(norm)
        for parameter in plain.parameters():
            parameter.grad *= min(1.0, clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    assert min(norms) > 0.05  # so the smaller clip has an effect
    records = steps(list(read_metrics(Path("run"))))
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    for (name, one), two in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [{}, DPO], ids=["redi", "dpo"])
@pytest.mark.parametrize(("clip", "decay"), [(1.0, 0.0), (0.05, 10.0)])
def test_the_update_norm_is_that_of_the_difference_of_the_weights(here, changes, clip, decay):
    def flat() -> torch.Tensor:
        return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])

    settings = {"clip": clip, "weight_decay": decay, "lr": 1e-2, "save_every": 1, "keep": 9}
    records = steps(run(redi_config(epochs=2, **settings, **changes)))
    model, _ = load_model("student")
    before = flat()
    for record in records[:-1]:  # the last step has no checkpoint: the model is saved instead
        load_weights(Path(f"run/checkpoints/step-{record['step']:06d}"), model)
        after = flat()
        assert record["update_norm"] == pytest.approx((after - before).norm().item(), rel=2e-5)
        before = after
    assert records[-1]["lr"] == records[-1]["update_norm"] == 0.0


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        # 3 steps per epoch. A tenth of the steps, rounded up, is the warm-up: W = 2, 3, 1, ...
        ({"epochs": 4}, [1 / 2, 1, *((12 - k) / 10 for k in range(3, 13))]),
        ({"epochs": 8}, [1 / 3, 2 / 3, 1, *((24 - k) / 21 for k in range(4, 25))]),
        ({"epochs": 50, "max_steps": 10}, [(10 - k) / 9 for k in range(1, 11)]),
        ({"epochs": 50, "max_steps": 1}, [1]),
        ({"max_steps": 1000}, [1, 1 / 2, 0]),  # more than the data has
    ],
    ids=str,
)
def test_learning_rates_of_a_run_are_logged(here, changes, shares):
    records = steps(run(sft_config(lr=3e-3, **changes)))
    assert [record["lr"] for record in records] == pytest.approx([3e-3 * s for s in shares])
    assert [record["step"] for record in records] == list(range(1, len(shares) + 1))
    if len(shares) == 24:  # long enough to learn
        assert records[-1]["loss"] < 0.7 * records[0]["loss"]


# ---------------------------------------------------------------- what is logged and compared

EVAL = {"kind", "step", "loss", "chosen_logp"}
OF_STEPS = {"lr", "grad_norm", "update_norm", "chosen_entropy", "tokens", "memory_gib", "seconds"}
FIELDS = {"train": EVAL | OF_STEPS, "eval": EVAL, "finished": {"kind"}}
OF_PAIRS = {"rejected_logp", "margin", "ranked_right"}
MORE = {"train": OF_PAIRS | {"rejected_entropy"}, "eval": OF_PAIRS, "finished": set()}


@pytest.mark.parametrize(
    ("config", "sides"),
    [(sft_config, ["completion"]), (redi_config, ["chosen", "rejected"])],
    ids=["sft", "redi"],
)
def test_records_have_these_fields(here, config, sides):
    data = config().data
    records = run(config(eval_data=data))
    assert [record["kind"] for record in records] == ["train"] * 3 + ["eval", "finished"]
    for record in records:
        kind = record["kind"]
        assert set(record) == FIELDS[kind] | (MORE[kind] if len(sides) == 2 else set())
        assert all(record[name] < 0 for name in record if name.endswith("_logp"))
        assert 0 <= record.get("ranked_right", 0) <= 1
    # Prompt and response of every sequence, nothing padded, nothing twice.
    rendered = [rendering(row, side) for row in read_jsonl(data) for side in sides]
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rendered)
    assert sum(record["tokens"] for record in steps(records)) == tokens


def test_mfu_counts_the_output_weight_on_supervised_tokens_only(here, monkeypatch):
    peak = 1e9  # FLOP/s; a CPU has none
    monkeypatch.setattr(train.monitor, "peak_flops", lambda device: peak)
    config = sft_config(rows_per_step=PAIRS)
    [record] = steps(run(config))
    model, data = loaded(config)
    lengths = data.dataset.lengths
    supervised = int(data.dataset.response_lengths.sum())
    flops = training_flops(model.config, lengths.tolist(), supervised)  # see test_memory.py
    assert record["mfu"] * record["seconds"] * peak == pytest.approx(flops)


# ---------------------------------------------------------------- rows

ROWS = [conversation(number) for number in range(8)]
EQUAL = {**ROWS[1], "rejected": ROWS[1]["chosen"]}


def chat() -> ChatTokenizer:
    return ChatTokenizer.from_folder("student")


def rendering(row: dict, side: str) -> TokenizedRow:
    [rendered] = chat().encode_rows([(row["prompt"], row[side][0])])
    return rendered


def selected(rows: list[dict], prompt: int, response: int, both: int, **settings) -> Dataset:
    """These pairs from a token store, within these limits."""
    path = write_jsonl(Path("rows.jsonl"), rows)
    store = load_store([path], chat(), ["pairs"], Path("cache"))
    limits = {"max_prompt": prompt, "max_response": response, "max_length": both}
    return select(store, redi_config(**limits, **settings), "rows.jsonl")


def longer(row: dict, field: str, words: int = 30) -> dict:
    [turn] = row[field]
    return {**row, field: [{**turn, "content": turn["content"] + "a b c d " * words}]}


def test_stored_tokens_are_the_rendered_rows_that_are_left(here):
    rows = [longer(ROWS[0], "chosen"), ROWS[1], longer(ROWS[2], "prompt"), ROWS[3]]
    dataset = selected(rows, 90, 90, 200)
    assert dataset.rows.tolist() == [1, 3]
    for number in range(4):
        row, side = divmod(number, 2)
        rendered = rendering(rows[dataset.rows[row]], ("chosen", "rejected")[side])
        sequence = dataset.sequence(number)
        assert sequence.tokens.tolist() == rendered.prompt_ids + rendered.response_ids
        assert sequence.tokens[-1] == chat().stop_id
        assert sequence.prompt_length == len(rendered.prompt_ids)
        assert len(sequence.supervised()) == dataset.response_lengths[number]
        assert len(sequence.tokens) == dataset.lengths[row, side]
        assert (sequence.row, sequence.sign) == (row, 1 - 2 * side)


def test_rows_over_a_limit_are_dropped_and_counted_by_the_first_reason_or_named(here):
    rows = [
        ROWS[0],
        longer(ROWS[1], "prompt"),
        longer(ROWS[2], "rejected"),
        longer(ROWS[3], "chosen"),
        longer(longer(ROWS[1], "prompt"), "chosen"),  # counted once
        longer(longer(ROWS[2], "prompt", 6), "chosen", 6),  # only the sum is too long
    ]
    dataset = selected(rows, 90, 90, 100)
    assert dataset.dropped == {
        "prompt over 90 tokens": 2,
        "response over 90 tokens": 2,
        "prompt and response over 100 tokens": 1,
    }
    assert dataset.rows.tolist() == [0]
    rows = [ROWS[0], EQUAL, longer(ROWS[2], "chosen")]
    message = refusal(selected, rows, 90, 90, 200, over_length="error")
    assert re.search(r"rows.jsonl.*\b3\b.*response over 90 tokens", message)
    message = refusal(selected, rows, 1000, 3, 1000)
    assert "no row is left" in message
    assert "1 chosen equals rejected, 2 response over 3 tokens" in message


@pytest.mark.parametrize("limit", range(3), ids=["prompt", "response", "total"])
def test_limits_are_inclusive_and_the_stop_token_counts(here, limit):
    row = rendering(ROWS[0], "chosen")  # the longer one of the pair
    limits = [1000, 1000, 1000]
    both = len(row.prompt_ids) + len(row.response_ids)
    limits[limit] = [len(row.prompt_ids), len(row.response_ids), both][limit]
    assert len(selected(ROWS[:1], *limits, over_length="error")) == 1
    limits[limit] -= 1
    assert "no row is left" in refusal(selected, ROWS[:1], *limits)


def test_describe_states_rows_tokens_quantiles_and_what_was_left_out(here):
    dataset = selected([*ROWS, longer(ROWS[0], "chosen"), EQUAL], 90, 90, 200)
    lines = describe(dataset, chat()).splitlines()
    assert lines[0] == "8 pairs to train on, 2 left out"
    assert "  left out: 1 chosen equals rejected" in lines
    assert "  left out: 1 response over 90 tokens" in lines
    for side in ("chosen", "rejected"):
        [shown] = [line.split() for line in lines if line.startswith(side)]
        smallest, *_, largest = lengths = sorted(
            len(rendering(row, side).response_ids) for row in ROWS
        )
        # Of 8 values, half are no larger than the 4th; the other quantiles are the largest.
        numbers = sum(lengths), smallest, lengths[3], largest, largest, largest
        assert shown[1:] == [str(number) for number in numbers]
    prompt, *responses = lines[-3:]
    assert prompt.endswith("<|im_start|>assistant\\n'")
    for side, line in zip(("chosen", "rejected"), responses, strict=True):
        assert line == f"  {side:<9}| {chat().decode(rendering(ROWS[0], side).response_ids)!r}"
