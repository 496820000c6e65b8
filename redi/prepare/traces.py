"""Raw teacher rows -> positives for stage 1 and pairs for stage 2 (Section 3, data set curation).

A row of OpenR1-Math-Raw is a problem, the teacher's traces, and two verifiers' votes on each:

    {"problem": "1+1?", "problem_is_valid": "Yes", "source": "olympiads",
     "generations": ["It is 3.", "It is 2.", "So 2."],
     "correctness": {"llama_verification":          [false, true, true],
                     "math_verify_reparsed_answer": [false, true, true]}}

It gives one line of each file: the first correct trace, and a pair with the first incorrect one.

    positive  {"prompt":     [{"role": "user", "content": "1+1?"}],
               "completion": [{"role": "assistant", "content": "It is 2."}], "source": .., "id": ..}
    pair      {"prompt":     [{"role": "user", "content": "1+1?"}],
               "chosen":     [{"role": "assistant", "content": "It is 2."}],
               "rejected":   [{"role": "assistant", "content": "It is 3."}], "source": .., "id": ..}

The id is 16 hex digits of SHA-256 over problem and chosen trace, so it does not depend on the row's
position. A row's first pair has the id of its positive; the id of a further pair also covers the
rejected trace. Texts are not stripped. The prompt has no system message: the tokenizer's chat
template adds its default, the one the paper trains with.

`Rules()` is the paper's recipe. `choose` gives a reason for every row without a positive and for
every positive without a pair. Left to the trainers: shuffling by seed (rows keep their order) and
limits on length (in tokens, and there is no tokenizer here).
"""

import hashlib
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

from redi.config import require
from redi.data.files import Row
from redi.prepare.raw import RawRow


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which traces are chosen; the defaults are the paper's.

    A trace is correct when both verifiers accept it. With the reject rule "both", a trace they
    disagree on is neither correct nor incorrect. require_complete leaves out traces that were
    truncated or give no answer: a truncated negative teaches nothing but length. A rejected trace
    may be much longer than the chosen one: wrong traces usually are, and that is part of what they
    teach. Lengths are in characters.
    """

    reject_rule: Annotated[
        Literal["either", "both"], "a trace is incorrect when one verifier rejects it, or both do"
    ] = "either"
    require_complete: Annotated[bool, "only traces that end their thinking and answer"] = False
    pairs_per_problem: Annotated[int, "most pairs per problem (k-th correct, k-th incorrect)"] = 1
    min_length_ratio: Annotated[float, "drop pairs with len(rejected) < this * len(chosen)"] = 0.0
    sources: Annotated[list[str], "only rows of these sources"] = field(default_factory=list)
    exclude_sources: Annotated[list[str], "no rows of these sources; `none` keeps all"] = field(
        default_factory=lambda: ["cn_k12"]
    )

    def __post_init__(self) -> None:
        pairs, ratio = self.pairs_per_problem, self.min_length_ratio
        require(pairs > 0, "pairs_per_problem", pairs, "1 or more")
        require(ratio >= 0, "min_length_ratio", ratio, "0 or more")

    @property
    def excluded(self) -> list[str]:
        return [source for source in self.exclude_sources if source != "none"]


@dataclass(frozen=True)
class Choice:
    """What a row gives: a positive with its pairs, or the reason why there is no positive.

    no_pair: one reason for each pair that could not be made. A positive has at least one pair or
    one reason.
    """

    positive: Row | None = None
    pairs: list[Row] = field(default_factory=list)
    no_positive: str | None = None
    no_pair: list[str] = field(default_factory=list)


def unusable(row: RawRow, rules: Rules) -> str | None:
    """Why a row can give nothing, whatever its labels are, or None."""
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
    """Steps 2 to 5 of the paper; step 1, shuffling, is left to the trainers."""
    # 2. Drop rows that cannot be used.
    if reason := unusable(row, rules) or row.flaw:
        return Choice(no_positive=reason)

    # 3. A trace is correct when both verifiers accept it.
    judged = [trace for trace in zip(row.traces, row.votes, row.complete) if trace[1]]
    accepted = any if rules.reject_rule == "both" else all  # a trace not accepted is incorrect
    correct = [(trace, complete) for trace, votes, complete in judged if all(votes)]
    incorrect = [(trace, complete) for trace, votes, complete in judged if not accepted(votes)]

    # 4. D_SFT: the first correct trace.
    if not correct:
        return Choice(no_positive="no correct generation")
    chosen = _usable(correct, rules)
    if not chosen:
        return Choice(no_positive="no complete correct one")
    if _is_blank(chosen[0]):
        return Choice(no_positive="empty chosen")
    positive = {
        "prompt": _message("user", row.problem),
        "completion": _message("assistant", chosen[0]),
        "source": row.source,
        "id": _id(row.problem, chosen[0]),
    }

    # 5. D_Pref: the same trace, and the first incorrect one.
    if not incorrect:
        disputed = any(not all(votes) for votes in row.votes)
        reason = "none that both reject" if disputed else "no incorrect generation"
        return Choice(positive, no_pair=[reason])
    rejected = _usable(incorrect, rules)
    if not rejected:
        return Choice(positive, no_pair=["no complete incorrect one"])
    pairs, reasons = _pairs(positive, chosen, rejected, rules)
    return Choice(positive, pairs, no_pair=reasons)


def _usable(traces: list[tuple[str | None, bool]], rules: Rules) -> list[str | None]:
    return [trace for trace, complete in traces if complete or not rules.require_complete]


def _pairs(
    positive: Row, correct: list[str | None], incorrect: list[str | None], rules: Rules
) -> tuple[list[Row], list[str]]:
    """The k-th correct trace with the k-th incorrect one, and why some of these give no pair."""
    pairs: dict[tuple[str, str], Row] = {}
    reasons: list[str] = []
    problem = positive["prompt"][0]["content"]
    candidates = islice(zip(correct, incorrect), rules.pairs_per_problem)
    for k, (chosen, rejected) in enumerate(candidates):
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
            pairs[chosen, rejected] = {
                "prompt": positive["prompt"],
                "chosen": _message("assistant", chosen),
                "rejected": _message("assistant", rejected),
                "source": positive["source"],
                "id": positive["id"] if k == 0 else _id(problem, chosen, rejected),
            }
    return list(pairs.values()), reasons


def _id(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()
