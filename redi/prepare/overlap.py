r"""Problems that occur twice, and problems of a benchmark.

    Find $x$, if $$x+1 = 2.$$         find x if x + 1 = 2       their tokens, normalized
    Find \(x\) if \[ x + 1 =2 \]      find x if x + 1 = 2       so these are one problem

Tokens are lower-case words, numbers, LaTeX commands and signs, without typesetting: dollar signs,
\left, \quad, line breaks, the punctuation of sentences. Problems with equal tokens are duplicates.

A benchmark's problem is found in another text by its 8-grams of words (signs left out). Competition
problems share stock phrases, "the number of ordered pairs of positive integers", so one common
n-gram proves nothing: half of them must occur. A copy with other numbers has nearly all n-grams
once numbers are masked. A problem of fewer than 16 words may consist of stock phrases: it is found
only if its tokens, signs included, are whole sentences of the text.

Left out: paraphrases and translations, which take a model to find; traces, which quote anything;
languages without spaces between words.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# The share of a benchmark problem's n-grams that a copy has, and of those with numbers masked.
# Unrelated problems of the paper's five benchmarks share up to 0.21 of their 8-grams. With 5-grams
# they do not collide either, but small exercises of one kind count as one with other numbers.
SAME = 0.5
MASKED = 0.9
N = 8

_TYPESETTING = re.compile(
    r"\\\\(?:\[[^]\n]*\])?"  # a line break of LaTeX, and the space it asks for
    r"|\\[,;:!> ()\[\]]|[$~]"
    r"|\\(?:left|right|[bB]igg?[lr]?|q?quad|displaystyle|limits|text(?:bf|it|rm)?|math(?:rm|bf|it)"
    r"|mbox|[hv]space\*?\{[^}\n]*\})(?![a-zA-Z])"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+(?:\.\d+)?|\S")
# The last alternative: mathematics without a full stop before an instruction on how to answer.
_SENTENCE_END = re.compile(r"(?<=[.?!:])[$\s]*\s|\n|(?<=[$)}\]])\s+(?=[A-Z])")
_PUNCTUATION = frozenset(".,;?")

Kind = Literal["same text", "other numbers"]
REPEATED = ("duplicate", "duplicate but for its typesetting")


@dataclass(frozen=True)
class Match:
    """A benchmark's problem found in a text; share: of its n-grams, to three digits."""

    benchmark: str
    benchmark_id: str
    kind: Kind
    share: float


def repeats(problem: str, seen: set[bytes]) -> str | None:
    """How `problem` repeats an earlier one, one of REPEATED, or None. seen: the hashes of earlier
    problems, which get those of this one: about a hundred bytes."""
    versions = (problem, "\0" + " ".join(tokens(problem)))
    hashes = [hashlib.sha256(version.encode()).digest()[:16] for version in versions]
    known = [digest in seen for digest in hashes]
    seen.update(hashes)
    return next((reason for reason, is_known in zip(REPEATED, known) if is_known), None)


class Index:
    """Finds problems of benchmarks, given as (benchmark, id, text), by their n-grams of words."""

    def __init__(self, problems: Iterable[tuple[str, str, str]]) -> None:
        # (benchmark, id, tokens, n-grams with numbers, masked n-grams) of each problem
        self._problems: list[tuple[str, str, str, frozenset[str], frozenset[str]]] = []
        self._where: dict[str, list[int]] = defaultdict(list)  # masked n-gram -> problems
        self._short: dict[str, list[int]] = defaultdict(list)  # masked tokens -> short problems
        for number, (benchmark, identity, text) in enumerate(problems):
            found = tokens(text)
            grams, masked = _word_ngrams(found)
            self._problems.append((benchmark, identity, " ".join(found), grams, masked))
            if len(_mask_numbers(_words(found))) < 2 * N:
                self._short[" ".join(_mask_numbers(found))].append(number)
            else:
                for gram in masked:
                    self._where[gram].append(number)

    def matches(self, text: str) -> list[Match]:
        """Every benchmark problem found in `text`, in the benchmarks' order."""
        found: dict[int, tuple[Kind, float]] = {}
        grams, masked = _word_ngrams(tokens(text))
        for number in {number for gram in masked for number in self._where.get(gram, ())}:
            *_, known, known_masked = self._problems[number]
            same = len(known & grams) / len(known)
            same_masked = len(known_masked & masked) / len(known_masked)
            if same_masked >= MASKED and same < same_masked:
                found[number] = ("other numbers", same_masked)
            elif same >= SAME:
                found[number] = ("same text", same)
        for run in _short_sentence_runs(text):
            for number in self._short.get(" ".join(_mask_numbers(run)), ()):
                if self._problems[number][2] == " ".join(run):
                    found[number] = ("same text", 1.0)
                else:
                    found.setdefault(number, ("other numbers", 1.0))
        return [
            Match(*self._problems[number][:2], kind, round(share, 3))
            for number, (kind, share) in sorted(found.items())
        ]


def tokens(text: str) -> list[str]:
    """The normalized tokens of a problem."""
    text = _FRACTION.sub(r"\\frac", _THOUSANDS.sub("", text))
    plain = _TYPESETTING.sub(" ", text).lower()
    return [token for token in _TOKEN.findall(plain) if token not in _PUNCTUATION]


def _word_ngrams(found: list[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The n-grams of a text's words, and the same with masked numbers."""
    words = _words(found)
    return tuple(
        frozenset(" ".join(given[i : i + N]) for i in range(len(given) - N + 1))
        for given in (words, _mask_numbers(words))
    )


def _words(found: Sequence[str]) -> list[str]:
    """Tokens without signs. A command is a word, \\frac as frac."""
    return [token.removeprefix("\\") for token in found if token[-1].isalnum()]


def _mask_numbers(found: Sequence[str]) -> list[str]:
    """Each number as 0, several in a row as one: 12,000 may have become 12,1."""
    zeros = ["0" if token[0].isdigit() else token for token in found]
    return [token for i, token in enumerate(zeros) if token != "0" or zeros[i - 1 : i] != ["0"]]


def _short_sentence_runs(text: str) -> Iterator[list[str]]:
    """The tokens of every run of whole sentences that has fewer than 2 N words."""
    sentences = [tokens(part) for part in _SENTENCE_END.split(text)]
    for first in range(len(sentences)):
        run: list[str] = []
        for sentence in filter(None, sentences[first:]):
            run = run + sentence
            if len(_mask_numbers(_words(run))) >= 2 * N:
                break
            yield run
