r"""redi/prepare/overlap.py: planted copies are found as what they are, and nothing else is."""

import random
import re

import pytest

from redi.prepare.overlap import Index, Match, repeats, tokens

BENCHMARK = [
    "What is the value of $\\frac{3}{7} + 12$?",  # fewer than 16 words: a sentence, whole
    "Simplify $\\sqrt{180}$.",
    "Compute \\[\\left(\\begin{array}{c} 8 \\\\ 3 \\end{array}\\right)\\]",  # no full stop
    "Ruth walks along a canal at $4$ kilometers per hour and stops for $t$ minutes at a lock. If "
    "she had walked at $6$ kilometers per hour, she would have come home $25$ minutes earlier. "
    "How long, in kilometers, is her way?",
    "A regular octagon is inscribed in a circle of radius $1{,}250$. Each of its vertices is "
    "painted red or blue, and the probability that no two red ones are adjacent is $\\tfrac{m}{n}$,"
    " where $m$ and $n$ are relatively prime positive integers. Find $m+n$.",
    "Let $f(x) = x^3 - 9x + 2$. Find the sum of the squares of all real numbers $c$ such that the "
    "line $y = c$ is tangent to the graph of $f$.",
]
INDEX = Index([("bench", str(i), text) for i, text in enumerate(BENCHMARK)])
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# Problems of the same trade, stock phrases and all.
UNRELATED = (
    "Let {a} and {b} be relatively prime positive integers such that the probability that no two "
    "of {n} chairs are taken is {a}/{b}. Find ${a}+{b}$.",
    "What is the value of ${n}{a} + {m}$ when ${a} = {k}$?",
    "Find the sum of all real numbers ${a}$ such that ${a}^2 - {n}{a} + {m} = 0$.",
    "{who} walks {n} kilometers and rests for {m} minutes. How long is {who} on the way?",
    "Simplify $\\frac{{{n}}}{{{m}}}$.",
    "Compute $\\sqrt{{{n}}} + \\sqrt{{{m}}}$. {who} gets {k}.",
    "How many positive integers less than {n} are divisible by {m} but not by {k}?",
    "A circle of radius ${n}$ is inscribed in a triangle with sides ${m}$, ${k}$ and ${a}$.",
)


def rewrapped(text, rng):
    """The same problem with another typesetting."""
    text = re.sub(r"\$(.+?)\$", r"\\( \1 \\)", text)
    text = re.sub(r"(?<!\\) ", lambda _: rng.choice([" ", "  ", "\n"]), text)
    text = text.replace("\\frac", "\\dfrac").replace("{,}", ",").replace("\\left", "\\big")
    return rng.choice(["", "Solve this problem.\n\n"]) + text


def renumbered(text, rng):
    number = rng.choice(list(re.finditer(r"\d+", text)))
    return f"{text[: number.start()]}{int(number[0]) + 5}{text[number.end() :]}"


def kinds(text):
    return {match.benchmark_id: match.kind for match in INDEX.matches(text)}


@pytest.mark.parametrize("number", range(len(BENCHMARK)))
def test_a_planted_copy_is_found_in_any_typesetting_and_apart_from_one_with_other_numbers(number):
    rng, text = random.Random(number), BENCHMARK[number]
    assert INDEX.matches(text) == [Match("bench", str(number), "same text", 1.0)]
    for _ in range(20):
        copy, other = rewrapped(text, rng), renumbered(text, rng)
        for found in (copy, f"{copy}\n{INSTRUCTION}", f"{copy} {INSTRUCTION}", copy.lower()):
            assert kinds(found) == {str(number): "same text"}
        for found in (other, f"{rewrapped(other, rng)} {INSTRUCTION}"):
            assert kinds(found) == {str(number): "other numbers"}


def test_a_copy_with_another_last_sentence_is_the_same_text():
    text = BENCHMARK[3].replace("How long, in kilometers, is her way?", "What does she do then?")
    (match,) = INDEX.matches(text)
    assert (match.benchmark_id, match.kind) == ("3", "same text")
    assert 0.5 <= match.share < 1


def test_no_unrelated_problem_is_matched():
    rng = random.Random(0)
    texts = set()
    for _ in range(1000):
        names = {"a": rng.choice("apqrs"), "b": rng.choice("bcdex")}
        numbers = {name: rng.randrange(1000) for name in "nmk"}
        who = rng.choice(["Ruth", "Omar", "Lin"])
        texts.add(rng.choice(UNRELATED).format(**names, **numbers, who=who))
    assert len(texts) > 900
    assert [text for text in texts if INDEX.matches(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "Simplify $\\sqrt{180} + \\sqrt{5}$.",  # continues
        "Simplify $180$.",
        "Find the sum of the squares of all real numbers $c$ such that $c > 2$.",  # a stock phrase
        "where $m$ and $n$ are relatively prime positive integers. Find $m+n$.",
        "",
        "...",
    ],
)
def test_a_part_of_a_problem_is_not_the_problem(text):
    assert INDEX.matches(text) == []


def test_a_problem_found_in_two_benchmarks_is_reported_for_both():
    found = Index([("a", "1", BENCHMARK[3]), ("b", "7", BENCHMARK[3])]).matches(BENCHMARK[3])
    assert [(m.benchmark, m.benchmark_id) for m in found] == [("a", "1"), ("b", "7")]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$, if $$x+1 = 2.$$", "Find \\(x\\) if \\[ x + 1 =2 \\]", True),
        ("Is 5! even?", "is  5!\neven", True),
        ("$\\dfrac{1}{2}$ of $1{,}000$", "\\( \\frac{1}{2} \\) of 1,000", True),
        ("$\\left( a \\right)\\,b$", "$(a) b$", True),
        ("$x+1$", "$x-1$", False),
        ("$1.5$", "$15$", False),
        ("1, 2", "12", False),
        ("$5!$", "$5$", False),
        ("$2^{n+1}$", "$2^n+1$", False),
        ("$\\frac{1}{23}$", "$\\frac{12}{3}$", False),
        ("$\\sin x$", "$\\cos x$", False),
        ("ratio 3:4", "ratio 3.4", False),
    ],
)
def test_problems_have_the_same_tokens_exactly_if_only_their_typesetting_differs(one, other, same):
    assert (tokens(one) == tokens(other)) == same


def test_a_repeated_problem_is_reported_as_exact_or_with_another_typesetting():
    exact, normalized, seen = "duplicate", "duplicate but for its typesetting", set()
    problems = ["Find $x$.", "Find $y$.", "Find $x$.", "find \\(x\\)", "find \\(x\\)", "find y"]
    expected = [None, None, exact, normalized, exact, normalized]
    assert [repeats(problem, seen) for problem in problems] == expected
