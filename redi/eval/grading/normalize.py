r"""One spelling for answers that typography alone tells apart: `\dfrac12`, `\frac{1}{2}`.

    clean("10,\\!080.")             10080         still LaTeX, to be read as algebra
    text_key(r"\text{(C)}")         C             equal keys are equal answers
    as_integer("042")               42            None if it is not plainly one

Regular expressions over short texts, and nothing that could hang: the process that samples uses
them. Left out: everything that needs to know what the text means (`equivalence.py`), and spellings
that change no verdict because Math-Verify reads them as well: \leqslant, \cfrac, a Unicode ×.
"""

import functools
import re
from collections.abc import Iterable

LONGEST_ANSWER = 2000  # characters; the longest gold of the five benchmarks has 204

_UNITS = (
    "degrees?|cents?|dollars?|inch(?:es)?|feet|foot|ft|miles?|mph|mm|cm|km|nm|meters?|metres?"
    "|kg|grams?|seconds?|minutes?|min|hours?|days?|years?|units?|Hz|eV|km/h|m/s"
)
_CLEANING = [
    (r"\\(?:[,!]|;|:)(?=\s*\d{3})|\{,\}(?=\d{3})|,\\!\s*(?=\d{3})", ""),  # 10,\!080
    (r"\\(?:left|right|[bB]ig{1,2}[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal)|\\mbox|\\operatorname", r"\\text"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"(?<!\\)\\[$()\[\]!]|\$", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|[~\s]+", " "),
    (r"(?<!\d{4})(?<=\d) (?=\d{3}(?: \d{3})*(?:\.\d+)?$)", ""),  # 1 000
    (r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\{])(?:and|or)(?![a-zA-Z])", " , "),
    (r"\\?%|(?:\\text\{\s*)?\bper ?cent\b(?:\s*\})?", "%"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?:\s*(?:\\text\{\s*)?[CF](?![a-zA-Z])\s*\}?)?", ""),
    (r"(\d)[eE]([+-]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
    (r"\\(frac|sqrt)\s*(\\[a-zA-Z]+|\w)", r"\\\1{\2}"),  # \frac12, \sqrt2: the first argument
    (r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|\w)", r"\1{\2}"),  # and the second
    (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"(?<![\d}])\.(?=\d)", "0."),
]
_SYMBOLS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00b7": r"\cdot ", "\u00b0": r"^\circ",
        "\u221e": r"\infty ", "\u00b1": r"\pm ",
    }
)  # fmt: skip


@functools.lru_cache(4096)
def clean(latex: str) -> str:
    """The same LaTeX with one spelling for what typography alone distinguishes."""
    text = rewrite(latex.translate(_SYMBOLS), _CLEANING)
    return text.strip().rstrip(".").strip(" ,")


def rewrite(text: str, rules: Iterable[tuple[str, str]]) -> str:
    """Replace each pattern in turn: what one rule leaves, a later one reads."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


@functools.lru_cache(4096)
def text_key(latex: str) -> str:
    r"""Equal keys mean equal answers: `\dfrac{1}{2}` and `\frac12`, `\text{(C)}` and `C`."""
    if len(latex) > LONGEST_ANSWER:  # a loop, for which the rules would take minutes
        return latex
    text = drop_units(clean(latex))
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # 1 2 is not 12
    if choice := re.fullmatch(r"\(([A-Z])\)", text):
        return choice[1]
    return text.lower() if re.fullmatch(r"[A-Za-z]{3,}", text) else text


def as_integer(latex: str) -> int | None:
    """The answer as an integer if it is plainly one (`-12`, `042`), else None. 1,234 may be two."""
    text = text_key(latex)
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,1000}", text) else None


_TRAILING_TEXT = re.compile(r"(?<=[^\s=+\-*/^_,<>({\[])\s*\\text\{[^{}]*\}(?:\^(?:\{-?\d\}|\d))?$")
_TRAILING_UNIT = re.compile(rf"(?<=[\d}}])\s*(?:{_UNITS})(?:\^(?:\{{\d\}}|\d))?$")


def drop_units(text: str) -> str:
    while (shorter := _TRAILING_UNIT.sub("", _TRAILING_TEXT.sub("", text))) != text:
        text = shorter.strip()
    return text
