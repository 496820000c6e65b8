r"""Completions of another program: the prompts for it, and its answers.

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
from itertools import chain
from pathlib import Path
from typing import Any

from redi.checkpoint.folder import Source
from redi.config import UserError
from redi.data.files import is_encodable, read_rows, write_aside
from redi.eval.benchmarks import Benchmark
from redi.eval.completions import Completion, by_problem, completions_file, read_lines, write_lines
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
    """Write one line per problem; returns their number. Raises UserError as `make_prompt` and
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
    """(samples per problem, benchmark's name -> completions in order) of a file of rows.

    Raises UserError that names the row or the problem: a field missing or of another type, an
    unknown problem, a sample that occurs twice or not at all.
    """
    found: dict[str, list[Completion]] = {test.name: [] for test in tests}
    for where, row in read_rows(path, FIELDS):
        name = row.get("benchmark", tests[0].name if len(tests) == 1 else None)
        if name not in [*found]:
            got = "no benchmark" if name is None else f"benchmark {name!r:.60}"
            raise UserError(f"{where}: {got}; expected {' or '.join(found)}")
        found[name].append(_completion(row, where))
    try:
        rows = {test.name: by_problem(test, found[test.name]) for test in tests}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    samples = {name: len(problems[0]) for name, problems in rows.items()}
    if len(set(samples.values())) > 1:
        raise UserError(f"{path}: expected as many samples for each benchmark, got {samples}")
    return max(samples.values()), {name: list(chain(*problems)) for name, problems in rows.items()}


def _completion(row: dict[str, Any], where: str) -> Completion:
    id, sample, text, reason, tokens = (row.get(field) for field in FIELDS[1:])
    reason = FINISH_REASONS.get(str("stop" if reason is None else reason).lower())
    is_count = type(tokens) is int and 0 <= tokens <= MOST_TOKENS
    for field, is_valid, expected in (
        ("id", type(id) in (str, int), "text or a whole number"),
        ("sample", type(sample) is int and sample >= 0, "a whole number from 0"),
        ("text", isinstance(text, str) and is_encodable(text), "the completion's text"),
        ("finish_reason", reason is not None, f"one of {', '.join(FINISH_REASONS)}"),
        ("num_tokens", tokens is None or is_count, f"a whole number from 0 to {MOST_TOKENS}"),
    ):
        if not is_valid:
            got = ascii(row[field])[:60] if field in row else "nothing"
            raise UserError(f"{where}: field {field!r}: expected {expected}, got {got}")
    return Completion(id=str(id), sample=sample, text=text, num_tokens=tokens, finish_reason=reason)


def store_completions(out: Path, given: dict[str, list[Completion]]) -> None:
    """Write them as our own are written. Raises UserError if the folder holds different ones: the
    file has changed since they were graded."""
    for name, completions in given.items():
        path = completions_file(out, name)
        if not path.is_file():
            write_lines(path, completions)
        elif list(read_lines(path, Completion)) != completions:
            raise UserError(f"{path}: holds other completions; choose another --out")
