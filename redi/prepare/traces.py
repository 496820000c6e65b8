"""Raw teacher rows -> positives for stage 1 and pairs for stage 2 (Section 3, data set curation).

A row of OpenR1-Math-Raw is a problem, the teacher's traces and a verdict of two verifiers on each:

    {"problem": "1+1?", "problem_is_valid": "Yes", "source": "olympiads",
     "generations": ["It is 3.", "It is 2.", "So 2."],
     "correctness": {"llama_verification":          [false, true, true],
                     "math_verify_reparsed_answer": [false, true, true]}}

gives one line of each file: the first correct trace, and beside it the first incorrect one.

    positive  {"prompt":     [{"role": "user", "content": "1+1?"}],
               "completion": [{"role": "assistant", "content": "It is 2."}], "source": .., "id": ..}
    pair      {"prompt":     [{"role": "user", "content": "1+1?"}],
               "chosen":     [{"role": "assistant", "content": "It is 2."}],
               "rejected":   [{"role": "assistant", "content": "It is 3."}], "source": .., "id": ..}

`Rules()` is the paper's recipe; other rules take several pairs of a problem, say, or leave out
traces that were cut off. The other forms of teacher data (raw.py) come to the same two lines.
Texts are taken as they are, not stripped. The prompt has no system message: the chat template of
the tokenizer supplies its default, the one that the paper trains with. Every row is accounted for:
`choose` says why a row has no positive, or why its positive has no pair.

Left to the trainers: shuffling by seed (rows stay in input order) and the limits on length (they
count tokens, and here there is no tokenizer). Problems that occur twice, or in a benchmark, are
the matter of overlap.py; the paper drops neither.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal, TypedDict

from redi.config import require
from redi.data.files import Row
from redi.prepare import raw
from redi.prepare.raw import RawRow

# Why a row has no positive under the paper's rules, in the order in which it is asked. Null and
# absent are the same.
NO_POSITIVE = (
    "malformed",  # a field of another type, or text that UTF-8 cannot hold (a lone surrogate)
    "problem not valid",  # problem_is_valid is not "yes"
    "source cn_k12",
    "empty problem",
    "no generations",
    "labels missing",  # a verifier's list is missing, or null for a generation
    "labels misaligned",  # a verifier's list is not as long as generations
    "no correct generation",
    "empty chosen",  # the first correct generation is null or blank
)
# Why a row that has a positive has no pair.
NO_PAIR = (
    "no incorrect generation",
    "empty rejected",  # the first incorrect generation is null or blank
    "chosen equals rejected",  # the same text was judged both ways
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows are chosen from; the defaults are the paper's.

    A trace is correct when both verifiers accept it. Under the reject rule "both", one that they
    dispute is neither correct nor incorrect; so is, with require_complete, one that was cut off or
    gives no answer: a cut-off negative teaches nothing but length. The ratio has no counterpart
    against long rejected traces: wrong ones are mostly the longer, and that is their lesson.
    """

    reject_rule: Annotated[
        Literal["either", "both"], "a trace is incorrect when one verifier rejects it, or both do"
    ] = "either"
    require_complete: Annotated[
        bool, "only traces that close their thinking and then give an answer"
    ] = False
    pairs_per_problem: Annotated[
        int, "pairs of a problem at most: the k-th correct with the k-th incorrect trace"
    ] = 1
    min_length_ratio: Annotated[
        float, "drop a pair whose rejected is shorter than this times its chosen, in characters"
    ] = 0.0
    sources: Annotated[list[str], "only rows of these sources"] = field(default_factory=list)
    exclude_sources: Annotated[list[str], "no rows of these sources; `none` keeps all"] = field(
        default_factory=lambda: ["cn_k12"]
    )

    def __post_init__(self) -> None:
        require(
            self.pairs_per_problem > 0, "pairs_per_problem", self.pairs_per_problem, "1 or more"
        )
        require(self.min_length_ratio >= 0, "min_length_ratio", self.min_length_ratio, "0 or more")

    @property
    def excluded(self) -> list[str]:
        return [source for source in self.exclude_sources if source != "none"]

    def no_positive(self) -> list[str]:
        """The reasons that there may be under these rules, in the order in which they are asked."""
        reasons = [f"source {source}" for source in self.excluded]
        reasons += ["source not asked for"] * bool(self.sources)
        first, last = NO_POSITIVE.index("source cn_k12"), NO_POSITIVE.index("empty chosen")
        reasons = [*NO_POSITIVE[:first], *reasons, *NO_POSITIVE[first + 1 : last]]
        return [*reasons, *["no complete correct one"] * self.require_complete, "empty chosen"]

    def no_pair(self) -> list[str]:
        reasons = [NO_PAIR[0], *["none that both reject"] * (self.reject_rule == "both")]
        reasons += ["no complete incorrect one"] * self.require_complete
        reasons += ["empty further chosen"] * (self.pairs_per_problem > 1)
        reasons += [*NO_PAIR[1:], *["rejected too short"] * (self.min_length_ratio > 0)]
        return [*reasons, *["same as another pair"] * (self.pairs_per_problem > 1)]


class Message(TypedDict):
    role: str
    content: str


