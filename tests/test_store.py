"""The token store: tokenized once, started again after a kill, never opened half written.

The tokenizer is a small one, and a block has only a few rows, so that a store has many blocks.
"""

import hashlib
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from processes import child, die, wait_until
from small_run import assistant, conversation, refusal, user, write_jsonl

from redi.config import UserError
from redi.data import store as store_module
from redi.data.dataset import Limits, describe, select
from redi.data.formats import Example
from redi.data.store import TokenStore, load_store
from redi.data.tokenizer import ChatTokenizer, chatml
from redi.toy.student import train_tokenizer

GENEROUS = Limits(10**8, 10**8, 10**8)


ROWS = [conversation(number) for number in range(40)]
EQUAL = {**ROWS[5], "rejected": ROWS[5]["chosen"]}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, user("1+1?"), assistant("2"), user("And <|im_end|> 2+2?"), assistant("\n4")]


@pytest.fixture
def folder(tmp_path, monkeypatch, save_tokenizer) -> Path:
    """A working folder with a tokenizer in student/ and 41 pairs, the 11th of equal traces."""
    save_tokenizer(tmp_path / "student")
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:10], EQUAL, *ROWS[10:]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 200)
    return tmp_path


def load(*names: str, paired: bool = True, student: str = "student", cache: str = "cache"):
    files = [Path(name) for name in names or ["rows.jsonl"]]
    return load_store(files, ChatTokenizer.from_folder(student), paired, cache)


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
    assert store.sequence_lengths.tolist() == [len(r) for r in rendered]
    assert store.prompt_lengths.tolist() == [len(r.prompt_ids) for r in rendered]
    assert store.response_lengths.tolist() == [len(r.response_ids) for r in rendered]
    assert store.row_numbers.tolist() == [n for n in range(1, 41 * files + 1) if n not in (11, 52)]
    assert store.skipped == {"chosen equals rejected": files}
    assert store.data_hash == hashlib.sha256(Path("rows.jsonl").read_bytes() * files).hexdigest()
    assert sorted(contents(store.folder)) == ["index.npz", "store.json", "tokens.bin"]
    recorded = json.loads((store.folder / "store.json").read_text())["tokens_hash"]
    assert recorded == hashlib.sha256((store.folder / "tokens.bin").read_bytes()).hexdigest()


def test_of_several_turns_only_answers_are_learned_and_those_between_are_shown_apart(folder):
    single = {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["chosen"]}
    write_jsonl(folder / "turns.jsonl", [{"messages": TURNS}, single])
    store, chat = load("turns.jsonl", paired=False), ChatTokenizer.from_folder("student")
    dataset = select(store, GENEROUS, "error", "turns.jsonl")
    [rendered] = chat.encode_rows([(TURNS[:2], TURNS[2:])])
    several, one = dataset.sequence(0), dataset.sequence(1)
    assert one.learned is None
    assert several.tokens.tolist() == rendered.prompt_ids + rendered.response_ids
    assert several.learned.tolist() == rendered.learned
    learned = several.tokens[several.prompt_length :][several.learned]
    assert chat.decode(learned) == "2<|im_end|>\n4<|im_end|>"
    assert several.response_length == store.response_lengths[0] == len(learned)
    assert dataset.response_lengths.tolist() == [len(learned), one.response_length]
    lines = describe(dataset, chat).splitlines()
    totals = {line.split()[0]: int(line.split()[1]) for line in lines[2:5]}
    assert list(totals) == ["prompt", "response", "between"]
    assert totals["between"] == len(rendered.learned) - len(learned)
    assert sum(totals.values()) == dataset.lengths.sum()
    names = [line.split("|")[0].strip() for line in lines[-4:]]
    assert names == ["prompt", "response", "between", "response"]
    assert "And" in lines[-2]


def test_no_more_than_a_few_blocks_are_read_ahead_of_what_is_written(monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 1000)  # 10 rows
    read = Counter()

    def examples():
        for number in range(1, 501):
            read["rows"] += 1
            yield number, Example([user("x" * 50)], [[assistant("y" * 50)]])

    chat, written = SimpleNamespace(encode_rows=lambda conversations: conversations), 0
    for number, _ in store_module.tokenize_rows(chat, examples()):
        written += 1
        assert number == written
        assert read["rows"] - written <= 10 * (store_module.THREADS + 2)
    assert written == 500


# ---------------------------------------------------------------- tokenized once


def test_the_data_is_tokenized_once_and_read_again(folder, monkeypatch, capsys):
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


CHANGED = ["data", "template", "tokenizer", "special tokens", "format", "paired"]


@pytest.mark.parametrize("changed", CHANGED)
def test_a_change_makes_another_store(folder, save_tokenizer, monkeypatch, changed):
    rows = [{**r, "completion": r["chosen"]} for r in ROWS]
    write_jsonl(folder / "rows.jsonl", rows)
    first = load()
    shutil.copytree("student", "other")
    if changed == "data":
        write_jsonl(folder / "rows.jsonl", [*rows[:-1], conversation(50)])
    elif changed == "template":
        Path("other/chat_template.jinja").write_text(chatml("Be brief."))
    elif changed == "tokenizer":
        train_tokenizer(["other text altogether", chatml()]).save("other/tokenizer.json")
    elif changed == "special tokens":
        save_tokenizer(folder / "other", bos_token="<|endoftext|>")
    elif changed == "format":
        monkeypatch.setattr(store_module, "FORMAT", "3")
    second = load(student="other", paired=changed != "paired")
    assert folders() == sorted({first.folder.name, second.folder.name})
    assert len(folders()) == 2
    same = changed in ("special tokens", "format")
    assert np.array_equal(second.tokens, first.tokens) == same


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
    rows = store_module.tokenize_rows
    store_module.tokenize_rows = lambda *given: (r for r in rows(*given) if r[0] < 20 or die())


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
        (SystemExit(), ""),
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


DAMAGES = {
    "no tokens": edit("tokens.bin", lambda data: b""),
    "tokens cut": edit("tokens.bin", lambda data: data[:-4]),
    "a bit": edit("tokens.bin", flip),
    "index cut": edit("index.npz", lambda data: data[:-30]),
    "empty index": edit("index.npz", lambda data: b""),
    "no index": lambda folder: (folder / "index.npz").unlink(),
    "other json": edit("store.json", lambda data: b"{}"),
    "no json": lambda folder: (folder / "store.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_noticed_and_tokenized_again(damage, folder):
    store = load().folder
    before = contents(store)
    DAMAGES[damage](store)
    assert TokenStore.open(store) is None
    # Without `verify`, the tokens are counted but not read.
    assert (TokenStore.open(store, verify=False) is not None) == (damage == "a bit")
    assert contents(load().folder) == before
