"""Labeled rows: a trace and whether it is right, from the file to the trained model.

    python -m pytest tests/test_labeled_rows.py

A labeled row is half a pair. Its loss is the part of a pair's loss that is of its trace, times its
weight, divided by half the number of rows in the step.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import main_in_this_process, run_ranks
from small_run import (
    OF_REDI,
    PAIRS,
    TWICE,
    Oracle,
    assert_same_bits,
    flags,
    labeled,
    read_jsonl,
    records,
    redi_config,
    refusal,
    run,
    sft_config,
    steps,
    weights,
    write_jsonl,
)
from small_step import (
    ALPHA,
    PARAMETERS,
    Rows,
    V,
    assert_close,
    backward,
    data_of,
    gradients,
    mean,
    objective_of,
    row_logps,
    tiny,
    unlikelihood,
)

from redi import curves, programs, train
from redi.config import Stopped
from redi.data.files import read_json
from redi.monitor import CollapseGuard
from redi.objectives import OBJECTIVES, loss_function
from redi.show import __main__ as show

# Loss of a right and of a wrong row, from the token log-probs of its trace.
OF_ROWS = {
    "redi": (lambda w: -mean(w), lambda r: ALPHA * mean(r)),
    "symmetric": (lambda w: -mean(w), mean),
    "positives": (lambda w: -mean(w), lambda r: 0 * r.sum()),
    "asymre": (lambda w: (V - 1) * w.sum(), lambda r: V * r.sum()),
    "w_reinforce": (lambda w: -ALPHA * w.sum(), lambda r: r.sum()),
    "uft": (lambda w: (ALPHA - 1) * mean(w), lambda r: ALPHA * unlikelihood(r)),
}
every_objective = pytest.mark.parametrize("name", OF_ROWS)


@pytest.fixture
def rows(here) -> list[dict]:
    """The 20 rows of labeled.jsonl: the traces of pairs.jsonl. In a folder with the student."""
    found = labeled(read_jsonl("pairs.jsonl"))
    write_jsonl(here / "labeled.jsonl", found)
    return found


def config(**changes):
    return redi_config(**{"data": "labeled.jsonl", **changes})


# ---------------------------------------------------------------- a step


def test_these_objectives_take_labeled_rows_and_the_others_pairs_alone():
    taken = {name for name in OBJECTIVES if "labeled rows" in objective_of(name).takes}
    assert taken == set(OF_ROWS)
    assert all("pairs" in objective_of(name).takes for name in OBJECTIVES)
    assert objective_of("sft").takes == ("rows",)


@every_objective
@pytest.mark.parametrize(("ranks", "pack_tokens"), [(1, 1000), (1, 1), (2, 30), (20, 1000)])
def test_any_plan_gives_the_loss_and_gradients_of_the_formula(name, ranks, pack_tokens):
    """Weights are random, and the number of rows divides, not the weights' sum."""
    model, rows = tiny(True, torch.float64), Rows("labeled rows")
    of_sign = dict(zip((1, -1), OF_ROWS[name]))
    losses = [s.weight * of_sign[s.sign](row_logps(model, s)) for s in rows.sequences]
    wanted = sum(losses) / (len(losses) / 2)
    wanted.backward()
    model, oracle = tiny(True, torch.float64), model
    parts = [data_of(name, rank, ranks, pack_tokens, rows) for rank in range(ranks)]
    loss = sum(backward(model, data) for data in parts)
    assert_close(gradients(model), loss, (wanted.item(), gradients(oracle)), 1e-10)


@every_objective
def test_rows_made_of_pairs_have_the_loss_and_gradients_of_the_pairs(name):
    pairs, rows = tiny(True, torch.float64), tiny(True, torch.float64)
    wanted = backward(pairs, data_of(name))
    loss = backward(rows, data_of(name, rows=Rows("labeled rows", weight=1.0)))
    assert_close(gradients(rows), loss, (wanted, gradients(pairs)), 1e-12)


