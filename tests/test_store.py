"""The token store: tokenized once, started again after a kill, never opened half written.

    python -m pytest tests/test_store.py

The tokenizer is a small one, and a block has only a few rows, so that a store has many blocks.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from redi.config import UserError
from redi.data import store as store_module
from redi.data.dataset import Limits, describe, select
from redi.data.formats import Example
from redi.data.store import TokenStore, hash_files, load_store
from redi.data.tokenizer import ChatTokenizer, chatml

ROOT = Path(__file__).parent.parent
GENEROUS = Limits(10**8, 10**8, 10**8)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(number: int) -> dict[str, list]:
    text = f"a\n\nb  c {number} 6-1=5\n" * (1 + number * 7 % 13)
    return {
        "prompt": [said("user", f"Compute {number}")],
        "chosen": [said("assistant", f"<think>\n{text}</think>\n\\boxed{{{number}}}")],
        "rejected": [said("assistant", f"\\boxed{{{number + 1}}}")],
    }


ROWS = [row(number) for number in range(40)]
EQUAL = {**ROWS[5], "rejected": ROWS[5]["chosen"]}
TURNS = {
    "messages": [
        said("system", "Be brief."),
        said("user", "1+1?"),
        said("assistant", "2"),
        said("user", "And <|im_end|> 2+2?"),
        said("assistant", "\n4"),
    ]
}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, save_tokenizer) -> Path:
    """A working folder with a tokenizer in student/ and 41 pairs, one of them of equal traces."""
    save_tokenizer(tmp_path / "student")
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, EQUAL])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 700)
    return tmp_path


def load(
    name: str = "rows.jsonl", paired: bool = True, folder: str = "student", cache: str = "cache"
) -> TokenStore:
    return load_store([Path(name)], ChatTokenizer.from_folder(folder), paired, cache)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def folders(cache: str = "cache") -> list[str]:
    """Everything in the cache but the locks, which stay."""
    return sorted(path.name for path in Path(cache).iterdir() if path.suffix != ".lock")


def child(script: str) -> subprocess.Popen:
    """A process that loads the store of rows.jsonl after running `script`."""
    before = f"""
