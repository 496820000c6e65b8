"""Cases of two tests of CUDA without a GPU: python -m fake_cuda.cases CASE [CASE ...]

A case names a function of this file and its arguments: "train-step objective=dpo world_size=8".
Each prints a line of JSON: {"case", "seconds"} and its result, or {"error": traceback}.
The model has the shape of Qwen2.5-Math-1.5B, with `layers` blocks.
"""

import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import gpu, measure
from redi import distributed, kernels, train
from redi.checkpoint.folder import _gather
from redi.eval.engine.cache import PAGE
from redi.eval.engine.decode_kernel import decode_attention
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.gpus import find_gpu
from redi.model import RopeScaling, Transformer
from redi.objectives import make_objective, sft
from redi.recipe import SFTConfig
from redi.trace import runs
from redi.trace.fake import FakeCuda
from redi.trace.published import QWEN
from redi.trace.runs import Prepared

from .aot import compiled_for

LAYERS = 2  # of most cases
SHAPE = replace(QWEN, num_layers=LAYERS)
FAMILIES = {  # facts of ModelConfig
    "qwen2": {},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
}
PACK_TOKENS = 32_768
PROMPT = 120  # tokens
BENCH_SIZES = gpu.Sizes(
    model=SHAPE, train_steps=2, head_rows=4096, rounds=1,
    checked=replace(gpu.CHECKED, num_layers=2), checked_lengths=(41, 130, 50, 100), answers=5,
    texts=8, contexts=(4096,), decode_steps=9, slice_seconds=0.2,
)  # fmt: skip
PARAMETERS = {"redi": {"alpha": 0.8}, "dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}}


def prepare(
    fake: FakeCuda, objective: str, packs: int, layers: int, reshard: bool, family: str = "qwen2",
    offload: bool = False,
) -> Prepared:  # fmt: skip
    """A sharded model, and rows for steps of so many packs per rank."""
    paired = objective != "sft"
    chosen = make_objective(objective, **PARAMETERS[objective]) if paired else sft()
    shape = replace(SHAPE, num_layers=layers, **FAMILIES[family])
    config = SFTConfig(pack_tokens=PACK_TOKENS, reshard_after_forward=reshard, offload=offload)
    return runs.prepare(fake, shape, chosen, config, packs)


def train_step(
    objective: str, world_size: int = 8, memory: float = 80e9, packs: int = 1,
    layers: int = LAYERS, reshard: bool = False, family: str = "qwen2", offload: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What an optimizer step does once AdamW has its moments."""
    with FakeCuda(world_size=world_size, memory=memory) as fake:
        prepared = prepare(fake, objective, packs, layers, reshard, family, offload)
        fake.reset()
        prepared.step()
        return {
            "waits": waits(fake), "collectives": fake.collectives, "backends": fake.backends,
            "launches": Counter(fake.launches), "peak_gib": fake.peak / 2**30,
            "formula_gib": prepared.expected.total(prepared.checkpointed) / 2**30,
            "update_on": sorted({t.device.type for t in update_tensors(prepared)}),
        }  # fmt: skip


def update_tensors(prepared: Prepared) -> Iterator[torch.Tensor]:
    """Of weights and optimizer states, this rank's shards."""
    for parameter in prepared.model.parameters():
        tensors = parameter, *prepared.optimizer.state[parameter].values()
        yield from map(distributed.local_shard, tensors)


def between_steps(reshard: bool = False, offload: bool = False) -> dict[str, Any]:
    """What happens between training steps: held-out loss, answers sampled from the weights in
    training, and the weights gathered to be saved."""
    with FakeCuda(world_size=8) as fake:
        prepared = prepare(fake, "sft", 1, LAYERS, reshard, offload=offload)
        data, model, step = prepared.data, prepared.model, prepared.step
        results = {}

        def record(name: str, run: Callable[[], Any]) -> Any:
            fake.reset()
            found = run()
            results[name] = {"waits": waits(fake), "collectives": dict(fake.collectives)}
            return found

        def answers() -> int:
            with distributed.gathered(model, reshard):
                return write_answers(model)

        step()
        record("held_out", lambda: train.held_out(model, data))
        completed = record("generate", answers)
        record("step", step)
        tensors = record("gather", lambda: _gather(model, torch.bfloat16))
        kinds = Counter(f"{t.device.type} {t.dtype}" for t in tensors.values())
        return {**results, "completed": completed, "gathered": kinds}


def generate_answers() -> dict[str, Any]:
    """Answers of a model that is only evaluated: decode steps are captured in CUDA graphs."""
    with FakeCuda() as fake:
        with torch.device("cuda", 0):
            model = Transformer(SHAPE).to(torch.bfloat16)
        fake.reset()
        completed = write_answers(model)
        captures = [asdict(capture) for capture in fake.captures]
        return {"waits": waits(fake), "captures": captures, "completed": completed}


def write_answers(model: Transformer) -> int:
    """Three requests on two slots, two of them with the same prompt -> number of answers."""
    prompts = (1,) * PROMPT, (1,) * PROMPT, (2,) * PROMPT
    requests = [Request(number, prompt, 3) for number, prompt in enumerate(prompts)]
    return len(list(generate(model, requests, [], Sampling(0.6, 0.95, 1), 2, 2**30)))


def compile_kernels(
    capability: int, dtype: str = "bfloat16", batch: int = 256, width: int = 1024
) -> dict[str, Any]:
    """Compile every Triton kernel. batch: rows; width: pages in a row's table."""
    compute, cuda = distributed.DTYPES[dtype], torch.device("cuda", 0)
    with FakeCuda(), compiled_for(capability) as compiled:
        logits = torch.empty(batch, SHAPE.vocab_size, device=cuda)
        targets = torch.zeros(batch, dtype=torch.int64, device=cuda)
        kernels.softmax_gradient_(logits, targets)
        weights = torch.zeros(batch, device=cuda)
        kernels.softmax_gradient_(logits, targets, weights, compute)
        query = torch.empty(batch, SHAPE.num_heads, SHAPE.head_dim, dtype=compute, device=cuda)
        pages = (4096, SHAPE.num_kv_heads, PAGE, SHAPE.head_dim)
        keys, values = (torch.empty(pages, dtype=compute, device=cuda) for _ in range(2))
        table = torch.zeros(batch + 1, width, dtype=torch.int64, device=cuda)
        _, slots, lengths = torch.zeros(3, batch, dtype=torch.int64, device=cuda)
        decode_attention(query, keys, values, table, slots, lengths)
        cos = torch.empty(batch, SHAPE.head_dim // 2, dtype=compute, device=cuda)
        kernels.rotate(query, cos, cos)
        gate = torch.empty(batch, SHAPE.intermediate_size, dtype=compute, device=cuda)
        kernels.swiglu(gate, gate)
        kernels.swiglu_gradients(gate, gate, gate)
        return {"kernels": [asdict(kernel) for kernel in compiled]}


def bench_part(name: str, folder: str) -> dict[str, Any]:
    """A part of bench.gpu, which writes folder/gpu.json."""
    results = mock.patch.object(measure, "RESULTS", Path(folder))
    with results, FakeCuda(find_gpu("H200")):
        gpu.run_part(name, torch.device("cuda", 0), BENCH_SIZES)
    return {}


def waits(fake: FakeCuda) -> dict[str, int]:
    """How often the host waits, by function and cause."""
    return Counter(f"{wait.function}: {wait.cause}" for wait in fake.waits)


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "train-step": train_step, "between-steps": between_steps, "generate": generate_answers,
    "compile": compile_kernels, "bench-part": bench_part,
}  # fmt: skip


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
