r"""The paper's own rules, faults and all: the authors' grader gives each case the same verdict."""

import pytest

from redi.eval.grade import extract
from redi.eval.grading.paper_grader import equal


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"</think> \boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1}</think> none", None),
        (r"\boxed{1}", None),
        (r"</think> \boxed{1} </think> \boxed{2}", "2"),
        (r"</think> \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"</think> \boxed{1} and \boxed{2", None),  # the last one is not closed
        (r"</think> \boxed{\boxed{3}}", "3"),
        (r"</think> \boxed {7}", None),
        (r"</think> \fbox{7}", None),
        (r"</think> \boxed{}", ""),
    ],
)
def test_the_answer_is_the_last_box_after_the_thinking(response, answer):
    assert extract(response, grader="paper") == answer


SAME = [  # gold, answer
    ("5", "5.0"),
    ("1234", "1,234"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{3}{4}", "0.75"),
    (r"\sqrt{2}", r"\sqrt2"),
    ("5", "x=5"),
    ("5", r"5\text{ cm}"),
    ("90", r"90^\circ"),
    ("50", r"50\%"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"),
    ("(1,2)", "(1, 2.0)"),
    ("x+2", "2+x"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"2\sqrt{3}", r"\sqrt{3}+\sqrt{3}"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{2} \\ 2 \end{pmatrix}"),
    # a fault that is part of the rules: both are flattened to 1+x/2
    (r"\frac{1+x}{2}", r"1+\frac{x}{2}"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "5.01"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1, 4/2)"),  # whole numbers are compared as they are written
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("x+y+z", "z+y+x"),  # three letters: never evaluated
    ("2^{10}", "1024"),  # nor is an exponent of two digits
    ("5", ""),
    (r"\frac{1}{3}", "0.33"),
    ("7-x", "__import__('os')"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_by_the_papers_rules(gold, answer):
    assert equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_by_the_papers_rules(gold, answer):
    assert not equal(gold, answer)


@pytest.mark.parametrize(
    "broken", ["", "{", "}", r"\frac", r"\sqrt", r"\sqrt[", "(,)", r"\left", "="]
)
def test_a_broken_answer_is_only_itself(broken):
    assert not equal("7", broken)
    assert equal(broken, broken)
