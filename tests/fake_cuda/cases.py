"""Cases of tests/test_cuda_without_a_gpu.py: python -m fake_cuda.cases CASE [CASE ...]

Each case is a line of JSON on stdout: {"case", "seconds"} and its result, or {"error": traceback}.
A case is a function of this file and its arguments: "train-step objective=dpo world_size=8".
The model has the shape of Qwen2.5-Math-1.5B, with `layers` blocks.
"""

import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from redi import distributed, kernels, memory, train
from redi.batches import TrainData
from redi.checkpoint.folder import _gather
from redi.distributed import Parallelism
from redi.eval.cache import PAGE
from redi.eval.decode_kernel import decode_attention
from redi.eval.generate import Request, generate
from redi.eval.sampling import Sampling
from redi.model import ModelConfig, Transformer
from redi.objectives import make_objective, sft
from redi.packing import TokenSequence
from redi.recipe import SFTConfig

from .aot import compiled_for
from .fake import FakeCuda

QWEN = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_heads": 12,
    "num_kv_heads": 2, "head_dim": 128, "rope_theta": 1e4, "norm_eps": 1e-6, "tied": True,
    "max_positions": 32_768,
}  # fmt: skip
LAYERS = 2  # of most cases
PACK_TOKENS, DOCUMENTS = 32_768, 4  # of a pack
PROMPT = 120  # tokens
PARAMETERS = {"redi": {"alpha": 0.8}, "dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}}


class Rows:
    """A Dataset of equally long traces of token 0, DOCUMENTS to a pack."""

    def __init__(self, num_packs: int, paired: bool):
        self.store = SimpleNamespace(paired=paired)
        sequences = num_packs * DOCUMENTS
        shape = (sequences // 2, 2) if paired else sequences
        self.lengths = np.full(shape, PACK_TOKENS // DOCUMENTS)
        self.response_lengths = self.lengths.reshape(-1) - PROMPT

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, number: int) -> TokenSequence:
        row, side = divmod(int(number), 2) if self.store.paired else (int(number), 0)
        tokens = np.zeros(PACK_TOKENS // DOCUMENTS, dtype=np.int64)
        return TokenSequence(tokens, PROMPT, row, -1 if side else 1)


@dataclass(frozen=True)
class Training:
    """What a case trains, on the fake device."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    data: TrainData
    settings: SFTConfig
    formula: float  # bytes that redi/memory.py expects at the peak

    def step(self) -> None:
        [plan] = self.data.plan(len(self.data.dataset), seed=42, epoch=0)
        signals = SimpleNamespace(wanted=False)
        train.train_step(self.model, self.optimizer, self.data, plan, self.settings, signals)


def prepare(objective: str, packs: int, layers: int, reshard: bool) -> Training:
    """A sharded model, and rows for steps of so many packs per rank."""
    distributed._mesh.cache_clear()  # of an earlier case's ranks
    world = distributed.start(30.0)
    paired = objective != "sft"
    chosen = make_objective(objective, **PARAMETERS[objective]) if paired else sft()
    rows = Rows(world.world_size * packs, paired)
    reference = torch.zeros(len(rows), 2, dtype=torch.float64) if chosen.needs_reference else None
    data = TrainData(rows, chosen, world, PACK_TOKENS, reference)
    with torch.device("meta"):
        model = Transformer(ModelConfig(num_layers=layers, **QWEN))
    dtype = distributed.compute_dtype("auto", world)
    expected = memory.step_memory(model, PACK_TOKENS, world, dtype)
    checkpointed = memory.blocks_to_checkpoint("auto", expected)
    how = Parallelism(dtype, checkpointed, reshard_after_forward=reshard)
    distributed.parallelize(model, world, how)
    settings = SFTConfig(reshard_after_forward=reshard)
    optimizer = train.make_optimizer(model, settings)
    return Training(model, optimizer, data, settings, expected.total(checkpointed))


def train_step(
    objective: str,
    world_size: int = 8,
    memory: float = 80e9,
    packs: int = 1,
    layers: int = LAYERS,
    reshard: bool = False,
) -> dict[str, Any]:
    """Two optimizer steps; what the second one did (the first creates AdamW's moments)."""
    with FakeCuda(world_size, memory=memory) as fake:
        training = prepare(objective, packs, layers, reshard)
        training.step()
        fake.reset()
        training.step()
        return {
            "waits": waits(fake),
            "collectives": fake.collectives,
            "launches": Counter(fake.launches),
            "backends": fake.backends,
            "peak_gib": fake.peak / 2**30,
            "formula_gib": training.formula / 2**30,
        }


def between_steps(reshard: bool = False) -> dict[str, Any]:
    """What happens between training steps: held-out loss, answers sampled from the weights in
    training, and the weights gathered to be saved."""
    with FakeCuda(world_size=8) as fake:
        training = prepare("sft", 1, LAYERS, reshard)
        model, results = training.model, {}
        training.step()

        def record(name: str) -> None:
            results[name] = {"waits": waits(fake), "collectives": dict(fake.collectives)}
            fake.reset()

        fake.reset()
        train.held_out(model, training.data)
        record("held_out")
        with distributed.gathered(model, reshard):
            completed = write_answers(model)
        record("generate")
        training.step()
        record("step")
        tensors = _gather(model, torch.bfloat16)
        record("gather")
        kinds = Counter(f"{t.device.type} {t.dtype}" for t in tensors.values())
        return {**results, "completed": completed, "gathered": kinds}


def generate_answers() -> dict[str, Any]:
    """Answers of a model that is evaluated: decode steps are captured in CUDA graphs."""
    with FakeCuda() as fake:
        with torch.device("cuda", 0):
            model = Transformer(ModelConfig(num_layers=LAYERS, **QWEN)).to(torch.bfloat16)
        fake.reset()
        completed = write_answers(model)
        captures = [asdict(capture) for capture in fake.captures]
        return {"waits": waits(fake), "captures": captures, "completed": completed}


def write_answers(model: Transformer) -> int:
    """Three requests, of which two share a prompt, on two rows -> how many were completed."""
    prompts = (1,) * PROMPT, (1,) * PROMPT, (2,) * PROMPT
    requests = [Request(number, prompt, 3) for number, prompt in enumerate(prompts)]
    stop_ids: list[int] = []
    return len(list(generate(model, requests, stop_ids, Sampling(0.6, 0.95, 1), 2, 2**30)))


def compile_kernels(
    capability: int, dtype: str = "bfloat16", batch: int = 256, width: int = 1024
) -> dict[str, Any]:
    """Every Triton kernel through its launch code. batch: rows; width: pages of a row's table."""
    compute, cuda = distributed.DTYPES[dtype], torch.device("cuda", 0)
    with FakeCuda(), compiled_for(capability) as compiled:
        logits = torch.empty(batch, QWEN["vocab_size"], device=cuda)
        targets = torch.zeros(batch, dtype=torch.int64, device=cuda)
        kernels.target_logps(logits, targets)
        weights = torch.zeros(batch, device=cuda)
        kernels.softmax_gradient_(logits, targets, weights, compute)
        query = torch.empty(batch, QWEN["num_heads"], QWEN["head_dim"], dtype=compute, device=cuda)
        pages = (4096, QWEN["num_kv_heads"], PAGE, QWEN["head_dim"])
        keys, values = (torch.empty(pages, dtype=compute, device=cuda) for _ in range(2))
        table = torch.zeros(batch + 1, width, dtype=torch.int64, device=cuda)
        _, slots, lengths = torch.zeros(3, batch, dtype=torch.int64, device=cuda)
        decode_attention(query, keys, values, table, slots, lengths)
        return {"kernels": [asdict(kernel) for kernel in compiled]}


def waits(fake: FakeCuda) -> dict[str, int]:
    """How often the host waits, by function and cause."""
    return Counter(f"{wait.function}: {wait.cause}" for wait in fake.waits)


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "train-step": train_step,
    "between-steps": between_steps,
    "generate": generate_answers,
    "compile": compile_kernels,
}


def run(case: str) -> dict[str, Any]:
    began = time.process_time()
    name, *arguments = case.split()
    function, values = CASES[name], dict(argument.split("=") for argument in arguments)
    try:  # bool("True") is True, and no case says "False"
        result = function(**{key: function.__annotations__[key](values[key]) for key in values})
    except Exception:
        result = {"error": traceback.format_exc()}
    return {"case": case, "seconds": time.process_time() - began, **result}


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(json.dumps(run(case)), flush=True)
