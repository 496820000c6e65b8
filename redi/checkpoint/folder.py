"""The Hugging Face model folder, in and out.

In: config.json (both forms in use), weights (weights.py), tokenizer, generation config. Weights
become fp32: they are what the optimizer updates, and an update at lr 1e-6 is lost in bf16.

Out: the same folder again, in the source's dtype, with what training changed: the weights, the
rotary base and the context if asked, and the stop tokens. A model trained on chat turns must stop
at the template's end token; that one decision goes into generation_config.json, config.json and
tokenizer_config.json together. Files are written aside and renamed, config.json last, so a folder
that was not finished does not load.

    python -m redi.checkpoint export OUT/checkpoints/step-000200 --out DIR

makes such a folder of a checkpoint that training saved on its way (resume.py).
Left out: remote code.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from redi.checkpoint.weights import INDEX, WEIGHTS, check_weights, fill, read_json
from redi.config import UserError
from redi.data.tokenizer import ChatTokenizer
from redi.distributed import full_tensor
from redi.hub import TOKENIZER_FILES, model_folder
from redi.model import ModelConfig, Transformer, read_rope_theta

MAX_SHARD_BYTES = 5 * 10**9
KEEP = "keep"  # for the overrides: as the checkpoint has it


@dataclass(frozen=True)
class Source:
    """Where a model came from, and what a saved one takes over from there."""

    name: str  # the folder or hub id as it was asked for
    folder: Path
    config: dict[str, Any]  # config.json, overrides applied
    generation: dict[str, Any]  # generation_config.json
    dtype: torch.dtype  # of the stored weights
    chat: ChatTokenizer | None  # None if the folder has no tokenizer
    stop_ids: list[int]  # the template's end token first


def load_model(
    folder_or_hub_id: str | Path,
    rope_theta: float | str = KEEP,
    max_position_embeddings: int | str = KEEP,
    made_by: str | None = None,
) -> tuple[Transformer, Source]:
    """Read a model: (the transformer in fp32 on the CPU, its source). See `open_model`, `fill`."""
    model, source = open_model(folder_or_hub_id, rope_theta, max_position_embeddings, made_by)
    model.to_empty(device="cpu")
    fill(model, source.folder)
    return model, source


def open_model(
    folder_or_hub_id: str | Path,
    rope_theta: float | str = KEEP,
    max_position_embeddings: int | str = KEEP,
    made_by: str | None = None,
) -> tuple[Transformer, Source]:
    """(the transformer on the meta device: sizes without numbers, its source).

    rope_theta and max_position_embeddings override the checkpoint's; the change is printed as
    old -> new. made_by: the command that makes the folder, for the error when it is missing.
    Raises UserError for anything missing, broken, of the wrong shape, or not built here; of the
    weights only the files' headers are read.
    """
    folder = model_folder(str(folder_or_hub_id), made_by=made_by)
    path = folder / "config.json"
    config_json = read_json(path)
    _override(config_json, rope_theta, max_position_embeddings, str(path))
    config = ModelConfig.from_json(config_json, str(path))
    with torch.device("meta"):
        model = Transformer(config)
    dtype = check_weights(model, folder)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    chat = ChatTokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    if chat is not None:
        largest = max(chat.tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= config.vocab_size:
            raise UserError(
                f"{folder / 'tokenizer.json'}: token id {largest} has no embedding; "
                f"{path.name} says vocab_size {config.vocab_size}"
            )
    stop_ids = _stop_ids(config_json, generation, chat)
    name = str(folder_or_hub_id)
    return model, Source(name, folder, config_json, generation, dtype, chat, stop_ids)


def save_model(
    model: Transformer,
    folder: str | Path,
    source: Source,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write `model` as a Hugging Face folder; dtype defaults to the source's.

    card: the text of README.md. Other files of `folder` are left alone. A sharded model is put
    together by all ranks, which must all call this, and written by the first. Raises UserError if
    the folder cannot be written.
    """
    folder, dtype = Path(folder), dtype or source.dtype
    tensors = _gathered(model, dtype)
    if not tensors:
        return
    aside = folder / f".saving-{os.getpid()}"  # inside: a rename cannot leave the file system
    try:
        for left in folder.glob(".saving-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_weights(tensors, aside)
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, aside / name)
        _write_settings(model.config, aside, source, dtype)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        _publish(aside, folder)
    except (OSError, SafetensorError) as error:  # a full disk is either, by who was writing
        raise UserError(f"{folder}: the model could not be saved ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- in


def _override(
    config: dict[str, Any], theta: float | str, max_positions: int | str, where: str
) -> None:
    if max_positions != KEEP:
        old = config.get("max_position_embeddings")
        config["max_position_embeddings"] = int(max_positions)
        print(f"max_position_embeddings: {old} -> {int(max_positions)}")
    if theta != KEEP:
        print(f"rope_theta: {read_rope_theta(config, where):g} -> {float(theta):g}")
        _set_rope_theta(config, float(theta))


def _set_rope_theta(config: dict[str, Any], theta: float) -> None:
    """In the older form of config.json and in that of transformers 5."""
    config["rope_theta"] = theta
    rope = config.get("rope_parameters") or {}
    config["rope_parameters"] = {**rope, "rope_theta": theta, "rope_type": "default"}


def _stop_ids(
    config: dict[str, Any], generation: dict[str, Any], chat: ChatTokenizer | None
) -> list[int]:
    """The template's end token, then those of generation_config.json (or else config.json)."""
    named = generation.get("eos_token_id")
    named = config.get("eos_token_id") if named is None else named
    named = named if isinstance(named, list) else [] if named is None else [named]
    first = [] if chat is None else [chat.stop_id]
    return list(dict.fromkeys([*first, *named]))


# ---------------------------------------------------------------- out


def _gathered(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights, whole, on the host of the first rank; nothing on the others."""
    sharded = hasattr(model.output_weight, "device_mesh")
    first = not sharded or torch.distributed.get_rank() == 0
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = full_tensor(tensor)  # an exchange between ranks: all take part
        if first:
            tensors[name] = tensor.to("cpu", dtype).contiguous()
    return tensors


def _write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """safetensors in shards of at most 5 GB, with an index if there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_settings(config: ModelConfig, folder: Path, source: Source, dtype: torch.dtype) -> None:
    """config.json in both forms, generation_config.json, and the stop token wherever it stands."""
    name = str(dtype).removeprefix("torch.")
    settings = {**source.config, "dtype": name, "torch_dtype": name}
    _set_rope_theta(settings, config.rope_theta)
    generation = dict(source.generation)
    if source.stop_ids:
        settings["eos_token_id"] = source.stop_ids[0]
        generation["eos_token_id"] = source.stop_ids
    # Where the older special_tokens_map.json is there, transformers may prefer what it says.
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if source.chat is not None and (folder / file).is_file():
            tokens = read_json(folder / file)
            tokens["eos_token"] = source.chat.token(source.chat.stop_id)
            _write_json(folder / file, tokens)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(aside: Path, folder: Path) -> None:
    """Move the finished files to their final names. config.json goes first and comes last: without
    it nothing loads, so no mixture of an old and a new model ever does. Files that the new model
    does not have (shards, a chat template) go too: they would be read as its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    names = (INDEX, "generation_config.json", *TOKENIZER_FILES)
    for old in [*folder.glob("model*.safetensors"), *(folder / name for name in names)]:
        old.unlink(missing_ok=True)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
