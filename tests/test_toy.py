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
# Of the rows below, made by the program as it was before the teacher had a file of its own.
OLD = "06e3818f4c18595fd68aa59289d4c2b836aff38c9be913c4b5bf9e71c66b4299"
# 6-1-9*7: left to right 5, 6, 2; multiplications first 9*7=3, 6-1=5, 5-3=2: the same by accident.
# 2+3*4: left to right 5, 0; multiplications first 3*4=2, 2+2=4.
WORKED = Problem(2, (("+", 3), ("*", 4)))


def trace(problem: Problem = WORKED, seed: int = 0, **faults) -> tuple[str, bool]:
    return draw_trace(random.Random(seed), problem, Faults(**{**CAREFUL, **faults}))


def rows_of(problems: int, seed: int, **faults) -> list[dict]:
    rng, verifier = random.Random(seed), random.Random(f"{seed} verifier")
    asked = draw_problems(rng, problems, 4)
    return [raw_row(rng, verifier, problem, Faults(**faults)) for problem in asked]


def boxed(text: str) -> str:
    return re.search(r"boxed\{(\d)\}", text)[1]


def test_the_default_teacher_writes_what_it_wrote_before_it_had_other_faults():
    config = ToyConfig(out="unused", problems=200, benchmark=20)
    rng = random.Random(config.seed)
    asked = draw_problems(rng, 200, config.operations)
    kept = draw_problems(rng, 20, config.operations, others=asked)
    rows = [raw_row(rng, random.Random(0), problem, config) for problem in asked]
    written = json.dumps([rows, [problem.text for problem in kept]]).encode()
    assert hashlib.sha256(written).hexdigest() == OLD


def test_a_careful_teacher_is_right():
    assert trace() == ("<think>\n2+3=5\n5*4=0\n</think>\n\\boxed{0}", True)


def test_precedence_is_another_order_and_a_wrong_answer():
    assert trace(precedence=1.0) == ("<think>\n3*4=2\n2+2=4\n</think>\n\\boxed{4}", False)
    same = Problem(6, (("-", 1), ("-", 9), ("*", 7)))
    assert trace(same, precedence=1.0) == (
        "<think>\n9*7=3\n6-1=5\n5-3=2\n</think>\n\\boxed{2}",
        True,
    )


@pytest.mark.parametrize(
    ("weak", "lines", "answer"),
    [
        (["*4"], "2+3=5\n5*4=1\n", 1),
        (["+"], "2+3=6\n6*4=4\n", 4),
        (["4"], "2+3=5\n5*4=1\n", 1),
        (["+", "4"], "2+3=6\n6*4=5\n", 5),
        (["-", "5"], "2+3=5\n5*4=0\n", 0),
    ],
)
def test_a_weak_step_is_one_too_high_each_time(weak, lines, answer):
    wanted = f"<think>\n{lines}</think>\n\\boxed{{{answer}}}", answer == 0
    assert trace(weak_steps=weak) == wanted


def test_rambling_goes_over_the_chain_again_and_says_the_same():
    text, right = trace(rambling=1.0)
    assert right
    assert text == "<think>\n" + 3 * "2+3=5\n5*4=0\n" + "</think>\n\\boxed{0}"


def test_impatience_stops_before_any_operation_but_the_last():
    text, right = trace(impatience=1.0, luck=1.0)
    assert (text, right) == ("<think>\n</think>\n\\boxed{0}", True)
    alone = Problem(2, (("+", 3),))  # its only operation is its last
    assert trace(alone, impatience=1.0, luck=0.0) == ("<think>\n2+3=5\n</think>\n\\boxed{5}", True)


def test_mislabelled_rejected_traces_are_right_and_nothing_else_changes():
    clean, noisy = rows_of(1500, 3), rows_of(1500, 3, mislabelled_rejected=0.3)
    changed = total = 0
    for before, after in zip(clean, noisy):
        assert before["problem"] == after["problem"]
        assert before["correctness"] == after["correctness"]
        for label, a, b in zip(
            before["correctness"]["math_verify_answer"], before["generations"], after["generations"]
        ):
            if label:
                assert a == b
                continue
            total += 1
            changed += boxed(b) == after["answer"]
    # 3 standard deviations of the share of some 650 draws at 0.3 are 0.054.
    assert total > 500
    assert abs(changed / total - 0.3) < 0.054


def test_larger_shares_of_mislabelled_traces_hold_the_smaller_ones_and_lose_no_pair():
    shares = (0.0, 0.15, 0.3, 0.5, 1.0)
    sets = [rows_of(300, 3, mislabelled_rejected=share) for share in shares]
    counts = []
    for before, after in pairwise(sets):
        for clean, row, worse in zip(sets[0], before, after):
            for a, b, c in zip(clean["generations"], row["generations"], worse["generations"]):
                assert b in (a, c)  # once replaced, by the same trace for good
            *rejected, _ = worse["generations"]
            if worse["correctness"]["math_verify_answer"][-1]:
                assert worse["generations"][-1] not in rejected
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
    ("faults", "said"),
    [
        ({"rambling": 1.5}, r"--rambling: expected within \[0, 1\]; got 1.5"),
        ({"weak_steps": ["/7"]}, "--weak-steps: expected an operation, a digit of 1-9, or both"),
        ({"weak_steps": [""]}, "--weak-steps: expected an operation"),
    ],
)
def test_faults_that_cannot_be(faults, said):
    with pytest.raises(UserError, match=said):
        Faults(**faults)


def test_problems_differ_from_each_other_and_from_those_kept_apart():
    kept = draw_problems(random.Random(1), 100, 1)  # of 243 that there are
    asked = draw_problems(random.Random(2), 100, 1, others=kept)
    assert len({problem.text for problem in kept + asked}) == 200
