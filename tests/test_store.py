"""The token store: tokenized once, started again after a kill, never opened half written.

The tokenizer is a small one, and a block has only a few rows, so that a store has many blocks.
"""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from processes import child, die, wait_until
from small_run import conversation, refusal, write_jsonl
from small_template import chatml

from redi.config import UserError
from redi.data import store as store_module
from redi.data.store import TokenStore, load_store
from redi.data.tokenizer import ChatTokenizer
from redi.toy import train_tokenizer

ROWS = [conversation(number) for number in range(40)]
EQUAL = {**ROWS[5], "rejected": ROWS[5]["chosen"]}


@pytest.fixture
def folder(tmp_path, monkeypatch, save_tokenizer) -> Path:
    """A working folder with a tokenizer in student/ and 41 pairs, the 11th of equal traces."""
    save_tokenizer(tmp_path / "student")
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:10], EQUAL, *ROWS[10:]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 200)
    return tmp_path


def load(*names: str, kind: str = "pairs", cache: str = "cache") -> TokenStore:
    files = [Path(name) for name in names or ["rows.jsonl"]]
    return load_store(files, ChatTokenizer.from_folder("student"), [kind], cache)


def load_rows() -> None:
    """The main of a process that loads the store of rows.jsonl."""
    store_module.BLOCK_CHARS = 200
    print(load().tokens.tolist())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def folders() -> list[str]:
    """Everything in the cache but the locks, which stay."""
    return sorted(path.name for path in Path("cache").iterdir() if path.suffix != ".lock")


# ---------------------------------------------------------------- what it holds


@pytest.mark.parametrize("block", [1, 200, 1 << 20])
@pytest.mark.parametrize("files", [1, 2])
def test_tokens_are_the_tokenized_rows_for_any_number_of_files_and_size_of_block(
    folder, monkeypatch, block, files
):
    monkeypatch.setattr(store_module, "BLOCK_CHARS", block)
    store = load(*["rows.jsonl"] * files)
    chat = ChatTokenizer.from_folder("student")
    sides = [(r["prompt"], r[side]) for r in ROWS * files for side in ("chosen", "rejected")]
    rendered = chat.encode_rows(sides)
    assert store.tokens.tolist() == [t for r in rendered for t in r.prompt_ids + r.response_ids]
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rendered]
    assert store.sequence_lengths.tolist() == lengths
    assert store.prompt_lengths.tolist() == [len(r.prompt_ids) for r in rendered]
    assert store.response_lengths.tolist() == [len(r.response_ids) for r in rendered]
    assert store.row_numbers.tolist() == [n for n in range(1, 41 * files + 1) if n not in (11, 52)]
    assert store.skipped == {"chosen equals rejected": files}
    assert store.data_hash == hashlib.sha256(Path("rows.jsonl").read_bytes() * files).hexdigest()
    assert sorted(contents(store.folder)) == ["index.npz", "sha256", "store.json", "tokens.bin"]


# ---------------------------------------------------------------- tokenized once


def test_the_data_is_tokenized_once_and_read_again(folder, monkeypatch, capsys):
    first = load()
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"tokenizing rows.jsonl into {first.folder}"
    monkeypatch.setattr(store_module, "_write_store", lambda *_: pytest.fail("tokenized again"))
    shutil.copy("rows.jsonl", "other_name.jsonl")
    for name in ("rows.jsonl", "other_name.jsonl"):  # bytes, not names
        again = load(name)
        assert again.folder == first.folder
        assert np.array_equal(again.tokens, first.tokens)
    assert capsys.readouterr().out == ""


def test_each_change_of_data_tokenizer_template_kind_or_format_makes_another_store(
    folder, save_tokenizer, monkeypatch
):
    rows = [{**row, "completion": row["chosen"]} for row in ROWS]  # of both kinds
    changes = [
        lambda: write_jsonl(folder / "rows.jsonl", rows),
        lambda: save_tokenizer(folder / "student", bos_token="<|endoftext|>"),  # templates see it
        lambda: train_tokenizer(["other text", chatml()]).save("student/tokenizer.json"),
        lambda: Path("student/chat_template.jinja").write_text(chatml("Be brief.")),
        lambda: monkeypatch.setattr(store_module, "FORMAT", "3"),
    ]
    stores = {load().folder}
    for change in changes:
        change()
        stores.add(load().folder)
    stores.add(load(kind="rows").folder)
    assert folders() == sorted(store.name for store in stores)
    assert len(stores) == 2 + len(changes)


