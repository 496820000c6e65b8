"""What a run needs, and a bound on how fast it is, before GPUs are rented.

redi trace train-sft [flags of train-sft]      redi trace train-redi [...]      redi trace evaluate
    --gpu "H100" --gpus 8                      on which GPUs (redi/gpus.py)
    --save FILE.json                           the same as JSON

Steps of one and two packs run on fake GPUs at their true size (redi/trace/fake.py): nothing is
measured, and no GPU is used. Memory leaves out the CUDA context, what is inside kernels, and
fragmentation. The tokens/s are an upper bound by the rules of redi/trace/costs.py. If the default
--model or --data is not in this folder, the published one takes its place. The default --data is
read only beside a local model. Flags that change neither memory nor time have no effect.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from decimal import ROUND_FLOOR, Context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from redi.checkpoint.config_json import read_config
from redi.checkpoint.folder import Source
from redi.config import UserError, parse, program, require
from redi.data.dataset import Dataset, select
from redi.data.files import read_json, refuse_overwriting, write_aside
from redi.data.tokenizer import ChatTokenizer
from redi.eval.benchmarks import load
from redi.eval.protocol import EvalConfig
from redi.gpus import GPUS, Gpu, find_gpu
from redi.hub import TOKENIZER_FILES, model_folder
from redi.memory import SHARE
from redi.model import ModelConfig
from redi.objectives import Objective, sft
from redi.recipe import REDIConfig, SFTConfig
from redi.run import check_limits, load_data
from redi.tables import text_table
from redi.trace import why_unavailable
from redi.trace.published import PROBLEMS, QWEN, published_rows

if TYPE_CHECKING:  # it changes torch, so it is imported when nothing else can fail
    from redi.trace.runs import DecodingTrace, TrainingTrace, Work

# How often the host moves the size of the weights in a step with --offload: clipping reads the
# gradients twice and writes them once; the update norm reads weights, gradients and both moments;
# AdamW reads these four and writes three.
HOST_PASSES = 14


@dataclass(kw_only=True)
class Machine:
    gpu: Annotated[str, f"one of {', '.join(gpu.name for gpu in GPUS)}"] = "A100"
    gpus: Annotated[int, "how many; nodes have eight"] = 8
    save: Annotated[str | None, "file: the trace as JSON"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(gpu.name for gpu in GPUS)
        require(find_gpu(self.gpu) is not None, "gpu", self.gpu, f"one of {known}")
        whole = 1 <= self.gpus <= 8 or (self.gpus > 8 and self.gpus % 8 == 0)
        require(whole, "gpus", self.gpus, "1 to 8, or a multiple of 8")
        path = self.save and Path(self.save)
        is_file = not path or (path.parent.is_dir() and not path.is_dir())
        require(is_file, "save", self.save, "a file in a folder that is there")
        require(self.dtype != "float32", "dtype", self.dtype, "auto or bfloat16 in a trace")
        for name in ("completions", "export_prompts"):
            value = getattr(self, name, None)
            require(not value, name, value, "nothing: a trace samples with redi's own engine")


@dataclass(kw_only=True)
class TraceSFT(Machine, SFTConfig):
    stage: Annotated[Literal["train-sft"], ""]


@dataclass(kw_only=True)
class TraceREDI(Machine, REDIConfig):
    stage: Annotated[Literal["train-redi"], ""]


@dataclass(kw_only=True)
class TraceEvaluation(Machine, EvalConfig):
    stage: Annotated[Literal["evaluate"], ""]


STAGES = {"train-sft": TraceSFT, "train-redi": TraceREDI, "evaluate": TraceEvaluation}


@program
def main() -> None:
    stage = next(iter(sys.argv[1:]), "--help")
    if stage in ("--help", "-h"):
        print(f"usage: redi trace {'|'.join(STAGES)} [--flag value ...]\n\n{__doc__}")
        return
    if stage not in STAGES:
        raise UserError(f"trace {stage}: no such program; there are {', '.join(STAGES)}")
    config = parse(STAGES[stage], "A run on GPUs that are not there.")
    if missing := why_unavailable():
        raise UserError(missing)
    data = config.benchmark if stage == "evaluate" else [config.data]
    refuse_overwriting("save", config.save, [Path(config.model, "config.json"), *data])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel would run
    gpu = find_gpu(config.gpu)
    print(f"{config.gpus} x {gpu.name}, traced, not measured")
    shape = model_shape(config)
    if stage == "evaluate":
        trace = evaluation(config, shape, gpu)
    else:
        objective = sft() if stage == "train-sft" else config.make_objective()
        trace = training(config, objective, shape, gpu)
    if config.save:
        about = {"stage": stage, "gpu": asdict(gpu), "gpus": config.gpus}
        with write_aside(config.save) as file:
            json.dump({**about, "torch": torch.__version__, **asdict(trace)}, file, indent=1)
        print(f"wrote {config.save}")


def model_shape(config: Any) -> ModelConfig:
    """Of the model's folder; of the stage's own that is not there, the published one. Raises
    UserError: no such model, a shape that flash attention does not take."""
    path = Path(config.model) / "config.json"
    if config.model == type(config).model and not path.is_file():
        print(f"{config.model}: not in this folder; taken to have the shape of Qwen2.5-Math-1.5B")
        shape = QWEN
    else:
        path = model_folder(config.model, files=["config.json"]) / "config.json"
        shape = read_config(read_json(path), str(path))
    if shape.head_dim % 8 or shape.head_dim > 256:
        wanted = "flash attention needs a multiple of 8 up to 256"
        raise UserError(f"{path}: head size {shape.head_dim}; {wanted}")
    context = getattr(config, "max_position_embeddings", "keep")
    return shape if context == "keep" else replace(shape, max_positions=context)


def training_rows(config: Any, objective: Objective, context: int) -> Dataset:
    """The run's rows; if the stage's own data or model is not there, lengths as the published."""
    model, own = Path(config.model), config.data == type(config).data
    if own and not (Path(config.data).exists() and (model / "tokenizer.json").is_file()):
        print(f"{config.data}: not read; lengths are assumed (redi/trace/published.py)")
        rows = published_rows("rows" not in objective.takes)
        check_limits(config, context)
        return select(rows, config, config.data)
    folder = model_folder(config.model, files=["config.json", *TOKENIZER_FILES])
    chat, about = ChatTokenizer.from_folder(folder), {"max_position_embeddings": context}
    source = Source(config.model, folder, about, {}, torch.float32, chat, [])
    return load_data(config.data, config, source, objective)


def training(config: Any, objective: Objective, shape: ModelConfig, gpu: Gpu) -> "TrainingTrace":
    rows = training_rows(config, objective, shape.max_positions)
    for reason, count in rows.dropped.items():
        print(f"left out: {count:,} {reason}")
    from redi.trace.runs import trace_training

    trace = trace_training(config, objective, shape, rows, gpu, config.gpus)
    fits, blocks = "fits" if trace.fits else "DOES NOT FIT", trace.kept + trace.checkpointed
    twice = trace.counted_flops / trace.model_flops - 1 > 1e-6
    steps, tokens = trace.steps, trace.run.tokens / trace.steps
    print(
        f"memory: {fits} into {trace.planned_gib:.2f} GiB, which a step may use ({SHARE:.0%} of "
        f"{trace.memory_gib:.1f}). Traced peak {trace.peak_gib:.2f}, in {trace.peak_at}; the "
        f"formula of --dry-run says {trace.formula_gib:.2f}\n"
        f"activations kept in {trace.kept} of {blocks} blocks\n{text_of_offload(trace)}\n"
        f"a traced step of {trace.traced_step.tokens:,} tokens per GPU, in packs of "
        f"{trace.pack_tokens:,}:\n{text_of_step(trace.traced_step)}\n"
        f"FLOPs without recomputation {trace.counted_flops / 1e12:,.1f} T; the MFU counts "
        f"{trace.model_flops / 1e12:,.1f} T{', the logits once instead of twice' * twice}\n\n"
        f"the run: {steps:,} steps of {tokens:,.0f} tokens per GPU\n{text_of_run(trace.run)}"
    )
    if objective.needs_reference:
        print("  not counted: a forward pass over all rows, for the reference model's log-probs")
    return trace


def text_of_offload(trace: "TrainingTrace") -> str:
    if not trace.host_gib:
        return ""
    return (
        f"offload: {trace.host_gib:.1f} GiB in host memory per GPU. Each step also takes, not in "
        f"the times below, {trace.copied_gb:.1f} GB over PCIe to the GPU and as many back, and "
        f"{HOST_PASSES * trace.copied_gb:.0f} GB read and written in host memory to clip and "
        "update\n"
    )


def evaluation(config: TraceEvaluation, shape: ModelConfig, gpu: Gpu) -> "DecodingTrace":
    problems = sum(PROBLEMS.get(name) or len(load(name).problems) for name in config.benchmark)
    from redi.trace.runs import trace_decoding

    trace = trace_decoding(config, shape, problems, gpu, config.gpus)
    too_large = " (DOES NOT FIT)" * (trace.peak_gib > trace.memory_gib)
    print(
        f"weights {trace.weights_gib:.2f} GiB; keys and values {trace.cached_token_bytes:,} bytes "
        f"per token, room for {trace.cache_tokens:,} tokens; traced peak {trace.peak_gib:.2f} of "
        f"{trace.memory_gib:.1f} GiB{too_large}\n\n"
        f"a decode step of {trace.traced_step.tokens} rows with {trace.context:,} tokens each "
        f"(assumed: answers of {trace.mean_answer:,.0f} tokens in the mean):\n"
        f"{text_of_step(trace.traced_step)}\n\n"
        f"the run: {config.samples} answers to each of {problems:,} problems\n"
        f"{text_of_run(trace.run)}"
    )
    return trace


def text_of_step(step: "Work") -> str:
    """Shares of the least time, by kind of kernel; tokens/s."""
    total = step.total
    table = [("kind", "kernels", "TFLOP", "GB", "least ms", "share", "likely ms")]
    for kind, cost in sorted(step.kinds.items(), key=lambda item: -item[1].seconds):
        numbers = cost.flops / 1e12, cost.bytes / 1e9, cost.seconds * 1e3
        shown = [f"{number:,.1f}" for number in numbers]
        shown += [f"{cost.seconds / total.seconds:.1%}", f"{cost.likely * 1e3:,.1f}"]
        table.append((kind, f"{cost.kernels:,}", *shown))
    limit = "by bandwidth" if total.by_bytes > total.seconds / 2 else "by FLOP/s"
    return (
        f"{text_table(table)}\n{total.kernels:,} kernels; at most {step.tokens_per_second:,.0f} "
        f"tokens/s per GPU, bound {limit}: kernels wait for memory "
        f"{total.by_bytes / total.seconds:.0%} of the time"
    )


def text_of_run(run: "Work") -> str:
    """Minutes to three digits, rounded down."""
    down = Context(prec=3, rounding=ROUND_FLOOR).create_decimal
    return (
        f"  at most  {run.tokens_per_second:>8,.0f} tokens/s per GPU, at least "
        f"{down(run.minutes):,f} minutes\n"
        f"  likely   {run.likely_tokens_per_second:>8,.0f} tokens/s per GPU, "
        f"{down(run.likely_minutes):,f} minutes, if kernels reach their usual shares (assumed)"
    )


if __name__ == "__main__":
    main()