@every_objective
@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_without_right_or_without_wrong_rows_is_a_step(name, sign):
    rows, model = Rows("labeled rows"), tiny(True, torch.float64)
    data = data_of(name, rows=rows)
    ids = np.flatnonzero(rows.signs == sign)
    loss = backward(model, data, [[ids]])
    of_row = OF_ROWS[name][0 if sign > 0 else 1]
    found = [rows.sequence(i).weight * of_row(row_logps(model, rows.sequence(i))) for i in ids]
    assert loss == pytest.approx((sum(found) / (len(found) / 2)).item(), rel=1e-12)


def test_uft_is_finite_where_a_wrong_token_is_certain():
    certain = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = loss_function("uft")([certain], [-1], alpha=1.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8))
    assert certain.grad.isfinite().all()


# ---------------------------------------------------------------- a run


def test_the_first_step_of_a_run_has_the_loss_and_statistics_of_transformers(rows):
    some = [{**row, "weight": 0.5 + number % 3} for number, row in enumerate(rows[:-1])]
    write_jsonl(Path("labeled.jsonl"), some)
    [record] = steps(run(config(rows_per_step=2 * PAIRS)))
    oracle = Oracle("student")
    means = [oracle.logps(row, "completion").mean() for row in some]
    slopes = [(-1 if row["label"] else 0.8) * row["weight"] for row in some]
    loss = sum(slope * one for slope, one in zip(slopes, means)) / (len(some) / 2)
    loss.backward()
    expected = {"loss": loss.item(), "grad_norm": oracle.gradient_norm()}
    for side, label in (("chosen", True), ("rejected", False)):
        of_side = [i for i, row in enumerate(some) if row["label"] is label]
        expected[f"{side}_logp"] = np.mean([means[i].item() for i in of_side])
        expected[f"{side}_entropy"] = np.mean(
            [oracle.entropy(some[i], "completion") for i in of_side]
        )
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    margin = record["chosen_logp"] - record["rejected_logp"]
    assert record["margin"] == pytest.approx(margin)
    assert "ranked_right" not in record


@every_objective
def test_every_objective_that_takes_rows_trains_on_them_by_its_flags(name, rows):
    settings = {**OF_REDI, "data": "labeled.jsonl", "rows_per_step": 8, "pack_tokens": 150}
    settings |= {"objective": name, **PARAMETERS[name], "eval_data": "pairs.jsonl"}
    assert main_in_this_process(programs.train_redi, *flags(settings)) == 0
    found = records()
    assert [r["kind"] for r in found] == ["train"] * 3 + ["eval", "finished"]
    assert all(record["grad_norm"] > 0 for record in steps(found))
    before = weights("student")
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights("run").items())


def test_one_row_per_step_logs_the_side_that_is_there_and_can_be_drawn(rows, tmp_path):
    found = steps(run(config(rows_per_step=1, collapse_threshold=1e-9, collapse_steps=2)))
    logged = [{"chosen_logp", "rejected_logp"} & record.keys() for record in found]
    assert sorted(map(sorted, logged)) == [["chosen_logp"]] * PAIRS + [["rejected_logp"]] * PAIRS
    curves.draw({"run": records()}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_collapse_guard_skips_steps_without_right_rows():
    guard = CollapseGuard(threshold=0.5, steps=2)
    given = [{}, {"chosen_logp": -1}, {"chosen_logp": -2}, {}, {"chosen_logp": -2}]
    assert [bool(guard.check(record)) for record in given] == [False] * 4 + [True]


def test_a_stopped_run_resumes_to_the_same_bits(rows, monkeypatch):
    settings = {"rows_per_step": 5, "epochs": 2, "save_every": 3}
    run(config(out="whole", **settings))
    step, calls = train.train_step, []

    def stop_after_the_third(*given):
        stats, record = step(*given)
        calls.append(record)
        stats.scalars[train.STOP] = float(len(calls) == 3)
        return stats, record

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop_after_the_third)
        with pytest.raises(Stopped):
            run(config(**settings))
    run(config(**settings))
    assert_same_bits("run", "whole")


