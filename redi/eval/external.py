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

from itertools import chain
from pathlib import Path
from typing import Any

from redi.checkpoint.folder import open_model
from redi.config import UserError
from redi.data.files import is_encodable, read_rows, refuse_overwriting, write_aside
from redi.eval.benchmarks import Benchmark, check_fields
from redi.eval.completions import Completion, Key, by_problem, to_line
from redi.eval.protocol import EvalConfig, prompt_samples, user_message

# Of vLLM, SGLang, TGI, llama.cpp and the APIs of OpenAI, Anthropic and Google, in lower case.
FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop"),
    **dict.fromkeys(("length", "limit", "max_tokens", "max_length"), "length"),
}
FIELDS = ("benchmark", "id", "sample", "text", "finish_reason", "num_tokens")  # of a returned row
MOST_TOKENS = 2**31  # of one response; a larger number is a mistake


def export_prompts(config: EvalConfig, benchmarks: list[Benchmark]) -> None:
    """Write the prompts of config.model, one line per problem, to config.export_prompts. Raises
    UserError if that is one of the files read."""
    if config.completions:
        raise UserError("--export-prompts: expected without --completions, which come later")
    _, source = open_model(config.model)
    given = [Path(name).expanduser() for name in config.benchmark]
    inputs = [*given, *chain(*(path.rglob("*") for path in given)), *source.folder.iterdir()]
    refuse_overwriting("export-prompts", config.export_prompts, inputs)
    prompted = prompt_samples(benchmarks, source, config)[:: config.samples]
    with write_aside(config.export_prompts) as file:
        for one in prompted:
            ids = list(one.request.prompt_ids)
            row = {
                "benchmark": one.benchmark,
                "id": one.problem.id,
                "samples": config.samples,
                "messages": [user_message(one.problem, config)],
                "prompt": source.chat.tokenizer.decode(ids, skip_special_tokens=False),
                "prompt_token_ids": ids,
                "temperature": config.temperature,
                "top_p": config.top_p,
                "max_tokens": one.request.max_new_tokens,
                "stop_token_ids": source.stop_ids,
            }
            file.write(to_line(row))
    count = f"{len(prompted)} prompts, {config.samples} samples of each"
    print(f"saved {config.export_prompts}: {count}")


def read_completions(
    path: str | Path, benchmarks: list[Benchmark]
) -> tuple[int, dict[str, list[Completion]]]:
    """(samples per problem, benchmark's name -> completions in order) of a file of rows.

    Raises UserError that names file, line, field and what was expected: a missing field or another
    type, an unknown benchmark or problem, a sample that occurs twice; the problem of a sample that
    is missing.
    """
    names = [benchmark.name for benchmark in benchmarks]
    ids = {benchmark.name: {p.id for p in benchmark.problems} for benchmark in benchmarks}
    found: dict[str, dict[Key, Completion]] = {name: {} for name in names}
    for where, row in read_rows(path, FIELDS):
        name = row.get("benchmark", names[0] if len(names) == 1 else None)
        check_fields(row, where, ("benchmark", name in names, " or ".join(names)))
        completion = _completion(row, where)
        check_fields(
            row,
            where,
            ("id", completion.id in ids[name], f"a problem of {name}"),
            ("sample", completion.key not in found[name], "a number that no earlier row has"),
        )
        found[name][completion.key] = completion
    rows = {b.name: by_problem(b, list(found[b.name].values()), str(path)) for b in benchmarks}
    samples = {name: len(problems[0]) for name, problems in rows.items()}
    if len(set(samples.values())) > 1:
        raise UserError(f"{path}: expected as many samples for each benchmark, got {samples}")
    return max(samples.values()), {name: list(chain(*problems)) for name, problems in rows.items()}


def _completion(row: dict[str, Any], where: str) -> Completion:
    id, sample, text, reason, tokens = (row.get(field) for field in FIELDS[1:])
    reason = FINISH_REASONS.get(str("stop" if reason is None else reason).lower())
    is_count = type(tokens) is int and 0 <= tokens <= MOST_TOKENS
    is_valid_text = isinstance(text, str) and is_encodable(text)
    check_fields(
        row,
        where,
        ("id", type(id) in (str, int), "text or a whole number"),
        ("sample", type(sample) is int and sample >= 0, "a whole number from 0"),
        ("text", is_valid_text, "the completion's text"),
        ("finish_reason", reason is not None, f"one of {', '.join(FINISH_REASONS)}"),
        ("num_tokens", tokens is None or is_count, f"a whole number from 0 to {MOST_TOKENS}"),
    )
    return Completion(id=str(id), sample=sample, text=text, num_tokens=tokens, finish_reason=reason)
