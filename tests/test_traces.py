"""redi/prepare/raw.py and traces.py: four forms of teacher data, one hand-made row per rule of the
recipe, and an account that adds up. test_broken_data.py breaks rows at random."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import refusal, write_jsonl

from redi.prepare.__main__ import Counts
from redi.prepare.raw import FORMS, HEAD, RawRow, Trace, read, recognize
from redi.prepare.traces import PrepareConfig, choose

DELETE = object()
PROBLEM, WRONG, RIGHT = "1+1?", "It is 3.", "It is 2."
TEXTS, LABELS = [WRONG, RIGHT, "So 2.", "So 3."], [False, True, True, False]


def labels(llama, math_verify):
    return {"llama_verification": llama, "math_verify_reparsed_answer": math_verify}


def flat_labels(llama, math_verify):
    return {"correctness_llama": llama, "correctness_math_verify": math_verify}


# The same problem with its traces in each form.
SHARED = {"problem": PROBLEM, "source": "amc", "answer": "2"}
VERIFIED = {**labels(LABELS, LABELS), "math_verify_answer": [None] * 4}
RAW = {**SHARED, "problem_is_valid": "Yes", "generations": TEXTS, "correctness": VERIFIED}
FLAT = {
    **SHARED, **flat_labels(None, LABELS), "uuid": "u-1", "generations": TEXTS,
    "is_reasoning_complete": [True] * 4, "finish_reasons": None,
    "correctness_count": 2, "messages": [{"role": "user", "content": PROBLEM}],
}  # fmt: skip
LISTED = {
    **SHARED, "answer": 2, "traces": [{"text": t, "correct": c} for t, c in zip(TEXTS, LABELS)],
}  # fmt: skip
ONE_TRACE = [
    {"question": PROBLEM, "response": text, "is_correct": int(label), "problem_source": "amc"}
    for text, label in zip(TEXTS, LABELS)
]
ONE_TRACE[-1]["expected_answer"] = "2"
SAMPLES = {
    "OpenR1-Math-Raw": [RAW], "OpenR1-Math-220k": [FLAT], "problem, traces": [LISTED],
    "one trace per row (question, response, is_correct, expected_answer, problem_source)":
        ONE_TRACE,
}  # fmt: skip


def rows_of(tmp_path, rows):
    """(name of the form, the problems) of a file of `rows`."""
    files = [write_jsonl(tmp_path / "raw.jsonl", rows)]
    form = recognize(files)
    return form.name, list(read(files, form, tmp_path))


def changed(tmp_path, sample, changes):
    """The RawRow of a changed row, in a file that begins with an unchanged one."""
    row = {name: value for name, value in {**sample, **changes}.items() if value is not DELETE}
    return rows_of(tmp_path, [sample, row])[1][1]


def only(**changes):
    """(positive, pair, reason) of a row of OpenR1-Math-Raw under the paper's rules."""
    choice = choose(FORMS[0].read({**RAW, **changes}), PrepareConfig(raw="raw.jsonl"))
    (reason,) = choice.no_pair or [choice.no_positive]
    (pair,) = choice.pairs or [None]
    return choice.positive, pair, reason


def text(row, side):
    (message,) = row[side]
    return message["content"]


def each(row, field):
    return [getattr(trace, field) for trace in row.traces]


# ---------------------------------------------------------------- what a row becomes


@pytest.mark.parametrize("name", SAMPLES)
def test_each_form_is_named_and_gives_the_same_training_rows(tmp_path, name):
    found, (row,) = rows_of(tmp_path, SAMPLES[name])
    assert found == name
    assert (row.answer, row.flaw) == ("2", None)
    choice = choose(row, PrepareConfig(raw="raw.jsonl"))
    positive, pair, _ = only()
    assert (choice.positive, choice.pairs) == (positive, [pair])


