"""Cached reference log-probs: the model that stage 2 starts from scores its pairs only once.

CACHE/reference-KEY.bin holds a sha256 and the values, (N, 2) float64: the summed log-probs of each
row's chosen and rejected trace. KEY hashes all that they depend on, so runs with another objective,
learning rate or number of ranks share the file. Every rank reads its node's file. If one node's is
missing or damaged, all ranks score the pairs and every node writes it, so a run that resumes trains
on the same bytes. Left out: a limit on the cache's size.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from redi.batches import TrainData
from redi.checkpoint.weights import weights_hash
from redi.config import UserError
from redi.data.dataset import Dataset
from redi.data.files import make_folder, write_aside
from redi.distributed import World, all_ranks_ok, sum_over_ranks, without_gradients
from redi.logprobs import token_logps
from redi.model import ModelConfig, Transformer
from redi.runlog import Progress

FORMAT = 2  # part of the key: files of other formats are not found


def reference_logps(
    model: Transformer, data: TrainData, folder: Path, dtype: torch.dtype, cache: str
) -> Tensor:
    """Summed log-probs (N, 2) float64 of each row's chosen and rejected trace, on the host: read
    from `cache`, or computed with `model`, which holds the weights of `folder`, and cached. All
    ranks must call this function."""
    path = reference_path(cache, folder, model.config, dtype, data.dataset)
    reference = load_reference(path, len(data.dataset))
    if not all_ranks_ok(reference is not None, data.world):
        reference = _score(model, data)
        save_reference(path, reference, data.world)
    else:
        print(f"reference log-probs of {len(reference):,} pairs: {path}", flush=True)
    return reference


def reference_path(
    cache: str, folder: Path, config: ModelConfig, dtype: torch.dtype, dataset: Dataset
) -> Path:
    """The file for this model (weights, sizes, rotary base), token store (data, tokenizer,
    template), selection of its rows, and compute dtype."""
    rows = hashlib.sha256(dataset.rows.astype("int64").tobytes()).hexdigest()
    store = dataset.store.folder.name
    parts = [FORMAT, weights_hash(folder), asdict(config), store, rows, str(dtype)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return Path(cache) / f"reference-{key}.bin"


def _score(model: Transformer, data: TrainData) -> Tensor:
    step, rank = data.all_rows(), data.world.rank
    sums = torch.zeros(len(data.dataset), 2, dtype=torch.float64)  # no compute dtype is wider
    progress = Progress(len(step[rank]), "reference log-probs", "pack", shown=rank == 0)
    with progress, without_gradients(model):
        for batch in data.batches(step):
            logps = model(batch, partial(token_logps, targets=batch.targets))  # (R,)
            parts = [part.sum() for part in logps.split(batch.response_lengths)]
            if parts:
                sums[batch.row_ids[0::2]] = torch.stack(parts).reshape(-1, 2).to(sums)
            progress.update({})
    sum_over_ranks(sums, data.world)
    return sums


def load_reference(path: Path, num_rows: int) -> Tensor | None:
    """The values (N, 2) in the file; None if it is missing or damaged."""
    content = path.read_bytes() if path.is_file() else b""
    digest, data = content[:32], content[32:]
    if len(data) != 16 * num_rows or hashlib.sha256(data).digest() != digest:
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.float64).reshape(-1, 2)


def save_reference(path: Path, reference: Tensor, world: World) -> None:
    """Cache `reference` (N, 2): local rank 0 of each node writes. A full disk is only a warning,
    because this run has the values already."""
    if not world.is_local_rank_zero:
        return
    data = reference.numpy().tobytes()
    try:
        make_folder(path.parent)
        with write_aside(path, binary=True) as file:
            file.write(hashlib.sha256(data).digest() + data)
    except UserError as error:
        print(f"warning: reference log-probs are not cached: {error}", file=sys.stderr)
