"""The Hugging Face model folder: load_model, save_model.

Loaded weights become fp32, because bf16 would lose the optimizer's updates at lr 1e-6. Saving
writes the same folder again, in the source's dtype, with what training changed: weights, rotary
base, context length and stop tokens. A model trained on chat turns must stop at the template's end
token, so generation_config.json, config.json and tokenizer_config.json all name it.
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
from torch import Tensor

from redi.checkpoint.config_json import read_config, set_rope_theta
from redi.checkpoint.weights import INDEX, check_weights, fill
from redi.config import UserError
from redi.data.files import folder_to_disk, read_json, to_disk
from redi.data.tokenizer import ChatTokenizer
from redi.distributed import full_tensor
from redi.hub import TOKENIZER_FILES, model_folder
from redi.model import ModelConfig, Transformer

MAX_SHARD_BYTES = 5 * 10**9
KEEP = "keep"  # the overrides' default: the value in config.json


@dataclass(frozen=True)
class Source:
    """The folder that a model was loaded from, with what saving copies from it."""

    name: str  # the folder or hub id that the user gave
    folder: Path
    config: dict[str, Any]  # config.json, with the overrides
    generation: dict[str, Any]  # generation_config.json
    dtype: torch.dtype  # of the stored weights
    chat: ChatTokenizer | None  # None if the folder has no tokenizer
    stop_ids: list[int]  # the template's end token comes first


def load_model(folder_or_hub_id: str | Path) -> tuple[Transformer, Source]:
    """(the model in fp32 on the CPU, its source). Arguments and errors: see `open_model`."""
    model, source = open_model(folder_or_hub_id)
    model.to_empty(device="cpu")
    fill(model, source.folder)
    return model, source


def open_model(
    folder_or_hub_id: str | Path,
    rope_theta: float | str = KEEP,
    max_position_embeddings: int | str = KEEP,
) -> tuple[Transformer, Source]:
    """(the model on the meta device, its source). Only the headers of the weight files are read.

    rope_theta and max_position_embeddings override config.json, and the changes are printed.
    Raises UserError for a file that is missing, broken, of the wrong shape or not supported.
    """
    folder = model_folder(folder_or_hub_id)
    path = folder / "config.json"
    config = read_json(path)
    if max_position_embeddings != KEEP:
        old = config.get("max_position_embeddings")
        print(f"max_position_embeddings: {old} -> {max_position_embeddings}")
        config["max_position_embeddings"] = max_position_embeddings
    if rope_theta != KEEP:
        print(f"rope_theta: {read_config(config, str(path)).rope_theta:g} -> {rope_theta:g}")
        set_rope_theta(config, rope_theta)
    with torch.device("meta"):
        model = Transformer(read_config(config, str(path)))
    dtype = check_weights(model, folder)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    path = folder / "tokenizer.json"
    chat = ChatTokenizer.from_folder(folder) if path.is_file() else None
    if chat is not None:
        largest, size = max(chat.tokenizer.get_vocab().values()), model.config.vocab_size
        if largest >= size:
            raise UserError(f"{path}: token id {largest} has no embedding; vocab_size is {size}")
    stop_ids = _stop_ids(folder, config, generation, chat)
    return model, Source(str(folder_or_hub_id), folder, config, generation, dtype, chat, stop_ids)


def _stop_ids(
    folder: Path, config: dict[str, Any], generation: dict[str, Any], chat: ChatTokenizer | None
) -> list[int]:
    """The template's end token, then those of generation_config.json, else of config.json."""
    ids = generation.get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    ids = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    for i in ids:
        if type(i) is not int or not 0 <= i < config["vocab_size"]:
            raise UserError(f"{folder}: eos_token_id is {i!r}; expected a token id, or a list")
    return list(dict.fromkeys(ids if chat is None else [chat.stop_id, *ids]))


def save_model(
    model: Transformer,
    folder: str | Path,
    source: Source,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write `model` as a Hugging Face folder, in the source's dtype unless another is given. card:
    the text of README.md. Other files in `folder` are left alone. All ranks must call it; rank 0
    gathers and writes. Raises UserError if the folder cannot be written."""
    from huggingface_hub import save_torch_state_dict  # imported only where used

    folder, dtype = Path(folder), dtype or source.dtype
    tensors = _gather(model, dtype)
    if not tensors:
        return
    aside = folder / f".saving-{os.getpid()}"  # a subfolder: renames stay in one file system
    try:
        for leftover in folder.glob(".saving-*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        save_torch_state_dict(tensors, aside, max_shard_size=MAX_SHARD_BYTES)
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, aside / name)
        _write_settings(model.config, aside, source, dtype)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        _publish(aside, folder)
    except (OSError, SafetensorError) as error:  # either may report a full disk
        raise UserError(f"{folder}: the model could not be saved ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _gather(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights on the host of rank 0; nothing on the other ranks."""
    is_sharded = hasattr(model.output_weight, "device_mesh")
    is_rank_zero = not is_sharded or torch.distributed.get_rank() == 0
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = full_tensor(tensor)  # all ranks take part
        if is_rank_zero:
            tensor = tensor.to("cpu", dtype)
            # Gathered from uneven shards, it is a view of padded storage, which cannot be saved.
            is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
            tensors[name] = tensor.clone() if is_view else tensor
    return tensors


def _write_settings(config: ModelConfig, folder: Path, source: Source, dtype: torch.dtype) -> None:
    """Write config.json in both forms and generation_config.json; name the stop token in all."""
    dtype_name = str(dtype).removeprefix("torch.")
    settings = {**source.config, "dtype": dtype_name, "torch_dtype": dtype_name}
    set_rope_theta(settings, config.rope_theta)
    generation = dict(source.generation)
    if source.stop_ids:
        settings["eos_token_id"] = source.stop_ids[0]
        generation["eos_token_id"] = source.stop_ids
    files = {"generation_config.json": generation, "config.json": settings}
    # transformers may prefer the older special_tokens_map.json if there is one.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if source.chat is not None and (folder / name).is_file():
            stop_token = source.chat.token(source.chat.stop_id)
            files[name] = read_json(folder / name) | {"eos_token": stop_token}
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _publish(aside: Path, folder: Path) -> None:
    """Give the files their final names, config.json last: no model loads without it, so a kill or a
    power cut never leaves a mixture of an old and a new model that loads. Old files that the new
    model lacks (shards, a chat template) are removed: they would be read with it."""
    config = folder / "config.json"
    files = list(aside.iterdir())
    for path in files:
        with open(path, "rb") as file:
            to_disk(file)
    config.unlink(missing_ok=True)
    folder_to_disk(folder)
    names = (INDEX, "generation_config.json", *TOKENIZER_FILES)
    for old in [*folder.glob("model*.safetensors"), *(folder / name for name in names)]:
        old.unlink(missing_ok=True)
    for path in files:
        if path.name != config.name:
            os.replace(path, folder / path.name)
    folder_to_disk(folder)
    os.replace(aside / config.name, config)
    folder_to_disk(folder)
