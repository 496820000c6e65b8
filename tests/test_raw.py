"""redi/prepare/raw.py: four forms of teacher data, and the same rows from each."""

import json
import random

import pytest
from small_run import write_jsonl

from redi.config import UserError
from redi.prepare.__main__ import PrepareConfig, no_counts
from redi.prepare.raw import HEAD, read, recognize
from redi.prepare.traces import Rules, choose

PROBLEM, WRONG, RIGHT = "1+1?", "It is 3.", "It is 2."

# The same problem with a wrong and a right trace, as each form has it: name, rows of the file.
RAW = {
    "problem": PROBLEM, "problem_is_valid": "Yes", "source": "amc", "answer": "2",
    "generations": [WRONG, RIGHT],
    "correctness": {
        "llama_verification": [True, True], "math_verify_reparsed_answer": [False, True],
    },
}  # fmt: skip
FLAT = {
    "problem": PROBLEM, "source": "amc", "answer": "2", "uuid": "u-1",
    "is_reasoning_complete": [True, True], "generations": [WRONG, RIGHT],
    "correctness_math_verify": [False, True], "correctness_llama": None, "finish_reasons": None,
    "correctness_count": 1, "messages": [{"role": "user", "content": PROBLEM}],
}  # fmt: skip
LISTED = {
    "problem": PROBLEM,
    "answer": 2,
    "source": "amc",
    "traces": [{"text": WRONG, "correct": False}, {"text": RIGHT, "correct": True}],
}
ONE_TRACE = [
    {"question": PROBLEM, "response": WRONG, "is_correct": 0, "problem_source": "amc"},
    {"question": PROBLEM, "response": RIGHT, "is_correct": 1, "expected_answer": "2"},
]
ONE_TRACE_NAME = "one trace a row (question, response, is_correct, expected_answer, problem_source)"
FORMS = [
    ("OpenR1-Math-Raw", [RAW]),
    ("OpenR1-Math-220k", [FLAT]),
    ("problem, traces", [LISTED]),
    (ONE_TRACE_NAME, ONE_TRACE),
]


def rows_of(tmp_path, rows):
    """(name of the form, the problems) of a file of `rows`."""
    files = [write_jsonl(tmp_path / "raw.jsonl", rows)]
    form = recognize(files)
    return form.name, list(read(files, form, tmp_path))


def only(tmp_path, form, **changes):
    """The RawRow of a changed row, in a file that begins with an unchanged one."""
    return rows_of(tmp_path, [form, {**form, **changes}])[1][1]


@pytest.mark.parametrize(("name", "rows"), FORMS)
def test_each_form_is_named_and_gives_the_same_training_rows(tmp_path, name, rows):
    found, (row,) = rows_of(tmp_path, rows)
    assert found == name
    assert row.answer == "2"
    choice = choose(row, Rules())
    assert choice == choose(rows_of(tmp_path, [RAW])[1][0], Rules())
    assert choice.positive["completion"][0]["content"] == RIGHT
    assert choice.pairs[0]["rejected"][0]["content"] == WRONG


def test_votes_are_in_the_order_of_the_verifiers(tmp_path):
    assert rows_of(tmp_path, [RAW])[1][0].votes == [(True, False), (True, True)]
    assert rows_of(tmp_path, [FLAT])[1][0].votes == [(False,), (True,)]


# ---------------------------------------------------------------- OpenR1-Math-220k


@pytest.mark.parametrize(
    ("llama", "math_verify", "votes"),
    [
        (None, [False, True], [(False,), (True,)]),
        ([True, True], [False, True], [(True, False), (True, True)]),
        ([True, None], [False, True], [(True, False), (True,)]),
        ([False, True], None, [(False,), (True,)]),
        (None, [None, True], [(), (True,)]),
        (None, None, [(), ()]),
    ],
)
def test_a_null_label_is_a_missing_vote(tmp_path, llama, math_verify, votes):
    row = only(tmp_path, FLAT, correctness_llama=llama, correctness_math_verify=math_verify)
    assert (row.votes, row.flaw) == (votes, None)


@pytest.mark.parametrize(
    ("closed", "reasons", "complete"),
    [
        ([True, False], None, [True, False]),
        (None, ["length", "stop"], [False, True]),
        (None, None, [True, True]),
    ],
)
def test_either_field_says_that_a_trace_was_truncated(tmp_path, closed, reasons, complete):
    row = only(tmp_path, FLAT, is_reasoning_complete=closed, finish_reasons=reasons)
    assert row.complete == complete


@pytest.mark.parametrize(("valid", "is_valid"), [("Yes", True), ("No", False), (None, False)])
def test_a_flat_row_is_valid_unless_it_says_otherwise(tmp_path, valid, is_valid):
    assert rows_of(tmp_path, [FLAT])[1][0].valid
    assert only(tmp_path, FLAT, problem_is_valid=valid).valid == is_valid


# ---------------------------------------------------------------- rows that cannot be used


@pytest.mark.parametrize(
    ("form", "change", "flaw"),
    [
        (FLAT, {"generations": WRONG}, "malformed"),
        (FLAT, {"problem": "\ud83d"}, "malformed"),
        (FLAT, {"correctness_math_verify": [1, 0]}, "malformed"),
        (FLAT, {"finish_reasons": ["stop"]}, "malformed"),
        (FLAT, {"correctness_math_verify": [True]}, "labels misaligned"),
        (FLAT, {"correctness_llama": []}, "labels misaligned"),
        (LISTED, {"traces": [RIGHT]}, "malformed"),
        (LISTED, {"traces": [None]}, "malformed"),
        (LISTED, {"traces": {"text": RIGHT}}, "malformed"),
        (LISTED, {"traces": [{"text": 2}]}, "malformed"),
        (LISTED, {"traces": [{"text": RIGHT, "correct": "yes"}]}, "malformed"),
        (ONE_TRACE[0], {"response": ["a"]}, "malformed"),
        (ONE_TRACE[0], {"is_correct": 0.5}, "malformed"),
        (ONE_TRACE[0], {"is_correct": "true"}, "malformed"),
    ],
)  # those of RAW: test_traces.py
def test_a_row_of_the_right_form_with_a_wrong_field_has_a_flaw(tmp_path, form, change, flaw):
    row = only(tmp_path, form, **change)
    assert row.flaw == choose(row, Rules()).no_positive == flaw


