"""redi/prepare/raw.py: four forms of teacher data, and the same rows from each."""

import json
import random

import pytest

from redi.config import UserError
from redi.prepare.raw import HEAD, RawRow, read, recognize
from redi.prepare.traces import Rules, choose

PROBLEM, WRONG, RIGHT = "1+1?", "It is 3.", "It is 2."

# The same problem with a wrong and a right trace, as each form has it: name, rows of the file.
RAW = {
    "problem": PROBLEM,
    "problem_is_valid": "Yes",
    "source": "amc",
    "answer": "2",
    "generations": [WRONG, RIGHT],
    "correctness": {
        "llama_verification": [True, True],
        "math_verify_reparsed_answer": [False, True],
    },
}
FLAT = {
    "problem": PROBLEM,
    "source": "amc",
    "answer": "2",
    "uuid": "u-1",
    "is_reasoning_complete": [True, True],
    "generations": [WRONG, RIGHT],
    "correctness_math_verify": [False, True],
    "correctness_llama": None,
    "finish_reasons": None,
    "correctness_count": 1,
    "messages": [{"role": "user", "content": PROBLEM}],
}
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(tmp_path, rows):
    """(name of the form, the problems) of a file of `rows`."""
    files = [write(tmp_path / "raw.jsonl", rows)]
    form = recognize(files)
    return form.name, list(read(files, form, tmp_path))


def only(tmp_path, row, first):
    """The RawRow of `row` in a file that begins with `first`."""
    return rows_of(tmp_path, [first, row])[1][1]


@pytest.mark.parametrize(("name", "rows"), FORMS)
def test_each_form_is_named_and_gives_the_same_training_rows(tmp_path, name, rows):
    seen, (row,) = rows_of(tmp_path, rows)
    assert seen == name
    assert row.answer == "2"
    choice = choose(row, Rules())
    expected = choose(rows_of(tmp_path, [RAW])[1][0], Rules())
    assert choice == expected
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
def test_a_null_label_is_a_vote_not_given(tmp_path, llama, math_verify, votes):
    labels = {"correctness_llama": llama, "correctness_math_verify": math_verify}
    row = only(tmp_path, {**FLAT, **labels}, FLAT)
    assert row.votes == votes
    assert row.flaw is None


def test_a_trace_that_was_cut_off_is_told_by_either_field(tmp_path):
    changes = {"is_reasoning_complete": [True, False], "finish_reasons": None}
    assert only(tmp_path, {**FLAT, **changes}, FLAT).complete == [True, False]
    changes = {"is_reasoning_complete": None, "finish_reasons": ["length", "stop"]}
    assert only(tmp_path, {**FLAT, **changes}, FLAT).complete == [False, True]
    changes = {"is_reasoning_complete": None, "finish_reasons": None}
    assert only(tmp_path, {**FLAT, **changes}, FLAT).complete == [True, True]


@pytest.mark.parametrize(("valid", "is_valid"), [("Yes", True), ("No", False), (None, False)])
def test_a_flat_row_is_valid_unless_it_says_otherwise(tmp_path, valid, is_valid):
    assert rows_of(tmp_path, [FLAT])[1][0].valid
    assert only(tmp_path, {**FLAT, "problem_is_valid": valid}, FLAT).valid == is_valid


# ---------------------------------------------------------------- rows that cannot be used

FLAWED = [
    (RAW, {"correctness": [True]}, "malformed"),
    (RAW, {"generations": [WRONG, 2]}, "malformed"),
    (RAW, {"correctness": None}, "labels missing"),
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
]


@pytest.mark.parametrize(("form", "change", "flaw"), FLAWED)
def test_a_row_of_the_right_form_with_a_wrong_field_is_kept_as_a_flaw(tmp_path, form, change, flaw):
    row = only(tmp_path, {**form, **change}, form)
    assert row.flaw == flaw
    assert choose(row, Rules()).no_positive == flaw