import os, signal, sys, time
from pathlib import Path
from redi.data import store
from redi.data.tokenizer import ChatTokenizer
store.BLOCK_CHARS = 700
savez, tokenize_rows = store.np.savez, store.tokenize_rows
{script}
found = store.load_store([Path("rows.jsonl")], ChatTokenizer.from_folder("student"), True, "cache")
print(store.hash_files([found.folder / "tokens.bin"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", before], env=environment, **pipes)


# ---------------------------------------------------------------- what it holds


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_tokens_are_the_tokenized_rows_for_any_size_of_block(here, monkeypatch, block):
    monkeypatch.setattr(store_module, "BLOCK_CHARS", block)
    store = load()
    chat = ChatTokenizer.from_folder("student")
    sides = [(r["prompt"], r[side]) for r in ROWS for side in ("chosen", "rejected")]
    rendered = chat.encode_rows(sides)
    assert store.tokens.tolist() == [t for r in rendered for t in r.prompt_ids + r.response_ids]
    assert store.sequence_lengths.tolist() == [len(r) for r in rendered]
    assert store.prompt_lengths.tolist() == [len(r.prompt_ids) for r in rendered]
    assert store.response_lengths.tolist() == [len(r.response_ids) for r in rendered]
    assert store.row_numbers.tolist() == list(range(1, 41))
    assert store.skipped == {"chosen equals rejected": 1}
    assert sorted(contents(store.folder)) == ["index.npz", "store.json", "tokens.bin"]
    recorded = json.loads((store.folder / "store.json").read_text())["tokens_hash"]
    assert recorded == hashlib.sha256((store.folder / "tokens.bin").read_bytes()).hexdigest()


def test_of_several_turns_only_answers_are_learned(here):
    single = {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["chosen"]}
    write_jsonl(here / "turns.jsonl", [single, TURNS])
    store = load("turns.jsonl", paired=False)
    dataset = select(store, GENEROUS, "error", "turns.jsonl")
    chat = ChatTokenizer.from_folder("student")
    prompt, response = TURNS["messages"][:2], TURNS["messages"][2:]
    [rendered] = chat.encode_rows([(prompt, response)])
    one, several = dataset.sequence(0), dataset.sequence(1)
    assert one.learned is None
    assert several.tokens.tolist() == rendered.prompt_ids + rendered.response_ids
    assert several.learned.tolist() == rendered.learned
    assert several.response_length == store.response_lengths[1] == sum(rendered.learned)
    assert dataset.response_lengths.tolist() == [one.response_length, several.response_length]
    learned = several.tokens[several.prompt_length :][several.learned]
    assert chat.decode(learned) == "2<|im_end|>\n4<|im_end|>"
    stored = store.tokens[store.offsets[1] :]
    assert (stored < 0).sum() == len(rendered.learned) - sum(rendered.learned) > 0
    assert (store.tokens[: store.offsets[1]] >= 0).all()


def test_turns_between_answers_are_counted_and_shown_apart(here):
    write_jsonl(here / "turns.jsonl", [TURNS])
    dataset = select(load("turns.jsonl", paired=False), GENEROUS, "error", "turns.jsonl")
    lines = describe(dataset, ChatTokenizer.from_folder("student")).splitlines()
    totals = {line.split()[0]: int(line.split()[1]) for line in lines[2:5]}
    assert list(totals) == ["prompt", "response", "between"]
    assert sum(totals.values()) == dataset.lengths.sum()
    names = [line.split("|")[0].strip() for line in lines[-4:]]
    assert names == ["prompt", "response", "between", "response"]
    assert "And" in lines[-2]


def test_a_row_of_ten_megabytes_stands_beside_small_ones(here, monkeypatch):
    monkeypatch.undo()  # blocks of a megabyte again
    monkeypatch.chdir(here)
    long = {**ROWS[1], "chosen": [said("assistant", ("Compute" * 28 + " ") * 51_000)]}
    write_jsonl(here / "long.jsonl", [ROWS[0], long, ROWS[2]])
    assert (here / "long.jsonl").stat().st_size > 10e6
    store, small = load("long.jsonl"), load()
    assert store.sequence_lengths[2] > 10**6
    for number in (0, 1, 4, 5):
        tokens = [s.tokens[s.offsets[number] : s.offsets[number + 1]] for s in (store, small)]
        assert np.array_equal(*tokens)


def test_no_more_than_a_few_blocks_are_read_ahead_of_what_is_written(monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 1000)  # 10 rows
    read = Counter()

    def examples():
        for number in range(1, 501):
            read["rows"] += 1
            yield number, Example([said("user", "x" * 50)], [[said("assistant", "y" * 50)]])

    chat = SimpleNamespace(encode_rows=lambda conversations: conversations)
    written = 0
    for number, _ in store_module.tokenize_rows(chat, examples()):
        written += 1
        assert number == written
        assert read["rows"] - written <= 10 * (store_module.THREADS + 2)
    assert written == 500


@pytest.mark.parametrize(
    ("names", "total"),
    [
        (["rows.jsonl"], 41),
        (["rows.jsonl", "rows.jsonl"], 82),
        (["rows.json"], None),
        (["rows.jsonl", "rows.json"], None),
    ],
)
def test_the_progress_bar_has_a_total_where_rows_are_lines(here, monkeypatch, names, total):
    shutil.copy("rows.jsonl", "rows.json")
    totals, tqdm = [], store_module.tqdm
    monkeypatch.setattr(
        store_module, "tqdm", lambda *given, **kw: totals.append(given[2]) or tqdm(*given, **kw)
    )
    chat = ChatTokenizer.from_folder("student")
    load_store([Path(name) for name in names], chat, True, "cache")
    assert totals == [total]


# ---------------------------------------------------------------- tokenized once


def test_the_data_is_tokenized_once_and_read_again(here, monkeypatch, capsys):
    first = load()
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"{first.folder}: no valid tokens of this data in this format; tokenizing"
    monkeypatch.setattr(store_module, "_write_store", lambda *_: pytest.fail("tokenized again"))
    shutil.copy("rows.jsonl", "other_name.jsonl")
    for name in ("rows.jsonl", "other_name.jsonl"):  # bytes, not names
        again = load(name)
        assert again.folder == first.folder
        assert np.array_equal(again.tokens, first.tokens)
    assert capsys.readouterr().out == ""


def test_a_store_of_another_format_is_not_read(here, monkeypatch):
    monkeypatch.setattr(store_module, "FORMAT", "3")
    old = load()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    new = load()
    assert new.folder != old.folder
    assert contents(new.folder) == contents(old.folder)


def new_data(here: Path) -> dict:
    write_jsonl(here / "other.jsonl", [*ROWS[:-1], row(50)])
    return {"name": "other.jsonl"}


def new_template(here: Path) -> dict:
    shutil.copytree(here / "student", here / "other")
    (here / "other" / "chat_template.jinja").write_text(chatml("Be brief."))
    return {"folder": "other"}


def new_tokenizer(here: Path) -> dict:
    from redi.toy.student import train_tokenizer

    shutil.copytree(here / "student", here / "other")
    train_tokenizer(["other text altogether", chatml()]).save("other/tokenizer.json")
    return {"folder": "other"}


@pytest.mark.parametrize("change", [new_data, new_template, new_tokenizer])
def test_a_change_of_data_tokenizer_or_template_makes_another_store(here, change):
    first, second = load(), load(**change(here))
    assert second.folder != first.folder
    assert not np.array_equal(second.tokens, first.tokens)
    assert folders() == sorted([first.folder.name, second.folder.name])


def test_pairs_and_sft_rows_of_one_file_have_separate_stores(here):
    write_jsonl(here / "both.jsonl", [{**r, "completion": r["chosen"]} for r in ROWS])
    pairs, traces = load("both.jsonl"), load("both.jsonl", paired=False)
    assert pairs.folder != traces.folder
    assert len(pairs.prompt_lengths) == 2 * len(traces.prompt_lengths) == 80


def test_a_process_waits_for_the_one_that_tokenizes_and_takes_its_store(here):
    first = child("""
def slowly(*given, **arrays):
    Path("begun").touch()
    while not Path("proceed").exists():
        time.sleep(0.01)
    savez(*given, **arrays)
store.np.savez = slowly
""")
    while not Path("begun").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    second = child("store._write_store = None  # it would tokenize too")
    assert "another process is tokenizing; waiting" in second.stderr.readline()
    Path("proceed").touch()
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    hashes = [output.splitlines()[-1] for output, _ in outputs]
    assert hashes[0] == hashes[1]
    assert folders() == [load().folder.name]


# ---------------------------------------------------------------- killed and started again


@pytest.mark.parametrize(
    "killed",
    [
        "store.tokenize_rows = lambda *a: (r for r in tokenize_rows(*a) if r[0] < 20 or die())",
        "store.np.savez = die",
        "store.json.dump = die",
        "Path.rename = die",
    ],
    ids=["rows", "index", "store.json", "rename"],
)
def test_a_kill_leaves_no_half_store_and_the_next_process_starts_again(here, killed):
    whole = load(cache="undisturbed").folder
    process = child(f"die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n{killed}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert folders() == [f"{whole.name}.part"]
    assert TokenStore.open(Path("cache") / whole.name) is None
    assert contents(load().folder) == contents(whole)
    assert folders() == [whole.name]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_ends_the_writing_nothing_is_left(here, monkeypatch, raised):
    def interrupted(*given):
        for number, sequences in tokenize_rows(*given):
            if number == 20:
                raise raised
            yield number, sequences

    tokenize_rows = store_module.tokenize_rows
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "tokenize_rows", interrupted)
        with pytest.raises(raised) as error:
            load()
    if raised is KeyboardInterrupt:
        assert str(error.value) == "while tokenizing; no tokens were kept"
    assert folders() == []
    assert load().row_numbers.tolist() == list(range(1, 41))


def test_a_full_disk_is_an_error_of_one_line(here, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.np, "savez", full)
    with pytest.raises(UserError, match=r"^--cache cache: cannot write there \(.*No space left"):
        load()
    assert folders() == []


# ---------------------------------------------------------------- damage and errors


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokens.bin").write_bytes(b""),
        lambda folder: cut(folder / "tokens.bin", 4),
        lambda folder: flip(folder / "tokens.bin"),
        lambda folder: cut(folder / "index.npz", 30),
        lambda folder: (folder / "index.npz").write_bytes(b""),
        lambda folder: (folder / "index.npz").unlink(),
        lambda folder: (folder / "store.json").write_text("{}"),
        lambda folder: (folder / "store.json").unlink(),
    ],
    ids=["empty", "cut", "a bit", "index cut", "empty index", "no index", "other json", "no json"],
)
def test_a_damaged_store_is_noticed_and_tokenized_again(damage, here):
    folder = load().folder
    before = contents(folder)
    damage(folder)
    assert TokenStore.open(folder) is None
    assert contents(load().folder) == before


def test_unverified_a_store_is_opened_without_reading_its_tokens(here, monkeypatch):
    folder = load().folder
    monkeypatch.setattr(store_module, "hash_files", lambda files: pytest.fail("tokens were read"))
    assert TokenStore.open(folder, verify=False) is not None
    cut(folder / "tokens.bin", 4)
    assert TokenStore.open(folder, verify=False) is None


@pytest.mark.parametrize("place", [0, 20])
def test_a_row_that_cannot_be_trained_on_is_named_and_nothing_is_left(here, place):
    broken = {**ROWS[place], "chosen": [said("assistant", " \n")]}
    write_jsonl(here / "broken.jsonl", [*ROWS[:place], broken, *ROWS[place + 1 :]])
    with pytest.raises(UserError, match=rf"^broken.jsonl:{place + 1}: .*chosen"):
        load("broken.jsonl")
    assert folders() == []


def test_no_row_to_train_on_is_an_error_that_counts_the_reasons(here):
    write_jsonl(here / "equal.jsonl", [EQUAL])
    with pytest.raises(UserError, match=r"equal.jsonl: no row to train on.*equals rejected': 1"):
        load("equal.jsonl")
    assert folders() == []


def test_a_cache_that_cannot_be_written_is_an_error(here):
    Path("cache").write_text("a file")
    with pytest.raises(UserError, match=r"^--cache cache: cannot write there"):
        load()


def test_hash_files_is_of_all_bytes_in_order(here):
    data = Path("rows.jsonl").read_bytes()
    Path("a").write_bytes(data[:100])
    Path("b").write_bytes(data[100:])
    assert hash_files([Path("a"), Path("b")]) == hashlib.sha256(data).hexdigest()
