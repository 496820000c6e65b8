"""redi on a GPU: whether it runs, whether it is right, its speed and its memory (G0 to G9).

    python -m bench.gpu           all parts, in under ten minutes, on a machine with one GPU
    python -m bench.gpu G1        one part, in this process; its results join those on disk

Parts run in this order, the most valuable facts first:

    G0        seconds to the first train steps and the first answers, with two layers
    G9        it is right: what `redi doctor` checks (redi/doctor/checks.py), at larger sizes, and
              greedy answers against the CPU's
    G4, G5    SFT and REDI (G5_DPO: DPO): tokens/s, seconds per step, MFU, GiB
    G6        the peak of a step of two packs over redi/memory.py's formula
    G1, G2    the head's loss: milliseconds and bytes over Liger, Liger's CuTe kernels, TRL's
              kernel, torch's fused loss, and plain logits, eager and compiled
    G7        decoding 256 rows over the limit of memory bandwidth
    G8        a PROJECTION of the whole evaluation's hours, from a slice of it
    G4_TRL, G5_TRL    TRL's SFT and DPO on rows of the same lengths, and ours over them (G4, G5)

Every part is a process: it has the GPU to itself, and if it fails or exceeds its limit the others
still run. Each result is written to bench/results/gpu.json as soon as it is measured. A peer that
fails is left out with a line. The exit status is 1 if a part failed or a check of G9 missed a goal.
Models have random weights and Qwen2.5-Math-1.5B's shape; lengths follow
redi/trace/published.py.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench import inputs, loss, measure, trainer
from bench.inputs import random_model, random_requests
from bench.measure import clock, free, interleave, peak, result
from redi import memory
from redi.attention import packed_attention
from redi.batches import TrainData
from redi.config import UserError, one_line, program
from redi.distributed import Parallelism, World, compute_dtype, parallelize
from redi.doctor import checks
from redi.doctor.checks import Given, Outcome, RandomRows, loss_and_gradients, relative_error
from redi.eval.engine.generate import Request, Usage, generate
from redi.eval.engine.sampling import Sampling
from redi.logprobs import weighted_logp_sum
from redi.model import ModelConfig, Transformer
from redi.monitor import training_flops
from redi.objectives import Objective, make_objective, sft
from redi.toy import initialize
from redi.trace import published as law
from redi.trace.published import QWEN as SHAPE
from redi.train import make_optimizer, train_step

ROOT = Path(__file__).parents[1]
TOTAL_SECONDS = 550.0  # of all parts
LEAST_SECONDS = 25.0  # with less left, no part is begun
DENSE_FLOPS = 790e12  # per second: large bf16 matmuls on an H200; not measured here
PROMPT = 120  # tokens of every row
PROBLEMS, SAMPLES, MEAN_ANSWER = sum(law.PROBLEMS.values()), 16, 8192  # of the evaluation
WARM_STEPS = 4  # of decoding: compiled, recorded, allocated; not timed
CHECKED = replace(checks.SMALL, num_layers=4, max_positions=4096)  # of G9
SETTINGS = SimpleNamespace(lr=1e-5, weight_decay=1e-4, clip=1.0, reshard_after_forward=False)
AT_LEAST = ("G4", "G4_tok_s", "G5", "G5_tok_s", "G7_4k", "G7_8k")

Found = Iterator[tuple[str, dict[str, Any]]]  # id of a measure, bench.measure.result


@dataclass(frozen=True)
class Sizes:
    """How large everything is; smaller in tests."""

    model: ModelConfig = SHAPE
    pack_tokens: int = 32_768
    rows: int = 17  # of an SFT step: about 96,000 tokens
    pairs: int = 8
    train_steps: int = 5
    head_rows: int = 32_768
    rounds: int = 7
    checked: ModelConfig = CHECKED
    checked_lengths: tuple[int, ...] = (1297, 2, 63, 64, 65, 500)
    answers: int = 20  # of G9: more than there are slots
    texts: int = 256  # decoded side by side
    contexts: tuple[int, ...] = (4096, 8192)  # mean tokens of the texts
    decode_steps: int = 60
    slice_seconds: float = 30.0

    def law_lengths(self, count: int, median: float, longest: int) -> np.ndarray:
        """(N,) quantiles of the published run's law, scaled to a pack, in random order."""
        rng, scale = np.random.default_rng(0), self.pack_tokens / law.LONGEST_TRACE
        drawn = law.draw(rng, 100_000, scale * median, int(scale * longest))
        return rng.permutation(np.quantile(drawn, (np.arange(count) + 0.5) / count)).astype(int)

    def text_lengths(self, count: int, mean: int, cut: int) -> np.ndarray:
        """(N,) of the same law, scaled to a mean and cut at `cut`."""
        drawn = self.law_lengths(count, law.MEDIAN_TRACE, law.LONGEST_TRACE)
        return np.clip(drawn * (mean / drawn.mean()), 1, cut).astype(np.int64)

    def traces(self) -> np.ndarray:  # (N,)
        return self.law_lengths(self.rows, law.MEDIAN_TRACE, law.LONGEST_TRACE)

    def pair_lengths(self) -> np.ndarray:  # (N, 2): chosen and rejected
        medians = (law.MEDIAN_CHOSEN, law.MEDIAN_REJECTED)
        sides = [self.law_lengths(self.pairs, each, law.LONGEST_OF_PAIR) for each in medians]
        return np.stack(sides, axis=1)


