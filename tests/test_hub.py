"""redi/hub.py: what is local stays local, a hub id is downloaded, all else is one line."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import DatasetCardData
from processes import run_command
from small_run import refusal

from redi.eval.protocol import EvalConfig
from redi.hub import dataset_files, model_folder
from redi.prepare.__main__ import dataset_license
from redi.recipe import REDIConfig, SFTConfig


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> SimpleNamespace:
    """A hub whose repositories are lists of paths; `downloads` lists what was downloaded."""
    fake = SimpleNamespace(repositories={}, downloads=[], cache=tmp_path / "cache")

    def snapshot_download(repo_id, *, repo_type, allow_patterns):
        fake.downloads.append((repo_id, repo_type))
        if repo_id not in fake.repositories:
            raise OSError("404 Client Error\n\nRepository Not Found for url: https://...")
        for pattern in allow_patterns:
            touch(fake.cache / repo_id, *fnmatch.filter(fake.repositories[repo_id], pattern))
        return str(fake.cache / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


# ---------------------------------------------------------------- local


def test_a_path_that_exists_is_local_even_if_it_looks_like_a_hub_id(hub, tmp_path):
    touch(tmp_path, "org/model/config.json", "org/rows.jsonl")
    assert model_folder("org/model") == Path("org/model")
    assert dataset_files("org/rows.jsonl") == [Path("org/rows.jsonl")]
    assert dataset_files(tmp_path / "org") == [tmp_path / "org" / "rows.jsonl"]
    assert "config.json: is a file" in refusal(model_folder, "org/model/config.json")
    assert hub.downloads == []


def test_a_folder_gives_its_own_data_files_by_name_and_lists_others(tmp_path, capsys):
    raw = tmp_path / "raw"
    data = ["a.parquet", "b.jsonl", "c.json", "d.json.gz", "e.jsonl.zst"]
    touch(raw, *reversed(data), "card.json", "f.md", "g.csv.gz", "sub/d.jsonl", ".git")
    (raw / "folder.json").mkdir()
    assert [f.name for f in dataset_files(raw)] == data
    assert capsys.readouterr().out == f"{raw}: 2 other files are not read: f.md, ...\n"
    assert "subfolders are not searched" in refusal(dataset_files, tmp_path)


@pytest.mark.parametrize(("name", "target"), [("b.jsonl", "gone.jsonl"), ("c.JSONL", "a.jsonl")])
def test_a_file_that_would_be_missed_in_a_folder_is_refused_by_name(tmp_path, name, target):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / name).symlink_to(tmp_path / target)
    message = refusal(dataset_files, tmp_path)
    assert message.startswith(f"{tmp_path}/{name}: a broken link, or a suffix in capitals; mend it")


NO_HUB_IDS = ["rows", "./a/b", "../b", "~/b", "/a/b", "a/b/c", "a/b/", "a/rows.jsonl", "a b/c"]


@pytest.mark.parametrize(
    ("find", "path", "command"),
    [
        (model_folder, SFTConfig.out, "train-sft"),
        (model_folder, REDIConfig.model, "train-sft"),
        (model_folder, REDIConfig.out, "train-redi"),
        (model_folder, EvalConfig.model, "train-redi"),
        (dataset_files, SFTConfig.data, "prepare"),
        (dataset_files, f"./{REDIConfig.data}", "prepare"),
        (dataset_files, "data/toy", None),
        *((dataset_files, path, None) for path in NO_HUB_IDS),
    ],
)
def test_what_is_neither_there_nor_a_hub_id_is_missing_and_a_default_names_its_command(
    hub, find, path, command
):
    message = refusal(find, path)
    usual = "expected a local path or a hub id, org/name"
    hint = f"`python -m redi {command}` makes it" if command else usual
    assert message == f"{Path(path).expanduser()}: no such file or folder; {hint}"
    assert hub.downloads == []


# ---------------------------------------------------------------- the hub


def test_of_a_model_id_only_what_loading_needs_is_downloaded(hub):
    needed = [
        "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    other = ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/weights.safetensors"]
    hub.repositories["Qwen/Qwen2.5-Math-1.5B"] = needed + other
    folder = model_folder("Qwen/Qwen2.5-Math-1.5B")
    assert sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*")) == needed
    assert hub.downloads == [("Qwen/Qwen2.5-Math-1.5B", "model")]


@pytest.mark.parametrize(
    ("card", "expected"),
    [(None, None), ({}, None), ({"license": "mit"}, "mit"), ({"license": ["a", "b"]}, ["a", "b"])],
)
def test_the_license_is_what_the_hub_names(hub, monkeypatch, card, expected):
    def info(repo_id, timeout):
        assert repo_id == "org/set"
        return SimpleNamespace(card_data=None if card is None else DatasetCardData(**card))

    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    assert dataset_license("org/set") == dataset_license("org/set:test") == expected


def test_without_the_hub_or_of_a_local_path_there_is_no_license(hub, tmp_path, monkeypatch):
    def offline(repo_id, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    touch(tmp_path, "org/rows/a.jsonl", "raw.jsonl")
    assert [dataset_license(name) for name in ("org/set", "org/rows", "raw.jsonl")] == [None] * 3


SHARD, OTHER_SHARD = (f"data/train-0000{number}-of-00002.parquet" for number in (0, 1))
HASHED = "data/train-00000-of-00001-ab12.parquet"
SPLITS = [  # split, files on the hub, those of the split
    ("train", [OTHER_SHARD, SHARD, "README.md"], [SHARD, OTHER_SHARD]),
    # Shards of the default configuration win over everything else with the word.
    ("train", ["all/train-00000-of-00001.parquet", HASHED], [HASHED]),
    ("test", ["train.jsonl", "test.jsonl"], ["test.jsonl"]),
    ("test", ["train.jsonl", "test.jsonl.gz", "card.json"], ["test.jsonl.gz"]),
    ("test", ["test/b.json", "test/a.json", "train/a.json"], ["test/a.json", "test/b.json"]),
    ("train", ["my_train_1.jsonl", "trains.jsonl", "retrain/x.jsonl"], ["my_train_1.jsonl"]),
]


@pytest.mark.parametrize(("split", "stored", "expected"), SPLITS)
def test_a_dataset_id_gives_the_files_of_one_split(hub, split, stored, expected):
    hub.repositories["org/set"] = stored
    found = [hub.cache / "org/set" / name for name in expected]
    assert dataset_files("org/set", split) == found
    assert dataset_files(f"org/set:{split}", "other") == found
    assert hub.downloads == [("org/set", "dataset")] * 2


def test_a_dataset_without_the_split_and_a_failed_download_are_one_line(hub):
    hub.repositories["org/set"] = ["data/test-00000-of-00001.parquet", "train.csv"]
    message = refusal(dataset_files, "org/set")
    assert "org/set: no .parquet" in message
    assert "named after the split 'train'" in message
    for find in (model_folder, dataset_files):
        message = refusal(find, "org/gone")
        assert message.startswith("org/gone: no such local path, and downloading this ")
        assert "(OSError: 404 Client Error)" in message


def test_the_real_client_without_a_network_is_one_line(tmp_path):
    code = "import redi.hub as h; h.model_folder('org/model')"
    _, _, errors = run_command("-c", code, HF_HOME=tmp_path)
    last = errors.splitlines()[-1]
    assert last.startswith("redi.config.UserError: org/model: no such local path, and downloading")
    assert "LocalEntryNotFoundError" in last


def test_local_json_lines_import_neither_the_hub_client_nor_pyarrow(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    code = (
        "import sys, redi.prepare.__main__; from redi.data.files import read_rows;"
        "assert [row for _, row in read_rows(sys.argv[1])] == [{}];"
        "print(sorted({'pyarrow', 'huggingface_hub', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert run_command("-c", code, tmp_path / "rows.jsonl") == (0, "[]\n", "")