@pytest.mark.parametrize("form", [rows[0] for _, rows in FORMS], ids=lambda form: len(form))
def test_any_values_of_the_fields_give_a_row_or_a_counted_drop(tmp_path, form):
    """test_broken_data.py breaks rows of OpenR1-Math-Raw more thoroughly."""
    rng = random.Random(0)
    values = [None, "", "x", "\ud800", 0, 1, 0.5, True, [], [None], [True], ["a"], {}, [[]], [{}]]
    changes = [{name: rng.choice(values) for name in rng.sample(list(form), 2)} for _ in range(800)]
    _, rows = rows_of(tmp_path, [form, *({**form, **change} for change in changes)])
    counts = no_counts(PrepareConfig(), recognize([tmp_path / "raw.jsonl"]))
    for row in rows:
        assert len(row.traces) == len(row.votes) == len(row.complete)
        choice = choose(row, Rules())
        json.dumps([choice.positive, choice.pairs], ensure_ascii=False).encode()
        assert choice.positive or choice.no_positive in counts.no_positive
        assert not choice.positive or choice.pairs or choice.no_pair[0] in counts.no_pair
    assert {None, "malformed"} <= {row.flaw for row in rows}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *[("2", "2"), (" 2 ", "2"), (2, "2"), (2.0, "2"), (0.5, "0.5")],
        *[("", None), ([2], None), (True, None), (None, None)],
    ],
)
def test_an_answer_is_text_or_a_number(tmp_path, answer, text):
    assert only(tmp_path, LISTED, answer=answer).answer == text


# ---------------------------------------------------------------- one trace per row


def test_rows_of_a_problem_are_joined_from_anywhere_in_order_of_first_appearance(tmp_path):
    rows = [{"prompt": p, "output": f"{p}{i}", "label": i % 2} for i, p in enumerate("babcab")]
    (tmp_path / "spool").mkdir()
    halves = {"1.jsonl": rows[:3], "2.jsonl": rows[3:]}
    files = [write_jsonl(tmp_path / name, half) for name, half in halves.items()]
    joined = list(read(files, recognize(files), tmp_path / "spool"))
    assert [(row.problem, row.traces) for row in joined] == [
        ("b", ["b0", "b2", "b5"]),
        ("a", ["a1", "a4"]),
        ("c", ["c3"]),
    ]
    assert joined[0].votes == [(False,), (False,), (True,)]
    assert list((tmp_path / "spool").iterdir()) == []


def test_malformed_rows_belong_to_no_problem_and_come_last(tmp_path):
    bad = {"question": PROBLEM, "response": 7}
    _, rows = rows_of(tmp_path, [ONE_TRACE[0], bad, ONE_TRACE[1], bad])
    assert [row.flaw for row in rows] == [None, "malformed", "malformed"]


def test_labels_of_one_trace_rows_may_be_missing(tmp_path):
    name, (row,) = rows_of(tmp_path, [{"prompt": PROBLEM, "completion": RIGHT, "label": "algebra"}])
    assert name == "one trace a row (prompt, completion)"
    assert row.votes == [()]


def test_a_finish_reason_of_length_is_a_truncated_trace(tmp_path):
    rows = [{"prompt": PROBLEM, "output": "a", "finish_reason": r} for r in ("stop", "length")]
    assert rows_of(tmp_path, rows)[1][0].complete == [True, False]


# ---------------------------------------------------------------- recognizing the form


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "1+1?", "answer": "2"},
        {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant"}]},
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"messages": []},
    ],
)
def test_a_file_of_no_known_form_is_refused_with_its_fields_and_the_forms(tmp_path, row):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, [row])
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/raw.jsonl: not teacher data in a form known here")
    assert f"its fields are {', '.join(row)};" in message
    for name in ("OpenR1-Math-Raw (", "OpenR1-Math-220k (", "problem, traces (", "one trace a row"):
        assert name in message


def test_the_form_is_that_of_the_first_rows_together(tmp_path):
    bare = {"problem": PROBLEM}
    name, rows = rows_of(tmp_path, [bare] * (HEAD - 1) + [RAW])
    assert name == "OpenR1-Math-Raw"
    assert choose(rows[0], Rules()).no_positive == "problem not valid"
    with pytest.raises(UserError):
        rows_of(tmp_path, [bare] * HEAD + [RAW])


def test_files_of_different_forms_are_not_mixed(tmp_path):
    rows = {"a.jsonl": RAW, "b.jsonl": LISTED}
    with pytest.raises(UserError) as error:
        recognize([write_jsonl(tmp_path / name, [row]) for name, row in rows.items()])
    assert str(error.value) == (
        f"{tmp_path}/b.jsonl: is in the form problem, traces, and {tmp_path}/a.jsonl in the form "
        "OpenR1-Math-Raw; prepare them apart"
    )


def test_rows_are_streamed(tmp_path):
    file = write_jsonl(tmp_path / "raw.jsonl", [RAW] * (HEAD + 1) + [{"problem": 1}])
    with open(file, "a") as lines:
        lines.write("{broken\n")
    rows = read([file], recognize([file]), tmp_path)
    assert next(rows).problem == PROBLEM
