"""Tensors in safetensors files: the weights of a Hugging Face model folder, and a rank's rows of a
checkpoint. Left out: .bin and .pt files (unpickling runs code), quantized weights.
"""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redi.config import UserError
from redi.data.files import hash_files, read_json, to_disk
from redi.distributed import first_row, local_shard
from redi.model import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_weights(model: Transformer, folder: Path) -> torch.dtype:
    """The dtype of the stored weights, by the headers of the files. Raises UserError unless these
    are the tensors of `model`, all and no others, with their shapes."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = stored_tensors(weight_files(folder))
    # Older Llama files hold a table of rotary frequencies, which config.json determines.
    stored = {name: t for name, t in tensors if not name.endswith("rotary_emb.inv_freq")}
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


def fill(model: Transformer, folder: Path) -> None:
    """Copy the weights of `folder` into `model`, on every rank the rows of its own shards. Raises
    UserError if the model is tied, but the stored output weight is not the embedding."""
    files = weight_files(folder)
    read_shards(files, dict(model.named_parameters()))
    if model.config.tied and HEAD in dict(stored_tensors(files)):
        head = torch.empty_like(model.output_weight)
        read_shards(files, {HEAD: head})
        if not torch.equal(local_shard(head), local_shard(model.output_weight)):
            raise UserError(
                f"{folder}: config.json ties the output weight to the embedding, but {HEAD} is "
                "stored and differs; set tie_word_embeddings to false if that is intended"
            )


@torch.no_grad()
def read_shards(files: list[Path], tensors: dict[str, Tensor]) -> None:
    """Fill this rank's rows of `tensors`. The rows of a tensor may lie in several files, in order.
    Raises UserError if a file is broken or a tensor is not complete."""
    seen = dict.fromkeys(tensors, 0)  # rows
    for name, stored in stored_tensors(files):
        if name in tensors:
            shard, rows = local_shard(tensors[name]), stored.get_shape()[0]
            # Where the file's rows begin, counted from the first row of the shard.
            start = seen[name] - first_row(tensors[name])
            begin, end = max(start, 0), min(start + rows, len(shard))
            if begin < end:
                shard[begin:end].copy_(stored[begin - start : end - start])
            seen[name] += rows
    for name, tensor in tensors.items():
        if seen[name] != len(tensor):
            where = files[0].parent
            raise UserError(f"{where}: {seen[name]} rows of {name}; expected {len(tensor)}")


@torch.no_grad()
def write_shards(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write this rank's rows of `tensors` and flush them to disk. Returns the file's sha256. From a
    GPU, all are copied to the host first. Raises OSError or SafetensorError."""
    save_file({name: local_shard(tensor).cpu() for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # else only the owner may read it
    with open(path, "rb") as file:
        to_disk(file)
    return hash_files([path])


def weights_hash(folder: Path) -> str:
    """The first 16 hex digits of the sha256 of all weight files."""
    return hash_files(weight_files(folder))[:16]


def stored_tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """(name, tensor on disk, read when indexed). Raises UserError if a file is broken."""
    for path in files:
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})") from None
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_slice(name)  # keeps the file open


def weight_files(folder: Path) -> list[Path]:
    """The one file if it exists, as in transformers, else the shards sorted by name. Raises
    UserError if a file is missing."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
            raise UserError(f"{folder / INDEX}: expected file names in the field 'weight_map'")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; expected the model's weights")
    return [folder / name for name in names]