# ---------------------------------------------------------------- G0, G4, G5, G6: train steps


@dataclass(frozen=True)
class Trained:
    seconds: list[float]  # of each step but the first, which compiles and allocates
    record: dict[str, float]  # the last step's
    checkpointed: int  # blocks
    formula: float  # bytes, by redi/memory.py


def train(
    objective: Objective, rows: np.ndarray, sizes: Sizes, device: torch.device, blocks: str
) -> Trained:
    """Optimizer steps of a run, each over all rows. rows: lengths (N,), or (N, 2) of pairs; blocks:
    as --checkpoint-blocks."""
    world = World(0, 1, device)
    dtype = compute_dtype("auto", world)
    model = random_model(sizes.model, device)
    longest = max(int(rows.max()), min(sizes.pack_tokens, int(rows.sum())))
    needs = memory.step_memory(model, longest, world, dtype)
    checkpointed = memory.blocks_to_checkpoint(blocks, needs)
    parallelize(model, world, Parallelism(dtype, checkpointed))
    optimizer = make_optimizer(model, SETTINGS)
    dataset = RandomRows(rows, sizes.model.vocab_size, PROMPT)
    reference = torch.zeros(len(rows), 2) if objective.needs_reference else None
    data = TrainData(dataset, objective, world, sizes.pack_tokens, reference)
    step, signals, ends = data.all_rows(), SimpleNamespace(wanted=False), []
    for _ in range(sizes.train_steps):
        _, record = train_step(model, optimizer, data, step, SETTINGS, signals)
        ends.append(time.perf_counter())
        assert math.isfinite(record["loss"]), f"the loss is {record['loss']}"
    assert record["tokens"] == rows.sum(), f"{record['tokens']} tokens, not {rows.sum()}"
    return Trained(np.diff(ends).tolist(), record, checkpointed, needs.total(checkpointed))


def first_steps(device: torch.device, sizes: Sizes) -> Found:
    """G0."""
    small = replace(sizes, model=replace(sizes.model, num_layers=2), train_steps=2)
    began = time.perf_counter()
    train(sft(), small.traces(), small, device, "auto")
    yield "G0_train", result([time.perf_counter() - began], None, "seconds: two SFT steps")
    began, model = time.perf_counter(), random_model(small.model, device).bfloat16()
    requests = random_requests(small.model, np.arange(20, 28), limit=8)
    assert len(list(generate(model, requests, [], Sampling(), slots=4))) == 8
    yield "G0_decode", result([time.perf_counter() - began], None, "seconds: 8 answers of 8 tokens")


TRAINED: dict[str, tuple] = {  # id -> objective, lengths of rows, goal in tokens/s
    "G4": (sft, Sizes.traces, 30_000.0),
    "G5": (partial(make_objective, "redi", alpha=0.8), Sizes.pair_lengths, 30_000.0),
    "G5_DPO": (partial(make_objective, "dpo", beta=0.001), Sizes.pair_lengths, None),
}