def test_the_first_correct_trace_is_chosen_and_the_first_incorrect_one_rejected_as_they_are():
    problem, right, wrong = "  1+1?\u2028\n", "<think>\nright\n\n", "\n wrong "
    positive, pair, reason = only(problem=problem, generations=[wrong, right, "", ""])
    shared = {
        "source": "amc",
        "id": hashlib.sha256(f"{problem}\0{right}".encode()).hexdigest()[:16],
        "prompt": [{"role": "user", "content": problem}],
    }
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, wrong))
    assert positive == {**shared, "completion": chosen}
    assert pair == {**shared, "chosen": chosen, "rejected": rejected}
    assert reason is None


ROLES = {"role": "user", "content": PROBLEM}, {"role": "assistant", "content": RIGHT}
FROM = {"from": "human", "value": PROBLEM}, {"from": "gpt", "value": RIGHT}
INFO = dict.fromkeys(("source", "reference_answer", "think_content", "answer_content"))
COLUMNS = {f"r1_solution_{number}": text for number, text in enumerate(TEXTS[:3], 1)}
THOUGHT = "<think>\n1+1\n</think>\n\nIt is 2."
# The fields of published rows; what prepare finds in them: texts, votes, answer, source.
PUBLISHED = {
    "NuminaMath-QwQ-CoT-5M": (
        {"prompt": PROBLEM, "response": RIGHT, "ground_truth": "2", "correct": True},
        "one trace per row (prompt, response, correct, ground_truth)",
        [RIGHT], [[True]], "2", None,
    ),
    "SYNTHETIC-1": (
        {
            "response_id": "r", "problem_id": "p", "task_type": "verifiable_math", "source": "amc",
            "in_source_id": "7", "prompt": PROBLEM, "gold_standard_solution": "2",
            "llm_response": WRONG, "verification_info": "{}", "score": 0.0, "metadata": "{}",
        },
        "one trace per row (prompt, llm_response, score, gold_standard_solution, source)",
        [WRONG], [[False]], "2", "amc",
    ),
    "SYNTHETIC-2-SFT-verified": (
        {"problem_id": "p", "task_type": "math", "reward": 1.0, "messages": [*ROLES]},
        "one trace per row (user turn, assistant turn, reward)", [RIGHT], [[True]], None, None,
    ),
    "AM-DeepSeek-R1-Distilled-1.4M": (
        {"messages": [{**ROLES[0], "info": {**INFO, "source": "amc", "reference_answer": "2"}},
                      {**ROLES[1], "info": {**INFO, "think_content": "1+1"}}]},
        "one trace per row (user turn, assistant turn, reference_answer, source)",
        [RIGHT], [[]], "2", "amc",
    ),
    "AceReason-1.1-SFT": (
        {"category": "math", "source": "amc", "input": PROBLEM, "output": RIGHT},
        "one trace per row (input, output, source)", [RIGHT], [[]], None, "amc",
    ),
    "OpenThoughts3-1.2M": (
        {"difficulty": 7, "source": "amc", "domain": "math", "conversations": [*FROM]},
        "one trace per row (user turn, assistant turn, source)", [RIGHT], [[]], None, "amc",
    ),
    "DeepMath-103K": (
        {"question": PROBLEM, "final_answer": "2", "difficulty": 5.0, "topic": "x", **COLUMNS},
        "problem, traces", TEXTS[:3], [[]] * 3, "2", None,
    ),
    "s1K-1.1": (
        {
            "solution": "2", "question": PROBLEM, "cot_type": "math", "source_type": "amc",
            "metadata": "{}", "gemini_thinking_trajectory": "x", "gemini_attempt": "x",
            "deepseek_thinking_trajectory": "1+1\n", "deepseek_attempt": RIGHT,
            "gemini_grade": "No", "gemini_grade_reason": "x", "deepseek_grade": "Yes",
            "deepseek_grade_reason": "x",
        },
        "one trace per row (question, deepseek_attempt, deepseek_grade)",
        [THOUGHT], [[True]], None, None,
    ),
    "messages with reasoning_content": (
        {"messages": [ROLES[0], {**ROLES[1], "reasoning_content": "1+1"}], "score": 1},
        "one trace per row (user turn, assistant turn, score)", [THOUGHT], [[True]], None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_fields_of_published_data_give_their_traces_and_labels(tmp_path, name, parquet):
    row, form, texts, votes, answer, source = PUBLISHED[name]
    file = tmp_path / ("raw.parquet" if parquet else "raw.jsonl")
    rows = [row, {**row, "id": "another"}]
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        write_jsonl(file, rows)
    found = recognize([file])
    first, *others = read([file], found, tmp_path)
    assert found.name == form
    assert (first.problem, first.answer, first.source) == (PROBLEM, answer, source)
    of_both = 2 if found.one_trace else 1  # joined, or a row each
    assert len(others) == 2 - of_both
    assert each(first, "text") == texts * of_both
    assert [list(given) for given in each(first, "votes")] == votes * of_both


OTHER_TURNS = [
    [{"role": "system", "content": "Be brief."}, *ROLES], [*ROLES, *ROLES], ROLES[:1], ROLES[::-1],
    [ROLES[0], {"role": "assistant", "content": None}], [*FROM, *ROLES], "text", {}, [], None,
]  # fmt: skip


@pytest.mark.parametrize("turns", OTHER_TURNS)
def test_conversations_of_other_turns_are_refused_and_malformed_among_good_ones(tmp_path, turns):
    good, other = {"messages": ROLES, "reward": 1}, {"messages": turns, "reward": 1}
    name, (row, malformed) = rows_of(tmp_path, [other, good])
    assert (name, each(row, "text")) == (PUBLISHED["SYNTHETIC-2-SFT-verified"][1], [RIGHT])
    assert malformed.flaw == "malformed"
    assert "conversations of one user and one" in refusal(rows_of, tmp_path, [other])


def test_an_attempt_without_a_thought_is_a_trace_and_grades_are_yes_or_no(tmp_path):
    sample = PUBLISHED["s1K-1.1"][0]
    changes = {"deepseek_thinking_trajectory": None, "deepseek_grade": "No", "question": "2+2?"}
    row = changed(tmp_path, sample, changes)
    assert (each(row, "text"), each(row, "votes")) == ([RIGHT], [[False]])
    assert changed(tmp_path, sample, {"deepseek_grade": "Perhaps"}).flaw == "malformed"


def test_alpacas_input_is_not_taken_for_the_problem(tmp_path):
    row = {"instruction": "Add them.", "input": "1, 1", "output": "2"}
    assert "not teacher data in a form known here" in refusal(rows_of, tmp_path, [row])


def ends(closed, reasons):
    return {"is_reasoning_complete": closed, "finish_reasons": reasons}


def two(llama, math_verify):
    """A flat row of two traces with these labels."""
    return {"generations": TEXTS[:2], **ends(None, None), **flat_labels(llama, math_verify)}


FIELDS = [
    # In the order of the verifiers; a null label is a missing vote.
    (RAW, {"correctness": labels([True] * 4, LABELS)}, "votes", [(True, c) for c in LABELS]),
    (FLAT, two(None, [False, True]), "votes", [(False,), (True,)]),
    (FLAT, two([True, True], [False, True]), "votes", [(True, False), (True, True)]),
    (FLAT, two([True, None], [False, True]), "votes", [(True, False), (True,)]),
    (FLAT, two([False, True], None), "votes", [(False,), (True,)]),
    (FLAT, two(None, [None, True]), "votes", [(), (True,)]),
    (FLAT, two(None, None), "votes", [(), ()]),
    # Either field says that a trace was truncated.
    (FLAT, ends([True, False] * 2, None), "complete", [True, False] * 2),
    (FLAT, ends(None, ["length", "stop"] * 2), "complete", [False, True] * 2),
    (FLAT, ends(None, None), "complete", [True] * 4),
    # An answer is text or a number.
    *((LISTED, {"answer": answer}, "answer", "2") for answer in ("2", " 2 ", 2, 2.0)),
    (LISTED, {"answer": 0.5}, "answer", "0.5"),
    *((LISTED, {"answer": answer}, "answer", None) for answer in ("", [2], True, None)),
]


@pytest.mark.parametrize(("sample", "changes", "field", "value"), FIELDS)
def test_what_a_row_says_of_its_traces_and_its_answer(tmp_path, sample, changes, field, value):
    row = changed(tmp_path, sample, changes)
    assert (row.answer if field == "answer" else each(row, field)) == value


# ---------------------------------------------------------------- one row per reason

ALL, NONE, SIDES = [True] * 4, [False] * 4, ([True, True, False, False], [False, False, True, True])


def changes_of(field, *values):
    return [(RAW, {field: value}) for value in values]


def first_traces(*texts):
    return [*texts, *TEXTS[len(texts) :]]


DROPPED = {
    "malformed": [
        *changes_of("generations", RIGHT, first_traces(RIGHT, 2), {"0": RIGHT}),
        *changes_of("generations", first_traces("half of a pair: \ud83d")),
        *changes_of("problem", 11, "half of a pair: \ud83d"),
        *changes_of("correctness", [True, True], labels("true", ALL), labels(ALL, [1, 0, 1, 0])),
        *((RAW, change) for change in ({"problem_is_valid": True}, {"source": ["amc"]})),
        *((FLAT, {"generations": given}) for given in (WRONG, [1, 2, 3, 4])),
        *((FLAT, change) for change in (flat_labels(None, [1] * 4), {"finish_reasons": ["stop"]})),
        *((LISTED, {"traces": given}) for given in ([RIGHT], [None], {}, [{"text": 2}])),
        (LISTED, {"traces": [{"text": RIGHT, "correct": "yes"}]}),
        *((ONE_TRACE[0], {"is_correct": given}) for given in (0.5, "true")),
        (ONE_TRACE[0], {"response": ["a"]}),
    ],
    "problem not valid": [
        *changes_of("problem_is_valid", "No", "", None, DELETE),
        *((FLAT, {"problem_is_valid": valid}) for valid in ("No", None)),
    ],
    "source cn_k12": changes_of("source", "cn_k12"),
    "empty problem": changes_of("problem", "", " \n", None, DELETE),
    "no generations": changes_of("generations", [], None, DELETE),
    "labels missing": changes_of(
        "correctness", None, DELETE, {"llama_verification": ALL}, labels(None, ALL),
        labels(ALL, None), labels([True, None, True, True], ALL),
    ),
    "labels misaligned": [
        *changes_of("correctness", labels(ALL, ALL[:3]), labels([True] * 5, ALL), labels([], ALL)),
        *((FLAT, flat_labels(*given)) for given in ((None, [True]), ([], LABELS))),
    ],
    "no correct generation": changes_of("correctness", labels(NONE, NONE), labels(*SIDES)),
    "empty chosen": changes_of("generations", *(first_traces(WRONG, t) for t in ("", " \n", None))),
}  # fmt: skip
UNPAIRED = {
    "no incorrect generation": changes_of("correctness", labels(ALL, ALL)),
    "empty rejected": changes_of("generations", first_traces(""), first_traces(None)),
    "chosen equals rejected": changes_of("generations", first_traces(RIGHT)),
}
# A row counts for the first rule that it breaks.
NO_LABELS = {"correctness": labels(NONE, NONE)}
EMPTY = {"problem": "", **NO_LABELS}
FIRST = {
    "problem not valid": [(RAW, {"problem_is_valid": "No", "source": "cn_k12", **EMPTY})],
    "source cn_k12": [(RAW, {"source": "cn_k12", **EMPTY})],
    "empty problem": [(RAW, EMPTY)],
}
NO_REASON = [
    *changes_of("problem_is_valid", "yes", " YES\n"),
    *changes_of("source", None, DELETE, "cn_k12_extra"),
    (FLAT, {"problem_is_valid": "Yes"}),
]


@pytest.mark.parametrize(
    ("reason", "sample", "changes"),
    [
        (reason, *row)
        for table in (DROPPED, UNPAIRED, FIRST, {None: NO_REASON})
        for reason, rows in table.items()
        for row in rows
    ],
)
def test_a_row_that_breaks_a_rule_gives_nothing_and_without_a_usable_wrong_trace_no_pair(
    tmp_path, reason, sample, changes
):
    choice = choose(changed(tmp_path, sample, changes), PrepareConfig(raw="raw.jsonl"))
    assert [choice.no_positive, *choice.no_pair] == [
        reason if reason in DROPPED else None, *([reason] if reason in UNPAIRED else []),
    ]  # fmt: skip
    assert (choice.positive is None) == (reason in DROPPED)
    assert bool(choice.pairs) == (reason is None)


def test_the_papers_rules_have_these_reasons_and_each_has_a_row_above():
    counts = Counts(PrepareConfig(raw="raw.jsonl"), FORMS[0])
    assert (list(DROPPED), list(UNPAIRED)) == (list(counts.no_positive), list(counts.no_pair))


# ---------------------------------------------------------------- other rules than the paper's


def judged(*traces, **changes):
    """A row of (text, votes) or (text, votes, complete) traces."""
    return RawRow(problem="1+1?", traces=[Trace(*trace) for trace in traces], **changes)


def texts(choice):
    return [(text(pair, "chosen"), text(pair, "rejected")) for pair in choice.pairs]


YES, NO, DISPUTED = (True, True), (False, False), (True, False)
SPLIT = [("maybe", DISPUTED), ("right", YES), ("wrong", NO)]
CUT = [("cut", NO, False), ("lucky", YES, False), ("right", YES), ("wrong", NO)]
LONG = [("12345678", YES), ("123", NO)]
COMPLETE = {"require_complete": True}
AMC = {"source": "amc"}


@pytest.mark.parametrize(
    ("rules", "row", "expected"),
    [
        ({}, judged(*SPLIT), [("right", "maybe")]),
        ({"reject_rule": "both"}, judged(*SPLIT), [("right", "wrong")]),
        ({"reject_rule": "both"}, judged(*SPLIT[:2]), "none that both reject"),
        ({}, judged(("a", ()), ("right", YES)), "no incorrect generation"),
        ({}, judged(("a", ()), ("wrong", NO)), "no correct generation"),
        ({}, judged(*CUT), [("lucky", "cut")]),
        (COMPLETE, judged(*CUT), [("right", "wrong")]),
        (COMPLETE, judged(("cut", NO, False), ("right", YES)), "no complete incorrect one"),
        (COMPLETE, judged(("lucky", YES, False), ("wrong", NO)), "no complete correct one"),
        ({"min_length_ratio": 0.375}, judged(*LONG), [("12345678", "123")]),
        ({"min_length_ratio": 0.376}, judged(*LONG), "rejected too short"),
        ({"min_length_ratio": 1.0}, judged(("1", YES), ("2" * 99, NO)), [("1", "2" * 99)]),
        ({"exclude_sources": ["amc", "x"]}, judged(*LONG, **AMC), "source amc"),
        ({"sources": ["amc"]}, judged(*LONG, **AMC), [("12345678", "123")]),
        ({"sources": ["x"]}, judged(*LONG, **AMC), "source not asked for"),
        ({"exclude_sources": ["none"]}, judged(*LONG, source="cn_k12"), [("12345678", "123")]),
    ],
)
def test_each_rule_decides_which_traces_are_a_pair(rules, row, expected):
    choice = choose(row, PrepareConfig(raw="raw.jsonl", **rules))
    assert expected in (texts(choice), choice.no_positive, *choice.no_pair)


def test_the_kth_pair_is_the_kth_correct_and_the_kth_incorrect_trace_and_has_another_id():
    row = judged(("n1", NO), ("y1", YES), ("y2", YES), ("n2", NO), ("n3", NO))
    one, two, many = (
        choose(row, PrepareConfig(raw="raw.jsonl", pairs_per_problem=n)) for n in (1, 2, 9)
    )
    assert texts(one) == [("y1", "n1")]
    assert texts(two) == texts(many) == [("y1", "n1"), ("y2", "n2")]
    assert one.pairs[0] == two.pairs[0]
    assert two.pairs[0]["id"] == two.positive["id"] != two.pairs[1]["id"]
    assert two.pairs[1]["id"] == hashlib.sha256(b"1+1?\0y2\0n2").hexdigest()[:16]


def test_every_further_pair_that_is_impossible_is_counted():
    chosen, rejected = ("y", " ", "y", "y", "y"), ("n", "n", "", "y", "n")
    row = judged(*((t, YES) for t in chosen), *((t, NO) for t in rejected))
    choice = choose(row, PrepareConfig(raw="raw.jsonl", pairs_per_problem=9))
    assert texts(choice) == [("y", "n")]
    assert choice.no_pair == [
        "empty further chosen", "empty rejected", "chosen equals rejected", "same as another pair",
    ]  # fmt: skip


# ---------------------------------------------------------------- files


def test_rows_of_a_problem_are_joined_from_anywhere_in_order_of_first_appearance(tmp_path):
    rows = [{"prompt": p, "output": f"{p}{i}", "label": i % 2} for i, p in enumerate("babcab")]
    rows[4]["finish_reason"] = "length"
    rows.insert(1, {"prompt": "b", "output": 7})
    (tmp_path / "spool").mkdir()
    halves = {"1.jsonl": rows[:3], "2.jsonl": rows[3:]}
    files = [write_jsonl(tmp_path / name, half) for name, half in halves.items()]
    *joined, malformed = read(files, recognize(files), tmp_path / "spool")
    assert [(row.problem, each(row, "text")) for row in joined] == [
        ("b", ["b0", "b2", "b5"]), ("a", ["a1", "a4"]), ("c", ["c3"]),
    ]  # fmt: skip
    assert each(joined[0], "votes") == [[False], [False], [True]]
    assert each(joined[1], "complete") == [True, False]
    assert malformed.flaw == "malformed"
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_field_that_holds_no_labels_is_no_label(tmp_path):
    rows = [{"prompt": PROBLEM, "completion": RIGHT, "label": "algebra"}]
    name, (row,) = rows_of(tmp_path, rows)
    assert (name, each(row, "votes")) == ("one trace per row (prompt, completion)", [[]])


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
    message = refusal(rows_of, tmp_path, [row])
    assert message.startswith(f"{tmp_path}/raw.jsonl: not teacher data in a form known here")
    assert f"its fields are {', '.join(row)};" in message
    for name in (*list(SAMPLES)[:3], "one trace per row"):
        assert f"{name} (" in message


def test_the_form_is_that_of_the_first_rows_together_and_rows_are_streamed(tmp_path):
    bare = {"problem": PROBLEM}
    file = write_jsonl(tmp_path / "raw.jsonl", [bare] * (HEAD - 1) + [RAW])
    with open(file, "a") as lines:
        lines.write("{broken\n")
    form = recognize([file])
    assert form.name == "OpenR1-Math-Raw"
    assert next(read([file], form, tmp_path)).flaw == "problem not valid"
    assert "not teacher data" in refusal(rows_of, tmp_path, [bare] * HEAD + [RAW])


def test_files_of_different_forms_are_not_mixed(tmp_path):
    rows = {"a.jsonl": RAW, "b.jsonl": LISTED}
    files = [write_jsonl(tmp_path / name, [row]) for name, row in rows.items()]
    assert refusal(recognize, files) == (
        f"{tmp_path}/b.jsonl: is in the form problem, traces, and {tmp_path}/a.jsonl in the form "
        "OpenR1-Math-Raw; prepare them apart"
    )
