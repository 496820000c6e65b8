"""A part of bench.gpu on a fake GPU, at the true widths, with two layers.

python -m fake_cuda.bench_part NAME FOLDER writes FOLDER/gpu.json.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from bench import gpu, measure

from .fake import FakeCuda

SIZES = gpu.Sizes(
    model=replace(gpu.SHAPE, num_layers=2), train_steps=2, head_rows=4096, rounds=1,
    checked=replace(gpu.CHECKED, num_layers=2), checked_lengths=(41, 130, 50, 100), answers=5,
    texts=8, contexts=(4096,), decode_steps=9, slice_seconds=0.2,
)  # fmt: skip


def main(name: str, folder: str) -> None:
    with (
        patch.object(measure, "RESULTS", Path(folder)),
        FakeCuda(memory=150e9, name="NVIDIA H200"),
    ):
        gpu.run_part(name, torch.device("cuda", 0), SIZES)


if __name__ == "__main__":
    main(*sys.argv[1:])