def train_speed(device: torch.device, sizes: Sizes, name: str) -> Found:
    objective, rows_of, goal = TRAINED[name]
    rows = rows_of(sizes)
    trained, flat = train(objective(), rows, sizes, device, "auto"), rows.reshape(-1)
    flops = training_flops(sizes.model, flat.tolist(), int(np.maximum(flat - PROMPT, 1).sum()))
    blocks = f"{trained.checkpointed} of {sizes.model.num_layers} blocks checkpointed"
    speeds = [flat.sum() / each for each in trained.seconds]
    shares = [flops / each / DENSE_FLOPS for each in trained.seconds]
    yield f"{name}_tok_s", result(speeds, goal, f"tokens/s, {blocks}")
    yield f"{name}_step", result(trained.seconds, None, f"seconds for {flat.sum():,} tokens")
    yield f"{name}_mfu", result(shares, None, "790 TFLOP/s; attention per document")
    yield f"{name}_gib", result([trained.record["memory_gib"]], None, "GiB")


def peaks(device: torch.device, sizes: Sizes) -> Found:
    """G6. Two packs, so that the peak of the second holds the gradients of the first. Two steps, so
    that the second holds Adam's moments."""
    rows = np.full(8, sizes.pack_tokens // 4)
    for blocks in ("all", "auto", "none"):
        free(device)
        try:
            trained = train(sft(), rows, replace(sizes, train_steps=2), device, blocks)
        except torch.OutOfMemoryError:
            print(f"G6_{blocks}: out of memory", flush=True)
            continue
        taken, expected = trained.record["memory_gib"], trained.formula / 2**30
        text = f"|peak / formula - 1|; {trained.checkpointed} blocks checkpointed"
        yield f"G6_{blocks}", result([abs(taken / expected - 1)], 0.15, text)
        yield f"G6_{blocks}_gib", result([taken], None, f"GiB; {expected:.2f} by the formula")


# ---------------------------------------------------------------- G9: it is right


def check(device: torch.device, sizes: Sizes) -> Found:
    """First what `redi doctor` checks, at larger sizes."""
    rows, vocabulary = min(sizes.head_rows, 1024), sizes.model.vocab_size
    for found in (
        checks.check_step(device),
        checks.check_model(device, sizes.checked, sizes.checked_lengths),
        checks.check_head(device, rows, 256, vocabulary),
    ):
        for one in found:
            yield f"G9_{one.name}", result([one.error], one.goal, one.peer)
    yield from check_decoding(device, sizes)


def check_decoding(device: torch.device, sizes: Sizes) -> Found:
    """Slots are refilled; when the queue is empty, ever smaller steps are recorded."""
    from redi.eval.engine import kernel_steps  # needs triton

    model = Transformer(sizes.checked).requires_grad_(False)
    initialize(model, seed=0)
    requests = random_requests(sizes.checked, 1 + 19 * np.arange(sizes.answers), limit=30)
    expected = greedy(model, requests)
    model.to(device)
    for name, recorded in (("recorded", kernel_steps.SIZES), ("launched", ())):
        with patch.object(kernel_steps, "SIZES", recorded):
            wrong = sum(a != b for a, b in zip(greedy(model, requests), expected))
        yield f"G9_greedy_{name}", result([wrong], 0.0, f"of {len(requests)} differ from the CPU's")
    model.bfloat16()
    answers = greedy(model, requests)
    model.float()  # the same weights
    gaps = []
    for request, answer in zip(requests, answers):
        exact = forward_logits(model, [*request.prompt_ids, *answer])[-len(answer) - 1 : -1]
        chosen = exact.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
        gaps.append((exact.amax(dim=1) - chosen).max().item())
    yield "G9_decode_bf16", result([max(gaps)], 0.5, "nats: a chosen token below the best")


def greedy(model: Transformer, requests: list[Request]) -> list[list[int]]:
    answers = generate(model, requests, [], Sampling(temperature=0.0), slots=12)
    return [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.key)]


