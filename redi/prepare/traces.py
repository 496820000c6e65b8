"""Raw teacher rows -> positives for stage 1 and pairs for stage 2 (Section 3, data set curation).

A problem with a wrong and a right trace gives one line of each file. It is the first correct trace,
and a pair with the first incorrect one:

    positive  {"prompt":     [{"role": "user", "content": "1+1?"}],
               "completion": [{"role": "assistant", "content": "It is 2."}], "source": .., "id": ..}
    pair      {"prompt":     [{"role": "user", "content": "1+1?"}],
               "chosen":     [{"role": "assistant", "content": "It is 2."}],
               "rejected":   [{"role": "assistant", "content": "It is 3."}], "source": .., "id": ..}

The id is 16 hex digits of SHA-256 over problem and chosen trace; that of a second or later pair
also covers the rejected trace. Texts are not stripped. The prompt has no system message: the
tokenizer's chat template adds its default, the one the paper trains with.

`choose` gives a reason for every row without a positive and for every positive without a pair. Left
to the trainers: shuffling by seed and limits on length, in tokens (there is no tokenizer here).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

from redi.config import require
from redi.data.files import Row
from redi.prepare.raw import RawRow, Trace


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
    checks = (
        (row.flaw, row.flaw in ("malformed", "problem not valid")),
        (f"source {row.source}", row.source in rules.excluded),
        ("source not asked for", rules.sources and row.source not in rules.sources),
        ("empty problem", _is_blank(row.problem)),
        ("no generations", not row.traces),
    )
    return next((reason for reason, applies in checks if applies), None)


def choose(row: RawRow, rules: Rules) -> Choice:
    """Steps 2 to 5 of the paper; step 1, shuffling, is left to the trainers."""
    # 2. Drop rows that cannot be used.
    if reason := unusable(row, rules) or row.flaw:
        return Choice(no_positive=reason)

    # 3. A trace is correct when both verifiers accept it.
    judged = [trace for trace in row.traces if trace.votes]
    accepted = any if rules.reject_rule == "both" else all  # a trace not accepted is incorrect
    correct = [trace for trace in judged if all(trace.votes)]
    incorrect = [trace for trace in judged if not accepted(trace.votes)]

    # 4. D_SFT: the first correct trace.
    if not correct:
        return Choice(no_positive="no correct generation")
    chosen = _texts_to_choose_from(correct, rules)
    if not chosen:
        return Choice(no_positive="no complete correct one")
    if _is_blank(chosen[0]):
        return Choice(no_positive="empty chosen")
    positive = _training_row(row, [chosen[0]], completion=chosen[0])

    # 5. D_Pref: the same trace, and the first incorrect one.
    if not incorrect:
        disputed = any(not all(trace.votes) for trace in row.traces)
        reason = "none that both reject" if disputed else "no incorrect generation"
        return Choice(positive, no_pair=[reason])
    rejected = _texts_to_choose_from(incorrect, rules)
    if not rejected:
        return Choice(positive, no_pair=["no complete incorrect one"])
    pairs: dict[tuple[str, str], Row] = {}
    reasons = []
    for k, texts in enumerate(islice(zip(chosen, rejected), rules.pairs_per_problem)):
        if reason := _reason_against_pair(*texts, rules):
            reasons.append(reason)
        elif texts in pairs:
            reasons.append("same as another pair")
        else:
            identity = [texts[0]] if k == 0 else texts
            pairs[texts] = _training_row(row, identity, chosen=texts[0], rejected=texts[1])
    return Choice(positive, list(pairs.values()), no_pair=reasons)


def _texts_to_choose_from(traces: list[Trace], rules: Rules) -> list[str | None]:
    return [trace.text for trace in traces if trace.complete or not rules.require_complete]


def _reason_against_pair(chosen: str | None, rejected: str | None, rules: Rules) -> str | None:
    """Why two traces cannot be a pair, or None."""
    if _is_blank(chosen):
        return "empty further chosen"
    if _is_blank(rejected):
        return "empty rejected"
    if rejected == chosen:
        return "chosen equals rejected"
    return "rejected too short" if len(rejected) < rules.min_length_ratio * len(chosen) else None


def _training_row(row: RawRow, identity: Sequence[str], **responses: str) -> Row:
    """A row to train on. identity: the traces that its id covers, beside the problem."""
    answers = {side: [{"role": "assistant", "content": r}] for side, r in responses.items()}
    return {
        "prompt": [{"role": "user", "content": row.problem}],
        **answers,
        "source": row.source,
        "id": hashlib.sha256("\0".join([row.problem, *identity]).encode()).hexdigest()[:16],
    }


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()
