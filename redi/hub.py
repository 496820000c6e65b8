"""A local path, or a hub id made local: everything downstream sees only files.

    model_folder("out/sft")                       -> out/sft, or "`python train_sft.py` makes it"
    model_folder("Qwen/Qwen2.5-Math-1.5B")        -> ~/.cache/huggingface/.../snapshots/<commit>
    dataset_files("data/positives.jsonl")         -> [data/positives.jsonl]
    dataset_files("open-r1/OpenR1-Math-Raw")      -> [.../data/train-00000-of-00010.parquet, ...]
    dataset_files("org/name:test")                -> the files of another split

What exists on this machine is local. Anything else is a hub id if it has a hub id's form,
`organisation/name`, and does not end in the suffix of a data file; otherwise it is a missing file.
`out/sft` has that form too, but a path under out/ or data/, where the programs write by default, is
local. When the caller knows the command that makes a missing input, `made_by`, the error says so.

The hub's own cache does the rest: a snapshot is fetched once, resumes when cut off, and is found
again without a network. Left out: revisions and the dataset viewer's YAML configurations; a
data set of several configurations is read by naming its files.
"""

import re
from pathlib import Path

from redi.config import UserError

PLAIN_SUFFIXES = (".parquet", ".jsonl", ".json")
DATA_SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
CARD = "card.json"  # what prepare writes beside its data about them
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
# Named one by one, so that weights in other formats and adapters stay where they are.
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
]
# Where the programs write by default: a path below them is never a hub id.
OUR_FOLDERS = ("out", "data")


def model_folder(
    folder_or_hub_id: str | Path, made_by: str | None = None, files: list[str] = MODEL_FILES
) -> Path:
    """The Hugging Face folder of a model, `files` of it downloaded if it is a hub id.

    made_by: the command that makes this folder, quoted in the error when it is missing.
    Raises UserError: missing, not a folder, or the hub does not give it.
    """
    path = Path(folder_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; expected a Hugging Face model folder")
    if not is_hub_id(str(folder_or_hub_id)):
        raise _missing(path, made_by)
    return _snapshot(str(folder_or_hub_id), "model", files)


def dataset_files(
    path_or_hub_id: str | Path, split: str = "train", made_by: str | None = None
) -> list[Path]:
    """The data files (.parquet, .jsonl, .json, the latter two also as .gz and .zst) of a file, a
    folder or a hub id, sorted by name.

    A folder gives every data file directly in it but prepare's card; subfolders are not searched,
    because a model or an earlier output kept below would be taken for data. A hub id gives the
    files of one split, the one named behind a colon or else `split`, by the hub's convention:
    data/train-00000-of-00010.parquet if there are such files, else those with the split as a word
    of their path (train.jsonl, main/train/0.parquet). A local path has no splits. Raises UserError:
    missing, no data file, or the hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if _is_data(f) and f.name != CARD)
        if not files:
            raise UserError(
                f"{path}: no {_any_of(PLAIN_SUFFIXES)} file directly in this folder "
                "(subfolders are not searched)"
            )
        return files
    if path.exists():
        if not _is_data(path):
            raise UserError(
                f"{path}: expected a {_any_of(PLAIN_SUFFIXES)} file or a folder of them"
            )
        return [path]
    hub_id, _, named = str(path_or_hub_id).partition(":")
    split = named or split
    if not is_hub_id(hub_id):
        raise _missing(path, made_by)
    snapshot = _snapshot(hub_id, "dataset", [f"*{split}*{suffix}" for suffix in DATA_SUFFIXES])
    files = _files_of_split(snapshot, split)
    if not files:
        raise UserError(
            f"{hub_id}: no {_any_of(PLAIN_SUFFIXES)} file of this data set on the hub is named "
            f"after the split {split!r}; download it and give the files"
        )
    return files


def _files_of_split(snapshot: Path, split: str) -> list[Path]:
    """The hub's convention for a folder without a configuration; its patterns, in its order."""
    names = sorted(f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*") if _is_data(f))
    word = re.escape(split)
    for pattern in (rf"data/{word}-\d{{5}}-of-\d{{5}}\b", rf".*(?<![^\W_]){word}(?![^\W_])"):
        files = [snapshot / name for name in names if re.match(pattern, name)]
        if files:
            return files
    return []


def _is_data(path: Path) -> bool:
    return path.name.endswith(DATA_SUFFIXES) and path.is_file()


# ---------------------------------------------------------------- local or hub


def is_hub_id(text: str) -> bool:
    """Whether `text` names nothing on this machine, and has the form of a hub id."""
    if Path(text).expanduser().exists() or text.split("/")[0] in OUR_FOLDERS:
        return False
    if text.count("/") != 1 or text.startswith((".", "~", "/")) or text.endswith(DATA_SUFFIXES):
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _snapshot(hub_id: str, kind: str, patterns: list[str]) -> Path:
    """The files of a hub repository that match `patterns`, in a local folder."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, repo_type=kind, allow_patterns=patterns)
        )
    except Exception as error:  # the client raises its own errors, OSError and its HTTP library's
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"{hub_id}: no such local path, and the hub does not give this {kind} "
            f"({type(error).__name__}: {reason}); check the name, the network and, "
            "for a gated repository, HF_TOKEN"
        ) from None


def _missing(path: Path, made_by: str | None) -> UserError:
    cure = f"`{made_by}` makes it" if made_by else "expected a local path or a hub id, org/name"
    return UserError(f"{path}: no such file or folder; {cure}")


def _any_of(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