@torch.no_grad()
def forward_logits(model: Transformer, tokens: list[int]) -> Tensor:
    """(T, V) of a text, by the forward pass of training, in the dtype of the weights."""
    weight, count = model.output_weight, len(tokens)
    ends = torch.tensor([0, count], dtype=torch.int32, device=weight.device)
    attend = partial(packed_attention, cu_seqlens=ends, lengths=[count])
    ids, positions = (torch.tensor(t, device=weight.device) for t in (tokens, range(count)))
    return model.model(ids, positions, repeat(attend)) @ weight.T


# ---------------------------------------------------------------- G1, G2: the head's loss

PEERS = {
    "Liger": partial(loss.liger, impl="nvidia-triton"),
    "Liger_mean": loss.liger_mean,
    "Liger_CuTe": partial(loss.liger, impl="nvidia-cutedsl"),
    "TRL": loss.trl,
    "torch": partial(loss.in_torch, reduction="none", chunk=None),
    "plain": loss.plain_in_bf16,
    "compiled": lambda *given: torch.compile(loss.plain_in_bf16)(*given),
}
HEAD_GOALS = {"Liger": ("G1", 0.75), "Liger_mean": ("G1_mean", 1.0)}


def head_loss(device: torch.device, sizes: Sizes) -> Found:
    """Bytes are those beyond the inputs; every variant's contain both gradients, in bf16."""
    count, config = sizes.head_rows, sizes.model
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(count, config.hidden_size, dtype=torch.bfloat16, **draw)
    weight = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.bfloat16, **draw)
    weight.mul_(config.hidden_size**-0.5)
    targets = torch.randint(config.vocab_size, (count,), **draw)
    token_weights = torch.randn(count, **draw) / count
    given = (hidden.requires_grad_(), weight.requires_grad_(), targets, token_weights)
    expected = loss_and_gradients(weighted_logp_sum, given)
    agreeing = {name: run for name, run in PEERS.items() if agrees(name, run, given, expected)}
    del expected
    compared = {"ours": weighted_logp_sum, "token_logps": checks.two_passes} | agreeing
    works = {name: partial(loss_and_gradients, run, given) for name, run in compared.items()}
    interleave(works, 2, clock(device))  # compile and allocate
    seconds = interleave(works, sizes.rounds, clock(device))
    shares = [6 * count * weight.numel() / t / DENSE_FLOPS for t in seconds["ours"]]
    for name in agreeing:
        ratios = [own / peer for own, peer in zip(seconds["ours"], seconds[name])]
        key, goal = HEAD_GOALS.get(name, (f"G1_over_{name}", None))
        yield key, result(ratios, goal, name)
    peaks = {name: peak(work, device) for name, work in works.items()}
    for name, taken in seconds.items():
        suffix, goals = ("", (75.0, 2.8)) if name == "ours" else (f"_{name}", (None, None))
        yield f"G1{suffix}_ms", result([1e3 * each for each in taken], goals[0], "milliseconds")
        yield f"G2{suffix}_gib", result([peaks[name] / 2**30], goals[1], "GiB")
    yield "G1_share", result(shares, None, "790 TFLOP/s, three matmuls")
    if peaks.get("plain"):
        yield "G2", result([peaks["ours"] / peaks["plain"]], 0.10, "plain")


def agrees(name: str, run: Callable, given: Given, expected: Outcome) -> bool:
    """Whether a peer runs here and its gradients are ours, within 10 %: many add up dW in bf16."""
    try:
        outcome = loss_and_gradients(run, given)
        errors = [relative_error(a, b) for a, b in zip(outcome[2:], expected[2:])]
        assert name == "Liger_mean" or max(errors) < 0.1, f"gradients differ by {errors}"
    except Exception as error:
        print(f"{name}: left out: {type(error).__name__}: {one_line(str(error))[:120]}", flush=True)
        return False
    return True


# ---------------------------------------------------------------- G7, G8: decoding


@dataclass
class StepTimes(Usage):
    """When the host had launched each decode step, and its rows."""

    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def count_step(self, rows: int, queued: bool) -> None:
        self.times.append(time.perf_counter())
        self.rows.append(rows)


