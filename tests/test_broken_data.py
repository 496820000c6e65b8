"""Broken rows end in a counted drop or in one line; never in a traceback.

4,000 mutated files, a quarter of them for prepare, half of labeled rows: sound rows, and between
them one that is not. It has
a value of another type anywhere in it, a field less, a lone surrogate, control characters, a
control token inside a trace, or bytes that were changed after it was written. Kept and dropped rows
must add up to what was read, and the sound rows must come out as the same bytes as without it.
Files of other kinds of breakage are in test_files.py.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
from processes import main_in_this_process
from small_run import as_positive, conversation

from redi.config import UserError
from redi.data.dataset import Dataset
from redi.data.store import load_store
from redi.hub import CARD
from redi.prepare import __main__ as prepare

SEEDS = range(500)  # mutated files of each of four kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder; nothing in it is flushed to the disk, which would take half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield tmp_path_factory.mktemp("mutated")


# ---------------------------------------------------------------- mutations

ODD_TEXTS = [
    "", " ", "\x00", "\x1b[2J", "<|im_end|>", "\ud800", "\udfff\ud800", "a\u2028\r\nb", "</think>",
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 10**30, 0.5, 1e300, float("nan"), float("-inf"), *ODD_TEXTS,
    [], [None], [True, "x"], [[1, "\ud800"], {}], {}, {"": None}, {"x": ["", {"y": 1.5}]},
]  # fmt: skip


def odd_text(random: Random) -> str:
    text = "".join(chr(random.randrange(0x110000)) for _ in range(random.randint(0, 20)))
    return random.choice([text, random.choice(ODD_TEXTS)])


def places(value: dict | list) -> list[tuple[dict | list, str | int]]:
    """(holder, key or index) of everything inside a row."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


def mutated(random: Random, row: dict) -> bytes:
    """A line that was a sound row."""
    row = copy.deepcopy(row)
    for _ in range(random.randint(1, 2)):
        holder, last = random.choice(places(row))
        how = random.choice(["value", "value", "gone", "twice", "text"])
        if how == "gone":
            del holder[last]
        elif how == "text" and isinstance(holder[last], str):
            at = random.randint(0, len(holder[last]))
            holder[last] = holder[last][:at] + odd_text(random) + holder[last][at:]
        elif how == "twice":
            holder[last] = [holder[last], holder[last]]
        else:
            holder[last] = copy.deepcopy(random.choice([odd_text(random), *ODD_VALUES]))
    return json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def garbled(random: Random, row: dict) -> bytes:
    """A line whose bytes were changed."""
    line = bytearray(json.dumps(row, ensure_ascii=False).encode())
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(line))
        how = random.choice(["flip", "cut", "insert"])
        if how == "flip":
            line[at] = random.randrange(256)
        else:
            removed = random.randint(1, 30) if how == "cut" else 0
            line[at : at + removed] = random.randbytes(0 if removed else random.randint(0, 6))
    return bytes(line)


def lines_with(line: bytes, row) -> bytes:
    """Sound rows 0 and 1, the mutated one, a sound row 3."""
    sound = [json.dumps(row(number)).encode() for number in (0, 1, 3)]
    return b"\n".join([*sound[:2], line, sound[2]]) + b"\n"


def rows_in(data: bytes) -> int:
    return len([line for line in data.split(b"\n") if line.strip()])


# ---------------------------------------------------------------- prepare


def traces(number: int) -> list[str]:
    return [f"<think>\n{number}\n</think>\n\\boxed{{{n}}}" for n in (0, number + 1)]


def problem(number: int, **fields) -> dict:
    return {"problem": f"What is {number} + 1?", "source": "x", "answer": f"{number + 1}", **fields}


def openr1_math_raw(number: int) -> dict:
    names = ("llama_verification", "math_verify_reparsed_answer")
    labels = {"problem_is_valid": "Yes", "correctness": {name: [False, True] for name in names}}
    return problem(number, generations=traces(number), **labels)


def openr1_math_220k(number: int) -> dict:
    names = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    labels = {"finish_reasons": ["length", "stop"], **{name: [False, True] for name in names}}
    return problem(number, generations=traces(number), **labels)


def listed(number: int) -> dict:
    given = zip(traces(number), (False, True))
    return problem(number, traces=[{"text": text, "correct": label} for text, label in given])


def one_trace(number: int) -> dict:
    return problem(number, response=traces(number)[1], correct=1, finish_reason="stop")


def conversation_row(number: int) -> dict:
    asked, text = problem(number)["problem"], traces(number)[1]
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
    return {"conversations": turns, "score": 1.0, "ground_truth": f"{number + 1}"}


def columns(number: int) -> dict:
    fields = {f"r1_solution_{n}": text for n, text in enumerate(traces(number), 1)}
    return {"question": problem(number)["problem"], "final_answer": f"{number + 1}", **fields}


def thought_and_attempt(number: int) -> dict:
    fields = dict(zip(("thinking_trajectory", "attempt", "grade"), ("so", "\\boxed{1}", "Yes")))
    fields = {f"deepseek_{name}": value for name, value in fields.items()}
    return {"question": problem(number)["problem"], **fields}


FORMS = (
    openr1_math_raw, openr1_math_220k, listed, one_trace, conversation_row, columns,
    thought_and_attempt,
)  # fmt: skip


