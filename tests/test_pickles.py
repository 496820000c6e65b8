"""Nothing that redi reads can run code: pickles planted in every place where a reader looks, and
answers that are programs.

python -m pytest tests/test_pickles.py
"""

import ast
import builtins
import gzip
import json
import os
import pickle
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from processes import ROOT, child, die_after
from small_run import SFT, refusal

from redi.checkpoint import load_model
from redi.checkpoint.reference import load_reference
from redi.checkpoint.resume import load_weights
from redi.config import UserError, load_toml
from redi.data.files import hash_files, read_rows
from redi.data.store import FILES, TokenStore
from redi.eval import benchmarks
from redi.eval.completions import Completion, read_lines
from redi.eval.grading.grader import Grader, grader_names
from redi.eval.grading.workers import Pool
from redi.runlog import read_metrics
from redi.study.plan import read_study


class Bomb:
    """Creates the folder RAN when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("RAN",)


BOMB = pickle.dumps(Bomb()) + b"\n"  # also a whole line, for readers of lines


# ---------------------------------------------------------------- planted


def object_array(path: Path) -> None:
    names = ("offsets", "prompt_lengths", "response_lengths", "row_numbers")
    np.savez(path, **dict.fromkeys(names, np.array([Bomb(), 0])))


def parquet_type(path: Path) -> None:
    """A column whose type older pyarrow unpickled (CVE-2023-47248)."""
    name, data = "ARROW:extension:name", "ARROW:extension:metadata"
    extension = {name: b"arrow.py_extension_type", data: BOMB}
    field = pyarrow.field("problem", pyarrow.string(), metadata=extension)
    pyarrow.parquet.write_table(pyarrow.table([["1+1"]], schema=pyarrow.schema([field])), path)


PLANT: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: path.write_bytes(BOMB),
    "torch.save": lambda path: torch.save({"model.norm.weight": Bomb()}, path),
    "object array": object_array,
    "gzip": lambda path: path.write_bytes(gzip.compress(BOMB)),
    "parquet type": parquet_type,
}


def checkpoint(path: Path) -> None:
    """Read the file as part of a checkpoint with the right hashes."""
    state = {"format": 3, "step": 1, "facts": {}, "sha256": {path.name: hash_files([path])}}
    (path.parent / "state.json").write_text(json.dumps(state))
    load_weights(path.parent, load_model("student")[0])


def model(path: Path) -> None:
    """Read the file as part of a model folder; a pytorch_model.bin replaces the weights."""
    for original in Path("student").iterdir():
        is_replaced = path.name == "pytorch_model.bin" and original.suffix == ".safetensors"
        if original.name != path.name and not is_replaced:
            shutil.copy(original, path.parent)
    load_model(path.parent)


def store(path: Path) -> None:
    about = {"kind": "rows", "data_hash": "", "skipped": {}}
    (path.parent / "store.json").write_text(json.dumps(about))
    (path.parent / "tokens.bin").write_bytes(bytes(8))
    files = [path.parent / name for name in FILES]
    (path.parent / "sha256").write_text(hash_files(files))
    if TokenStore.open(path.parent) is None:
        raise UserError("invalid: tokenized again")


def cached_reference(path: Path) -> None:
    if load_reference(path, 2) is None:
        raise UserError("invalid: computed again")


# File: its reader, what is planted in it.
PLANTED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "rank-0.safetensors": (checkpoint, ["pickle", "torch.save"]),
    "model.safetensors": (model, ["pickle", "torch.save"]),
    "pytorch_model.bin": (model, ["torch.save"]),
    "config.json": (model, ["pickle"]),
    "generation_config.json": (model, ["pickle"]),
    "tokenizer.json": (model, ["pickle"]),
    "index.npz": (store, ["pickle", "object array"]),
    "reference-0.bin": (cached_reference, ["pickle"]),
    "rows.jsonl": (lambda path: list(read_rows(path)), ["pickle"]),
    "rows.json": (lambda path: list(read_rows(path)), ["torch.save"]),
    "rows.parquet": (lambda path: list(read_rows(path)), ["pickle"]),
    "rows.json.gz": (lambda path: list(read_rows(path)), ["gzip"]),
    "problems.jsonl": (benchmarks.load, ["pickle"]),
    "problems.parquet": (benchmarks.load, ["parquet type"]),
    "completions.jsonl": (lambda path: list(read_lines(path, Completion)), ["pickle"]),
    "metrics.jsonl": (lambda path: list(read_metrics(path.parent)), ["pickle"]),
    "study.toml": (read_study, ["pickle"]),
    "recipe.toml": (lambda path: load_toml(path, str(path)), ["pickle"]),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, kinds) in PLANTED.items() for kind in kinds]
)
def test_a_planted_pickle_is_refused_and_never_runs(name, kind, here, tmp_path):
    folder = tmp_path / "planted"
    folder.mkdir()
    PLANT[kind](folder / name)
    read, _ = PLANTED[name]
    try:
        refusal(read, folder / name)
    finally:
        assert not Path("RAN").exists()


def test_a_planted_pickle_would_run_if_it_were_read(here):
    pickle.loads(BOMB)
    assert Path("RAN").exists()


# ---------------------------------------------------------------- all that a run reads


def report_unpickling() -> None:
    """In a child process, write to stderr whenever a pickle imports something."""

    def look(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class":
            print("unpickles", arguments, "".join(traceback.format_stack()), file=sys.stderr)

    sys.addaudithook(look)


def test_a_run_and_one_that_resumes_unpickle_nothing(here):
    child(here, SFT, die_after(3)).ends(-signal.SIGKILL)
    resumed = child(here, SFT, report_unpickling)
    resumed.ends(0)
    assert "run: resumes after step 2" in resumed.shown
    assert resumed.errors == ""


UNPICKLES = (
    r"\b(_pickle|cloudpickle|dill|fromfile|joblib|marshal|pickle|read_pickle|shelve)\b|torch\.load"
    r"|multiprocessing(?!\.connection)|distributed(\.| import )checkpoint"
    r"|np\.load\((?!.*allow_pickle=False)|\.(recv|send)$"  # of a multiprocessing connection
)


def test_no_file_of_redi_uses_a_function_that_unpickles():
    kinds, found = (ast.Import, ast.ImportFrom, ast.Attribute, ast.Call), set()
    for path in ROOT.glob("redi/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, kinds) else ""
            if isinstance(node, ast.Call) and not text.startswith("np.load("):
                text = ast.unparse(node.func)
            is_generator = text == "steps.send"  # in redi/dialogue/talk.py
            found |= {path.name} if re.search(UNPICKLES, text) and not is_generator else set()
    assert found == set()


# ---------------------------------------------------------------- answers


CODE = 'open("ran","x")'
NUMBERED = "+".join(f"chr({ord(char)})" for char in CODE)
# Letters of docstrings, in Roman numerals; other signs in quotes.
ROMAN = "+".join(
    f"''.__\u217eo\u217d__[{str.__doc__.index(char)}]" if char in str.__doc__ else f"'{char}'"
    for char in CODE
)
DOCS = {name: getattr(builtins, name).__doc__ for name in ("aiter", "anext", "property", "compile")}
NO_CALL = "+".join(
    next(f"{name}.__doc__[{text.index(char)}]" for name, text in DOCS.items() if char in text)
    for char in CODE
)
SERIES = r"\sum_{n=0}^{\infty} \frac{%s^n}{n!}"
NAME = rf"r_{{(exec({NUMBERED}))}}"
HOSTILE = [
    rf"frac({ROMAN})",
    rf"\frac{{1}}{{2}}+frac({ROMAN})",
    rf"sqrt({ROMAN})",
    rf"(1, frac({ROMAN}))",
    SERIES % NAME,
    SERIES % rf"r_{{[exec({NUMBERED})]}}",
    SERIES % rf"\text{{[vectorize[{NO_CALL}]for[vectorize.__class_getitem__]in[[exec]]]}}",
    rf"(1, {SERIES % NAME})",
    CODE,
    rf"\text{{{CODE}}}+x",
]


def test_no_answer_and_no_gold_runs_code_in_a_grader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Pool() as pool:
        for hostile in HOSTILE:
            plain = r"(1, \sqrt{2})" if hostile.startswith("(") else r"\sqrt{2}"
            pairs = (hostile, plain), (plain, hostile)
            items = [(rf"</think> \boxed{{{answer}}}", gold, "stop") for answer, gold in pairs]
            for name in grader_names("both"):
                assert Grader(pool, name).grade_all(items) == ["incorrect"] * 2
                assert not Path("ran").exists(), f"{name}: {hostile}"