def decode_speed(device: torch.device, sizes: Sizes) -> Found:
    """G7: tokens/s over those of a step that only reads weights, keys and values, at copy speed."""
    model, config = random_model(sizes.model, device).bfloat16(), sizes.model
    count = 2**31 if device.type == "cuda" else 2**20  # bytes
    source, target = torch.zeros(2, count, dtype=torch.uint8, device=device)
    copies = [clock(device, calls=9)(partial(target.copy_, source)) for _ in range(sizes.rounds)]
    bandwidth = 2 * count / min(copies)  # read and written
    yield "copy", result([2 * count / each / 1e12 for each in copies], None, "TB/s")
    del source, target
    weights = sum(parameter.nbytes for parameter in model.parameters())
    token_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    for mean in sizes.contexts:
        name, cut = f"{mean // 1024}k", config.max_positions - sizes.decode_steps - 1
        counts = sizes.text_lengths(sizes.texts, mean, cut)
        requests, usage = random_requests(config, counts, sizes.decode_steps + 1), StepTimes()
        list(generate(model, requests, [], Sampling(), len(counts), usage=usage))
        assert set(usage.rows) == {len(counts)}, "the texts did not fit side by side"
        taken = [after - before for before, after in pairwise(usage.times)][WARM_STEPS:]
        read = counts.sum() + len(counts) * (WARM_STEPS + 1 + np.arange(len(taken)))  # tokens
        shares = ((weights + token_bytes * read) / bandwidth / taken).tolist()
        yield f"G7_{name}", result(shares, 0.6, "the limit of memory bandwidth")
        speeds = [len(counts) / each for each in taken]
        yield f"G7_{name}_tok_s", result(speeds, None, f"tokens/s, {len(counts)} rows")
        free(device)


def evaluation(device: torch.device, sizes: Sizes) -> Found:
    """G8, without loading, grading, and the end when slots stay empty."""
    model, usage = random_model(sizes.model, device).bfloat16(), StepTimes()
    median = law.MEDIAN_ANSWER * sizes.pack_tokens / law.LONGEST_TRACE
    requests = inputs.requests_under_way(sizes.model, sizes.texts, median, PROMPT)
    for _ in generate(model, requests, [], Sampling(), sizes.texts, usage=usage):
        started = len(usage.times) > WARM_STEPS
        if started and usage.times[-1] - usage.times[WARM_STEPS] > sizes.slice_seconds:
            break
    edges = np.linspace(WARM_STEPS, len(usage.times) - 1, 6).astype(int).tolist()
    speeds = [sum(usage.rows[a:b]) / (usage.times[b] - usage.times[a]) for a, b in pairwise(edges)]
    tokens = PROBLEMS * SAMPLES * MEAN_ANSWER
    hours = [tokens / speed / 3600 for speed in speeds]
    what = f"hours, PROJECTION: {PROBLEMS:,} x {SAMPLES} x {MEAN_ANSWER:,} tokens"
    yield "G8_hours", result(hours, 5.0, what)
    text = f"tokens/s, {np.mean(usage.rows):.0f} rows, {usage.evictions} set aside"
    yield "G8_tok_s", result(speeds, None, text)


# ---------------------------------------------------------------- TRL


def beside_trl(device: torch.device, sizes: Sizes, ours: str, goal: float) -> Found:
    """TRL's trainer (bench/trainer.py) in bf16 autocast with torch's SDPA: SFT with packing, or DPO
    with one pair per batch, which pads least. Activation checkpointing only if memory runs out."""
    paired, ends, counted = ours == "G5", [], []
    sides = ("chosen", "rejected") if paired else ("completion",)
    rows = sizes.pair_lengths() if paired else sizes.traces()[:, None]
    peer = replace(trainer.TRL_DPO if paired else trainer.TRL_PACKING, batch=1)

    def take(loss: float, tokens: int) -> None:
        ends.append(time.perf_counter())
        counted.append(tokens)
        if ends[-1] - ends[0] > 40:  # seconds
            raise StopIteration

    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        inputs.write_model(folder / "model", **inputs.config_json(sizes.model))
        columns, vocabulary = dict(zip(sides, rows.T.tolist())), sizes.model.vocab_size
        inputs.write_jsonl(folder / peer.data, rng, columns, vocabulary)
        for checkpointing in (False, True):
            free(device)
            peer = replace(peer, longest=sizes.pack_tokens, checkpointing=checkpointing)
            try:
                with suppress(StopIteration):
                    trainer.trl(peer, folder, SimpleNamespace(take=take))
                break
            except torch.OutOfMemoryError:
                print(f"TRL: out of memory, activation checkpointing {checkpointing}", flush=True)
    assert set(counted) == {rows.sum()}, f"TRL counts {counted} tokens a step"
    speeds = (rows.sum() / np.diff(ends)).tolist()
    text = f"TRL, activation checkpointing {peer.checkpointing}"
    yield f"{ours}_TRL_tok_s", result(speeds, None, f"tokens/s of {text}")
    if own := saved().get(f"{ours}_tok_s"):
        yield ours, result([own["median"] / speed for speed in speeds], goal, text)


