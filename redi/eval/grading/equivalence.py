r"""Whether two written answers are the same answer: `\frac{1}{2}`, `1/2` and `0.5`.

Both answers are cleaned (normalize.py); equal texts are equal answers. Otherwise each is cut at its
top-level commas: `(1, 2)` has two parts and brackets, `5` is one part. Parts are compared one by
one, by Math-Verify, the verifier behind the paper's labels. What it lacks or gets wrong is decided
here. In brackets: how many of 14,000 verdicts change without the rule.

    brackets (225)       (3,4] is not [3,4]
    names (153)          x = 5 is 5
    percent (147)        10% is 0.1 and, as problems often name the unit, 10; 0.5% is not 0.5
    any order (76)       the parts of a list or {set} match in any order; of a (tuple) in its own
    intervals (66)       (2, 5) is 2 < x < 5
    words (64)           \text{east} is compared as text; as algebra it is e*a*s*t, equal to "seat"
    symbols (52)         R is not r, \Delta not \delta, x' not x: they are renamed for Math-Verify
    bases (8)            52_8 is not 52_9
    small numbers (6)    Math-Verify rounds at 6 decimals, so 8e-19 would be 3e-19: five digits must
                         agree as well

Units are dropped, not compared, as in every published grader: 5 cm and 5 m are the same answer.
Left out: tolerance for a differently rounded decimal, since the published scores have none.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

from redi.eval.grading.normalize import clean, drop_units, text_key

# ---------------------------------------------------------------- answers of several parts

_TOKENS = re.compile(r"\\begin|\\end|\\[{}]|\\.|[(){}\[\],;]")
_NAME = r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\w|_\{[^{}]*\}|'|\([a-z,]+\))*|\([a-zA-Z](?:,\s*[a-zA-Z])+\)"
_NAMED = re.compile(rf"(?:{_NAME})\s*(=|\\in(?![a-zA-Z]))\s*(.+)")


def _tokens(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """The brackets and separators of a text, and the number of brackets open after each."""
    depth = 0
    for token in _TOKENS.finditer(text):
        depth += token[0] in ("(", "[", "{", r"\{", r"\begin")
        depth -= token[0] in (")", "]", "}", r"\}", r"\end")
        yield token, depth


def _split(text: str, separators: str = ",;") -> list[str]:
    """Cut at the commas and semicolons outside all brackets."""
    start, parts = 0, []
    for token, depth in _tokens(text):
        if token[0] in separators and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around the whole answer ("" for a bare list) and the answers inside."""
    whole = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    if whole and _encloses(text):
        inside = _split(whole[2])
        if len(inside) > 1 or whole[1] == r"\{":
            return whole[1] + whole[3], _with_both_signs(inside)
    points = _split(text, ";")
    if 1 < len(points) < len(_split(text)):  # x = 5, y = 2; x = 7, y = 2
        return "", [f"({point})" if len(_split(point)) > 1 else point for point in points]
    return "", _with_both_signs(_split(text))


def _encloses(text: str) -> bool:
    """Whether the first bracket of `text` is closed by its last one, unlike in (1,2),(3,4)."""
    end = next((token.end() for token, depth in _tokens(text) if depth == 0), None)
    return end == len(text)


def _with_both_signs(parts: list[str]) -> list[str]:
    r"""`1 \pm \sqrt{2}` stands for two answers."""
    signs = [("+", "-") if part.count(r"\pm") == 1 else (r"\pm",) for part in parts]
    return [p.replace(r"\pm", sign) for p, both in zip(parts, signs) for sign in both]


_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+\.\d+;[+-]?\d+,\d+")