def prepared(folder: Path, data: bytes) -> tuple[int, str]:
    """Exit status and stderr of redi.prepare on these bytes."""
    (folder / "raw.jsonl").write_bytes(data)
    shutil.rmtree(folder / "out", ignore_errors=True)
    errors, arguments = StringIO(), (folder / "raw.jsonl", "--out", folder / "out")
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        status = main_in_this_process(prepare.main, *arguments)
    return status, errors.getvalue()


def outputs(folder: Path) -> tuple[dict, dict[str, list[bytes]]]:
    """The counts, and the lines of positives and pairs."""
    files = {path.stem: path.read_bytes() for path in (folder / "out").glob("*.jsonl")}
    lines = {name: data.splitlines(keepends=True) for name, data in files.items()}
    return json.loads((folder / "out" / CARD).read_text()), lines


@pytest.fixture(scope="module")
def sound(folder) -> dict:
    """What prepare makes of the sound rows alone, by form."""
    made = {}
    for form in FORMS:
        assert prepared(folder, lines_with(b"", form)) == (0, "")
        made[form] = outputs(folder)
        assert made[form][0]["positives"] == 3
    return made


def check_prepared(folder: Path, sound: dict, form: Callable[[int], dict], line: bytes) -> None:
    data = lines_with(line, form)
    status, errors = prepared(folder, data)
    if status:
        assert status == 2
        [error] = errors.splitlines()
        assert error.startswith("error: ")
        assert not list((folder / "out").glob("*"))
        return
    (counts, lines), (sound_counts, sound_lines) = outputs(folder), sound[form]
    assert counts["positives"] + sum(counts["no_positive"].values()) == counts["rows"]
    assert counts["pairs"] + sum(counts["no_pair"].values()) == counts["positives"]
    assert counts["rows"] == rows_in(data)
    for name, kept in lines.items():
        assert len(kept) == counts[name]
        assert [line for line in kept if line in sound_lines[name]] == sound_lines[name]
    for reasons in ("no_positive", "no_pair"):  # no reason that the card does not always list
        assert counts[reasons].keys() == sound_counts[reasons].keys()


@pytest.mark.parametrize("change", [mutated, garbled])
def test_prepare_counts_or_refuses_a_broken_row_of_any_form(folder, sound, change):
    for seed in SEEDS:
        form = FORMS[seed % len(FORMS)]
        check_prepared(folder, sound, form, change(Random(seed), form(2)))


@pytest.mark.parametrize(
    "text", ["x" * 10_000_000, "\\boxed{" * 100_000, "(" * 1_000_000, "\x00" * 1_000_000]
)
def test_a_row_of_megabytes_is_a_row(folder, sound, text):
    row = openr1_math_raw(2)
    row["generations"][1] = text
    check_prepared(folder, sound, openr1_math_raw, json.dumps(row).encode())
    assert outputs(folder)[0]["positives"] == 4


# ---------------------------------------------------------------- the trainers' rows


def labeled_row(number: int) -> dict:
    side, label = ("chosen", True) if number % 3 else ("rejected", False)
    pair = conversation(number)
    row = {"prompt": pair["prompt"], "completion": pair[side]}
    return {**row, "label": label, "weight": number + 1}


KINDS = {  # a sound row, seeds
    "rows": (lambda number: as_positive(conversation(number)), SEEDS[0::2]),
    "pairs": (conversation, SEEDS[1::2]),
    "labeled rows": (labeled_row, range(1000)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [mutated, garbled])
def test_training_counts_or_refuses_a_broken_row(folder, make_chat, change, kind):
    chat, path, tokens = make_chat(folder), folder / "rows.jsonl", folder / "tokens"
    (row, seeds), per_row, kept_mutants = KINDS[kind], 2 if kind == "pairs" else 1, 0

    @cache
    def expected(number: int) -> list[list[int]]:
        """The tokens of a sound row's sides."""
        prompt, *sides = (part for part in row(number).values() if isinstance(part, list))
        rendered = chat.encode_rows([(prompt, side) for side in sides])
        return [side.prompt_ids + side.response_ids for side in rendered]

    for seed in seeds:
        line = change(Random(seed), row(2))
        data = lines_with(line, row)
        path.write_bytes(data)
        shutil.rmtree(tokens, ignore_errors=True)
        message = None
        try:
            with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
                store = load_store([path], chat, [kind], tokens)
        except UserError as error:
            message = str(error)
        if message is not None:
            assert "\n" not in message
            assert not [made for made in tokens.glob("*") if made.name.isalnum()]  # no store
            continue
        numbers = store.row_numbers.tolist()
        dataset = Dataset(store, np.arange(len(numbers)), {})
        assert len(dataset) + sum(store.skipped.values()) == rows_in(data)
        for number, position in ((0, 1), (1, 2), (3, rows_in(data))):
            first = per_row * numbers.index(position)
            found = [dataset.sequence(first + side).tokens.tolist() for side in range(per_row)]
            assert found == expected(number)
        if kind == "labeled rows":
            lines = [json.loads(text) for text in data.split(b"\n") if text.strip()]
            for number, weight in zip(numbers, store.weights.tolist()):
                label, size = lines[number - 1]["label"], lines[number - 1].get("weight")
                assert label is (weight > 0)
                assert abs(weight) == (1.0 if size is None else float(size))
                assert weight != 0
            kept_mutants += 3 in numbers
    assert kind != "labeled rows" or kept_mutants > 50
