"""Resolve a local path or a hub id to local files. Everything else in redi only reads files.

    model_folder("Qwen/Qwen2.5-Math-1.5B")        -> ~/.cache/huggingface/.../snapshots/<commit>
    dataset_files("data/positives.jsonl")         -> [data/positives.jsonl]
    dataset_files("open-r1/OpenR1-Math-Raw")      -> [.../data/train-00000-of-00010.parquet, ...]
    dataset_files("org/name:test")                -> the files of another split

A path that exists is local. Any other `organization/name` is a hub id, unless it is below out/ or
data/, where the programs write by default, or has the ending of a data file. A hub id is downloaded
once; from then on the cache is enough. Left out: revisions and dataset configurations (download the
one you need and pass its files).
"""

import re
from pathlib import Path

from redi.config import UserError

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
DATA_FILE = ".parquet, .jsonl or .json file"  # in errors
MADE_BY = {  # what a program writes by default -> its command, for the error if it is missing
    "data/positives.jsonl": "prepare", "data/pairs.jsonl": "prepare", "out/sft": "train-sft",
    "out/redi": "train-redi",
}  # fmt: skip
CARD = "card.json"  # redi.prepare's description of its data, in the same folder
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
]  # fmt: skip
# An explicit list, so that adapters and weights in other formats are not downloaded.
MODEL_FILES = [
    "config.json", "generation_config.json", *TOKENIZER_FILES,
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
]  # fmt: skip


def model_folder(folder_or_hub_id: str | Path, files: list[str] = MODEL_FILES) -> Path:
    """The Hugging Face folder of a model. For a hub id, `files` are downloaded. Raises UserError:
    missing, not a folder, or not on the hub."""
    path = Path(folder_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; expected a Hugging Face model folder")
    if not is_hub_id(str(folder_or_hub_id)):
        raise _missing(path)
    return _download(str(folder_or_hub_id), "model", files)


def dataset_files(path_or_hub_id: str | Path, split: str = "train") -> list[Path]:
    """The data files that a file, a folder or a hub id stands for, sorted by name.

    A folder: every data file directly in it, except redi.prepare's card; others are counted on
    stdout. Subfolders are not searched: they may hold models or earlier outputs. A hub id: the
    files of one split, named after a colon or by `split`. Raises UserError: missing, no data file
    or a broken one, or not on the hub."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if not file.is_dir() and file.name != CARD)
        files = [file for file in found if file.name.lower().endswith(DATA_SUFFIXES)]
        if broken := [file for file in files if not _is_data(file)]:
            raise UserError(f"{broken[0]}: a broken link, or a suffix in capitals; mend it")
        if others := [f.name for f in found if f not in files and not f.name.startswith(".")]:
            print(f"{path}: {len(others)} other files are not read: {others[0]}, ...")
        if not files:
            raise UserError(f"{path}: no {DATA_FILE} in this folder (subfolders are not searched)")
        return files
    if path.exists():
        if not _is_data(path):
            raise UserError(f"{path}: expected a {DATA_FILE} or a folder of them")
        return [path]
    hub_id, _, named = str(path_or_hub_id).partition(":")
    if not is_hub_id(hub_id):
        raise _missing(path)
    split = named or split
    patterns = [f"*{split}*{suffix}" for suffix in DATA_SUFFIXES]
    files = _files_of_split(_download(hub_id, "dataset", patterns), split)
    if not files:
        raise UserError(
            f"{hub_id}: no {DATA_FILE} on the hub is named after the split {split!r}; "
            "download the dataset and pass its files"
        )
    return files


def _is_data(path: Path) -> bool:
    return path.name.endswith(DATA_SUFFIXES) and path.is_file()


def _files_of_split(snapshot: Path, split: str) -> list[Path]:
    """Follow the hub's convention: data/train-00000-of-00010.parquet if there are such files, else
    the files whose path contains the split as a word (train.jsonl, main/train/0.parquet)."""
    names = sorted(f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*") if _is_data(f))
    word = re.escape(split)
    for pattern in (rf"data/{word}-\d{{5}}-of-\d{{5}}\b", rf".*(?<![^\W_]){word}(?![^\W_])"):
        if files := [snapshot / name for name in names if re.match(pattern, name)]:
            return files
    return []


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id and is not a local path."""
    if text.startswith(("out/", "data/")) or text.endswith(DATA_SUFFIXES) or Path(text).exists():
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def _download(hub_id: str, kind: str, patterns: list[str]) -> Path:
    """The local folder of a hub repository, with the files that match `patterns`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, repo_type=kind, allow_patterns=patterns))
    except Exception as error:  # the client's own errors, its HTTP library's, OSError
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{hub_id}: no such local path, and downloading this {kind} from the hub failed "
            f"({type(error).__name__}: {reason}); check the name, the network and HF_TOKEN"
        ) from None


def _missing(path: Path) -> UserError:
    hint = "expected a local path or a hub id, org/name"
    if command := MADE_BY.get(path.as_posix()):
        hint = f"`python -m redi {command}` makes it"
    return UserError(f"{path}: no such file or folder; {hint}")
