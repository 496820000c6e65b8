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
    "problem": PROBLEM, "answer": 2, "source": "amc",
    "traces": [{"text": WRONG, "correct": False}, {"text": RIGHT, "correct": True}],
}  # fmt: skip
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


def changed(tmp_path, form, **changes):
    """The RawRow of a changed row, in a file that begins with an unchanged one."""
    return rows_of(tmp_path, [form, {**form, **changes}])[1][1]


@pytest.mark.parametrize(("name", "rows"), FORMS)
def test_each_form_is_named_and_gives_the_same_training_rows(tmp_path, name, rows):
    found, (row,) = rows_of(tmp_path, rows)
    assert found == name
    assert (row.answer, row.flaw) == ("2", None)
    choice = choose(row, Rules())
    assert choice == choose(rows_of(tmp_path, [RAW])[1][0], Rules())
    assert choice.positive["completion"][0]["content"] == RIGHT
    assert choice.pairs[0]["rejected"][0]["content"] == WRONG


def each(row, field):
    return [getattr(trace, field) for trace in row.traces]


def votes(llama, math_verify):
    return {"correctness_llama": llama, "correctness_math_verify": math_verify}


def ends(closed, reasons):
    return {"is_reasoning_complete": closed, "finish_reasons": reasons}


BOTH = [(True, False), (True, True)]
FIELDS = [
    # In the order of the verifiers; a null label is a missing vote.
    (RAW, {}, "votes", BOTH),
    (FLAT, {}, "votes", [(False,), (True,)]),
    (FLAT, votes([True, True], [False, True]), "votes", BOTH),
    (FLAT, votes([True, None], [False, True]), "votes", [(True, False), (True,)]),
    (FLAT, votes([False, True], None), "votes", [(False,), (True,)]),
    (FLAT, votes(None, [None, True]), "votes", [(), (True,)]),
    (FLAT, votes(None, None), "votes", [(), ()]),
    # Either field says that a trace was truncated.
    (FLAT, ends([True, False], None), "complete", [True, False]),
    (FLAT, ends(None, ["length", "stop"]), "complete", [False, True]),
    (FLAT, ends(None, None), "complete", [True, True]),
    # A flat row is valid unless it says otherwise.
    (FLAT, {}, "valid", True),
    *((FLAT, {"problem_is_valid": v}, "valid", v == "Yes") for v in ("Yes", "No", None)),
    # An answer is text or a number.
    *((LISTED, {"answer": answer}, "answer", "2") for answer in ("2", " 2 ", 2, 2.0)),
    (LISTED, {"answer": 0.5}, "answer", "0.5"),
    *((LISTED, {"answer": answer}, "answer", None) for answer in ("", [2], True, None)),
    # Rows that cannot be used; those of RAW are in test_traces.py.
    *((FLAT, {"generations": given}, "flaw", "malformed") for given in (WRONG, [1, 2])),
    (FLAT, {"problem": "\ud83d"}, "flaw", "malformed"),
    (FLAT, {"correctness_math_verify": [1, 0]}, "flaw", "malformed"),
    (FLAT, {"finish_reasons": ["stop"]}, "flaw", "malformed"),
    (FLAT, {"correctness_math_verify": [True]}, "flaw", "labels misaligned"),
    (FLAT, {"correctness_llama": []}, "flaw", "labels misaligned"),
    *(
        (LISTED, {"traces": traces}, "flaw", "malformed")
        for traces in (
            *([RIGHT], [None], {"text": RIGHT}, [{"text": 2}]),
            [{"text": RIGHT, "correct": "yes"}],
        )
    ),
    (ONE_TRACE[0], {"response": ["a"]}, "flaw", "malformed"),
    *((ONE_TRACE[0], {"is_correct": given}, "flaw", "malformed") for given in (0.5, "true")),
]


@pytest.mark.parametrize(("form", "changes", "field", "value"), FIELDS)
def test_what_a_row_says_and_what_is_wrong_with_it(tmp_path, form, changes, field, value):
    row = changed(tmp_path, form, **changes)
    of_traces = field in ("votes", "complete")
    assert (each(row, field) if of_traces else getattr(row, field)) == value
    if field == "flaw":
        assert choose(row, Rules()).no_positive == value


@pytest.mark.parametrize("form", [rows[0] for _, rows in FORMS], ids=lambda form: len(form))
def test_any_values_of_the_fields_give_a_row_or_a_counted_drop(tmp_path, form):
    """test_broken_data.py breaks rows of OpenR1-Math-Raw more thoroughly."""
    rng = random.Random(0)
    values = [None, "", "x", "\ud800", 0, 1, 0.5, True, [], [None], [True], ["a"], {}, [[]], [{}]]
    changes = [{name: rng.choice(values) for name in rng.sample(list(form), 2)} for _ in range(800)]
    _, rows = rows_of(tmp_path, [form, *({**form, **change} for change in changes)])
    counts = no_counts(PrepareConfig(), recognize([tmp_path / "raw.jsonl"]))
    for row in rows:
        choice = choose(row, Rules())
        json.dumps([choice.positive, choice.pairs], ensure_ascii=False).encode()
        assert choice.positive or choice.no_positive in counts.no_positive
        assert not choice.positive or choice.pairs or choice.no_pair[0] in counts.no_pair
    assert {None, "malformed"} <= {row.flaw for row in rows}


# ---------------------------------------------------------------- one trace per row


def test_rows_of_a_problem_are_joined_from_anywhere_in_order_of_first_appearance(tmp_path):
    rows = [{"prompt": p, "output": f"{p}{i}", "label": i % 2} for i, p in enumerate("babcab")]
    rows.insert(1, {"prompt": "b", "output": 7})
    (tmp_path / "spool").mkdir()
    halves = {"1.jsonl": rows[:3], "2.jsonl": rows[3:]}
    files = [write_jsonl(tmp_path / name, half) for name, half in halves.items()]
    *joined, malformed = read(files, recognize(files), tmp_path / "spool")
    assert [(row.problem, each(row, "text")) for row in joined] == [
        ("b", ["b0", "b2", "b5"]), ("a", ["a1", "a4"]), ("c", ["c3"]),
    ]  # fmt: skip
    assert each(joined[0], "votes") == [(False,), (False,), (True,)]
    assert malformed.flaw == "malformed"
    assert list((tmp_path / "spool").iterdir()) == []


def test_one_trace_rows_may_have_no_label_and_a_finish_reason(tmp_path):
    rows = [
        {"prompt": PROBLEM, "completion": text, "label": "algebra", "finish_reason": reason}
        for text, reason in (("a", "stop"), ("b", "length"))
    ]
    name, (row,) = rows_of(tmp_path, rows)
    assert name == "one trace a row (prompt, completion)"
    assert (each(row, "votes"), each(row, "complete")) == ([(), ()], [True, False])


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
