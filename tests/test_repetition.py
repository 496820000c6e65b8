"""redi/eval/grading/repetition.py against its definition."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from redi.eval.grading.repetition import repeats

ROUND = "Wait, 4 + 4 = 8. "  # 17 characters
PARAGRAPH = "".join(chr(0x4E00 + i) for i in range(120))  # no character twice


@settings(max_examples=200, deadline=None)
@given(
    start=st.text("ab", max_size=40),
    block=st.text("abc", min_size=1, max_size=90),
    copies=st.integers(0, 80),
    more=st.text("ab", max_size=2),
)
@example("", "x", 199, "")
@example("", "x", 200, "")
@example("so ", ROUND, 11, "")  # 187 characters
@example("so ", ROUND, 12, "Wait")  # the block is ", 4 + 4 = 8. Wait", then
@example("so ", ROUND, 40, "done")
@example("so ", PARAGRAPH, 3, PARAGRAPH[:-1])
@example("so ", PARAGRAPH, 4, "")
@example("", "x" * 90 + "y", 4, "")  # inner repeats do not hide the block
def test_a_text_repeats_if_it_ends_in_four_copies_and_200_characters(start, block, copies, more):
    text = start + block * copies + more

    def ends_in_copies(size: int) -> bool:
        ending = text[-max(4 * size, 200) :]
        long_enough = len(ending) == max(4 * size, 200)
        return long_enough and all(a == b for a, b in zip(ending, ending[size:]))

    assert repeats(text) == any(map(ends_in_copies, range(1, len(text) + 1)))
