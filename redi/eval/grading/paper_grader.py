r"""The paper's own way of comparing answers, so that a score can stand beside its tables.

Two answers are the same if either of two old rules says so, both written anew here:

    text     spellings of MATH's answers are made one (\dfrac12 and \frac{1}{2}, 1/2, 5\text{ cm}),
             then the strings must be equal (Hendrycks et al., 2021)
    sympy    LaTeX is flattened into plain text, a tuple cut at its commas, and what is left must be
             the same string or differ by 0 for sympy (Lightman et al., 2023)

Their faults are kept, since they are part of the published numbers: \frac{x+1}{2} is read as x+1/2,
a fraction must be reduced as the gold is, capitals do not count, an exponent of several digits is
never evaluated, a list matches in the gold's order only. sympy reads text by running it as Python,
so only plain formulas are read: numbers, names, operators and round brackets, with two different
letters at most. Left out: the language model that theirs could ask; the paper does not.
"""

import re
import unicodedata
from contextlib import suppress

from redi.eval.grading.normalize import rewrite

# ---------------------------------------------------------------- which answer


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}`; None if that one is not closed, or there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0 or text.rfind(r"\boxed") != start:
        return None
    start += len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def equal(gold: str, answer: str) -> bool:
    """Whether either rule takes `answer` for `gold`.

    May run for ever, exhaust memory or raise whatever sympy raises on what it cannot read.
    """
    return _text_key(gold) == _text_key(answer) or _same_by_sympy(gold, answer)


# ---------------------------------------------------------------- first rule: text

_ONLY_TEXT = re.compile(r"\\text\{(.+?)\}")
_SPELLINGS = [
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"tfrac|dfrac", "frac"),
    (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$", ""),
    (r"^([^\0]*?)\\text\{ (?:(?!\\text\{ )[^\0])*$", r"\1"),  # a unit at the end
    (r"\\%", ""),
    (r" \.", " 0."),
    (r"\{\.", "{0."),
    (r"^\.", "0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # x = 5
    (r"\\sqrt(?!\{)([^\0])", r"\\sqrt{\1}"),
    (r" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))$", r"\\frac{\1}{\2}"),
]


def _text_key(latex: str) -> str:
    text = latex.strip()
    if only := _ONLY_TEXT.fullmatch(text):
        text = only[1].strip()
    return rewrite(text, _SPELLINGS)


# ---------------------------------------------------------------- second rule: sympy

_UNIT = (
    "(?:degree|centimeter|meter|cm|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
    r"(?:es)?s? *(?:\^[0-9]+)?"
)
_FLATTENING = [
    (r"\\(?=[%$])|[%$]", ""),
    (r" (?:or|and) ", " , "),
    ("million", "*10^6"),
    ("billion", "*10^9"),
    ("trillion", "*10^12"),
    (_UNIT, ""),
    (r"\^ *\\circ", ""),
    (r"(?s)\A\{(.*)\}\Z", r"\1"),
    (r",\\! *", ""),
]
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_NOT_EVALUATED = re.compile(r"\^\{|\^\(|\^[0-9]+\^|\^[0-9][0-9]+")  # sympy may hang on these
# All that sympy may read. With a string, index or attribute a formula is a program, so quotes,
# square brackets and dots outside numbers are missing. The dot of x1.a is outside: x1 is a name.
_FORMULA = re.compile(
    r"[a-z\u03b1-\u03c9ħ]+[0-9]*(?:_[a-z\u03b1-\u03c9ħ0-9]+)*"  # a name: pi, x_1
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"  # a number
    r"|[-+*/^(),!\n\t ]"
)
_BRACKETS = "()[]"


def _same_by_sympy(gold: str, answer: str) -> bool:
    gold, answer = _flat(gold), _flat(answer)
    if gold == answer:
        return True
    if not answer:
        return False
    golds, answers = _elements(gold), _elements(answer)
    if len(golds) > 1 and (gold[0], gold[-1]) != (answer[0], answer[-1]):
        return False
    return len(golds) == len(answers) and all(map(_same_element, golds, answers))


def _flat(latex: str) -> str:
    """An answer as lower-case text without spaces, braces, units and macros."""
    only = _ONLY_TEXT.fullmatch(latex)
    text = only[1] if only else latex
    text = rewrite(text, _FLATTENING)
    if "\\" in text:
        text = _without_macros(text)
    mixed = r"([0-9]) +([0-9])", r"\1+\2"  # 7 3/4
    text = rewrite(text, [("- *", "-"), mixed, ("[ {}]", "")]).lower()
    number = _whole_number(text)
    return text if number is None else str(number)


def _whole_number(text: str) -> int | None:
    """1234 for 1,234.0; None if the text is not a whole number."""
    try:
        value = float(_THOUSANDS.sub("", text))
        return round(value) if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):  # not a number; infinite
        return None


def _elements(text: str) -> list[str]:
    """The parts of a tuple or an interval; anything else is one part."""
    text = _THOUSANDS.sub("", text)
    inside = text[1:-1]
    closed = len(text) > 2 and text[0] in _BRACKETS and text[-1] in _BRACKETS
    if closed and not any(bracket in inside for bracket in _BRACKETS):
        return inside.split(",")
    return [text] if text else []


def _same_element(gold: str, answer: str) -> bool:
    if _FRACTION.fullmatch(gold) and _FRACTION.fullmatch(answer):
        return gold == answer
    if (_whole_number(gold) is None) != (_whole_number(answer) is None):
        return False
    difference = f"({gold})-({answer})"
    letters = set(filter(str.isalpha, difference.replace("sqrt", "").replace("frac", "")))
    is_formula = _FORMULA.sub("", difference) == ""
    if not is_formula or len(letters) > 2 or _NOT_EVALUATED.search(difference):
        return False
    from sympy import simplify
    from sympy.parsing import sympy_parser

    reading = sympy_parser.standard_transformations
    reading += (sympy_parser.implicit_multiplication_application,)
    parsed = sympy_parser.parse_expr(difference.replace("^", "**"), transformations=reading)
    return bool(simplify(parsed) == 0)


# ---------------------------------------------------------------- LaTeX as plain text

_MATRIX = re.compile(r"\\begin\{([a-zA-Z]*matrix)\}(.*?)\\end\{\1\}", re.DOTALL)
_TOKEN = re.compile(r"\\(?:([a-zA-Z]+)\s*|(.))|([^\\])", re.DOTALL)
_WORDS = {
    "pi": "pi", "infty": "inf", "cup": "U", "cdot": "*", "times": "*", "le": "≤", "leq": "≤",
    "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "pm": "±", "cap": "∩", "in": "∈", "to": "→",
    "circ": "∘", "quad": " ", "qquad": " ", "div": "÷", "approx": "≈", "ldots": "…", "dots": "…",
    "leqslant": "⩽", "geqslant": "⩾", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉",
    "prime": "'", "angle": "∠", "hbar": "ħ", "odot": "⊙",
}  # fmt: skip
_FUNCTIONS = "sin cos tan arcsin arccos arctan sinh cosh tanh ln log exp max min"
_WORDS |= {name: name for name in _FUNCTIONS.split()}


def _without_macros(latex: str) -> str:
    r"""\frac{\pi}{2} as pi/2, \sqrt{3} as sqrt(3), \text{cm} as cm; macros unknown here vanish."""
    latex = re.sub(r"\\[td]?frac(?![a-zA-Z])", r" \\frac", latex)  # 1\frac{1}{2}: a mixed number
    latex = _MATRIX.sub(lambda found: f"[{found[2].replace('&', ' ')}]", latex)
    return _read(list(_TOKEN.finditer(latex))[::-1], None).strip()


def _read(tokens: list[re.Match[str]], end: str | None) -> str:
    """Text of the tokens (the next one last) up to `end`, or of all."""
    text = ""
    while tokens and tokens[-1][0] != end:
        text += _argument(tokens)
    del tokens[-1:]  # the end
    return text


def _argument(tokens: list[re.Match[str]]) -> str:
    """Text of the next token, with what belongs to it: a group, a macro and its arguments."""
    if not tokens:
        return ""
    token = tokens.pop()
    name, escaped, plain = token.groups()
    if plain is not None:
        return _read(tokens, "}") if plain == "{" else plain
    if escaped is not None:
        return " " if escaped in ",;: " else escaped.replace("!", "").replace("\\", ";")
    if name == "frac":
        return f"{_argument(tokens)}/{_argument(tokens)}"
    if name == "sqrt":
        if tokens and tokens[-1][0] == "[":
            tokens.pop()
            _read(tokens, "]")  # the index is lost, as there
        return f"sqrt({_argument(tokens)})"
    return _WORDS.get(name) or _greek(name)


def _greek(name: str) -> str:
    size = "CAPITAL" if name[0].isupper() else "SMALL"
    spelled = name.upper().replace("LAMBDA", "LAMDA")
    with suppress(KeyError):
        return unicodedata.lookup(f"GREEK {size} LETTER {spelled}")
    return ""
