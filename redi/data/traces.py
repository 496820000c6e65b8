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

Texts are taken as they are, not stripped. The prompt has no system message: the chat template of
the tokenizer supplies its default, the one that the paper trains with. Every row is accounted for:
`build` says why a row has no positive, or why its positive has no pair.

Left out, as in the paper: de-duplication, decontamination, and judging whether a wrong trace was
merely cut off. Left to the trainers: shuffling by seed (rows stay in input order) and the limits
on length (they count tokens, and here there is no tokenizer). OpenR1-Math-220k has other fields and
only about 12k problems with both a right and a wrong trace; a file of it is refused.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from redi.config import UserError
from redi.data.files import Row, is_encodable, read_rows

FIELDS = ("problem", "problem_is_valid", "generations", "correctness")
TEXTS = ("problem", "problem_is_valid", "source")
VERIFIERS = ("llama_verification", "math_verify_reparsed_answer")

# Why a row has no positive, in the order in which it is asked. Null and absent are the same.
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


class Message(TypedDict):
    role: str
    content: str


class Positive(TypedDict):
    """One line of positives.jsonl, (x, y_w). A typed dict, because it is the JSON it is saved as.

    id: 16 hex digits of SHA-256 over problem and chosen trace. The same raw row has the same id
    wherever it stands in the data, and a pair has the id of the positive from its row.
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


Built = tuple[Positive | None, Pair | None, str | None]


def raw_rows(path: str | Path) -> Iterator[Row]:
    """The rows of one raw file, a folder or a hub id, streamed.

    Raises UserError as `read_rows` does, and at the end if not one row had OpenR1-Math-Raw's
    fields: such a file is another format, and counting all of it as dropped would hide that.
    """
    seen: dict[str, None] = {}  # an ordered set
    is_raw = False
    for _, row in read_rows(path):
        is_raw = is_raw or all(name in row for name in FIELDS)
        if not is_raw:
            seen.update(dict.fromkeys(row))
        yield row
    if not is_raw:
        raise UserError(
            f"{path}: not OpenR1-Math-Raw: expected the fields {', '.join(FIELDS)}; "
            f"found {', '.join(list(seen)[:20]) or 'none'}"
        )


def build(rows: Iterable[Row]) -> Iterator[Built]:
    """Yield (positive, pair, reason) for each raw row, in the order of the rows (Section 3).

    reason is None for a row that gave both; else what kept it from giving a positive (one of
    NO_POSITIVE; positive and pair are None) or a pair (one of NO_PAIR; pair is None).
    """
    return map(_build_row, rows)


def _build_row(row: Row) -> Built:
    # 1. Shuffling is the trainer's.
    # 2. Rows that cannot be used.
    if _is_malformed(row):
        return None, None, "malformed"
    reason = _unusable(row)
    if reason:
        return None, None, reason
    problem, generations, source = row["problem"], row["generations"], row.get("source")

    # 3. A trace is correct when both verifiers say so.
    verdicts = zip(*(row["correctness"][name] for name in VERIFIERS))
    correct = [llama and math_verify for llama, math_verify in verdicts]

    # 4. D_SFT: the first correct trace.
    if True not in correct:
        return None, None, "no correct generation"
    chosen = generations[correct.index(True)]
    if _is_blank(chosen):
        return None, None, "empty chosen"
    prompt = _message("user", problem)
    row_id = hashlib.sha256(f"{problem}\0{chosen}".encode()).hexdigest()[:16]
    positive = Positive(
        prompt=prompt, completion=_message("assistant", chosen), source=source, id=row_id
    )

    # 5. D_Pref: the same, and the first incorrect trace.
    if False not in correct:
        return positive, None, "no incorrect generation"
    rejected = generations[correct.index(False)]
    if _is_blank(rejected):
        return positive, None, "empty rejected"
    if rejected == chosen:
        return positive, None, "chosen equals rejected"
    pair = Pair(
        prompt=prompt,
        chosen=_message("assistant", chosen),
        rejected=_message("assistant", rejected),
        source=source,
        id=row_id,
    )
    return positive, pair, None


def _unusable(row: Row) -> str | None:
    """Step 2: the reason to drop a well-formed row before its labels are read, or None."""
    if (row.get("problem_is_valid") or "").strip().lower() != "yes":
        return "problem not valid"
    if row.get("source") == "cn_k12":
        return "source cn_k12"
    if _is_blank(row.get("problem")):
        return "empty problem"
    if not row.get("generations"):
        return "no generations"
    labels = [(row.get("correctness") or {}).get(name) for name in VERIFIERS]
    if any(column is None or None in column for column in labels):
        return "labels missing"
    if any(len(column) != len(row["generations"]) for column in labels):
        return "labels misaligned"
    return None


def _message(role: str, content: str) -> list[Message]:
    return [Message(role=role, content=content)]


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()


# ---------------------------------------------------------------- types; null passes everywhere


def _is_malformed(row: Row) -> bool:
    correctness = row.get("correctness")
    return not (
        all(_is_text(row.get(name)) for name in TEXTS)
        and _is_list(row.get("generations"), _is_text)
        and (correctness is None or isinstance(correctness, dict))
        and all(_is_list((correctness or {}).get(name), _is_label) for name in VERIFIERS)
    )


def _is_text(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, str) and is_encodable(value)


def _is_label(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_item, value)))