def equivalent(gold: str, answer: str) -> bool:
    """Whether `answer` says what `gold` says, both LaTeX.

    May run for ever, exhaust memory or raise whatever sympy raises on what it cannot compare.
    """
    gold, answer = _without_group(clean(gold)), _without_group(clean(answer))
    if text_key(gold) == text_key(answer):
        return True
    gold, answer = _without_thousands(gold, answer), _without_thousands(answer, gold)
    if _DECIMAL_COMMA.fullmatch(f"{gold};{answer}") or _DECIMAL_COMMA.fullmatch(f"{answer};{gold}"):
        return gold.replace(",", ".") == answer.replace(",", ".")
    gold, answer = _without_name(gold, answer), _without_name(answer, gold)

    gold_brackets, golds = _parts(gold)
    answer_brackets, answers = _parts(answer)
    if (golds, answers) == ([gold], [answer]):
        return _same_value(gold, answer)
    if len(golds) != len(answers):
        # an interval may be written as an inequality: (2, 5) and 2 < x < 5
        interval = (gold_brackets or answer_brackets) not in ("", r"\{\}")
        return interval and 1 in (len(golds), len(answers)) and _same_value(gold, answer)
    if gold_brackets and answer_brackets and gold_brackets != answer_brackets:
        return False
    if {gold_brackets, answer_brackets} - {"", r"\{\}"}:
        return all(equivalent(g, a) for g, a in zip(golds, answers))
    return _same_members(golds, answers)


def is_readable(gold: str) -> bool:
    """Whether `equivalent` could know this gold in other words: each part is plain words, or
    something Math-Verify reads. May run for ever, exhaust memory or raise, as `equivalent`."""
    _, parts = _parts(_without_name(clean(gold), ""))
    return all(_WORDS.fullmatch(p) or _parsed(drop_units(p).rstrip("% ")) for p in parts)


def _without_group(text: str) -> str:
    """{5} as 5: braces alone only group."""
    whole = text.startswith("{") and text.endswith("}") and _encloses(text)
    return text[1:-1].strip() if whole else text


def _without_thousands(text: str, other: str) -> str:
    """1,234 as 1234, unless the other has commas as well."""
    grouped = "," not in other and _THOUSANDS.fullmatch(text)
    return text.replace(",", "") if grouped else text


def _without_name(text: str, other: str) -> str:
    r"""`x \in A` as `A`; `x = 5` as `5`, unless the other is an equation: x = 5 is not y = 5."""
    named = _NAMED.fullmatch(text)
    return named[2] if named and (named[1] != "=" or "=" not in other) else text


