"""redi/eval/grading/repetition.py against its definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.eval.grading.repetition import period

ROUND = "Wait, 4 + 4 = 8. "  # 17 characters
PARAGRAPH = "".join(chr(0x4E00 + i) for i in range(120))  # no character twice


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("x" * 199, 0),
        ("x" * 200, 1),
        ("so " + ROUND * 12, 17),
        ("so " + ROUND * 11, 0),  # 187 characters
        ("so " + ROUND * 12 + "Wait", 17),  # the block is ", 4 + 4 = 8. Wait", then
        ("so " + ROUND * 40 + "done", 0),
        ("so " + PARAGRAPH * 3, 0),
        ("so " + PARAGRAPH * 4, 120),
        ("so " + PARAGRAPH * 3 + PARAGRAPH[:-1], 0),
        (("x" * 90 + "y") * 4, 91),  # inner repeats do not hide the block
    ],
)
def test_a_text_loops_if_it_ends_in_copies_of_a_block(text, expected):
    assert period(text) == expected


@settings(max_examples=200, deadline=None)
@given(
    start=st.text("ab", max_size=40),
    block=st.text("abc", min_size=1, max_size=90),
    copies=st.integers(0, 80),
    more=st.text("ab", max_size=2),
)
def test_period_equals_its_definition(start, block, copies, more):
    text = start + block * copies + more

    def loops(size: int) -> bool:
        ending = text[-max(4 * size, 200) :]
        long_enough = len(ending) == max(4 * size, 200)
        return long_enough and all(a == b for a, b in zip(ending, ending[size:]))

    assert period(text) == next((size for size in range(1, len(text) + 1) if loops(size)), 0)
