"""Reference log-probs, kept on disk: the model that stage 2 starts from scores its pairs once.

The file CACHE/reference-KEY.bin is the sha256 of what follows, then (N, 2) float64: the summed
log-probs of each row's chosen and rejected sequence. KEY is a hash of all that they depend on: the
bytes of the model's weights and its configuration (the rotary base may be overridden), the token
store (data, tokenizer and template), the rows chosen from it, and the dtype of the compute. Any run
that agrees in these takes them from there, whatever its objective, learning rate or number of
ranks, and a run that goes on trains on the same bits as before.

A file that is short or damaged is computed again, with a notice. Ranks use it only if all of them
read the same bytes: on several nodes a cache may be on one and not on another.
Left out: a limit to the folder's size (16 bytes a row).
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redi.batches import TrainData
from redi.checkpoint.weights import weight_files
from redi.config import UserError
from redi.data.dataset import Dataset
from redi.data.files import hash_files, make_folder, write_aside
from redi.distributed import World, sum_over_ranks, without_gradients
from redi.logprobs import token_logps
from redi.model import ModelConfig, Transformer
from redi.runlog import Progress

DIGEST = hashlib.sha256().digest_size


def reference_path(
    cache: str, folder: Path, config: ModelConfig, dtype: torch.dtype, dataset: Dataset
) -> Path:
    """Where the reference log-probs of this model folder on these rows are kept."""
    rows = hashlib.sha256(np.ascontiguousarray(dataset.rows, dtype=np.int64).tobytes())
    made_from = [
        hash_files(weight_files(folder)), asdict(config), dataset.store.folder.name,
        rows.hexdigest(), str(dtype),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    return Path(cache) / f"reference-{key}.bin"


def reference_logps(
    model: Transformer, data: TrainData, folder: Path, dtype: torch.dtype, cache: str
) -> Tensor:
    """Summed log-probs (N, 2) of every row's chosen and rejected trace under `model`, which holds
    the weights of `folder`: from the cache, or computed and cached. On the host of every rank."""
    path = reference_path(cache, folder, model.config, dtype, data.dataset)
    reference = load_reference(path, len(data.dataset), data.world)
    if reference is None:
        reference = _score(model, data)
        save_reference(path, reference, data.world)
    elif data.world.rank == 0:
        print(f"reference log-probs of {len(reference):,} pairs: {path}", flush=True)
    return reference


def _score(model: Transformer, data: TrainData) -> Tensor:
    step = data.all_rows()
    packs = step[data.world.rank]
    # On the host, where the rows of a pack are looked up; float64, so that no model's sums are
    # rounded.
    sums = torch.zeros(len(data.dataset), 2, dtype=torch.float64)
    progress = Progress(len(packs), "reference log-probs", "pack", data.world.rank == 0)
    with progress, without_gradients(model):
        for batch in data.batches(step, data.totals(step)):
            targets = batch.targets
            logps = model(batch, lambda h, w, targets=targets: token_logps(h, w, targets))  # (R,)
            parts = [part.sum() for part in logps.split(batch.response_lengths)]
            if parts:
                sums[batch.row_ids[0::2]] = torch.stack(parts).reshape(-1, 2).to(sums)
            progress.update({})
    sum_over_ranks(sums, data.world)
    return sums


def load_reference(path: Path, num_rows: int, world: World) -> Tensor | None:
    """The (N, 2) float64 in `path`, or None, on all ranks alike."""
    digest, sums = _read(path, num_rows, world)
    # 40 bits of everybody's sha256, exact in float64; 0 for a rank that has none.
    seen = torch.zeros(world.world_size, dtype=torch.float64)
    seen[world.rank] = int.from_bytes(digest[:5], "big") + 1 if sums is not None else 0
    sum_over_ranks(seen, world)
    return sums if seen[0] > 0 and (seen == seen[0]).all() else None


def save_reference(path: Path, sums: Tensor, world: World) -> None:
    """Keep `sums` (N, 2) for other runs: the first rank of each node writes. A disk that does not
    take them is a warning: this run has what it needs."""
    if not world.is_local_rank_zero:
        return
    data = sums.numpy().tobytes()
    try:
        make_folder(path.parent)
        with write_aside(path, binary=True) as file:
            file.write(hashlib.sha256(data).digest() + data)
    except UserError as error:
        print(f"warning: reference log-probs are not kept: {error}", file=sys.stderr)


def _read(path: Path, num_rows: int, world: World) -> tuple[bytes, Tensor | None]:
    """The digest in the file and what follows it, if it is whole."""
    if not path.is_file():
        return b"", None
    content = path.read_bytes()
    digest, data = content[:DIGEST], content[DIGEST:]
    if len(data) == 16 * num_rows and hashlib.sha256(data).digest() == digest:
        return digest, torch.frombuffer(bytearray(data), dtype=torch.float64).reshape(-1, 2)
    if world.rank == 0:
        print(f"{path}: is not what was written; computed again", file=sys.stderr)
    return b"", None
