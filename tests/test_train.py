"""The train loop against a plain one, what it logs, and the rows under it.

    python -m pytest tests/py

The model is a random Qwen2 with two layers, the data one-line arithmetic problems. Losses are
checked against transformers, which runs every row alone; the optimizer against a loop written
here.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_run import (
    HERE,
    PAIRS,
    Oracle,
    conversation,
    loaded,
    read_jsonl,
    redi_config,
    run,
    sft_config,
    steps,
    weights,
    write_jsonl,
)

from redi import distributed, train
from redi import run as run_module
from redi.batches import TrainData
from redi.checkpoint.folder import load_model
from redi.checkpoint.resume import Checkpoints, load_weights
from redi.config import UserError
from redi.data.dataset import Limits, describe, select
from redi.data.store import load_store
from redi.data.tokenizer import ChatTokenizer
from redi.objectives import sft
from redi.runlog import RunLog, read_metrics

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- a student and its rows


# ---------------------------------------------------------------- transformers as the oracle


def test_first_step_of_sft_has_the_loss_and_gradient_norm_of_transformers(here):
    [record] = steps(run(sft_config(rows_per_step=PAIRS)))
    oracle = Oracle("student")
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
    chosen = torch.stack([oracle.logps(row, "chosen").mean() for row in rows])
    rejected = torch.stack([oracle.logps(row, "rejected").mean() for row in rows])
    loss = (-chosen + 0.8 * rejected).mean()
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(oracle.gradient_norm(), rel=1e-5)
    assert record["chosen_logp"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert record["rejected_logp"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert record["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert record["ranked_right"] == (chosen > rejected).double().mean().item()
    for side in ("chosen", "rejected"):
        entropy = np.mean([oracle.entropy(row, side) for row in rows])
        assert record[f"{side}_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_held_out_loss_is_that_of_the_model_as_saved(here):
    rows = [conversation(100 + number) for number in range(5)]
    write_jsonl(here / "held_out.jsonl", rows)
    records = run(redi_config(eval_data="held_out.jsonl", eval_every=2, max_steps=3))
    evaluations = steps(records, "eval")
    assert [record["step"] for record in evaluations] == [2, 3]  # every second, and the last
    oracle = Oracle("run")
    losses = [
        -oracle.logps(row, "chosen").mean() + 0.8 * oracle.logps(row, "rejected").mean()
        for row in rows
    ]
    assert evaluations[-1]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


# ---------------------------------------------------------------- it learns


def test_sft_loss_falls(here):
    losses = [record["loss"] for record in steps(run(sft_config(lr=3e-3, epochs=8)))]
    assert losses[-1] < 0.7 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "symmetric"},
        {"objective": "dpo", "beta": 0.1},
        {"objective": "simpo", "beta": 2.0, "gamma": 1.0},
    ],
    ids=["redi", "symmetric", "dpo", "simpo"],
)
def test_stage_2_widens_the_margin(here, changes):
    records = steps(run(redi_config(rows_per_step=PAIRS, epochs=8, **changes)))
    margins = [record["margin"] for record in records]
    losses = [record["loss"] for record in records]
    assert margins[-1] > margins[0] + 0.1
    assert losses[-1] < losses[0]


def test_dpo_begins_at_ln_2(here):
    # Every pair's margin over the reference is 0, and -log sigmoid(0) = ln 2.
    [record] = steps(run(redi_config(objective="dpo", beta=0.1, max_steps=1)))
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_dpo_reference_is_the_model_that_training_starts_from(here):
    records = run(
        redi_config(objective="dpo", beta=0.5, epochs=3, eval_data="pairs.jsonl", eval_every=9)
    )
    start, end = Oracle("student"), Oracle("run")
    losses = []
    for row in read_jsonl("pairs.jsonl"):
        gain = {
            field: (end.logps(row, field).sum() - start.logps(row, field).sum()).item()
            for field in ("chosen", "rejected")
        }
        losses.append(math.log1p(math.exp(-0.5 * (gain["chosen"] - gain["rejected"]))))
    assert steps(records, "eval")[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_with_alpha_0_rejected_traces_teach_nothing_but_are_logged(here):
    first = steps(run(redi_config(alpha=0.0, out="one")))
    rows = read_jsonl("pairs.jsonl")
    for row in rows:  # the same number of tokens, other ones
        row["rejected"][0]["content"] = row["rejected"][0]["content"].replace("boxed", "dexob")
    Path("pairs.jsonl").unlink()
    write_jsonl(here / "pairs.jsonl", rows)
    second = steps(run(redi_config(alpha=0.0, out="two")))
    assert first[0]["rejected_logp"] != second[0]["rejected_logp"]
    for one, two in zip(first, second):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["chosen_logp"] == pytest.approx(two["chosen_logp"], rel=1e-6)
    for name, tensor in weights("one").items():
        # Adam divides a gradient that is all rounding by its own size: hence not bitwise.
        assert (tensor - weights("two")[name]).abs().max() < 1e-4


# ---------------------------------------------------------------- the optimizer and its schedule


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_training_equals_a_plain_loop_of_adamw_with_clipping(here, clip):
    config = redi_config(epochs=2, clip=clip, weight_decay=0.1, pack_tokens=60)
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
    plans = [step for epoch in (0, 1) for step in data.plan(4, config.seed, epoch)]
    assert len(plans) == len(rates)
    norms = []
    for step, rate in zip(plans, rates):
        optimizer.zero_grad()
        totals = data.totals(step)
        for batch in data.batches(step, totals):
            data.loss(plain, batch, totals).loss.backward()
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in plain.parameters()))
        norms.append(norm)
        for parameter in plain.parameters():
            parameter.grad *= min(1.0, clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    assert min(norms) > 0.05  # so the smaller clip is one
    records = steps(list(read_metrics(Path("run"))))
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    for (name, one), two in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [{}, {"objective": "dpo", "beta": 0.1}], ids=["redi", "dpo"])
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
    ("total", "shares"),
    [
        (1, [1]),
        (2, [1, 0]),
        (5, [1, 3 / 4, 2 / 4, 1 / 4, 0]),  # W = 1: k/1, then (5 - k)/4
        (11, [1 / 2, 1, *((11 - k) / 9 for k in range(3, 12))]),  # W = ceil(1.1) = 2
    ],
)
def test_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_to_0(total, shares):
    assert [train.lr_factor(k, total) for k in range(1, total + 1)] == pytest.approx(shares)


@pytest.mark.parametrize("total", [10, 70, 100, 110, 1662, 3040])
def test_warm_up_is_a_tenth_of_the_steps_rounded_up(total):
    warmup = -(-total // 10)
    assert train.lr_factor(warmup, total) == 1
    assert train.lr_factor(warmup - 1, total) < 1
    assert train.lr_factor(warmup + 1, total) < 1
    assert train.lr_factor(total, total) == 0


def test_learning_rates_of_a_run_are_logged(here):
    # 3 steps an epoch, 4 epochs: S = 12, W = 2
    records = steps(run(sft_config(lr=2e-3, epochs=4)))
    shares = [1 / 2, 1, *((12 - k) / 10 for k in range(3, 13))]
    assert [record["lr"] for record in records] == pytest.approx([2e-3 * s for s in shares])
    assert [record["step"] for record in records] == list(range(1, 13))


def test_the_last_smaller_step_of_an_epoch_is_run_with_its_own_counts(here):
    # 10 rows, 4 per step: 4 + 4 + 2. The learning rate is so small that the model does not change.
    records = steps(run(sft_config(lr=1e-12, rows_per_step=4)))
    assert len(records) == 3
    rows = read_jsonl("positives.jsonl")
    oracle = Oracle("student")
    tokens = {i: len(oracle.logps(row, "completion")) for i, row in enumerate(rows)}
    sums = {i: oracle.logps(row, "completion").sum().item() for i, row in enumerate(rows)}
    config = sft_config()
    source = load_model(config.model)[1]
    dataset = run_module.load_data(config.data, config, source, paired=False)
    data = TrainData(dataset, sft(), HERE, config.pack_tokens)
    for record, step in zip(records, data.plan(4, config.seed, 0)):
        ids = [int(i) for packs in step for pack in packs for i in pack]
        wanted = -sum(sums[i] for i in ids) / sum(tokens[i] for i in ids)
        assert record["loss"] == pytest.approx(wanted, rel=1e-5)


def test_max_steps_ends_the_run_and_its_schedule(here):
    records = steps(run(sft_config(max_steps=4, epochs=50)))
    # S = 4, W = 1: 1, 2/3, 1/3, 0
    assert [record["lr"] for record in records] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 0])


def test_max_steps_beyond_the_data_changes_nothing(here):
    assert len(steps(run(sft_config(max_steps=1000)))) == 3


def test_epochs_are_shuffled_differently(here):
    records = steps(run(sft_config(lr=1e-12, epochs=2)))
    assert [r["loss"] for r in records[:3]] != [r["loss"] for r in records[3:]]


# ---------------------------------------------------------------- what a run leaves on disk


def test_records_have_these_fields(here):
    *trained, last = run(redi_config(eval_data="pairs.jsonl"))
    assert last == {"kind": "finished"}
    logps = {"chosen_logp", "rejected_logp", "margin", "ranked_right"}
    by_kind = {
        "train": {
            "kind", "step", "loss", "lr", "grad_norm", "update_norm", "chosen_entropy",
            "rejected_entropy", "tokens", "memory_gib", "seconds",
        },
        "eval": {"kind", "step", "loss"},
    }  # fmt: skip
    for record in trained:
        assert set(record) == by_kind[record["kind"]] | logps
        assert record["chosen_logp"] < 0
        assert record["rejected_logp"] < 0
        assert 0 <= record["ranked_right"] <= 1
    # Prompt and response of every sequence, nothing padded, nothing twice.
    chat = ChatTokenizer.from_folder("student")
    rendered = chat.encode_rows(
        [
            (row["prompt"], row[field][0])
            for row in read_jsonl("pairs.jsonl")
            for field in ("chosen", "rejected")
        ]
    )
    assert sum(record["tokens"] for record in steps(trained)) == sum(map(len, rendered))


def test_mfu_counts_the_output_weight_on_supervised_tokens_only(here, monkeypatch):
    peak = 1e9  # FLOP/s; a CPU has none
    monkeypatch.setattr(train, "peak_flops", lambda device: peak)
    config = sft_config(rows_per_step=PAIRS)
    [record] = steps(run(config))
    model, source = load_model("student")
    data = run_module.load_data(config.data, config, source, paired=False)
    # 6 FLOPs per weight and token, and causal attention: 6 H d L^2 per layer and document.
    sizes, matrices = model.config, [p for p in model.model.layers.parameters() if p.ndim == 2]
    flops = 6 * sum(matrix.numel() for matrix in matrices) * int(data.lengths.sum())
    flops += 6 * model.output_weight.numel() * int(data.response_lengths.sum())
    per_square = 6 * sizes.num_layers * sizes.num_heads * sizes.head_dim
    flops += per_square * int((data.lengths.astype(np.int64) ** 2).sum())
    assert record["mfu"] * record["seconds"] * peak == pytest.approx(flops)


def test_sft_records_have_no_rejected_side(here):
    for record in steps(run(sft_config())):
        assert not {"rejected_logp", "margin", "ranked_right"} & set(record)


@pytest.mark.parametrize("changes", [{}, {"objective": "dpo", "beta": 0.1}], ids=["redi", "dpo"])
def test_two_runs_give_the_same_bits(here, changes):
    first = steps(run(redi_config(out="one", pack_tokens=60, **changes)))
    second = steps(run(redi_config(out="two", pack_tokens=60, **changes)))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name])


def test_another_seed_trains_another_model(here):
    run(sft_config(out="one", seed=1))
    run(sft_config(out="two", seed=2))
    one, two = weights("one"), weights("two")
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_ranks_compare_settings_data_and_weights(here, monkeypatch):
    """What differs between two runs is what two ranks would be refused for."""
    compared = []
    monkeypatch.setattr(distributed, "require_same", lambda values, _: compared.append(values))
    run(sft_config(dry_run=True, cache="a"))
    rows = read_jsonl("positives.jsonl")
    write_jsonl(here / "fewer.jsonl", rows[:-4]).replace(here / "positives.jsonl")
    model = dict(weights("student"), **{"model.norm.weight": torch.zeros(32)})
    folder = shutil.copytree("student", "zeros")
    save_file(model, folder + "/model.safetensors", metadata={"format": "pt"})
    run(sft_config(dry_run=True, cache="b", lr=1e-2, save_every=7, model="zeros"))
    differ = [[k for k in a if b[k] != a[k]] for a, b in zip(compared, compared[2:])]
    assert differ[0] == ["model", "lr", "save_every"]
    assert differ[1] == ["parent", "parent's weights sha256", "data sha256", "rows"]


def test_training_leaves_the_model_it_started_from_alone(here):
    before = weights("student")
    run(sft_config())
    for name, tensor in weights("student").items():
        assert torch.equal(tensor, before[name])


# ---------------------------------------------------------------- the rows of a store


@pytest.fixture
def store_of(here):
    """store_of(rows, ...) -> the token store of these pairs."""

    def load(rows: list[dict], name: str = "rows.jsonl"):
        path = write_jsonl(here / name, rows)
        chat = ChatTokenizer.from_folder("student")
        return load_store([path], chat, True, here / "cache")

    return load


ROWS = [conversation(number) for number in range(4)]
GENEROUS = Limits(1000, 1000, 1000)


def test_stored_tokens_are_the_rendered_rows(here, store_of):
    store = store_of(ROWS)
    dataset = select(store, GENEROUS, "error", "rows.jsonl")
    chat = ChatTokenizer.from_folder("student")
    for row, given in enumerate(ROWS):
        for side, field in enumerate(("chosen", "rejected")):
            [rendered] = chat.encode_rows([(given["prompt"], given[field][0])])
            sequence = dataset.sequence(2 * row + side)
            assert sequence.tokens.tolist() == rendered.prompt_ids + rendered.response_ids
            assert sequence.prompt_length == len(rendered.prompt_ids)
            assert sequence.response_length == dataset.response_lengths[2 * row + side]
            assert len(sequence.tokens) == dataset.lengths[row, side]
            assert (sequence.row, sequence.sign) == (row, 1 - 2 * side)
            assert sequence.tokens[-1] == chat.stop_id


def longer(row: dict, field: str, words: int) -> dict:
    role = "user" if field == "prompt" else "assistant"
    text = "a b c d " * words
    return {**row, field: [{"role": role, "content": row[field][0]["content"] + text}]}


def test_rows_over_a_limit_are_dropped_and_counted_by_the_first_reason(here, store_of):
    rows = [
        ROWS[0],
        longer(ROWS[1], "prompt", 30),
        longer(ROWS[2], "rejected", 30),
        longer(ROWS[3], "chosen", 30),
        longer(longer(ROWS[1], "prompt", 30), "chosen", 30),  # counted once
        longer(longer(ROWS[2], "prompt", 6), "chosen", 6),  # only the sum is too long
    ]
    dataset = select(store_of(rows), Limits(90, 90, 100), "drop", "rows.jsonl")
    assert dataset.dropped == {
        "prompt over 90 tokens": 2,
        "response over 90 tokens": 2,
        "prompt and response over 100 tokens": 1,
    }
    assert dataset.rows.tolist() == [0]
    assert len(dataset) + sum(dataset.dropped.values()) == len(rows)


def test_after_rows_were_dropped_ids_name_the_rows_that_are_left(here, store_of):
    rows = [longer(ROWS[0], "chosen", 30), ROWS[1], longer(ROWS[2], "prompt", 30), ROWS[3]]
    dataset = select(store_of(rows), Limits(90, 90, 200), "drop", "rows.jsonl")
    whole = select(store_of(ROWS, name="whole.jsonl"), GENEROUS, "drop", "whole.jsonl")
    assert dataset.rows.tolist() == [1, 3]
    for mine, given in ((0, 1), (1, 3)):
        for side in (0, 1):
            one, other = dataset.sequence(2 * mine + side), whole.sequence(2 * given + side)
            assert np.array_equal(one.tokens, other.tokens)
            assert one.row == mine
    assert dataset.lengths.tolist() == whole.lengths[[1, 3]].tolist()
    assert dataset.response_lengths.tolist() == whole.response_lengths[[2, 3, 6, 7]].tolist()


@pytest.mark.parametrize("limit", ["prompt", "response", "total"])
def test_limits_are_inclusive_and_the_stop_token_counts(here, store_of, limit):
    chat = ChatTokenizer.from_folder("student")
    # Row 0's chosen trace is the longer one.
    [row] = chat.encode_rows([(ROWS[0]["prompt"], ROWS[0]["chosen"][0])])
    assert row.response_ids[-1] == chat.stop_id
    lengths = {
        "prompt": len(row.prompt_ids), "response": len(row.response_ids), "total": len(row),
    }  # fmt: skip
    limits = {"prompt": 1000, "response": 1000, "total": 1000, limit: lengths[limit]}
    store = store_of(ROWS[:1])
    assert len(select(store, Limits(**limits), "error", "rows.jsonl")) == 1
    limits[limit] -= 1
    with pytest.raises(UserError, match="no row is left"):
        select(store, Limits(**limits), "drop", "rows.jsonl")


def test_over_length_error_names_the_row(here, store_of):
    rows = [ROWS[0], {**ROWS[1], "rejected": ROWS[1]["chosen"]}, longer(ROWS[2], "chosen", 30)]
    with pytest.raises(UserError, match=r"rows.jsonl.*\b3\b.*response over 90 tokens"):
        select(store_of(rows), Limits(90, 90, 200), "error", "rows.jsonl")


def test_no_row_left_is_an_error_that_counts_the_reasons(here, store_of):
    rows = [ROWS[0], ROWS[1], {**ROWS[2], "rejected": ROWS[2]["chosen"]}]
    with pytest.raises(UserError, match=r"1 chosen equals rejected, 2 response over 3 tokens"):
        select(store_of(rows), Limits(1000, 3, 1000), "drop", "rows.jsonl")


def test_a_pair_of_equal_answers_is_counted_out(here, store_of):
    rows = [ROWS[0], {**ROWS[1], "rejected": ROWS[1]["chosen"]}, ROWS[2]]
    store = store_of(rows)
    assert store.skipped == {"chosen equals rejected": 1}
    assert store.row_numbers.tolist() == [1, 3]
    with pytest.raises(UserError, match=r"no row to train on.*chosen equals rejected"):
        store_of([rows[1]], name="equal.jsonl")


def test_describe_states_rows_tokens_quantiles_and_what_was_left_out(here, store_of):
    rows = [conversation(number) for number in range(8)]
    rows += [longer(ROWS[0], "chosen", 30), {**ROWS[1], "rejected": ROWS[1]["chosen"]}]
    store = store_of(rows)
    dataset = select(store, Limits(90, 90, 200), "drop", "rows.jsonl")
    chat = ChatTokenizer.from_folder("student")
    lines = describe(dataset, chat).splitlines()
    assert lines[0] == "8 pairs to train on, 2 left out"
    assert "  left out: 1 chosen equals rejected" in lines
    assert "  left out: 1 response over 90 tokens" in lines
    lengths = {
        "chosen": [len(chat.encode_rows([(r["prompt"], r["chosen"][0])])[0].response_ids)
                   for r in rows[:8]],
        "rejected": [len(chat.encode_rows([(r["prompt"], r["rejected"][0])])[0].response_ids)
                     for r in rows[:8]],
        "prompt": [len(chat.encode_prompt(r["prompt"])) for r in rows[:8]],
    }  # fmt: skip
    for name, values in lengths.items():
        [shown] = [line.split() for line in lines if line.startswith(name)]
        values = sorted(values)
        # of 8 values: the smallest, the 4th (half are no larger), the largest three times
        assert shown[1:] == [
            str(sum(values)), str(values[0]), str(values[3]), *[str(values[7])] * 3,
        ]  # fmt: skip
    prompt, response = lines[-2:]
    assert "Compute" in prompt
    assert prompt.endswith("<|im_start|>assistant\\n'")
    assert response.endswith("<|im_end|>'")