def test_two_ranks_train_as_one(rows, here):
    settings = {**OF_REDI, **TWICE, "data": "labeled.jsonl", "rows_per_step": 14}
    for number in (1, 2):
        arguments = flags({**settings, "out": f"on-{number}"})
        run_ranks(here, arguments, number, main=programs.train_redi)
    one, two = (steps(records(f"on-{number}")) for number in (1, 2))
    for name in ("loss", "chosen_logp", "rejected_logp", "grad_norm"):
        values = [[record[name] for record in found] for found in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


def test_a_dry_run_and_show_state_rows_labels_and_masks(rows, capsys):
    run(config(dry_run=True))
    said = capsys.readouterr().out
    assert "20 labeled rows (10 right) to train on, 0 left out" in said
    assert "5 optimizer steps of 4 rows" in said
    assert not Path("run").exists()
    assert main_in_this_process(
        show.main, "labeled.jsonl", "--model", "student", "--cache", "cache", "--row", 2,
        "--html", "page.html",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "labeled.jsonl: 20 labeled rows for train_redi.py" in said
    assert "chosen: 50.0% of the rows, 100.0% with </think>, 100.0% with \\boxed{}" in said
    drawn = said[said.index("Row 2: + is made more likely, - less") :]
    assert re.search(r"^  - \| ", drawn, re.MULTILINE)
    assert not re.search(r"^  \+ \| ", drawn, re.MULTILINE)
    assert "rejected: made less likely" in Path("page.html").read_text()


# ---------------------------------------------------------------- weights and labels


def test_weights_multiply_the_loss_and_rows_of_weight_0_are_dropped_and_counted(rows, capsys):
    for number, name in ((1, "one"), (2, "two"), (2.5, "more")):
        write_jsonl(Path("labeled.jsonl"), [{**row, "weight": number} for row in rows])
        run(config(out=name, rows_per_step=20))
    one, two, more = (records(name)[0]["loss"] for name in ("one", "two", "more"))
    assert [two, more] == pytest.approx([2 * one, 2.5 * one], rel=1e-6)
    some = [{**row, "weight": None if number % 2 else 0.0} for number, row in enumerate(rows)]
    write_jsonl(Path("labeled.jsonl"), [*some, {**rows[0], "weight": 1}])
    capsys.readouterr()
    run(config(dry_run=True))
    said = capsys.readouterr().out
    assert "11 labeled rows (1 right) to train on, 10 left out\n  left out: 10 weight 0\n" in said


ROW = {"prompt": "1+1?", "completion": "2", "label": True}
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
BROKEN = {  # what the fourth of six rows is, and what the error says
    "a pair": (PAIR, "fields seen: prompt, chosen, .* files of pairs"),
    "no label": ({"prompt": "1+1?", "completion": "2"}, "expected {prompt, completion, label}; tr"),
    "a null label": ({**ROW, "label": None}, r"expected {prompt, completion, label}"),
    "1": ({**ROW, "label": 1}, "'label' must be true or false; got 1"),
    "0.0": ({**ROW, "label": 0.0}, "'label' must be true or false; got 0.0"),
    "text": ({**ROW, "label": "true"}, "'label' must be true or false; got 'true'"),
    "a list": ({**ROW, "label": [True]}, "'label' must be"),
    "below 0": ({**ROW, "weight": -1}, "'weight' must be a number, at least 0; got -1"),
    "nan": ({**ROW, "weight": float("nan")}, "'weight' must be a number, at least 0; got nan"),
    "infinite": ({**ROW, "weight": float("inf")}, "'weight' must be .* got inf"),
    "more than a float holds": ({**ROW, "weight": 10**400}, "'weight' must be"),
    "true": ({**ROW, "weight": True}, "'weight' must be .* got True"),
    "a number as text": ({**ROW, "weight": "1"}, "'weight' must be .* got '1'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_not_labeled_as_the_others_is_named(name, rows):
    row, expected = BROKEN[name]
    write_jsonl(Path("labeled.jsonl"), [*rows[:3], row, *rows[3:5]])
    message = refusal(run, config())
    assert message.startswith("labeled.jsonl:4: ")
    assert re.search(expected, message)
    assert not Path("run").exists()


def test_a_labeled_row_among_pairs_is_named(rows):
    write_jsonl(Path("mixed.jsonl"), [*read_jsonl("pairs.jsonl")[:2], rows[0]])
    message = refusal(run, config(data="mixed.jsonl"))
    assert message.startswith("mixed.jsonl:3: fields seen: prompt, completion, label; expected ")
    assert "train_redi.py trains on files of labeled rows, with objectives that take" in message


def test_an_objective_that_needs_pairs_refuses_labeled_rows(rows):
    message = refusal(run, config(objective="dpo", beta=0.1))
    assert message.startswith("labeled.jsonl:1: fields seen: prompt, completion, label; expected ")
    assert message.endswith("labeled rows, with objectives that take them")


def test_rows_of_one_label_alone_are_refused_also_if_limits_left_no_other(rows, capsys):
    for label in (True, False):
        write_jsonl(Path("labeled.jsonl"), [row for row in rows if row["label"] is label])
        message = refusal(run, config())
        assert "all 10 rows have the same label" in message
        assert "stage 2 takes right and wrong rows, train_sft.py right ones alone" in message
        config_of_show = show.ShowConfig(file="labeled.jsonl", model="student", cache="cache")
        assert show.show(config_of_show) is None  # the report says it, and shows the rows
        assert "all 10 rows have the same label" in capsys.readouterr().out
    write_jsonl(Path("labeled.jsonl"), [rows[1], {**rows[0], "completion": "a b c d " * 40}])
    assert "all 1 rows have the same label" in refusal(run, config())


def test_stage_1_learns_from_the_right_rows_and_counts_the_others(rows, capsys):
    run(sft_config(data="labeled.jsonl"))
    assert "10 rows to train on, 10 left out\n  left out: 10 label false" in capsys.readouterr().out
    run(sft_config(out="positives"))
    assert records() == records("positives")
    weighed = [{**row, "weight": 2} for row in rows]
    write_jsonl(Path("labeled.jsonl"), [*weighed, {**rows[0], "weight": 0}])
    run(sft_config(data="labeled.jsonl", out="weighed"))
    assert "left out: 1 weight 0" in capsys.readouterr().out
    losses = [records(name)[0]["loss"] for name in ("weighed", "positives")]
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-6)
    unlabeled = [{k: row[k] for k in ("prompt", "completion", "weight")} for row in weighed[::2]]
    write_jsonl(Path("labeled.jsonl"), unlabeled)  # a weight needs no label
    run(sft_config(data="labeled.jsonl", out="unlabeled"))
    assert records("unlabeled")[0]["loss"] == pytest.approx(losses[0], rel=1e-6)
    for label in (1, "false", None):
        write_jsonl(Path("labeled.jsonl"), [*rows, {**rows[0], "label": label}])
        message = refusal(run, sft_config(data="labeled.jsonl", out="other"))
        assert message == f"labeled.jsonl:21: 'label' must be true or false; got {label!r}"


def test_parquet_holds_labels_and_weights(rows, here):
    import pyarrow
    import pyarrow.parquet

    some = [{**row, "weight": 0.5 * (number % 4)} for number, row in enumerate(rows)]
    write_jsonl(here / "labeled.jsonl", some)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), "labeled.parquet")
    run(config(out="lines"))
    run(config(data="labeled.parquet"))
    assert records() == records("lines")


def test_the_store_keeps_the_sign_and_weight_of_every_row(rows):
    some = [{**row, "weight": 1 + number} for number, row in enumerate(rows)]
    write_jsonl(Path("labeled.jsonl"), some)
    run(config(cache="tokens"))
    [folder] = [path for path in Path("tokens").iterdir() if path.is_dir()]
    assert read_json(folder / "store.json")["kind"] == "labeled rows"
    stored = np.load(folder / "index.npz")["weights"]
    assert stored.tolist() == [(1 if row["label"] else -1) * row["weight"] for row in some]
