"""A training step and a decode step at their true size, on a fake GPU, and the run they make up.

A traced training step has two full packs of DOCUMENTS equal documents, or one if the run's steps
need only one. redi/memory.py's formula is for two or more. Of a document as many tokens are prompt
as in the mean of the run's rows. Both steps are traced, and their difference is what a pack costs.
In the mean step of the run that grows with the tokens, in attention with the sum of L^2 of the
documents; the rest of a step (the exchange of weights and gradients, clipping, AdamW) stays as it
is. Ranks are taken as evenly loaded.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from redi import distributed, memory, train
from redi.batches import TrainData
from redi.config import UserError
from redi.data.dataset import Dataset
from redi.distributed import Parallelism, World
from redi.doctor.checks import RandomRows
from redi.eval.engine.cache import PAGE, Cache, pages_for
from redi.eval.engine.kernel_steps import KernelDecoder
from redi.eval.engine.sampling import Sampling, sample
from redi.eval.protocol import EvalConfig
from redi.gpus import Gpu
from redi.model import ModelConfig, Transformer, rotary_tables
from redi.monitor import training_flops
from redi.objectives import Objective
from redi.recipe import TrainConfig
from redi.run import longest_pack
from redi.trace.costs import Cost, Costs
from redi.trace.fake import FakeCuda
from redi.trace.published import LONGEST_TRACE, MEDIAN_ANSWER, PROMPT, draw

GIB = 2**30
DOCUMENTS = 4  # of a traced pack
UPDATE = "clip and AdamW"  # the kind of all kernels after the packs


@dataclass(frozen=True)
class TracedData(TrainData):
    """Rows after whose packs the kernels are of one kind, UPDATE."""

    costs: Callable[[], Costs] = field(kw_only=True)

    def batches(self, *args: Any) -> Any:
        yield from super().batches(*args)
        self.costs().kind = UPDATE


@dataclass(frozen=True)
class Prepared:
    """A sharded model, rows for one step, and what redi/memory.py says of it."""

    data: TracedData
    model: Transformer
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    expected: memory.StepMemory
    checkpointed: int  # blocks

    def step(self, packs: int | None = None) -> None:
        """Run an optimizer step; packs: how many of the step's packs, if not all."""
        plan = [of_rank[:packs] for of_rank in self.data.all_rows()]
        signals = SimpleNamespace(wanted=False)
        train.train_step(self.model, self.optimizer, self.data, plan, self.config, signals)


