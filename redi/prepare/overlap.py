r"""Problems that occur twice, and problems of a benchmark.

    Find $x$, if $$x+1 = 2.$$         find x if x + 1 = 2       their tokens, normalized
    Find \(x\) if \[ x + 1 =2 \]      find x if x + 1 = 2       so these are one problem

Tokens are lower-case words, numbers, LaTeX commands and signs, without typesetting: dollar signs,
\left, \quad, line breaks, the punctuation of sentences. Problems with equal tokens are duplicates.

A benchmark's problem is found in another text by its word n-grams (signs left out). Competition
problems share stock phrases, "the number of ordered pairs of positive integers", so one common
n-gram proves nothing: half of them must occur. A copy with other numbers has nearly all n-grams
once numbers are masked, and is reported as such. A problem of fewer than 2n words may consist of
stock phrases: it is found only if its tokens, signs included, are whole sentences of the text.

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
# Unrelated problems of the paper's five benchmarks share up to 0.21 of their 8-grams. With n = 5
# they do not collide either, but small exercises of one kind count as one with other numbers.
SAME = 0.5
MASKED = 0.9

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


class Seen:
    """The problems seen so far, as hashes: about a hundred bytes per problem."""

    def __init__(self) -> None:
        self._texts: set[bytes] = set()
        self._tokens: set[bytes] = set()

    def add(self, problem: str) -> str | None:
        """Add `problem`. How it repeats an earlier one, one of REPEATED, or None."""
        versions = (problem, " ".join(tokens(problem)))
        text, normal = (hashlib.sha256(version.encode()).digest()[:16] for version in versions)
        exact, normalized = REPEATED
        reason = exact if text in self._texts else normalized if normal in self._tokens else None
        self._texts.add(text)
        self._tokens.add(normal)
        return reason


class Index:
    """Finds problems of benchmarks, given as (benchmark, id, text), by their n-grams of words."""

    def __init__(self, problems: Iterable[tuple[str, str, str]], n: int) -> None:
        self.n = n
        self._names: list[tuple[str, str]] = []
        self._tokens: list[str] = []
        self._grams: list[tuple[frozenset[str], frozenset[str]]] = []  # with numbers, and masked
        self._where: dict[str, list[int]] = defaultdict(list)  # masked n-gram -> problems
        self._short: dict[str, list[int]] = defaultdict(list)  # masked tokens -> short problems
        for number, (benchmark, identity, text) in enumerate(problems):
            found = tokens(text)
            self._names.append((benchmark, identity))
            self._tokens.append(" ".join(found))
            self._grams.append(self._both_grams(found))
            if len(_masked(_words(found))) < 2 * n:
                self._short[" ".join(_masked(found))].append(number)
            else:
                for gram in self._grams[number][1]:
                    self._where[gram].append(number)

    def matches(self, text: str) -> list[Match]:
        """Every benchmark problem found in `text`, in the benchmarks' order."""
        found: dict[int, tuple[Kind, float]] = {}
        grams, masked = self._both_grams(tokens(text))
        for number in {number for gram in masked for number in self._where.get(gram, ())}:
            known, known_masked = self._grams[number]
            same = len(known & grams) / len(known)
            alike = len(known_masked & masked) / len(known_masked)
            if alike >= MASKED and same < alike:
                found[number] = ("other numbers", alike)
            elif same >= SAME:
                found[number] = ("same text", same)
        for run in _sentences(text, 2 * self.n):
            for number in self._short.get(" ".join(_masked(run)), ()):
                if self._tokens[number] == " ".join(run):
                    found[number] = ("same text", 1.0)
                else:
                    found.setdefault(number, ("other numbers", 1.0))
        in_order = sorted(found.items())
        return [Match(*self._names[i], kind, round(share, 3)) for i, (kind, share) in in_order]

    def _both_grams(self, found: list[str]) -> tuple[frozenset[str], frozenset[str]]:
        """The n-grams of the words among the tokens, and the same with masked numbers."""
        words, n = _words(found), self.n
        return tuple(
            frozenset(" ".join(given[i : i + n]) for i in range(len(given) - n + 1))
            for given in (words, _masked(words))
        )


def tokens(text: str) -> list[str]:
    """The normalized tokens of a problem."""
    text = _FRACTION.sub(r"\\frac", _THOUSANDS.sub("", text))
    plain = _TYPESETTING.sub(" ", text).lower()
    return [token for token in _TOKEN.findall(plain) if token not in _PUNCTUATION]


def _words(found: Sequence[str]) -> list[str]:
    """Tokens without signs. A command is a word, \\frac as frac."""
    return [token.removeprefix("\\") for token in found if token[-1].isalnum()]


def _masked(found: Sequence[str]) -> list[str]:
    """Each number as 0, several in a row as one: 12,000 may have become 12,1."""
    zeros = ["0" if token[0].isdigit() else token for token in found]
    return [token for i, token in enumerate(zeros) if token != "0" or zeros[i - 1 : i] != ["0"]]


def _sentences(text: str, limit: int) -> Iterator[list[str]]:
    """The tokens of each sentence, and of each run of sentences, of fewer than `limit` words."""
    sentences = [tokens(part) for part in _SENTENCE_END.split(text)]
    for first in range(len(sentences)):
        run: list[str] = []
        for sentence in filter(None, sentences[first:]):
            run = run + sentence
            if len(_masked(_words(run))) >= limit:
                break
            yield run