def write_slowly() -> None:
    savez = np.savez

    def slowly(*given, **arrays) -> None:
        Path("begun").touch()
        wait_until(Path("proceed").exists)
        savez(*given, **arrays)

    np.savez = slowly


def never_write() -> None:
    store_module._write_store = None


def test_a_process_waits_for_the_one_that_tokenizes_and_takes_its_store(folder):
    first = child(folder, [], write_slowly, main=load_rows)
    wait_until(Path("begun").exists)
    second = child(folder, [], never_write, main=load_rows)
    wait_until(lambda: "another process is tokenizing; waiting" in second.errors)
    Path("proceed").touch()
    first.ends(0)
    second.ends(0)
    assert first.shown.splitlines()[-1] == second.shown.splitlines()[-1]
    assert folders() == [load().folder.name]


# ---------------------------------------------------------------- killed, failed, damaged


def dies_in(name: str) -> None:
    mock.patch(name, side_effect=lambda *_, **__: die()).start()


def dies_at_row_20() -> None:
    rows = store_module.read_examples
    store_module.read_examples = lambda *given: (r for r in rows(*given) if r[0] < 20 or die())


KILLS = {
    "rows": dies_at_row_20, "index": partial(dies_in, "numpy.savez"),
    "store.json": partial(dies_in, "json.dump"), "rename": partial(dies_in, "pathlib.Path.rename"),
}  # fmt: skip


@pytest.mark.parametrize("killed", KILLS)
def test_a_kill_leaves_no_half_store_and_the_next_process_starts_again(folder, killed):
    whole = load(cache="undisturbed").folder
    child(folder, [], KILLS[killed], main=load_rows).ends(-signal.SIGKILL)
    assert folders() == [f"{whole.name}.part"]
    assert TokenStore.open(Path("cache") / whole.name) is None
    assert contents(load().folder) == contents(whole)
    assert folders() == [whole.name]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyboardInterrupt(), "while tokenizing; no tokens were kept"),
        (MemoryError(), ""),
        (FULL, f"--cache cache: cannot write there ({FULL})"),
    ],
)
def test_whatever_ends_the_writing_nothing_is_left(folder, monkeypatch, raised, message):
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", mock.Mock(side_effect=raised))
        with pytest.raises(UserError if raised is FULL else type(raised)) as error:
            load()
    assert str(error.value) == message
    assert folders() == []
    assert len(load().row_numbers) == 40
    assert refusal(load, cache="rows.jsonl").startswith("--cache rows.jsonl: cannot write there")


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes([data[third] ^ 4]) + data[third + 1 :]


def about(**changes: Any) -> Callable[[Path], int]:
    return edit("store.json", lambda data: json.dumps(json.loads(data) | changes).encode())


def shorten(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = dict(np.load(folder / "index.npz"))
        np.savez(folder / "index.npz", **index | {name: index[name][:-1]})

    return damage


DAMAGES = {
    "no tokens": edit("tokens.bin", lambda data: b""),
    "tokens cut": edit("tokens.bin", lambda data: data[:-4]),
    "a bit": edit("tokens.bin", flip),
    "index cut": edit("index.npz", lambda data: data[:-30]),
    "empty index": edit("index.npz", lambda data: b""),
    "no index": lambda folder: (folder / "index.npz").unlink(),
    "other json": edit("store.json", lambda data: b"{}"),
    "no sha256": lambda folder: (folder / "sha256").unlink(),
    "no json": lambda folder: (folder / "store.json").unlink(),
    "skipped": about(skipped=5),
    "a count": about(skipped={"a": "x"}),
    "a hash": about(data_hash=5),
    "fewer offsets": shorten("offsets"),
    "fewer rows": shorten("row_numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_noticed_and_tokenized_again(damage, folder):
    store = load().folder
    before = contents(store)
    DAMAGES[damage](store)
    assert TokenStore.open(store) is None
    assert contents(load().folder) == before