def test_whatever_stands_in_the_fields_a_row_is_read(tmp_path):
    chance = random.Random(0)
    scraps = [None, "", "x", "\ud800", 0, 1, 0.5, True, [], [None], [True], ["a"], {}, [[]], [{}]]
    for _, first in FORMS:
        rows = [first[0]]
        for _ in range(400):
            row = dict(first[0])
            for name in chance.sample(list(row), 2):
                row[name] = chance.choice(scraps)
            rows.append(row)
        _, read_back = rows_of(tmp_path, rows)
        for row in read_back:
            assert isinstance(row, RawRow)
            assert len(row.traces) == len(row.votes) == len(row.complete)
            choose(row, Rules())
        assert any(row.flaw for row in read_back)
        assert not all(row.flaw for row in read_back)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *[("2", "2"), (" 2 ", "2"), (2, "2"), (2.0, "2"), (0.5, "0.5")],
        *[("", None), ([2], None), (True, None), (None, None)],
    ],
)
def test_an_answer_is_text_or_a_number(tmp_path, answer, text):
    assert only(tmp_path, {**LISTED, "answer": answer}, LISTED).answer == text


# ---------------------------------------------------------------- one trace a row


def test_rows_of_a_problem_are_gathered_from_anywhere_in_order_of_first_appearance(tmp_path):
    order = ["b", "a", "b", "c", "a", "b"]
    rows = [{"prompt": p, "output": f"{p}{i}", "label": i % 2} for i, p in enumerate(order)]
    (tmp_path / "spool").mkdir()
    files = [write(tmp_path / "1.jsonl", rows[:3]), write(tmp_path / "2.jsonl", rows[3:])]
    gathered = list(read(files, recognize(files), tmp_path / "spool"))
    assert [(row.problem, row.traces) for row in gathered] == [
        ("b", ["b0", "b2", "b5"]),
        ("a", ["a1", "a4"]),
        ("c", ["c3"]),
    ]
    assert gathered[0].votes == [(False,), (False,), (True,)]
    assert list((tmp_path / "spool").iterdir()) == []


def test_malformed_rows_belong_to_no_problem_and_come_last(tmp_path):
    bad = {"question": PROBLEM, "response": 7}
    _, rows = rows_of(tmp_path, [ONE_TRACE[0], bad, ONE_TRACE[1], bad])
    assert [row.flaw for row in rows] == [None, "malformed", "malformed"]


def test_labels_of_one_trace_rows_may_be_missing(tmp_path):
    name, (row,) = rows_of(tmp_path, [{"prompt": PROBLEM, "completion": RIGHT, "label": "algebra"}])
    assert name == "one trace a row (prompt, completion)"
    assert row.votes == [()]


def test_a_finish_reason_of_length_is_a_trace_cut_off(tmp_path):
    rows = [{"prompt": PROBLEM, "output": "a", "finish_reason": r} for r in ("stop", "length")]
    assert rows_of(tmp_path, rows)[1][0].complete == [True, False]


# ---------------------------------------------------------------- telling the form


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
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/raw.jsonl: not teacher data in a form known here")
    assert f"its fields are {', '.join(row)};" in said
    for name in ("OpenR1-Math-Raw (", "OpenR1-Math-220k (", "problem, traces (", "one trace a row"):
        assert name in said


def test_the_form_is_that_of_the_first_rows_together(tmp_path):
    bare = {"problem": PROBLEM}
    name, rows = rows_of(tmp_path, [bare] * (HEAD - 1) + [RAW])
    assert name == "OpenR1-Math-Raw"
    assert choose(rows[0], Rules()).no_positive == "problem not valid"
    with pytest.raises(UserError):
        rows_of(tmp_path, [bare] * HEAD + [RAW])


def test_files_of_different_forms_are_not_mixed(tmp_path):
    files = [write(tmp_path / "a.jsonl", [RAW]), write(tmp_path / "b.jsonl", [LISTED])]
    with pytest.raises(UserError) as error:
        recognize(files)
    assert str(error.value) == (
        f"{tmp_path}/b.jsonl: is in the form problem, traces, and {tmp_path}/a.jsonl in the form "
        "OpenR1-Math-Raw; prepare them apart"
    )


def test_rows_are_streamed(tmp_path):
    files = [write(tmp_path / "raw.jsonl", [RAW] * (HEAD + 1) + [{"problem": 1}])]
    with open(files[0], "a") as file:
        file.write("{broken\n")
    rows = read(files, recognize(files), tmp_path)
    assert next(rows).problem == PROBLEM