# ---------------------------------------------------------------- parts, results


# name -> what it runs, and its limit in seconds
PARTS: dict[str, tuple[Callable[[torch.device, Sizes], Found], float]] = {
    "G0": (first_steps, 60),
    "G9": (check, 90),
    "G4": (partial(train_speed, name="G4"), 70),
    "G5": (partial(train_speed, name="G5"), 70),
    "G5_DPO": (partial(train_speed, name="G5_DPO"), 70),
    "G6": (peaks, 80),
    "G1": (head_loss, 100),
    "G7": (decode_speed, 120),
    "G8": (evaluation, 80),
    "G4_TRL": (partial(beside_trl, ours="G4", goal=1.5), 150),
    "G5_TRL": (partial(beside_trl, ours="G5", goal=2.5), 150),
}


def run_part(name: str, device: torch.device, sizes: Sizes) -> None:
    """Print each result, and write it to disk, as soon as it is measured."""
    for key, entry in PARTS[name][0](device, sizes):
        numbers = "".join(f"{entry[column]:>11.4g}" for column in ("median", "min", "max"))
        sign = ">=" if key in AT_LEAST else "<="
        goal = "" if entry["goal"] is None else f"{sign} {entry['goal']:.4g}"
        verdict = "  MISSED" if missed(key, entry) else ""
        print(f"{key:<24}{numbers}{goal:>12}   {entry['peer']}{verdict}", flush=True)
        measure.save("gpu", saved() | {key: entry})


def saved() -> dict[str, dict[str, Any]]:
    """The results on disk, if they are this machine's."""
    path = measure.RESULTS / "gpu.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content["results"] if content.get("machine") == measure.machine() else {}


def missed(key: str, entry: dict[str, Any]) -> bool:
    value, goal = entry["median"], entry["goal"]
    return not (goal is None or (value >= goal if key in AT_LEAST else value <= goal))  # nan misses


def in_process(command: list[str], seconds: float) -> str:
    """Run a part's command. Returns why it failed, or ""."""
    # A session of its own, so that compilers which it started are killed with it.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(total: float = TOTAL_SECONDS) -> int:
    """Run every part as a process. Returns the exit status."""
    measure.save("gpu", {})
    failed, ends = [], time.monotonic() + total
    for name, (_, limit) in PARTS.items():
        left = min(limit, ends - time.monotonic())
        if left < min(LEAST_SECONDS, limit):
            print(f"\n{name}: skipped: no time is left", flush=True)
            continue
        print(f"\n{name}", flush=True)
        if why := in_process([sys.executable, "-m", "bench.gpu", name], left):
            failed.append(name)
            print(f"{name}: failed: {why}", flush=True)
    wrong = [key for key, entry in saved().items() if missed(key, entry)]
    print(f"\nfailed: {', '.join(failed) or '-'}; goals missed: {', '.join(wrong) or '-'}")
    return int(bool(failed or any(key.startswith("G9") for key in wrong)))


@program
def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: bench.gpu measures on a GPU; the other benches do not")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that in_process kills the part
    if not sys.argv[1:]:
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
        sys.exit(run_all())
    if sys.argv[1] not in PARTS:
        raise UserError(f"no part {sys.argv[1]!r}; there are {', '.join(PARTS)}")
    run_part(sys.argv[1], torch.device("cuda", 0), Sizes())


if __name__ == "__main__":
    main()