def prepare(
    fake: FakeCuda, shape: ModelConfig, objective: Objective, config: TrainConfig, packs: int,
    prompt: int = PROMPT,
) -> Prepared:  # fmt: skip
    """A step of `packs` packs per rank, each of config.pack_tokens. prompt: tokens of each
    document. AdamW has its moments."""
    distributed._mesh.cache_clear()  # of an earlier case's ranks
    world = distributed.start(config.timeout)
    traces = world.world_size * packs * DOCUMENTS
    paired = "rows" not in objective.takes
    lengths = np.full((traces // 2, 2) if paired else traces, config.pack_tokens // DOCUMENTS)
    rows = RandomRows(lengths, shape.vocab_size, prompt)
    sums = torch.zeros(len(rows), 2, dtype=torch.float64) if objective.needs_reference else None
    tokens = config.pack_tokens
    data = TracedData(rows, objective, world, tokens, sums, costs=lambda: fake.costs)
    with torch.device("meta"):
        model = Transformer(shape)
    dtype = distributed.compute_dtype(config.dtype, world)
    expected = memory.step_memory(model, config.pack_tokens, world, dtype, config.offload)
    blocks = memory.blocks_to_checkpoint(config.checkpoint_blocks, expected)
    how = Parallelism(dtype, blocks, config.reshard_after_forward, config.offload)
    distributed.parallelize(model, world, how)
    if config.offload:  # pins the weights
        with distributed.gathered(model, config.reshard_after_forward):
            pass
    rotary_tables(shape, dtype, world.device)  # a run computes them once
    optimizer = train.make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Torch works out the layout of each operator on sharded tensors once, on whole fake tensors,
    # which would be counted: so each runs here first.
    distributed.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Prepared(data, model, optimizer, config, expected, blocks)


@dataclass
class Work:
    """Tokens of a GPU, and the kernels that process them, by kind."""

    tokens: float
    kinds: dict[str, Cost]
    total: Cost = field(init=False)
    tokens_per_second: float = field(init=False)
    likely_tokens_per_second: float = field(init=False)
    minutes: float = field(init=False)
    likely_minutes: float = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(self.kinds.values(), Cost())
        self.tokens_per_second = self.tokens / self.total.seconds
        self.likely_tokens_per_second = self.tokens / self.total.likely
        self.minutes, self.likely_minutes = self.total.seconds / 60, self.total.likely / 60


@dataclass(frozen=True)
class Trace:
    """What --save writes: a traced step, and the whole run as far as such steps make it up."""

    memory_gib: float  # of the GPU
    peak_gib: float
    peak_at: str
    traced_step: Work
    run: Work


@dataclass(frozen=True)
class TrainingTrace(Trace):
    kept: int  # blocks with their activations
    checkpointed: int  # blocks
    formula_gib: float  # at the peak, by redi/memory.py
    planned_gib: float  # what a step may use
    fits: bool
    pack_tokens: int  # of the traced packs
    counted_flops: float  # of the traced step, without those of blocks that are computed again
    model_flops: float  # of the traced step, as the MFU counts them
    steps: int
    host_gib: float  # what --offload needs of host memory
    copied_gb: float  # what it copies to the GPU in a step, and as much back


def trace_training(
    config: TrainConfig, objective: Objective, shape: ModelConfig, rows: Dataset, gpu: Gpu,
    gpus: int,
) -> TrainingTrace:  # fmt: skip
    """rows: those of the run, of which the lengths are read."""
    plan = TrainData(rows, objective, World(0, gpus, torch.device("cuda", 0)), config.pack_tokens)
    tokens = longest_pack(plan, config) // DOCUMENTS * DOCUMENTS
    document, lengths = tokens // DOCUMENTS, rows.lengths.reshape(-1).astype(float)
    steps, per_epoch = train.num_steps(plan, config), -(-len(rows) // config.rows_per_step)
    mean_tokens = lengths.sum() / per_epoch / gpus  # of a step of a rank
    mean_squares = (lengths**2).sum() / per_epoch / gpus
    prompt = round(document * (1 - rows.response_lengths.sum() / lengths.sum()))
    with FakeCuda(gpu, gpus) as fake:
        full = replace(config, pack_tokens=tokens)
        prepared = prepare(fake, shape, objective, full, 2, max(prompt, 1))

        def trace_step(packs: int) -> tuple[dict[str, Cost], int, str]:
            fake.reset()
            prepared.step(packs)
            return dict(fake.costs.by_kind), fake.peak, fake.peak_at

        one, two = trace_step(1), trace_step(2)
    number = 2 if mean_tokens > tokens else 1
    kinds, peak, peak_at = (one, two)[number - 1]
    growth = defaultdict(lambda: mean_tokens / tokens - 1)  # kind -> packs more than one
    growth["attention"] = mean_squares / (DOCUMENTS * document**2) - 1

    def mean_step(kind: str, first: Cost) -> Cost:
        pack = two[0][kind] + first * -1
        if growth[kind] < 0:  # only later packs add to gradients
            pack = Cost(*map(min, astuple(pack), astuple(first)))
        return first + pack * growth[kind]

    run = {kind: mean_step(kind, cost) * steps for kind, cost in one[0].items()}
    supervised = prepared.data.dataset.response_lengths[: number * DOCUMENTS].sum()
    expected, checkpointed = prepared.expected, prepared.checkpointed
    formula = expected.total(checkpointed)
    weights = sum(distributed.local_shard(p).nbytes for p in prepared.model.parameters())
    return TrainingTrace(
        memory_gib=fake.memory / GIB,
        peak_gib=peak / GIB,
        peak_at=peak_at,
        traced_step=Work(number * tokens, kinds),
        run=Work(mean_tokens * steps, run),
        kept=shape.num_layers - checkpointed,
        checkpointed=checkpointed,
        formula_gib=formula / GIB,
        planned_gib=expected.planned / GIB,
        fits=max(peak, formula) <= expected.planned,
        pack_tokens=tokens,
        counted_flops=sum(cost.flops - cost.again for cost in kinds.values()),
        model_flops=training_flops(shape, [document] * number * DOCUMENTS, int(supervised)),
        steps=steps,
        host_gib=expected.host / GIB,
        copied_gb=weights / 1e9 if config.offload else 0.0,
    )


@dataclass(frozen=True)
class DecodingTrace(Trace):
    weights_gib: float
    cached_token_bytes: int  # its keys and values
    cache_tokens: int  # for which the run allocates memory
    problems: int
    context: int  # mean tokens of a row under way
    mean_answer: float  # tokens


def trace_decoding(
    config: EvalConfig, shape: ModelConfig, problems: int, gpu: Gpu, gpus: int
) -> DecodingTrace:
    """A step of as many rows as slots and cache allow. In the mean, a row under way has half of the
    length-weighted mean of all answers. Raises UserError for what does not fit."""
    limit = min(config.max_new_tokens, shape.max_positions - PROMPT)
    if limit < 1:
        raise UserError(
            f"{config.model}: its context of {shape.max_positions} tokens leaves no room for an "
            f"answer after a prompt of {PROMPT} (assumed)"
        )
    drawn = draw(np.random.default_rng(0), 100_000, MEDIAN_ANSWER, LONGEST_TRACE)
    answers = np.minimum(drawn, limit).astype(float)
    context = int(PROMPT + (answers**2).mean() / answers.mean() / 2)
    answers_of_gpu = problems * config.samples / gpus
    slots = min(config.slots, int(np.ceil(answers_of_gpu)))
    with FakeCuda(gpu) as fake:
        with torch.device("cuda", 0):
            model = Transformer(shape).to(torch.bfloat16).requires_grad_(False)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if weights >= fake.memory:
            have, need = fake.memory / GIB, weights / GIB
            raise UserError(f"--gpu {gpu.name}: {have:.1f} GiB, but the weights take {need:.1f}")
        fake.peak = fake.allocated
        with torch.inference_mode():
            budget = None if config.cache_gib is None else int(config.cache_gib * GIB)
            wanted = slots * (pages_for(PROMPT + limit) + 1)
            cache = Cache(model, wanted, budget, slots, PROMPT + limit)
            pages = len(cache.free)
            rows = list(range(min(slots, pages // pages_for(context + 1))))
            cache.lengthen(rows, context - 1)
            decoder = KernelDecoder(model, cache)
            decoder.sizes = ()  # a graph holds the same kernels
            decoder.step(rows, [1] * len(rows))  # rotary tables and the table of pages
            fake.costs = Costs(gpu)
            fake.costs.cached_tokens = len(rows) * (context + 1)
            logits, keys = decoder.step(rows, [1] * len(rows)), np.arange(len(rows))
            sample(logits, keys, keys, Sampling(config.temperature, config.top_p, config.seed))
    step = Work(len(rows), dict(fake.costs.by_kind))
    run_tokens = answers_of_gpu * answers.mean()
    run = {kind: cost * (run_tokens / step.tokens) for kind, cost in step.kinds.items()}
    return DecodingTrace(
        memory_gib=fake.memory / GIB,
        peak_gib=fake.peak / GIB,
        peak_at=fake.peak_at,
        traced_step=step,
        run=Work(run_tokens, run),
        weights_gib=weights / GIB,
        cached_token_bytes=2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim,  # bf16
        cache_tokens=pages * PAGE,
        problems=problems,
        context=context,
        mean_answer=float(answers.mean()),
    )
