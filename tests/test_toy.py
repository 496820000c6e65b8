"""The toy's teacher: each fault does what the table in redi/toy/teacher.py says, and no more."""

import hashlib
import json
import random
import re
from itertools import pairwise

import pytest

from redi.config import UserError
from redi.toy.student import ToyConfig
from redi.toy.teacher import Faults, Problem, draw_problems, draw_trace, raw_row

CAREFUL = {"impatience": 0.0, "slip": 0.0}
# Of the rows below, as the program wrote them before the teacher had other faults.
RECORDED = "06e3818f4c18595fd68aa59289d4c2b836aff38c9be913c4b5bf9e71c66b4299"
# 2+3*4: left to right 5, 0; multiplications first 3*4=2, 2+2=4.
WORKED = Problem(2, (("+", 3), ("*", 4)))
# 6-1-9*7: left to right 5, 6, 2; multiplications first 9*7=3, 6-1=5, 5-3=2: the same by accident.
SAME = Problem(6, (("-", 1), ("-", 9), ("*", 7)))
ONE_STEP = Problem(2, (("+", 3),))


def rows_of(problems: int, seed: int, **faults) -> list[dict]:
    rng, verifier = random.Random(seed), random.Random(f"{seed} verifier")
    drawn = draw_problems(rng, problems, 4)
    return [raw_row(rng, verifier, problem, Faults(**faults)) for problem in drawn]


def boxed(text: str) -> str:
    return re.search(r"boxed\{(\d)\}", text)[1]


def test_the_default_teacher_writes_the_recorded_rows():
    config = ToyConfig(out="unused", problems=200, benchmark=20)
    rng = random.Random(config.seed)
    taught = draw_problems(rng, 200, config.operations)
    held_out = draw_problems(rng, 20, config.operations, others=taught)
    rows = [raw_row(rng, random.Random(0), problem, config) for problem in taught]
    written = json.dumps([rows, [problem.text for problem in held_out]]).encode()
    assert hashlib.sha256(written).hexdigest() == RECORDED


@pytest.mark.parametrize(
    ("problem", "faults", "lines", "answer", "right"),
    [
        (WORKED, {}, "2+3=5\n5*4=0\n", 0, True),
        (WORKED, {"precedence": 1.0}, "3*4=2\n2+2=4\n", 4, False),
        (SAME, {"precedence": 1.0}, "9*7=3\n6-1=5\n5-3=2\n", 2, True),
        (WORKED, {"weak_steps": ["*4"]}, "2+3=5\n5*4=1\n", 1, False),
        (WORKED, {"weak_steps": ["+"]}, "2+3=6\n6*4=4\n", 4, False),
        (WORKED, {"weak_steps": ["4"]}, "2+3=5\n5*4=1\n", 1, False),
        (WORKED, {"weak_steps": ["+", "4"]}, "2+3=6\n6*4=5\n", 5, False),
        (WORKED, {"weak_steps": ["-", "5"]}, "2+3=5\n5*4=0\n", 0, True),
        (WORKED, {"rambling": 1.0}, 3 * "2+3=5\n5*4=0\n", 0, True),
        (WORKED, {"impatience": 1.0, "luck": 1.0}, "", 0, True),
        # Its only operation is its last, before which no teacher is impatient.
        (ONE_STEP, {"impatience": 1.0, "luck": 0.0}, "2+3=5\n", 5, True),
    ],
)
def test_each_fault_changes_the_trace_as_the_table_says(problem, faults, lines, answer, right):
    trace = draw_trace(random.Random(0), problem, Faults(**{**CAREFUL, **faults}))
    assert trace == (f"<think>\n{lines}</think>\n\\boxed{{{answer}}}", right)


def test_mislabelled_rejected_traces_are_right_and_nothing_else_changes():
    clean, noisy = rows_of(1500, 3), rows_of(1500, 3, mislabelled_rejected=0.3)
    changed = total = 0
    for before, after in zip(clean, noisy):
        assert before["problem"] == after["problem"]
        assert before["correctness"] == after["correctness"]
        labels = before["correctness"]["math_verify_answer"]
        for label, a, b in zip(labels, before["generations"], after["generations"]):
            assert not label or a == b
            total += not label
            changed += not label and boxed(b) == after["answer"]
    # 3 standard deviations of the share of some 650 draws at 0.3 are 0.054.
    assert total > 500
    assert abs(changed / total - 0.3) < 0.054


def test_larger_shares_of_mislabelled_traces_include_the_smaller_ones_and_lose_no_pair():
    shares = (0.0, 0.15, 0.3, 0.5, 1.0)
    sets = [rows_of(300, 3, mislabelled_rejected=share) for share in shares]
    counts = []
    for before, after in pairwise(sets):
        for clean, row, worse in zip(sets[0], before, after):
            for a, b, c in zip(clean["generations"], row["generations"], worse["generations"]):
                assert b in (a, c)  # once replaced, by the same trace for good
            *rejected, last = worse["generations"]
            assert not worse["correctness"]["math_verify_answer"][-1] or last not in rejected
        counts.append(sum(row["answer"] == boxed(row["generations"][0]) for row in after))
    assert counts == sorted(counts)
    assert counts[-1] == 300


def test_mislabelled_chosen_traces_are_wrong():
    for row in rows_of(50, 3, mislabelled_chosen=1.0):
        assert row["answer"] not in map(boxed, row["generations"])


def test_a_trace_that_the_teacher_never_writes_is_an_error():
    with pytest.raises(UserError, match="--mislabelled-chosen: this teacher writes no other wrong"):
        rows_of(1, 0, **CAREFUL, mislabelled_chosen=1.0)
    # Its one right trace is there already, so a rejected one that is right would be that again.
    two_ways = {**CAREFUL, "precedence": 0.5}
    with pytest.raises(UserError, match="--mislabelled-rejected: this teacher writes no other"):
        rows_of(50, 0, **two_ways, mislabelled_rejected=1.0)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"rambling": 1.5}, r"--rambling: expected within \[0, 1\]; got 1.5"),
        ({"weak_steps": ["/7"]}, "--weak-steps: expected an operation, a digit of 1-9, or both"),
        ({"weak_steps": [""]}, "--weak-steps: expected an operation"),
    ],
)
def test_an_impossible_fault_names_its_flag(faults, message):
    with pytest.raises(UserError, match=message):
        Faults(**faults)


def test_problems_differ_from_each_other_and_from_the_held_out_ones():
    held_out = draw_problems(random.Random(1), 100, 1)  # of 243 that there are
    taught = draw_problems(random.Random(2), 100, 1, others=held_out)
    assert len({problem.text for problem in held_out + taught}) == 200
