"""redi/prepare/traces.py: one hand-made row per rule of the recipe, and an account that adds up."""

import hashlib

import pytest

from redi.prepare.__main__ import PrepareConfig, no_counts
from redi.prepare.raw import FORMS, RawRow, Trace
from redi.prepare.traces import Rules, choose

DELETE = object()
RAW = FORMS[0]


def labels(llama, math_verify):
    return {"llama_verification": llama, "math_verify_reparsed_answer": math_verify}


WRONG_RIGHT = [False, True, True, False]
LABELS = labels(WRONG_RIGHT, WRONG_RIGHT)


def raw(**changes):
    """A row with a wrong, a right, another right and another wrong trace."""
    row = {
        "problem": "1+1?",
        "problem_is_valid": "Yes",
        "source": "olympiads",
        "generations": ["It is 3.", "It is 2.", "So 2.", "So 3."],
        "correctness": {**LABELS, "math_verify_answer": [None] * 4},
        **changes,
    }
    return {name: value for name, value in row.items() if value is not DELETE}


def only(**changes):
    """(positive, pair, reason) of a row under the paper's rules."""
    choice = choose(RAW.read(raw(**changes)), Rules())
    (reason,) = choice.no_pair or [choice.no_positive]
    (pair,) = choice.pairs or [None]
    return choice.positive, pair, reason


def text(row, side):
    (message,) = row[side]
    return message["content"]


# ---------------------------------------------------------------- what a row becomes


def test_the_first_correct_trace_is_chosen_and_the_first_incorrect_one_rejected_as_they_are():
    problem, right, wrong = "  1+1?\u2028\n", "<think>\nright\n\n", "\n wrong "
    positive, pair, reason = only(problem=problem, generations=[wrong, right, "", ""])
    shared = {
        "source": "olympiads",
        "id": hashlib.sha256(f"{problem}\0{right}".encode()).hexdigest()[:16],
        "prompt": [{"role": "user", "content": problem}],
    }
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, wrong))
    assert positive == {**shared, "completion": chosen}
    assert pair == {**shared, "chosen": chosen, "rejected": rejected}
    assert reason is None


def test_a_trace_is_correct_only_when_both_verifiers_say_so():
    split = labels([True, False, True, True], [False, True, True, False])
    positive, pair, _ = only(correctness=split)
    assert text(positive, "completion") == "So 2."
    assert text(pair, "rejected") == "It is 3."


@pytest.mark.parametrize(
    "changes",
    [
        *({"problem_is_valid": valid} for valid in ("Yes", "yes", " YES\n")),
        *({"source": source} for source in (None, DELETE, "cn_k12_extra")),
    ],
)
def test_a_valid_problem_of_another_source_than_the_excluded_is_kept(changes):
    assert only(**changes)[2] is None


# ---------------------------------------------------------------- one row per reason

ALL, NONE = [True] * 4, [False] * 4
DROPPED = {
    "malformed": [
        *({"generations": g} for g in ("It is 2.", ["It is 2.", 2, "a", "b"], {"0": "It is 2."})),
        *({"problem": 11}, {"problem_is_valid": True}, {"source": ["olympiads"]}),
        {"correctness": [True, True]},
        {"correctness": {**LABELS, "llama_verification": "true"}},
        {"correctness": {**LABELS, "math_verify_reparsed_answer": [1, 0, 1, 0]}},
        *({"problem": "half of a pair: \ud83d"}, {"generations": ["a", "b", "c", "\udc00"]}),
    ],
    "problem not valid": [{"problem_is_valid": valid} for valid in ("No", "", None, DELETE)],
    "source cn_k12": [{"source": "cn_k12"}],
    "empty problem": [{"problem": problem} for problem in ("", " \n", None, DELETE)],
    "no generations": [{"generations": generations} for generations in ([], None, DELETE)],
    "labels missing": [
        {"correctness": given}
        for given in (
            *(None, DELETE, {"llama_verification": ALL}, labels(None, ALL), labels(ALL, None)),
            labels([True, None, True, True], ALL),
        )
    ],
    "labels misaligned": [
        {"correctness": given}
        for given in (labels(ALL, [True] * 3), labels([True] * 5, ALL), labels([], ALL))
    ],
    "no correct generation": [
        {"correctness": given}
        for given in (labels(NONE, NONE), labels(ALL[:2] + NONE[:2], NONE[:2] + ALL[:2]))
    ],
    "empty chosen": [
        {"generations": ["It is 3.", chosen, "So 2.", "So 3."]} for chosen in ("", " \n", None)
    ],
}
UNPAIRED = {
    "no incorrect generation": [{"correctness": labels(ALL, ALL)}],
    "empty rejected": [
        {"generations": [rejected, "It is 2.", "So 2.", "So 3."]} for rejected in ("", None)
    ],
    "chosen equals rejected": [{"generations": ["It is 2.", "It is 2.", "So 2.", "So 3."]}],
}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [(reason, row) for reason, rows in (DROPPED | UNPAIRED).items() for row in rows],
)
def test_a_row_that_breaks_a_rule_gives_nothing_and_without_a_usable_wrong_trace_no_pair(
    reason, changes
):
    positive, pair, found = only(**changes)
    assert (pair, found) == (None, reason)
    assert (positive is None) == (reason in DROPPED)


def test_the_papers_rules_have_these_reasons_and_each_has_a_row_above():
    counts = no_counts(PrepareConfig(), RAW)
    assert (list(DROPPED), list(UNPAIRED)) == (list(counts.no_positive), list(counts.no_pair))


def test_the_rules_are_checked_in_their_order():
    changes = {
        "correctness": labels(NONE, NONE), "problem_is_valid": "No", "source": "cn_k12",
        "problem": "",
    }  # fmt: skip
    reasons = [only(**changes)[2]]
    for name, value in {"problem_is_valid": "Yes", "source": "math", "problem": "1+1?"}.items():
        changes[name] = value
        reasons.append(only(**changes)[2])
    assert reasons == [
        "problem not valid", "source cn_k12", "empty problem", "no correct generation",
    ]  # fmt: skip


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
    choice = choose(row, Rules(**rules))
    assert expected in (texts(choice), choice.no_positive, *choice.no_pair)


def test_the_kth_pair_is_the_kth_correct_and_the_kth_incorrect_trace_and_has_another_id():
    row = judged(("n1", NO), ("y1", YES), ("y2", YES), ("n2", NO), ("n3", NO))
    one, two, many = (choose(row, Rules(pairs_per_problem=n)) for n in (1, 2, 9))
    assert texts(one) == [("y1", "n1")]
    assert texts(two) == texts(many) == [("y1", "n1"), ("y2", "n2")]
    assert one.pairs[0] == two.pairs[0]
    assert two.pairs[0]["id"] == two.positive["id"] != two.pairs[1]["id"]
    assert two.pairs[1]["id"] == hashlib.sha256(b"1+1?\0y2\0n2").hexdigest()[:16]


def test_every_further_pair_that_is_impossible_is_counted():
    chosen, rejected = ("y", " ", "y", "y", "y"), ("n", "n", "", "y", "n")
    row = judged(*((t, YES) for t in chosen), *((t, NO) for t in rejected))
    choice = choose(row, Rules(pairs_per_problem=9))
    assert texts(choice) == [("y", "n")]
    assert choice.no_pair == [
        "empty further chosen", "empty rejected", "chosen equals rejected", "same as another pair",
    ]  # fmt: skip
