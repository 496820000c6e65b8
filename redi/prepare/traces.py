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
from typing import Annotated, Any, Literal

from redi.config import require
from redi.data.files import Row
from redi.prepare.raw import RawRow

NONE_LEFT = "all traces left out"  # by the reader, which counts them


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The defaults are the paper's.

    A trace is correct when both verifiers accept it. With the reject rule "both", a trace they
    disagree on is neither correct nor incorrect. require_complete leaves out traces that were
    truncated or give no answer: a truncated negative teaches nothing but length. A rejected trace
    may be much longer than the chosen one: wrong traces usually are, and that is part of what they
    teach. Lengths are in characters.
    """

    raw: Annotated[str, "a hub id, a .parquet, .jsonl or .json file, a folder, or an evaluation"]
    out: Annotated[str, "folder for positives.jsonl, pairs.jsonl and card.json"] = "data"
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
    relabel: Annotated[bool, "grade every trace, whatever labels are given"] = False
    workers: Annotated[int, "processes that grade"] = 4
    dedup: Annotated[bool, "keep only the first of problems that are the same"] = False
    decontaminate: Annotated[list[str], "drop problems of these benchmarks (names or files)"] = (
        field(default_factory=list)
    )
    keep_truncated: Annotated[bool, "of an evaluation: keep answers cut off at the limit"] = False
    allow_benchmarks: Annotated[bool, "of an evaluation: known benchmarks may be used"] = False

    def __post_init__(self) -> None:
        for name in ("pairs_per_problem", "workers"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        ratio = self.min_length_ratio
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


def unusable(row: RawRow, rules: PrepareConfig) -> str | None:
    """Why a row can give nothing, whatever its labels are, or None."""
    return _first_reason(
        (row.flaw, row.flaw in ("malformed", "problem not valid")),
        (f"source {row.source}", row.source in rules.excluded),
        ("source not asked for", rules.sources and row.source not in rules.sources),
        ("empty problem", _is_blank(row.problem)),
        (NONE_LEFT, row.left_out and not row.traces),
        ("no generations", not row.traces),
    )


def choose(row: RawRow, rules: PrepareConfig) -> Choice:
    """Steps 2 to 5 of the paper; step 1, shuffling, is left to the trainers."""
    # 2. Drop rows that cannot be used.
    if reason := unusable(row, rules) or row.flaw:
        return Choice(no_positive=reason)

    # 3. A trace is correct when both verifiers accept it.
    judged = [trace for trace in row.traces if trace.votes]
    accepted = any if rules.reject_rule == "both" else all  # a trace not accepted is incorrect
    correct = [trace for trace in judged if all(trace.votes)]
    incorrect = [trace for trace in judged if not accepted(trace.votes)]
    chosen, rejected = (
        [trace.text for trace in side if trace.complete or not rules.require_complete]
        for side in (correct, incorrect)
    )

    # 4. D_SFT: the first correct trace.
    reason = _first_reason(
        ("no correct generation", not correct),
        ("no complete correct one", not chosen),
        ("empty chosen", chosen and _is_blank(chosen[0])),
    )
    if reason:
        return Choice(no_positive=reason)
    positive = _training_row(row, [chosen[0]], completion=chosen[0])

    # 5. D_Pref: the same trace, and the first incorrect one.
    reason = _first_reason(
        ("none that both reject", not incorrect and not all(all(t.votes) for t in row.traces)),
        ("no incorrect generation", not incorrect),
        ("no complete incorrect one", not rejected),
    )
    if reason:
        return Choice(positive, no_pair=[reason])
    pairs: dict[tuple[str, str], Row] = {}
    reasons = []
    for k, texts in enumerate(islice(zip(chosen, rejected), rules.pairs_per_problem)):
        right, wrong = (text or "" for text in texts)
        reason = _first_reason(
            ("empty further chosen", _is_blank(right)),
            ("empty rejected", _is_blank(wrong)),
            ("chosen equals rejected", right == wrong),
            ("rejected too short", len(wrong) < rules.min_length_ratio * len(right)),
            ("same as another pair", texts in pairs),
        )
        if reason:
            reasons.append(reason)
        else:
            identity = [right] if k == 0 else texts
            pairs[texts] = _training_row(row, identity, chosen=right, rejected=wrong)
    return Choice(positive, list(pairs.values()), no_pair=reasons)


def _first_reason(*checks: tuple[str | None, Any]) -> str | None:
    """checks: (reason, whether it applies), in the order in which they count."""
    return next((reason for reason, applies in checks if applies), None)


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
