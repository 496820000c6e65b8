"""The weights of a Hugging Face model folder, read.

safetensors in one file, or in shards with an index. Every tensor must be there with the right shape
and none may be left over; that is seen from the files' headers, before a number is read. Weights
become fp32 in a model that has memory already, and of a sharded one every rank reads only the rows
that are its own.

Left out: .bin and .pt files (pickles run code), quantised weights.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from redi.config import UserError
from redi.distributed import first_row, local_shard
from redi.model import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_weights(model: Transformer, folder: Path) -> torch.dtype:
    """Whether the files' headers fit the meta-device `model`; returns their dtype."""
    missing = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    unexpected, dtypes = [], set()
    for path in weight_files(folder):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                header = tensors.get_slice(name)
                shape, dtype = header.get_shape(), header.get_dtype()
                if name == HEAD and model.config.tied:
                    continue  # `fill` compares it with the embedding
                if name not in missing:
                    unexpected.append(name)
                    continue
                wanted = missing.pop(name)
                if shape != wanted:
                    raise UserError(
                        f"{path}: {name} has shape {shape}; config.json asks for {wanted}"
                    )
                if dtype not in STORED:
                    raise UserError(f"{path}: {name} is {dtype}; expected floating point")
                dtypes.add(STORED[dtype])
    if missing or unexpected:
        raise UserError(
            f"{folder}: weights do not fit config.json; "
            f"missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


@torch.no_grad()
def fill(model: Transformer, folder: Path) -> None:
    """Give `model`, which has memory, its numbers: of a sharded one every rank reads its own rows.

    Raises UserError if a file is broken, or if a tied model's folder has another output weight.
    """
    parameters = dict(model.named_parameters())
    for path in weight_files(folder):
        with _opened(path) as tensors:
            for name in parameters.keys() & tensors.keys():
                mine, start = local_shard(parameters[name]), first_row(parameters[name])
                mine.copy_(tensors.get_slice(name)[start : start + len(mine)])
    for path in weight_files(folder):  # now that the embedding is there to compare with
        with _opened(path) as tensors:
            if model.config.tied and HEAD in tensors.keys():  # noqa: SIM118 (not a dict)
                mine, start = local_shard(model.output_weight), first_row(model.output_weight)
                stored = tensors.get_slice(HEAD)
                same_shape = stored.get_shape() == list(model.output_weight.shape)
                if not same_shape or not torch.equal(
                    stored[start : start + len(mine)].to(mine), mine
                ):
                    raise UserError(
                        f"{folder}: config.json ties the output weight to the embedding, "
                        f"but {HEAD} is stored and differs; set tie_word_embeddings to false if it "
                        "is meant"
                    )


def fingerprint(folder: Path) -> str:
    """A hash of a folder's weights by their first and last MiB: other weights have another one."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it becomes a UserError."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX}: the field 'weight_map' is missing")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard}: no such file, though {INDEX} lists it")
        return [folder / shard for shard in shards]
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file (nor {INDEX})")
    return [folder / WEIGHTS]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
