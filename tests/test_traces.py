"""redi/prepare/traces.py: one hand-made row per rule of the recipe, and an account that adds up."""

import copy
import hashlib
import json
import random

import pytest

from redi.config import UserError
from redi.prepare.__main__ import PrepareConfig, no_counts
from redi.prepare.raw import FORMS, RawRow
from redi.prepare.traces import Rules, choose

DELETE = object()
RAW = FORMS[0]
COUNTS = no_counts(PrepareConfig(), RAW)
NO_POSITIVE, NO_PAIR = list(COUNTS.no_positive), list(COUNTS.no_pair)


def raw(**changes):
    """A row with a wrong, a right, another right and another wrong trace."""
    both = [False, True, True, False]
    row = {
        "problem": "1+1?",
        "problem_is_valid": "Yes",
        "source": "olympiads",
        "generations": ["It is 3.", "It is 2.", "So 2.", "So 3."],
        "correctness": {
            "llama_verification": list(both),
            "math_verify_answer": [None] * 4,
            "math_verify_reparsed_answer": list(both),
        },
        **changes,
    }
    return {name: value for name, value in row.items() if value is not DELETE}


def labelled(llama, math_verify, **changes):
    labels = {"llama_verification": llama, "math_verify_reparsed_answer": math_verify}
    return raw(correctness=labels, **changes)


def only(row):
    """(positive, pair, reason) of a row under the paper's rules."""
    choice = choose(RAW.read(row), Rules())
    (reason,) = choice.no_pair or [choice.no_positive]
    (pair,) = choice.pairs or [None]
    return choice.positive, pair, reason


# ---------------------------------------------------------------- what a row becomes


def test_the_first_correct_trace_is_chosen_and_the_first_incorrect_one_rejected():
    row_id = hashlib.sha256(b"1+1?\0It is 2.").hexdigest()[:16]
    positive, pair, reason = only(raw())
    assert positive == {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "completion": [{"role": "assistant", "content": "It is 2."}],
        "source": "olympiads",
        "id": row_id,
    }
    assert pair == {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "chosen": [{"role": "assistant", "content": "It is 2."}],
        "rejected": [{"role": "assistant", "content": "It is 3."}],
        "source": "olympiads",
        "id": row_id,
    }
    assert reason is None
    assert list(positive) == ["prompt", "completion", "source", "id"]
    assert list(pair) == ["prompt", "chosen", "rejected", "source", "id"]


def test_a_trace_is_correct_only_when_both_verifiers_say_so():
    positive, pair, _ = only(labelled([True, False, True, True], [False, True, True, False]))
    assert positive["completion"][0]["content"] == "So 2."
    assert pair["rejected"][0]["content"] == "It is 3."


def test_texts_are_taken_as_they_are():
    generations = ["\n wrong ", "<think>\nright\n\n", "", ""]
    positive, pair, _ = only(raw(problem="  1+1?\u2028\n", generations=generations))
    assert positive["prompt"][0]["content"] == "  1+1?\u2028\n"
    assert pair["chosen"][0]["content"] == "<think>\nright\n\n"
    assert pair["rejected"][0]["content"] == "\n wrong "


