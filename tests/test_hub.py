"""redi/hub.py: what is local stays local, what is a hub id is fetched, all else is one line."""

import fnmatch
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from redi.config import UserError, one_line
from redi.hub import dataset_files, model_folder

ROOT = Path(__file__).parent.parent


class FakeHub:
    """Repositories as lists of paths, downloaded into a folder; `asked` are the downloads."""

    def __init__(self, cache):
        self.cache, self.repositories, self.asked = cache, {}, []

    def snapshot_download(self, repo_id, *, repo_type, allow_patterns):
        self.asked.append((repo_id, repo_type))
        if repo_id not in self.repositories:
            raise OSError("404 Client Error\n\nRepository Not Found for url: https://...")
        folder = self.cache / repo_id
        for name in self.repositories[repo_id]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("{}")
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def names(files, hub_id):
    return [f.as_posix().split(f"cache/{hub_id}/")[1] for f in files]


# ---------------------------------------------------------------- local


def test_a_path_that_exists_is_local_even_if_it_looks_like_a_hub_id(hub, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "rows.jsonl").write_text("{}\n")
    assert model_folder("org/model") == Path("org/model")
    assert dataset_files("org/rows.jsonl") == [Path("org/rows.jsonl")]
    assert dataset_files(tmp_path / "org") == [tmp_path / "org" / "rows.jsonl"]
    assert hub.asked == []


def test_a_folder_gives_its_own_data_files_by_name_and_lists_others(hub, tmp_path, capsys):
    for name in ("b.jsonl", "a.parquet", "c.json", "notes.md", "e.csv", "sub/d.jsonl", ".git"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text("")
    (tmp_path / "raw" / "folder.json").mkdir()
    assert [f.name for f in dataset_files("raw")] == ["a.parquet", "b.jsonl", "c.json"]
    assert capsys.readouterr().out == "raw: 2 other files are not read: e.csv, ...\n"
    with pytest.raises(UserError, match="subfolders are not searched"):
        dataset_files(tmp_path)


def test_a_file_that_would_be_missed_in_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: a broken link"):
        dataset_files(tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")
    (tmp_path / "c.JSONL").touch()
    with pytest.raises(UserError, match=r"c\.JSONL: .* a suffix in capitals"):
        dataset_files(tmp_path)


@pytest.mark.parametrize(
    ("find", "asked", "made_by"),
    [
        (model_folder, "out/sft", "python train_sft.py"),
        (dataset_files, "data/positives.jsonl", "python -m redi.prepare"),
        (dataset_files, "data/toy", "python -m redi.toy"),
    ],
)
def test_a_missing_default_names_the_command_that_makes_it(hub, find, asked, made_by):
    with pytest.raises(UserError) as error:
        find(asked, made_by=made_by)
    assert str(error.value) == f"{asked}: no such file or folder; `{made_by}` makes it"
    assert hub.asked == []


@pytest.mark.parametrize(
    "asked",
    [
        "rows",
        "./a/b",
        "../b",
        "~/b",
        "/a/b",
        "a/b/c",
        "a/b/",
        "a/rows.jsonl",
        "a b/c",
        "",
    ],
)
def test_what_has_not_the_form_of_a_hub_id_is_a_missing_file(hub, tmp_path, asked, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"no such file or folder|no \.parquet"):
        dataset_files(asked)
    assert hub.asked == []


def test_a_file_where_a_model_folder_is_expected_is_an_error(hub, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=r"model\.safetensors: is a file"):
        model_folder("model.safetensors")


# ---------------------------------------------------------------- the hub


def test_a_model_id_is_fetched_with_what_loading_needs_and_nothing_else(hub):
    needed = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    other = ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/weights.safetensors"]
    hub.repositories["Qwen/Qwen2.5-Math-1.5B"] = needed + other
    folder = model_folder("Qwen/Qwen2.5-Math-1.5B", made_by="python train_sft.py")
    assert sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*")) == needed
    assert hub.asked == [("Qwen/Qwen2.5-Math-1.5B", "model")]


@pytest.mark.parametrize(
    ("split", "stored", "found"),
    [
        (
            "train",
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "README.md"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (  # shards of the default configuration win over everything else with the word
            "train",
            ["all/train-00000-of-00001.parquet", "data/train-00000-of-00001-ab12.parquet"],
            ["data/train-00000-of-00001-ab12.parquet"],
        ),
        ("test", ["train.jsonl", "test.jsonl"], ["test.jsonl"]),
        ("test", ["test/b.json", "test/a.json", "train/a.json"], ["test/a.json", "test/b.json"]),
        ("train", ["my_train_1.jsonl", "trains.jsonl", "retrain/x.jsonl"], ["my_train_1.jsonl"]),
    ],
)
def test_a_dataset_id_gives_the_files_of_one_split(hub, split, stored, found):
    hub.repositories["org/set"] = stored
    assert names(dataset_files("org/set", split), "org/set") == found
    assert hub.asked == [("org/set", "dataset")]


def test_a_dataset_id_names_its_split_behind_a_colon(hub):
    hub.repositories["org/set"] = ["train.jsonl", "test.jsonl.gz", "card.json"]
    assert names(dataset_files("org/set:test"), "org/set") == ["test.jsonl.gz"]
    assert hub.asked == [("org/set", "dataset")]


def test_a_folder_gives_compressed_files_too_but_not_the_card(tmp_path):
    there = ["a.json.gz", "b.jsonl.zst", "c.parquet", "card.json", "d.csv.gz", "e.gz"]
    for name in there:
        (tmp_path / name).touch()
    assert [f.name for f in dataset_files(tmp_path)] == there[:3]


def test_a_dataset_without_the_split_is_an_error(hub):
    hub.repositories["org/set"] = ["data/test-00000-of-00001.parquet", "train.csv"]
    with pytest.raises(UserError, match=r"org/set: no .* named after the split 'train'"):
        dataset_files("org/set")


@pytest.mark.parametrize("find", [model_folder, dataset_files])
def test_what_the_hub_does_not_give_is_a_one_line_error(hub, find):
    with pytest.raises(UserError) as error:
        find("org/gone")
    said = str(error.value)
    assert said == one_line(said)
    assert said.startswith("org/gone: no such local path, and downloading this ")
    assert "(OSError: 404 Client Error)" in said


# ---------------------------------------------------------------- the real client


def test_the_real_client_without_a_network_is_a_one_line_error(tmp_path):
    code = "import redi.hub as h; h.model_folder('org/model')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    last = run.stderr.splitlines()[-1]
    assert last.startswith("redi.config.UserError: org/model: no such local path, and downloading")
    assert "LocalEntryNotFoundError" in last


def test_local_json_lines_import_neither_the_hub_client_nor_pyarrow(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    code = (
        "import sys, redi.prepare.__main__; from redi.data.files import read_rows;"
        "assert list(read_rows('rows.jsonl')) == [('rows.jsonl:1', {})];"
        "print(sorted({'pyarrow', 'huggingface_hub', 'torch', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
