"""The toy's teacher: each fault does what redi/toy.py says, and no more."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from processes import main_in_this_process

from redi import toy
from redi.config import UserError
from redi.toy import Problem, ToyConfig, draw_problems, draw_trace, labeled_rows, raw_row

CAREFUL = {"impatience": 0.0, "slip": 0.0}
# Of the rows below, as the program wrote them before the teacher had other faults.
RECORDED = "06e3818f4c18595fd68aa59289d4c2b836aff38c9be913c4b5bf9e71c66b4299"
# 2+3*4: left to right 5, 0; multiplications first 3*4=2, 2+2=4.
WORKED = Problem(2, (("+", 3), ("*", 4)))
# 6-1-9*7: left to right 5, 6, 2; multiplications first 9*7=3, 6-1=5, 5-3=2: the same by accident.
SAME = Problem(6, (("-", 1), ("-", 9), ("*", 7)))
ONE_STEP = Problem(2, (("+", 3),))


def rows_of(problems: int, **faults) -> list[dict]:
    rng, verifier = random.Random(3), random.Random("3 verifier")
    drawn = draw_problems(rng, problems, 4)
    return [raw_row(rng, verifier, problem, ToyConfig(out="unused", **faults)) for problem in drawn]


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
        (WORKED, {"rambling": 1.0}, 3 * "2+3=5\n5*4=0\n", 0, True),
        (WORKED, {"impatience": 1.0, "luck": 1.0}, "", 0, True),
        # Its only operation is its last, before which no teacher is impatient.
        (ONE_STEP, {"impatience": 1.0, "luck": 0.0}, "2+3=5\n", 5, True),
    ],
)
def test_each_fault_changes_the_trace_as_its_flag_says(problem, faults, lines, answer, right):
    trace = draw_trace(random.Random(0), problem, ToyConfig(out="unused", **{**CAREFUL, **faults}))
    assert trace == (f"<think>\n{lines}</think>\n\\boxed{{{answer}}}", right)


def test_larger_shares_of_mislabelled_traces_include_the_smaller_ones_and_change_nothing_else():
    shares, wrong, replaced = np.array([0.0, 0.15, 0.3, 0.5, 1.0]), 0, np.zeros(5)
    for rows in zip(*(rows_of(1500, mislabelled_rejected=share) for share in shares)):
        clean, labels = rows[0], rows[0]["correctness"]["math_verify_answer"]
        assert all(
            row == clean | {name: row[name] for name in ("generations", "reparsed_answers")}
            for row in rows
        )
        for label, *traces in zip(labels, *(row["generations"] for row in rows)):
            changed = [trace != traces[0] for trace in traces]
            assert changed == sorted(changed)  # once replaced,
            assert len(set(traces)) <= 2  # by the same trace for good
            assert not (label and any(changed))
            assert {boxed(t) for t, new in zip(traces, changed) if new} <= {clean["answer"]}
            wrong, replaced = wrong + (not label), replaced + changed
        *rejected, last = rows[-1]["generations"]
        assert not labels[-1] or last not in rejected  # no pair is lost
    deviation = np.sqrt(shares * (1 - shares) / wrong)
    assert wrong > 500
    assert (abs(replaced / wrong - shares) <= 3 * deviation).all()


def test_a_trace_that_the_teacher_never_writes_is_an_error():
    # Its one right trace is there already, so a rejected one that is right would be that again.
    two_ways = {**CAREFUL, "precedence": 0.5}
    with pytest.raises(UserError, match="--mislabelled-rejected: this teacher writes no other"):
        rows_of(50, **two_ways, mislabelled_rejected=1.0)


def test_of_a_problems_ten_labeled_rows_as_many_are_right_as_asked_for():
    def rows_with(right: int) -> list[dict]:
        rng, config = random.Random(5), ToyConfig(out="unused", right_rows=right)
        return [row for problem in problems for row in labeled_rows(rng, problem, config)]

    problems = draw_problems(random.Random(4), 100, 4)
    few, many = rows_with(3), rows_with(7)
    for start, problem in zip(range(0, 1000, 10), problems, strict=True):
        for rows, right in ((few, 3), (many, 7)):
            of_problem = rows[start : start + 10]
            assert {row["prompt"] for row in of_problem} == {problem.text}
            assert sum(row["label"] for row in of_problem) == right
            assert all(
                row["label"] == (boxed(row["completion"]) == str(problem.answer))
                for row in of_problem
            )
    assert len({tuple(row["label"] for row in few[n : n + 10]) for n in range(0, 1000, 10)}) > 50
    same = [one == other for one, other in zip(few, many, strict=True)]
    assert sum(same) == 600  # the other 4 of a problem's 10 are right only in the second
    assert all(s or (not one["label"] and other["label"]) for s, one, other in zip(same, few, many))


def test_a_teacher_that_is_never_wrong_has_no_wrong_row():
    config = ToyConfig(out="unused", **CAREFUL, right_rows=9)
    with pytest.raises(UserError, match=r"--right-rows: this teacher writes no wrong trace of"):
        list(labeled_rows(random.Random(0), WORKED, config))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"rambling": 1.5}, r"--rambling: expected within \[0, 1\]; got 1.5"),
        ({"right_rows": 10}, "--right-rows: expected 1 to 9; got 10"),
    ],
)
def test_an_impossible_fault_names_its_flag(fault, message):
    with pytest.raises(UserError, match=message):
        ToyConfig(out="unused", **fault)


def test_a_student_that_cannot_be_written_is_one_line_and_no_half_file(tmp_path, capsys):
    taken = tmp_path / "student/tokenizer.json"
    taken.mkdir(parents=True)
    assert main_in_this_process(toy.main, tmp_path, "--problems", 20, "--benchmark", 2) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: {taken}: cannot be written (Is a directory)"
    assert list(taken.parent.iterdir()) == [taken]


def test_problems_differ_from_each_other_and_from_the_held_out_ones():
    held_out = draw_problems(random.Random(1), 100, 1)  # of 243 that there are
    taught = draw_problems(random.Random(2), 100, 1, others=held_out)
    assert len({problem.text for problem in held_out + taught}) == 200