def test_the_id_is_that_of_the_content_not_of_the_place():
    rows = [raw(), raw(problem="2+2?"), raw(generations=["3", "2", "2", "3"])]
    forward = [positive["id"] for positive, _, _ in map(only, rows)]
    backward = [positive["id"] for positive, _, _ in map(only, reversed(rows))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 3


@pytest.mark.parametrize("valid", ["Yes", "yes", " YES\n"])
def test_a_problem_is_valid_whatever_the_case_and_the_blanks(valid):
    assert only(raw(problem_is_valid=valid))[2] is None


@pytest.mark.parametrize("source", [None, DELETE, "cn_k12_extra"])
def test_a_row_of_any_other_source_stays(source):
    assert only(raw(source=source))[2] is None


# ---------------------------------------------------------------- one row per reason

ALL, NONE = [True] * 4, [False] * 4
LABELS = raw()["correctness"]
DROPPED = [
    ("malformed", raw(generations="It is 2.")),
    ("malformed", raw(generations=["It is 2.", 2, "a", "b"])),
    ("malformed", raw(generations={"0": "It is 2."})),
    ("malformed", raw(problem=11)),
    ("malformed", raw(problem_is_valid=True)),
    ("malformed", raw(source=["olympiads"])),
    ("malformed", raw(correctness=[True, True])),
    ("malformed", raw(correctness={**LABELS, "llama_verification": "true"})),
    ("malformed", raw(correctness={**LABELS, "math_verify_reparsed_answer": [1, 0, 1, 0]})),
    ("malformed", raw(problem="half of a pair: \ud83d")),
    ("malformed", raw(generations=["a", "b", "c", "\udc00"])),
    ("problem not valid", raw(problem_is_valid="No")),
    ("problem not valid", raw(problem_is_valid="")),
    ("problem not valid", raw(problem_is_valid=None)),
    ("problem not valid", raw(problem_is_valid=DELETE)),
    ("source cn_k12", raw(source="cn_k12")),
    ("empty problem", raw(problem="")),
    ("empty problem", raw(problem=" \n")),
    ("empty problem", raw(problem=None)),
    ("empty problem", raw(problem=DELETE)),
    ("no generations", raw(generations=[])),
    ("no generations", raw(generations=None)),
    ("no generations", raw(generations=DELETE)),
    ("labels missing", raw(correctness=None)),
    ("labels missing", raw(correctness=DELETE)),
    ("labels missing", raw(correctness={"llama_verification": ALL})),
    ("labels missing", labelled(None, ALL)),
    ("labels missing", labelled(ALL, None)),
    ("labels missing", labelled([True, None, True, True], ALL)),
    ("labels misaligned", labelled(ALL, [True] * 3)),
    ("labels misaligned", labelled([True] * 5, ALL)),
    ("labels misaligned", labelled([], ALL)),
    ("no correct generation", labelled(NONE, NONE)),
    ("no correct generation", labelled([True, True, False, False], [False, False, True, True])),
    ("empty chosen", raw(generations=["It is 3.", "", "So 2.", "So 3."])),
    ("empty chosen", raw(generations=["It is 3.", " \n", "So 2.", "So 3."])),
    ("empty chosen", raw(generations=["It is 3.", None, "So 2.", "So 3."])),
]
UNPAIRED = [
    ("no incorrect generation", labelled(ALL, ALL)),
    ("empty rejected", raw(generations=["", "It is 2.", "So 2.", "So 3."])),
    ("empty rejected", raw(generations=[None, "It is 2.", "So 2.", "So 3."])),
    ("chosen equals rejected", raw(generations=["It is 2.", "It is 2.", "So 2.", "So 3."])),
]


@pytest.mark.parametrize(("reason", "row"), DROPPED)
def test_a_row_that_breaks_a_rule_gives_nothing_but_its_reason(reason, row):
    assert only(row) == (None, None, reason)


@pytest.mark.parametrize(("reason", "row"), UNPAIRED)
def test_a_row_without_a_usable_wrong_trace_gives_its_positive_alone(reason, row):
    positive, pair, why = only(row)
    assert positive["prompt"][0]["content"] == "1+1?"
    assert pair is None
    assert why == reason


def test_every_reason_has_a_row_above():
    assert {reason for reason, _ in DROPPED} == set(NO_POSITIVE)
    assert {reason for reason, _ in UNPAIRED} == set(NO_PAIR)


def test_the_rules_are_asked_in_their_order():
    row = labelled(NONE, NONE, problem_is_valid="No", source="cn_k12", problem="")
    reasons = [only(row)[2]]
    for mended in ({"problem_is_valid": "Yes"}, {"source": "math"}, {"problem": "1+1?"}):
        row = {**row, **mended}
        reasons.append(only(row)[2])
    assert reasons == [
        "problem not valid",
        "source cn_k12",
        "empty problem",
        "no correct generation",
    ]


def test_rows_come_out_one_for_one_and_in_order():
    rows = [raw(problem="a"), raw(source="cn_k12"), labelled(ALL, ALL, problem="b"), raw()]
    seen = [(p and p["prompt"][0]["content"], q is not None, why) for p, q, why in map(only, rows)]
    assert seen == [
        ("a", True, None),
        (None, False, "source cn_k12"),
        ("b", False, "no incorrect generation"),
        ("1+1?", True, None),
    ]


def test_a_row_is_left_unchanged():
    row = raw()
    before = copy.deepcopy(row)
    only(row)
    assert row == before


def test_whatever_stands_in_the_fields_is_a_row_or_a_counted_drop():
    chance = random.Random(0)
    scraps = [None, "", "yes", "\ud800", 0, True, [], [None], [True], ["a"], ["a", "a"], {}, [[]]]
    labels = {"llama_verification": [True, False], "math_verify_reparsed_answer": [True, False]}
    reasons = set()
    for _ in range(5000):
        row = raw(generations=["a", "b"], correctness=dict(labels))
        for name in chance.sample((*RAW.fields, "source"), chance.choice([0, 1, 2])):
            row[name] = chance.choice(scraps)
        if isinstance(row["correctness"], dict) and chance.random() < 0.5:
            row["correctness"][chance.choice(list(labels))] = chance.choice(scraps)
        positive, pair, reason = only(row)
        json.dumps([positive, pair], ensure_ascii=False).encode()
        assert reason in (None, *NO_POSITIVE, *NO_PAIR)
        assert (positive is None) == (reason in NO_POSITIVE)
        assert (pair is None) == (reason is not None)
        reasons.add(reason)
    assert {None, "malformed", "labels missing", "labels misaligned"} <= reasons


# ---------------------------------------------------------------- other rules than the paper's


def judged(*traces, **changes):
    """A row of (text, votes) or (text, votes, complete) traces."""
    whole = [trace[2] if len(trace) == 3 else True for trace in traces]
    return RawRow(
        problem="1+1?",
        traces=[trace[0] for trace in traces],
        votes=[trace[1] for trace in traces],
        complete=whole,
        **changes,
    )


def texts(choice):
    return [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in choice.pairs]


YES, NO, DISPUTED = (True, True), (False, False), (True, False)


def test_the_defaults_are_the_papers_rules():
    assert NO_POSITIVE == [
        "malformed", "problem not valid", "source cn_k12", "empty problem", "no generations",
        "labels missing", "labels misaligned", "no correct generation", "empty chosen",
    ]  # fmt: skip
    assert NO_PAIR == ["no incorrect generation", "empty rejected", "chosen equals rejected"]


def test_under_the_reject_rule_both_a_disputed_trace_is_neither():
    row = judged(("maybe", DISPUTED), ("right", YES), ("wrong", NO))
    assert texts(choose(row, Rules())) == [("right", "maybe")]
    assert texts(choose(row, Rules(reject_rule="both"))) == [("right", "wrong")]
    row = judged(("maybe", DISPUTED), ("right", YES))
    assert choose(row, Rules(reject_rule="both")).no_pair == ["none that both reject"]


def test_a_trace_without_a_vote_is_neither():
    assert choose(judged(("a", ()), ("right", YES)), Rules()).no_pair == ["no incorrect generation"]
    assert choose(judged(("a", ()), ("wrong", NO)), Rules()).no_positive == "no correct generation"


def test_only_complete_traces_count_when_that_is_required():
    row = judged(("cut", NO, False), ("lucky", YES, False), ("right", YES), ("wrong", NO))
    assert texts(choose(row, Rules())) == [("lucky", "cut")]
    assert texts(choose(row, Rules(require_complete=True))) == [("right", "wrong")]
    row = judged(("cut", NO, False), ("right", YES))
    assert choose(row, Rules(require_complete=True)).no_pair == ["no complete incorrect one"]
    row = judged(("lucky", YES, False), ("wrong", NO))
    assert choose(row, Rules(require_complete=True)).no_positive == "no complete correct one"


def test_the_kth_pair_is_the_kth_correct_and_the_kth_incorrect_trace_and_has_its_own_id():
    row = judged(("n1", NO), ("y1", YES), ("y2", YES), ("n2", NO), ("n3", NO))
    one, two, many = (choose(row, Rules(pairs_per_problem=n)) for n in (1, 2, 9))
    assert texts(one) == [("y1", "n1")]
    assert texts(two) == texts(many) == [("y1", "n1"), ("y2", "n2")]
    assert one.pairs[0] == two.pairs[0]
    assert two.pairs[0]["id"] == two.positive["id"] != two.pairs[1]["id"]
    assert two.pairs[1]["id"] == hashlib.sha256(b"1+1?\0y2\0n2").hexdigest()[:16]


def test_every_further_pair_that_cannot_be_is_counted():
    row = judged(
        *[("y", YES), (" ", YES), ("y", YES), ("y", YES), ("y", YES)],
        *[("n", NO), ("n", NO), ("", NO), ("y", NO), ("n", NO)],
    )
    choice = choose(row, Rules(pairs_per_problem=9))
    assert texts(choice) == [("y", "n")]
    assert choice.no_pair == [
        "empty further chosen",
        "empty rejected",
        "chosen equals rejected",
        "same as another pair",
    ]


def test_a_rejected_trace_may_be_so_much_shorter_and_any_length_longer():
    row = judged(("12345678", YES), ("123", NO))
    assert texts(choose(row, Rules(min_length_ratio=0.375)))
    assert choose(row, Rules(min_length_ratio=0.376)).no_pair == ["rejected too short"]
    assert texts(choose(judged(("1", YES), ("2" * 99, NO)), Rules(min_length_ratio=1.0)))


def test_sources_are_taken_or_left_by_name():
    row = judged(("right", YES), source="amc")
    assert choose(row, Rules(exclude_sources=["amc", "x"])).no_positive == "source amc"
    assert choose(row, Rules(sources=["amc"])).positive
    assert choose(row, Rules(sources=["x"])).no_positive == "source not asked for"
    assert choose(judged(("right", YES), source="cn_k12"), Rules(exclude_sources=["none"])).positive


def test_every_reason_under_any_rules_is_one_that_they_list():
    chance = random.Random(0)
    met = set()
    for _ in range(5000):
        rules = PrepareConfig(
            reject_rule=chance.choice(["either", "both"]),
            require_complete=chance.random() < 0.5,
            pairs_per_problem=chance.choice([1, 2, 5]),
            min_length_ratio=chance.choice([0.0, 0.5]),
            sources=chance.choice([[], ["a"]]),
            exclude_sources=chance.choice([["cn_k12"], ["b", "a"], ["none"]]),
        )
        traces = [
            (chance.choice(["", "a", "bb", "cccc"]), chance.choice([YES, NO, DISPUTED, ()]), whole)
            for whole in chance.choices([True, False], [3, 1], k=chance.randrange(7))
        ]
        choice = choose(judged(*traces, source=chance.choice([None, "a", "none"])), rules)
        listed = no_counts(rules, RAW)
        if choice.positive is None:
            assert choice.no_positive in listed.no_positive
            assert choice.pairs == choice.no_pair == []
        else:
            assert set(choice.no_pair) <= set(listed.no_pair)
            assert 1 <= len(choice.pairs) + len(choice.no_pair) <= rules.pairs_per_problem
            assert len({pair["id"] for pair in choice.pairs}) == len(choice.pairs)
        met.update([choice.no_positive, *choice.no_pair])
    assert met >= {
        "same as another pair",
        "rejected too short",
        "none that both reject",
        "source a",
    }


@pytest.mark.parametrize("wrong", [{"pairs_per_problem": 0}, {"min_length_ratio": -0.1}])
def test_rules_that_make_no_sense_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        Rules(**wrong)
