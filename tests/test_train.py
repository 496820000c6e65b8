"""The training loop against a plain one, what it logs, and the rows it trains on.

    python -m pytest tests/test_train.py

The model is a random Qwen2 of two layers, the data one-line arithmetic problems. Losses are checked
against transformers, which runs every row alone; the optimizer against a loop written here.
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
from redi.data.dataset import Dataset, Limits, describe, select
from redi.data.store import load_store
from redi.data.tokenizer import ChatTokenizer, TokenizedRow
from redi.objectives import sft
from redi.runlog import RunLog, read_metrics


def sft_data(config) -> Dataset:
    _, source = load_model(config.model)
    return run_module.load_data(config.data, config, source, paired=False)


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


def test_the_held_out_loss_is_of_the_saved_model_and_the_dpo_reference_of_the_first(here):
    rows = [conversation(100 + number) for number in range(5)]
    write_jsonl(here / "held_out.jsonl", rows)
    dpo = redi_config(objective="dpo", beta=0.5, epochs=3, eval_data="held_out.jsonl", eval_every=4)
    records = run(dpo)
    # At first every pair's margin over the reference is 0, and -log sigmoid(0) = ln 2.
    assert steps(records)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluations = steps(records, "eval")
    assert [record["step"] for record in evaluations] == [4, 8, 9]  # every fourth, and the last
    start, end = Oracle("student"), Oracle("run")
    for field in ("chosen", "rejected"):
        logp = np.mean([end.logps(row, field).mean().item() for row in rows])
        assert evaluations[-1][f"{field}_logp"] == pytest.approx(logp, rel=1e-5)
    losses = []
    for row in rows:
        gain = {
            field: (end.logps(row, field).sum() - start.logps(row, field).sum()).item()
            for field in ("chosen", "rejected")
        }
        losses.append(math.log1p(math.exp(-0.5 * (gain["chosen"] - gain["rejected"]))))
    assert evaluations[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_last_smaller_step_of_an_epoch_is_run_with_its_own_counts(here):
    # 10 rows, 4 per step: 4 + 4 + 2. The learning rate is so small that the model does not change.
    config = sft_config(lr=1e-12, rows_per_step=4)
    records = steps(run(config))
    oracle = Oracle("student")
    logps = [oracle.logps(row, "completion").detach() for row in read_jsonl("positives.jsonl")]
    plan = TrainData(sft_data(config), sft(), HERE, config.pack_tokens).plan(4, config.seed, 0)
    assert len(records) == len(plan) == 3
    for record, step in zip(records, plan):
        loss = -torch.cat([logps[int(i)] for packs in step for pack in packs for i in pack]).mean()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)


# ---------------------------------------------------------------- it learns


def test_sft_loss_falls(here):
    losses = [record["loss"] for record in steps(run(sft_config(lr=3e-3, epochs=8)))]
    assert losses[-1] < 0.7 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "redi"},
        {"objective": "symmetric"},
        {"objective": "dpo", "beta": 0.1},
        {"objective": "simpo", "beta": 2.0, "gamma": 1.0},
    ],
    ids=lambda changes: changes["objective"],
)
def test_stage_2_widens_the_margin(here, changes):
    first, *_, last = steps(run(redi_config(rows_per_step=PAIRS, epochs=8, **changes)))
    assert last["margin"] > first["margin"] + 0.1
    assert last["loss"] < first["loss"]


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
        totals = data.totals(step)
        for batch in data.batches(step, totals):
            data.objective.loss(plain, batch, totals).loss.backward()
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
    ("changes", "shares"),
    [
        # 3 steps per epoch. A tenth of the steps, rounded up, is the warm-up: W = 2, 3, 1, ...
        ({"epochs": 4}, [1 / 2, 1, *((12 - k) / 10 for k in range(3, 13))]),
        ({"epochs": 7}, [1 / 3, 2 / 3, 1, *((21 - k) / 18 for k in range(4, 22))]),
        ({"epochs": 50, "max_steps": 10}, [(10 - k) / 9 for k in range(1, 11)]),
        ({"epochs": 50, "max_steps": 1}, [1]),
        ({"max_steps": 1000}, [1, 1 / 2, 0]),  # more than the data has
    ],
    ids=str,
)
def test_learning_rates_of_a_run_are_logged(here, changes, shares):
    records = steps(run(sft_config(lr=2e-3, **changes)))
    assert [record["lr"] for record in records] == pytest.approx([2e-3 * s for s in shares])
    assert [record["step"] for record in records] == list(range(1, len(shares) + 1))


# ---------------------------------------------------------------- what is logged and compared

FIELDS = {
    "train": {
        "kind", "step", "loss", "lr", "grad_norm", "update_norm", "chosen_logp", "chosen_entropy",
        "tokens", "memory_gib", "seconds",
    },
    "eval": {"kind", "step", "loss", "chosen_logp"},
    "finished": {"kind"},
}  # fmt: skip
OF_PAIRS = {
    "train": {"rejected_logp", "rejected_entropy", "margin", "ranked_right"},
    "eval": {"rejected_logp", "margin", "ranked_right"},
}


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
        more = OF_PAIRS.get(record["kind"], set()) if len(sides) == 2 else set()
        assert set(record) == FIELDS[record["kind"]] | more
        assert all(record[name] < 0 for name in record if name.endswith("_logp"))
        assert 0 <= record.get("ranked_right", 0) <= 1
    # Prompt and response of every sequence, nothing padded, nothing twice.
    rendered = [rendering(row, side) for row in read_jsonl(data) for side in sides]
    assert sum(record["tokens"] for record in steps(records)) == sum(map(len, rendered))


def test_mfu_counts_the_output_weight_on_supervised_tokens_only(here, monkeypatch):
    peak = 1e9  # FLOP/s; a CPU has none
    monkeypatch.setattr(train.monitor, "peak_flops", lambda device: peak)
    config = sft_config(rows_per_step=PAIRS)
    [record] = steps(run(config))
    model, _ = load_model("student")
    data = sft_data(config)
    # 6 FLOPs per weight and token, and causal attention: 6 H d L^2 per layer and document.
    sizes, matrices = model.config, [p for p in model.model.layers.parameters() if p.ndim == 2]
    flops = 6 * sum(matrix.numel() for matrix in matrices) * int(data.lengths.sum())
    flops += 6 * model.output_weight.numel() * int(data.response_lengths.sum())
    per_square = 6 * sizes.num_layers * sizes.num_heads * sizes.head_dim
    flops += per_square * int((data.lengths.astype(np.int64) ** 2).sum())
    assert record["mfu"] * record["seconds"] * peak == pytest.approx(flops)


def test_ranks_compare_settings_data_and_weights(here, monkeypatch):
    """What differs between two runs is what two ranks would be refused for."""
    compared = []
    monkeypatch.setattr(distributed, "require_same", lambda values, _: compared.append(values))
    run(sft_config(dry_run=True, cache="a"))
    fewer = write_jsonl(here / "fewer.jsonl", read_jsonl("positives.jsonl")[:-4])
    fewer.replace(here / "positives.jsonl")
    model = dict(weights("student"), **{"model.norm.weight": torch.zeros(32)})
    folder = shutil.copytree("student", "zeros")
    save_file(model, folder + "/model.safetensors", metadata={"format": "pt"})
    run(sft_config(dry_run=True, cache="b", lr=1e-2, save_every=7, model="zeros"))
    differ = [[k for k in a if b[k] != a[k]] for a, b in zip(compared, compared[2:])]
    assert differ[0] == ["model", "lr", "save_every"]
    assert differ[1] == ["parent", "parent's weights sha256", "data sha256", "rows"]


# ---------------------------------------------------------------- rows

ROWS = [conversation(number) for number in range(4)]


def rendering(row: dict, side: str) -> TokenizedRow:
    [rendered] = ChatTokenizer.from_folder("student").encode_rows([(row["prompt"], row[side][0])])
    return rendered


def selected(rows: list[dict], *limits: int, over_length: str = "drop") -> Dataset:
    """These pairs from a token store, within the limits of prompt, response and both."""
    path = write_jsonl(Path("rows.jsonl"), rows)
    store = load_store([path], ChatTokenizer.from_folder("student"), True, Path("cache"))
    return select(store, Limits(*limits), over_length, "rows.jsonl")


def longer(row: dict, field: str, words: int = 30) -> dict:
    role = "user" if field == "prompt" else "assistant"
    text = "a b c d " * words
    return {**row, field: [{"role": role, "content": row[field][0]["content"] + text}]}


EQUAL = {**ROWS[1], "rejected": ROWS[1]["chosen"]}


def test_stored_tokens_are_the_rendered_rows_that_are_left(here):
    rows = [longer(ROWS[0], "chosen"), ROWS[1], longer(ROWS[2], "prompt"), ROWS[3]]
    dataset = selected(rows, 90, 90, 200)
    assert dataset.rows.tolist() == [1, 3]
    for row, given in enumerate((ROWS[1], ROWS[3])):
        for side, field in enumerate(("chosen", "rejected")):
            rendered = rendering(given, field)
            sequence = dataset.sequence(2 * row + side)
            assert sequence.tokens.tolist() == rendered.prompt_ids + rendered.response_ids
            assert sequence.prompt_length == len(rendered.prompt_ids)
            assert sequence.response_length == dataset.response_lengths[2 * row + side]
            assert len(sequence.tokens) == dataset.lengths[row, side]
            assert (sequence.row, sequence.sign) == (row, 1 - 2 * side)
            assert sequence.tokens[-1] == ChatTokenizer.from_folder("student").stop_id


def test_rows_over_a_limit_are_dropped_and_counted_by_the_first_reason(here):
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


@pytest.mark.parametrize("limit", range(3), ids=["prompt", "response", "total"])
def test_limits_are_inclusive_and_the_stop_token_counts(here, limit):
    row = rendering(ROWS[0], "chosen")  # the longer one of the pair
    assert row.response_ids[-1] == ChatTokenizer.from_folder("student").stop_id
    limits = [1000, 1000, 1000]
    limits[limit] = [len(row.prompt_ids), len(row.response_ids), len(row)][limit]
    assert len(selected(ROWS[:1], *limits, over_length="error")) == 1
    limits[limit] -= 1
    with pytest.raises(UserError, match="no row is left"):
        selected(ROWS[:1], *limits)


def test_over_length_error_names_the_row(here):
    rows = [ROWS[0], EQUAL, longer(ROWS[2], "chosen")]
    with pytest.raises(UserError, match=r"rows.jsonl.*\b3\b.*response over 90 tokens"):
        selected(rows, 90, 90, 200, over_length="error")


def test_no_row_left_is_an_error_that_counts_the_reasons(here):
    with pytest.raises(UserError, match=r"1 chosen equals rejected, 2 response over 3 tokens"):
        selected([ROWS[0], EQUAL, ROWS[2]], 1000, 3, 1000)


def test_describe_states_rows_tokens_quantiles_and_what_was_left_out(here):
    rows = [conversation(number) for number in range(8)]
    dataset = selected([*rows, longer(ROWS[0], "chosen"), EQUAL], 90, 90, 200)
    lines = describe(dataset, ChatTokenizer.from_folder("student")).splitlines()
    assert lines[0] == "8 pairs to train on, 2 left out"
    assert "  left out: 1 chosen equals rejected" in lines
    assert "  left out: 1 response over 90 tokens" in lines
    lengths = {
        "prompt": [len(rendering(row, "chosen").prompt_ids) for row in rows],
        "chosen": [len(rendering(row, "chosen").response_ids) for row in rows],
        "rejected": [len(rendering(row, "rejected").response_ids) for row in rows],
    }
    for name, values in lengths.items():
        [shown] = [line.split() for line in lines if line.startswith(name)]
        smallest, *_, largest = ordered = sorted(values)
        # Of 8 values, half are no larger than the 4th; the other quantiles are the largest.
        quantiles = [smallest, ordered[3], largest, largest, largest]
        assert shown[1:] == [str(number) for number in (sum(values), *quantiles)]
    prompt, response = lines[-2:]
    assert "Compute" in prompt
    assert prompt.endswith("<|im_start|>assistant\\n'")
    assert response.endswith("<|im_end|>'")
