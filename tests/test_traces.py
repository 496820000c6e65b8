"""redi/prepare/traces.py: one hand-made row per rule of the recipe, and an account that adds up."""

import hashlib
import random

import pytest

from redi.prepare.__main__ import PrepareConfig, no_counts
from redi.prepare.raw import FORMS, RawRow
from redi.prepare.traces import Rules, choose

DELETE = object()
RAW = FORMS[0]
COUNTS = no_counts(PrepareConfig(), RAW)
NO_POSITIVE, NO_PAIR = list(COUNTS.no_positive), list(COUNTS.no_pair)


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


def test_the_first_correct_trace_is_chosen_and_the_first_incorrect_one_rejected():
    row_id = hashlib.sha256(b"1+1?\0It is 2.").hexdigest()[:16]
    positive, pair, reason = only()
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
    split = labels([True, False, True, True], [False, True, True, False])
    positive, pair, _ = only(correctness=split)
    assert text(positive, "completion") == "So 2."
    assert text(pair, "rejected") == "It is 3."


def test_texts_are_taken_as_they_are():
    generations = ["\n wrong ", "<think>\nright\n\n", "", ""]
    positive, pair, _ = only(problem="  1+1?\u2028\n", generations=generations)
    assert text(positive, "prompt") == "  1+1?\u2028\n"
    assert text(pair, "chosen") == "<think>\nright\n\n"
    assert text(pair, "rejected") == "\n wrong "


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


def cases(table):
    return [(reason, changes) for reason, rows in table.items() for changes in rows]


@pytest.mark.parametrize(("reason", "changes"), cases(DROPPED))
def test_a_row_that_breaks_a_rule_gives_nothing_but_its_reason(reason, changes):
    assert only(**changes) == (None, None, reason)


@pytest.mark.parametrize(("reason", "changes"), cases(UNPAIRED))
def test_a_row_without_a_usable_wrong_trace_gives_its_positive_alone(reason, changes):
    positive, pair, found = only(**changes)
    assert text(positive, "prompt") == "1+1?"
    assert (pair, found) == (None, reason)


def test_the_papers_rules_have_these_reasons_and_each_has_a_row_above():
    assert NO_POSITIVE == [
        "malformed", "problem not valid", "source cn_k12", "empty problem", "no generations",
        "labels missing", "labels misaligned", "no correct generation", "empty chosen",
    ]  # fmt: skip
    assert NO_PAIR == ["no incorrect generation", "empty rejected", "chosen equals rejected"]
    assert (list(DROPPED), list(UNPAIRED)) == (NO_POSITIVE, NO_PAIR)


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
    texts, votes, complete = zip(*((*trace, True)[:3] for trace in traces)) if traces else [()] * 3
    return RawRow(problem="1+1?", traces=texts, votes=votes, complete=complete, **changes)


def texts(choice):
    return [(text(pair, "chosen"), text(pair, "rejected")) for pair in choice.pairs]


YES, NO, DISPUTED = (True, True), (False, False), (True, False)
SPLIT = [("maybe", DISPUTED), ("right", YES), ("wrong", NO)]
CUT = [("cut", NO, False), ("lucky", YES, False), ("right", YES), ("wrong", NO)]
COMPLETE = {"require_complete": True}


@pytest.mark.parametrize(
    ("rules", "traces", "expected"),
    [
        ({}, SPLIT, [("right", "maybe")]),
        ({"reject_rule": "both"}, SPLIT, [("right", "wrong")]),
        ({"reject_rule": "both"}, SPLIT[:2], "none that both reject"),
        ({}, [("a", ()), ("right", YES)], "no incorrect generation"),
        ({}, [("a", ()), ("wrong", NO)], "no correct generation"),
        ({}, CUT, [("lucky", "cut")]),
        (COMPLETE, CUT, [("right", "wrong")]),
        (COMPLETE, [("cut", NO, False), ("right", YES)], "no complete incorrect one"),
        (COMPLETE, [("lucky", YES, False), ("wrong", NO)], "no complete correct one"),
        ({"min_length_ratio": 0.375}, [("12345678", YES), ("123", NO)], [("12345678", "123")]),
        ({"min_length_ratio": 0.376}, [("12345678", YES), ("123", NO)], "rejected too short"),
        ({"min_length_ratio": 1.0}, [("1", YES), ("2" * 99, NO)], [("1", "2" * 99)]),
    ],
)
def test_each_rule_decides_which_traces_are_a_pair(rules, traces, expected):
    choice = choose(judged(*traces), Rules(**rules))
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
    row = judged(
        *[("y", YES), (" ", YES), ("y", YES), ("y", YES), ("y", YES)],
        *[("n", NO), ("n", NO), ("", NO), ("y", NO), ("n", NO)],
    )
    choice = choose(row, Rules(pairs_per_problem=9))
    assert texts(choice) == [("y", "n")]
    assert choice.no_pair == [
        "empty further chosen", "empty rejected", "chosen equals rejected", "same as another pair",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "rules", "reason"),
    [
        ("amc", {"exclude_sources": ["amc", "x"]}, "source amc"),
        ("amc", {"sources": ["amc"]}, None),
        ("amc", {"sources": ["x"]}, "source not asked for"),
        ("cn_k12", {"exclude_sources": ["none"]}, None),
    ],
)
def test_sources_are_included_or_excluded_by_name(source, rules, reason):
    assert choose(judged(("right", YES), source=source), Rules(**rules)).no_positive == reason


def test_every_reason_under_any_rules_is_one_that_they_list():
    rng = random.Random(0)
    met = set()
    for _ in range(5000):
        rules = PrepareConfig(
            reject_rule=rng.choice(["either", "both"]),
            require_complete=rng.random() < 0.5,
            pairs_per_problem=rng.choice([1, 2, 5]),
            min_length_ratio=rng.choice([0.0, 0.5]),
            sources=rng.choice([[], ["a"]]),
            exclude_sources=rng.choice([["cn_k12"], ["b", "a"], ["none"]]),
        )
        traces = [
            (rng.choice(["", "a", "bb", "cccc"]), rng.choice([YES, NO, DISPUTED, ()]), complete)
            for complete in rng.choices([True, False], [3, 1], k=rng.randrange(7))
        ]
        choice = choose(judged(*traces, source=rng.choice([None, "a", "none"])), rules)
        listed = no_counts(rules, RAW)
        if choice.positive is None:
            assert choice.no_positive in listed.no_positive
            assert choice.pairs == choice.no_pair == []
        else:
            assert set(choice.no_pair) <= set(listed.no_pair)
            assert 1 <= len(choice.pairs) + len(choice.no_pair) <= rules.pairs_per_problem
            assert len({pair["id"] for pair in choice.pairs}) == len(choice.pairs)
        met.update([choice.no_positive, *choice.no_pair])
    rare = {"same as another pair", "rejected too short", "none that both reject", "source a"}
    assert met >= rare