def _same_members(golds: list[str], answers: list[str]) -> bool:
    """Each gold has its own answer, in any order."""
    left = list(answers)
    for gold in golds:
        match = next((a for a in left if equivalent(gold, a)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# ---------------------------------------------------------------- one answer against one

_PERCENT = re.compile(r"(.+?)\s*%")
_AT_LEAST_ONE = re.compile(r"[+-]?0*[1-9]\d*(?:\.\d+)?")
_BASED = re.compile(r"\(?(\w+?)\)?_\{?(\d+)\}?")
_WORDS = re.compile(r"\\text\{[^{}\d]*\}")


def _same_value(gold: str, answer: str) -> bool:
    """Compare two answers that hold one value each, both clean."""
    if _WORDS.fullmatch(gold) or _WORDS.fullmatch(answer):
        return False  # equal words have equal keys
    gold_percent, answer_percent = _PERCENT.fullmatch(gold), _PERCENT.fullmatch(answer)
    if gold_percent and answer_percent:
        return _same_value(gold_percent[1], answer_percent[1])
    if percent := gold_percent or answer_percent:
        other = answer if gold_percent else gold
        if _AT_LEAST_ONE.fullmatch(percent[1]) and _same_algebra(percent[1], other):
            return True
        return _same_algebra(rf"\frac{{{percent[1]}}}{{100}}", other)
    gold_based, answer_based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if gold_based and answer_based and gold_based[1].isdigit() and answer_based[1].isdigit():
        values = [int(digits[1], int(digits[2])) for digits in (gold_based, answer_based)]
        return values[0] == values[1]  # a digit that its base lacks has raised ValueError
    return _same_algebra(gold, answer)


def _same_algebra(gold: str, answer: str) -> bool:
    """Math-Verify's judgement, unless two decimals agree in fewer than five digits."""
    from math_verify import verify
    from sympy import Eq

    golds, answers = _parsed(drop_units(gold)), _parsed(drop_units(answer))
    if not golds or not answers:
        return False
    if isinstance(golds[0], Eq) and isinstance(answers[0], Eq):
        return _same_equation(golds[0], answers[0])
    # Its timeout is a Python signal handler, which a long power never lets run.
    settings = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    return verify(golds, answers, **settings) and not _far_apart(golds[0], answers[0])


def _same_equation(gold: Any, answer: Any) -> bool:
    """Whether one equation is a multiple of the other: y = 1/x and 2xy - 2 = 0.

    Math-Verify solves both for their symbols instead, and takes M' = kM for M' = -kM.
    """
    from sympy import fraction, simplify, together

    gold, answer = (equation.lhs - equation.rhs for equation in (gold, answer))
    if simplify(gold - answer) == 0:
        return True
    ratio = simplify(fraction(together(gold))[0] / fraction(together(answer))[0])
    return bool(ratio.is_number and ratio.is_finite is not False and ratio != 0)


def _parsed(latex: str) -> list[Any]:
    """LaTeX as sympy expressions; [] if it is not LaTeX that Math-Verify reads."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    _never_compile_formulas()
    # units would cut the variable from 6m; the box is opened already, and reading it here merges
    # neighbors
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    return parse(
        f"${_distinct_symbols(latex)}$",
        [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",  # else it falls back on a fragment of what it cannot read
        parsing_timeout=None,
        raise_on_error=True,
    )


@functools.cache
def _never_compile_formulas() -> None:
    r"""Take from sympy its way of turning formulas into Python.

    It writes the name of a symbol into the program as it is, and a name may be any text: \text{...}
    inside a sum would run. Sums are then evaluated in another way; formulas are read as before.
    """

    def refuse(*_: object) -> None:
        raise NotImplementedError("formulas are not compiled")  # sympy tries another way on this

    # the name within the module hides the built-in; `sympy.utilities.lambdify` is the function
    importlib.import_module("sympy.utilities.lambdify").compile = refuse


_GREEK = "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega"
_SYMBOL = re.compile(
    r"\\(?:begin|end|mathbb|text)\s*\{[^{}]*\}"  # left alone
    r"|(?P<imaginary>(?<![a-zA-Z])i(?![a-zA-Z_(]))"
    r"|(?P<symbol>"
    r"\\frac\{d(?:\^\d)?\s*[a-zA-Z\\][^{}]*\}\{d[^{}]+\}"  # a derivative
    rf"|\\(?:{_GREEK})(?![a-zA-Z])"
    r"|[a-zA-Z]'+(?!\()"
    r"|[A-Z](?!\s*\()"
    r")|\\[a-zA-Z]+"  # left alone
)


def _distinct_symbols(latex: str) -> str:
    r"""Rename what Math-Verify confuses: capitals, primes, derivatives, i."""

    def rename(match: re.Match[str]) -> str:
        if match["imaginary"]:
            return " I "
        if not match["symbol"]:
            return match[0]
        name = re.sub(r"[^0-9a-zA-Z']", "", match["symbol"]).replace("'", "prime")
        name = re.sub(r"([A-Z])", r"capital\1", name)
        return rf"\text{{{name}}}"

    return _SYMBOL.sub(rename, latex)


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers, one of them a decimal, differ by more than 1e-5 of the larger."""
    from sympy import Basic, Float

    if not (isinstance(gold, Basic) and isinstance(answer, Basic)):
        return False  # matrices
    if gold.free_symbols or answer.free_symbols or not (gold.has(Float) or answer.has(Float)):
        return False
    try:
        gold, answer = complex(gold), complex(answer)
    except (TypeError, ValueError, OverflowError):
        return False  # sets, equations, numbers beyond a double: Math-Verify's judgement stands
    return abs(gold - answer) > 1e-5 * max(abs(gold), abs(answer))