class Positive(TypedDict):
    """One line of positives.jsonl, (x, y_w). A typed dict, because it is the JSON it is saved as.

    id: 16 hex digits of SHA-256 over problem and chosen trace. The same raw row has the same id
    wherever it stands in the data, and a row's first pair has the id of its positive. Further pairs
    have one over problem, chosen and rejected trace.
    """

    prompt: list[Message]
    completion: list[Message]
    source: str | None
    id: str


class Pair(TypedDict):
    """One line of pairs.jsonl, (x, y_w, y_l)."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str | None
    id: str


@dataclass(frozen=True)
class Choice:
    """What a row gives: with a positive, pairs and why not more; without, why there is none.

    no_pair: a reason for each pair that might have been, of at least one and as many as the rules
    ask for and the traces allow. So 1 + further ones = pairs + no_pair.
    """

    positive: Positive | None = None
    pairs: list[Pair] = field(default_factory=list)
    no_positive: str | None = None
    no_pair: list[str] = field(default_factory=list)


Built = tuple[Positive | None, Pair | None, str | None]


def build(rows: Iterable[Row]) -> Iterator[Built]:
    """Yield (positive, pair, reason) for each row of OpenR1-Math-Raw, in their order (Section 3).

    reason is None for a row that gave both; else what kept it from giving a positive (one of
    NO_POSITIVE; positive and pair are None) or a pair (one of NO_PAIR; pair is None).
    """
    for row in rows:
        choice = choose(raw.openr1_math_raw(row), Rules())
        (reason,) = choice.no_pair or [choice.no_positive]
        (pair,) = choice.pairs or [None]
        yield choice.positive, pair, reason


def unusable(row: RawRow, rules: Rules) -> str | None:
    """Why nothing can come of a row, whatever its labels say, or None."""
    if row.flaw == "malformed":
        return row.flaw
    if not row.valid:
        return "problem not valid"
    if row.source in rules.excluded:
        return f"source {row.source}"
    if rules.sources and row.source not in rules.sources:
        return "source not asked for"
    if _is_blank(row.problem):
        return "empty problem"
    if not row.traces:
        return "no generations"
    return None


def choose(row: RawRow, rules: Rules) -> Choice:
    # 1. Shuffling is the trainer's.
    # 2. Rows that cannot be used.
    if reason := unusable(row, rules) or row.flaw:
        return Choice(no_positive=reason)

    # 3. A trace is correct when both verifiers say so.
    judged = list(zip(row.traces, row.votes, row.complete))
    correct = [(trace, whole) for trace, votes, whole in judged if votes and all(votes)]
    incorrect = [
        (trace, whole)
        for trace, votes, whole in judged
        if votes and not (any(votes) if rules.reject_rule == "both" else all(votes))
    ]

    # 4. D_SFT: the first correct trace.
    if not correct:
        return Choice(no_positive="no correct generation")
    chosen = _usable(correct, rules)
    if not chosen:
        return Choice(no_positive="no complete correct one")
    if _is_blank(chosen[0]):
        return Choice(no_positive="empty chosen")
    positive = Positive(
        prompt=_message("user", row.problem),
        completion=_message("assistant", chosen[0]),
        source=row.source,
        id=_id(row.problem, chosen[0]),
    )

    # 5. D_Pref: the same, and the first incorrect trace.
    if not incorrect:
        disputed = any(not all(votes) for votes in row.votes)
        why = "none that both reject" if disputed else "no incorrect generation"
        return Choice(positive, no_pair=[why])
    rejected = _usable(incorrect, rules)
    if not rejected:
        return Choice(positive, no_pair=["no complete incorrect one"])
    pairs, reasons = _pairs(positive, chosen, rejected, rules)
    return Choice(positive, pairs, no_pair=reasons)


def _usable(traces: list[tuple[str | None, bool]], rules: Rules) -> list[str | None]:
    return [trace for trace, whole in traces if whole or not rules.require_complete]


def _pairs(
    positive: Positive, correct: list[str | None], incorrect: list[str | None], rules: Rules
) -> tuple[list[Pair], list[str]]:
    """The k-th correct trace with the k-th incorrect one, and why any of these is not a pair."""
    pairs: dict[tuple[str, str], Pair] = {}
    reasons: list[str] = []
    problem = positive["prompt"][0]["content"]
    wanted = islice(zip(correct, incorrect), rules.pairs_per_problem)
    for k, (chosen, rejected) in enumerate(wanted):
        if _is_blank(chosen):
            reasons.append("empty further chosen")
        elif _is_blank(rejected):
            reasons.append("empty rejected")
        elif rejected == chosen:
            reasons.append("chosen equals rejected")
        elif len(rejected) < rules.min_length_ratio * len(chosen):
            reasons.append("rejected too short")
        elif (chosen, rejected) in pairs:
            reasons.append("same as another pair")
        else:
            pairs[chosen, rejected] = Pair(
                prompt=positive["prompt"],
                chosen=_message("assistant", chosen),
                rejected=_message("assistant", rejected),
                source=positive["source"],
                id=positive["id"] if k == 0 else _id(problem, chosen, rejected),
            )
    return list(pairs.values()), reasons


def _id(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _message(role: str, content: str) -> list[Message]:
    return [Message(role=role, content=content)]


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()
