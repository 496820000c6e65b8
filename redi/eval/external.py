r"""Completions of another program: the prompts for it, and reading back what it returned.

    python evaluate.py --model out/redi --export-prompts prompts.jsonl --samples 16
        {"benchmark": "aime24", "id": "60", "samples": 16, "messages": [...], "prompt": "<|im_...",
         "prompt_token_ids": [...], "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, ...}
    python evaluate.py --completions made.jsonl
        {"id": "60", "sample": 0, "text": "...", "finish_reason": "stop"}

`prompt_token_ids` are exactly what redi would read; `prompt` is the same as text, which a server
may tokenize differently; `messages` are for an API with its own template and no prefix. A returned
row needs `benchmark` if there are several, and may have `num_tokens`. `finish_reason` is one of
FINISH_REASONS; without it a response counts as finished, and a truncated one is recognized only by
its missing answer.
"""

import json
from pathlib import Path
from typing import Any

from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.data.files import is_encodable, read_rows, write_aside
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Completion, Key, completions_file, read_lines, write_lines
from redi.eval.protocol import EvalConfig, check_limit, make_prompt, user_message

# Of vLLM, SGLang, TGI, llama.cpp and the APIs of OpenAI, Anthropic and Google, in lower case.
FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop"),
    **dict.fromkeys(("length", "limit", "max_tokens", "max_length"), "length"),
}
FIELDS = ("benchmark", "id", "sample", "text", "finish_reason", "num_tokens")  # of a returned row
MOST_TOKENS = 2**31  # of one response; a larger number is a mistake


def export_prompts(
    path: str | Path, tests: list[Benchmark], source: Source, config: EvalConfig
) -> int:
    """Write one line a problem; returns how many. Raises UserError as `make_prompt` and
    `check_limit`."""
    rooms = []
    with write_aside(path) as file:
        for test in tests:
            for problem in test.problems:
                prompt, room = make_prompt(test, problem, source, config)
                rooms.append(room)
                row = {
                    "benchmark": test.name,
                    "id": problem.id,
                    "samples": config.samples,
                    "messages": [user_message(problem, config)],
                    "prompt": source.chat.tokenizer.decode(prompt, skip_special_tokens=False),
                    "prompt_token_ids": prompt,
                    "temperature": config.temperature,
                    "top_p": config.top_p,
                    "max_tokens": room,
                    "stop_token_ids": source.stop_ids,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        check_limit(rooms, source, config)
    return len(rooms)


def read_completions(
    path: str | Path, tests: list[Benchmark]
) -> tuple[int, dict[str, list[Completion]]]:
    """(samples a problem, benchmark's name -> completions in order) of a file of rows.

    Raises UserError that names the row or the problem: a field missing or of another type, a
    problem that was not asked, a sample that is there twice or not at all.
    """
    asked = {test.name: {problem.id for problem in test.problems} for test in tests}
    found: dict[tuple[str, Key], tuple[str, Completion]] = {}
    for place, row in read_rows(path, FIELDS):
        name = _benchmark(row, place, list(asked))
        completion = _completion(row, place)
        if completion.id not in asked[name]:
            raise UserError(f"{place}: {name} has no problem {completion.id!r}")
        earlier, _ = found.setdefault((name, completion.key), (place, completion))
        if earlier != place:
            raise UserError(
                f"{place}: sample {completion.sample} of problem {completion.id!r} is also at "
                f"{earlier}"
            )
    samples = 1 + max(sample for _, (_, sample) in found)
    complete = {}
    for test in tests:
        # A generator, not a list: one row with a huge sample number makes `samples` huge.
        keys = ((test.name, (p.id, s)) for p in test.problems for s in range(samples))
        present = sum(name == test.name for name, _ in found)
        if missing := samples * len(test.problems) - present:
            id, sample = next(key for key in keys if key not in found)[1]
            raise UserError(
                f"{path}: {test.name}: sample {sample} of problem {id!r} is missing"
                + (f", and {missing - 1} more" if missing > 1 else "")
                + f"; expected samples 0 to {samples - 1} of each problem"
            )
        complete[test.name] = [found[key][1] for key in keys]
    return samples, complete


def store_completions(out: Path, given: dict[str, list[Completion]]) -> None:
    """Write them where our own lie. Raises UserError if others lie there: the file was made anew
    since they were graded."""
    for name, completions in given.items():
        path = completions_file(out, name)
        if not path.is_file():
            write_lines(path, completions)
        elif list(read_lines(path, Completion)) != completions:
            raise UserError(f"{path}: holds other completions; choose another --out")


def _benchmark(row: dict[str, Any], place: str, names: list[str]) -> str:
    name = row.get("benchmark", names[0] if len(names) == 1 else None)
    if name not in names:
        said = "no benchmark" if name is None else f"benchmark {name!r:.60}"
        raise UserError(f"{place}: {said}; expected {' or '.join(names)}")
    return name


def _completion(row: dict[str, Any], place: str) -> Completion:
    id, sample, text = (row.get(field) for field in ("id", "sample", "text"))
    said, tokens = row.get("finish_reason"), row.get("num_tokens")
    reason = FINISH_REASONS.get(str("stop" if said is None else said).lower())
    for field, holds, expected in (
        ("id", type(id) in (str, int), "text or a whole number"),
        ("sample", type(sample) is int and sample >= 0, "a whole number from 0"),
        ("text", isinstance(text, str) and is_encodable(text), "the completion's text"),
        ("finish_reason", reason is not None, f"one of {', '.join(FINISH_REASONS)}"),
        (
            "num_tokens",
            tokens is None or (type(tokens) is int and 0 <= tokens <= MOST_TOKENS),
            f"a whole number from 0 to {MOST_TOKENS}",
        ),
    ):
        if not holds:
            got = ascii(row[field])[:60] if field in row else "nothing"
            raise UserError(f"{place}: field {field!r}: expected {expected}, got {got}")
    return Completion(
        id=str(id),
        sample=sample,
        text=text,
        num_tokens=tokens,
        finish_reason=reason,
    )
