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
from small_run import assistant, refusal, user, write_jsonl

from redi.data import store as store_module
from redi.data.dataset import Limits, describe, select
from redi.data.formats import Example
from redi.data.store import TokenStore, load_store
from redi.data.tokenizer import ChatTokenizer, chatml
from redi.toy.student import train_tokenizer

GENEROUS = Limits(10**8, 10**8, 10**8)


def row(number: int) -> dict[str, list]:
    text = f"a\n\nb  c {number} 6-1=5\n" * (1 + number * 7 % 13)
    return {
        "prompt": [user(f"Compute {number}")],
        "chosen": [assistant(f"<think>\n{text}</think>\n\\boxed{{{number}}}")],
        "rejected": [assistant(f"\\boxed{{{number + 1}}}")],
    }


ROWS = [row(number) for number in range(40)]
EQUAL = {**ROWS[5], "rejected": ROWS[5]["chosen"]}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, user("1+1?"), assistant("2"), user("And <|im_end|> 2+2?"), assistant("\n4")]


@pytest.fixture
def folder(tmp_path, monkeypatch, save_tokenizer) -> Path:
    """A working folder with a tokenizer in student/ and 41 pairs, one of them of equal traces."""
    save_tokenizer(tmp_path / "student")
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, EQUAL])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 700)
    return tmp_path


def load(
    *names: str, paired: bool = True, student: str = "student", cache: str = "cache"
) -> TokenStore:
    files = [Path(name) for name in names or ["rows.jsonl"]]
    return load_store(files, ChatTokenizer.from_folder(student), paired, cache)


def load_rows() -> None:
    """The main of a process that loads the store of rows.jsonl."""
    store_module.BLOCK_CHARS = 700
    print(load().tokens.tolist())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def folders(cache: str = "cache") -> list[str]:
    """Everything in the cache but the locks, which stay."""
    return sorted(path.name for path in Path(cache).iterdir() if path.suffix != ".lock")


# ---------------------------------------------------------------- what it holds


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_tokens_are_the_tokenized_rows_for_any_size_of_block(folder, monkeypatch, block):
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
    assert several.response_length == store.response_lengths[0] == sum(rendered.learned)
    assert dataset.response_lengths.tolist() == [several.response_length, one.response_length]
    learned = several.tokens[several.prompt_length :][several.learned]
    assert chat.decode(learned) == "2<|im_end|>\n4<|im_end|>"
    tokens = np.split(store.tokens, store.offsets[1:-1])
    not_learned = len(rendered.learned) - sum(rendered.learned)
    assert [int((part < 0).sum()) for part in tokens] == [not_learned, 0]
    lines = describe(dataset, chat).splitlines()
    totals = {line.split()[0]: int(line.split()[1]) for line in lines[2:5]}
    assert list(totals) == ["prompt", "response", "between"]
    assert totals["between"] == not_learned > 0
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

    chat = SimpleNamespace(encode_rows=lambda conversations: conversations)
    written = 0
    for number, _ in store_module.tokenize_rows(chat, examples()):
        written += 1
        assert number == written
        assert read["rows"] - written <= 10 * (store_module.THREADS + 2)
    assert written == 500


def test_several_files_are_one_store_and_the_bar_has_a_total_where_rows_are_lines(folder):
    shutil.copy("rows.jsonl", "rows.json")
    lines, other = ["rows.jsonl"], ["rows.json"]
    with mock.patch.object(store_module, "tqdm", wraps=store_module.tqdm) as bar:
        for number, names in enumerate([lines, lines * 2, other, lines + other]):
            store = load(*names, cache=f"cache-{number}")
            data = Path("rows.jsonl").read_bytes() * len(names)
            assert store.data_hash == hashlib.sha256(data).hexdigest()
            assert len(store.row_numbers) == 40 * len(names)
    assert [call.args[2] for call in bar.call_args_list] == [41, 82, None, None]


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


@pytest.mark.parametrize("changed", ["data", "template", "tokenizer", "format"])
def test_a_change_of_data_template_tokenizer_or_format_makes_another_store(
    folder, monkeypatch, changed
):
    first = load()
    shutil.copytree("student", "other")
    write_jsonl(folder / "other.jsonl", [*ROWS[:-1], row(50)])
    if changed == "template":
        Path("other/chat_template.jinja").write_text(chatml("Be brief."))
    elif changed == "tokenizer":
        train_tokenizer(["other text altogether", chatml()]).save("other/tokenizer.json")
    elif changed == "format":
        monkeypatch.setattr(store_module, "FORMAT", "3")
    second = load("other.jsonl" if changed == "data" else "rows.jsonl", student="other")
    assert folders() == sorted({first.folder.name, second.folder.name})
    assert len(folders()) == 2
    assert np.array_equal(second.tokens, first.tokens) == (changed == "format")


def test_pairs_and_sft_rows_of_one_file_have_separate_stores(folder):
    write_jsonl(folder / "both.jsonl", [{**r, "completion": r["chosen"]} for r in ROWS])
    pairs, traces = load("both.jsonl"), load("both.jsonl", paired=False)
    assert pairs.folder != traces.folder
    assert len(pairs.prompt_lengths) == 2 * len(traces.prompt_lengths) == 80


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


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_ends_the_writing_nothing_is_left(folder, monkeypatch, raised):
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", mock.Mock(side_effect=raised))
        with pytest.raises(raised) as error:
            load()
    if raised is KeyboardInterrupt:
        assert str(error.value) == "while tokenizing; no tokens were kept"
    assert folders() == []
    assert load().row_numbers.tolist() == list(range(1, 41))


def test_a_cache_that_cannot_be_written_is_one_line(folder, monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(np, "savez", full)
    message = refusal(load)
    assert message.startswith("--cache cache: cannot write there (")
    assert "No space left" in message
    assert folders() == []
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
