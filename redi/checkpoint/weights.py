"""Read the weights of a Hugging Face model folder: safetensors, in one file or in shards.

`check_weights` reads only the headers: every tensor must be there with the right shape, and no
other tensor. `fill` copies the numbers into a model: on every rank, the rows of its own shards.
Left out: .bin and .pt files (unpickling runs code), quantized weights.
"""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redi.config import UserError
from redi.data.files import hash_files
from redi.distributed import first_row, local_shard
from redi.model import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_weights(model: Transformer, folder: Path) -> torch.dtype:
    """The dtype of the stored weights. Raises UserError if they do not fit `model`."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = stored_tensors(folder)
    if model.config.tied and HEAD in stored:
        shapes[HEAD] = list(model.output_weight.shape)  # `fill` compares the two
    missing = [name for name in shapes if name not in stored]
    unexpected = [name for name in stored if name not in shapes]
    if missing or unexpected:
        raise UserError(
            f"{folder}: weights do not fit config.json; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    dtypes = set()
    for name, tensor in stored.items():
        shape, dtype = tensor.get_shape(), tensor.get_dtype()
        if shape != shapes[name]:
            raise UserError(f"{folder}: {name} has shape {shape}; expected {shapes[name]}")
        if dtype not in FLOATS:
            raise UserError(f"{folder}: {name} is {dtype}; expected floating point")
        dtypes.add(FLOATS[dtype])
    return reduce(torch.promote_types, dtypes)


@torch.no_grad()
def fill(model: Transformer, folder: Path) -> None:
    """Copy the weights of `folder` into `model`, on every rank the rows of its own shards. Raises
    UserError if the model is tied, but the stored output weight is not the embedding."""
    stored = stored_tensors(folder)
    for name, parameter in model.named_parameters():
        local_shard(parameter).copy_(_local_rows(stored[name], parameter))
    if model.config.tied and HEAD in stored:
        embedding = local_shard(model.output_weight)
        head = _local_rows(stored[HEAD], model.output_weight).to(embedding)
        if not torch.equal(head, embedding):
            raise UserError(
                f"{folder}: config.json ties the output weight to the embedding, but {HEAD} is "
                "stored and differs; set tie_word_embeddings to false if that is intended"
            )


def _local_rows(stored: Any, parameter: Tensor) -> Tensor:
    start = first_row(parameter)
    return stored[start : start + len(local_shard(parameter))]


def weights_hash(folder: Path) -> str:
    """The first 16 hex digits of the sha256 of all weight files."""
    return hash_files(weight_files(folder))[:16]


def stored_tensors(folder: Path) -> dict[str, Any]:
    """Name -> tensor on disk, read when it is indexed. Raises UserError if a file is broken."""
    stored: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})") from None
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in stored:
                raise UserError(f"{path}: {name} is stored in another file too")
            stored[name] = file.get_slice(name)  # keeps the file open
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards sorted by name. Raises UserError if a file is missing."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX}: the field 'weight_map' is missing")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; expected the model's weights")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
