"""Whole training steps, ours over TRL's, in real tokens per second of CPU time (C8, C9, C10).

    python -m bench.trainer            about ten minutes on one core

A tiny Qwen2 (4 layers, 4 query and 2 kv heads, 8192 words, tied, fp32; hidden 256, then 512), then
the shape of SmolLM2-135M, and rows of 138 tokens in the median and 1024 at most (bench/inputs.py),
from the same files. Weights are random.

    C8    our SFT over TRL SFT with packing=True: packs of 1024 tokens on either side
    C9    our SFT over TRL SFT without packing: batches of 8 rows, padded
    C10   our REDI over TRL DPO: batches of 8 pairs, padded; reference log-probs outside the clock
    C8_no_checkpointing    C8, but TRL keeps its activations
    C9_batch1, C10_batch1  over TRL with one row, or pair, per batch and without checkpointing: on a
          CPU its fastest, since nothing or little is padded. Not at hidden 512
    ..._gib      the memory of our process at its peak, over that of the peer; at SmolLM2's shape,
          where two trainers run at a time: each holds 3.5 GB

Both sides come with their defaults. TRL's (1.16): gradient_checkpointing=True, batches of 8,
chunked logits, packing by best fit. Ours: as much checkpointing as the memory requires, here
none. Changed on TRL's side: fp32, a pack at a time with packing, a log line every step, no
checkpoint files. On ours: packs of 1024 tokens, TRL's longest row. An epoch of the data is one
optimizer step.

What makes a ratio count, in the same run: all trainers of the same rows count the same tokens;
our SFT and TRL's have the same losses at every step, and so have our DPO and TRL's; REDI's first
log-probs are our DPO's. Every trainer is a process with one thread; they take turns, an optimizer
step each. The clock runs from one step's logging to the next: loading and the first step are
outside. Real tokens: those of the rows, without padding.
"""

import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.inputs import LONGEST, SMOLLM2_135M, VOCABULARY, write_inputs
from bench.measure import CPUSeconds, Worker, cpu_now, ratios, result, write
from redi.tables import text_table

ROUNDS = 5  # steps after the first, which is not timed
STEPS = 1 + ROUNDS  # of the learning rate's fall
SHAPES = {  # suffix of the ids -> fields of config.json
    "": {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": VOCABULARY},
    "_512": {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": VOCABULARY},
    "_135M": SMOLLM2_135M,
}
LR = {"sft": 1e-4, "redi": 1e-5, "dpo": 1e-5}  # small: equal losses should stay equal
WEIGHT_DECAY, CLIP, BETA = 1e-4, 1.0, 0.1


# ---------------------------------------------------------------- turns


@dataclass(frozen=True)
class Step:
    """What a trainer reports of an optimizer step."""

    loss: float
    tokens: int  # real ones, as the trainer itself counts them
    chosen_logp: float  # mean log-prob per token of the chosen responses; ours only
    seconds: CPUSeconds
    peak_gib: float = 0.0  # of the process so far


class Turns:
    """A trainer's end of the pipe: wait for a turn, then report an optimizer step."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self._wait()

    def take(self, loss: float, tokens: int, chosen_logp: float = 0.0) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.pipe.send(Step(loss, tokens, chosen_logp, cpu_now().since(self.began), peak))
        self._wait()

    def _wait(self) -> None:
        if self.pipe.recv() is None:
            sys.exit()
        self.began = cpu_now()


@dataclass(frozen=True)
class Trainer:
    """A trainer to measure: `run` calls `turns.take` after every optimizer step."""

    run: Callable[["Trainer", Path, Turns], None]
    objective: str
    longest: int = LONGEST  # tokens of a row, and of a pack
    batch: int = 8  # TRL's, as the next two
    packing: bool = False
    checkpointing: bool = True

    @property
    def data(self) -> str:
        return "rows.jsonl" if self.objective == "sft" else "pairs.jsonl"


def run_trainer(trainer: Trainer, folder: Path, pipe: Connection) -> None:
    trainer.run(trainer, folder, Turns(pipe))


def take_turns(folder: Path, trainers: dict[str, Trainer], steps: int) -> dict[str, list[Step]]:
    """The steps of every trainer, on the inputs in `folder`; each round reverses the order."""
    taken: dict[str, list[Step]] = {name: [] for name in trainers}
    order = list(trainers)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, folder, run_trainer, trainer, folder))
            for name, trainer in trainers.items()
        }
        for _ in range(steps):
            for name in order:
                taken[name].append(workers[name].ask("a step"))
            order.reverse()
    return taken


# ---------------------------------------------------------------- ours and TRL's


def ours(trainer: Trainer, folder: Path, turns: Turns) -> None:
    from redi import programs, runlog

    def track(kind: str, step: int, values: dict) -> None:
        turns.take(values["loss"], values["tokens"], values["chosen_logp"])

    runlog.TRACKERS["none"] = lambda run, settings: track  # where nobody listens, we do
    program = programs.train_sft if trainer.objective == "sft" else programs.train_redi
    settings = {
        "model": folder / "model",
        "data": folder / trainer.data,
        "out": folder / f"out-{trainer.objective}",
        "cache": folder / "cache",
        "lr": LR[trainer.objective],
        "rows-per-step": len(read_rows(folder / trainer.data)),
        "epochs": STEPS + 1,  # step 1 at the peak; the one at 0 is not reached
        "pack-tokens": trainer.longest,
        "max-length": trainer.longest,
        "weight-decay": WEIGHT_DECAY,
        "clip": CLIP,
        "rope-theta": "keep",
        "max-position-embeddings": "keep",
    }
    if program is programs.train_redi:
        settings |= {"objective": trainer.objective}
    if trainer.objective == "dpo":
        settings |= {"beta": BETA}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    sys.argv = [program.__name__, *flags]
    program()


def trl(trainer: Trainer, folder: Path, turns: Turns) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class TakeTurns(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            if "loss" in logs:  # the last log is a summary
                turns.take(logs["loss"], int(logs["num_tokens"]) // state.global_step)

    rows = read_rows(folder / trainer.data)
    settings = {
        "output_dir": str(folder / "out-trl"),
        "per_device_train_batch_size": trainer.batch,
        # Whatever is left at the end of an epoch makes a step: packs are fewer than rows.
        "gradient_accumulation_steps": -(-len(rows) // trainer.batch),
        "max_steps": STEPS,
        "learning_rate": LR[trainer.objective],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "max_length": trainer.longest,
        "gradient_checkpointing": trainer.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
    }
    if trainer.objective == "sft":
        make, config = SFTTrainer, SFTConfig(**settings, packing=trainer.packing)
    else:
        make, config = DPOTrainer, DPOConfig(**settings, beta=BETA, precompute_ref_log_probs=True)
    make(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        callbacks=[TakeTurns()],
    ).train()


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


TRL_PACKING = Trainer(trl, "sft", batch=1, packing=True)
TRL_SFT = Trainer(trl, "sft")
TRL_DPO = Trainer(trl, "dpo")
TRAINERS = {
    "our SFT": Trainer(ours, "sft"),
    "TRL SFT, packing": TRL_PACKING,
    "TRL SFT, packing, no checkpointing": replace(TRL_PACKING, checkpointing=False),
    "TRL SFT": TRL_SFT,
    "TRL SFT, batch 1": replace(TRL_SFT, batch=1, checkpointing=False),
    "our REDI": Trainer(ours, "redi"),
    "our DPO": Trainer(ours, "dpo"),
    "TRL DPO": TRL_DPO,
    "TRL DPO, batch 1": replace(TRL_DPO, batch=1, checkpointing=False),
}
MEASURES = {  # ours, the peer, the goal at the first shape, the shapes
    "C8": ("our SFT", "TRL SFT, packing", 2.0, ("", "_512")),
    "C8_no_checkpointing": (
        "our SFT", "TRL SFT, packing, no checkpointing", None, ("", "_512", "_135M"),
    ),
    "C9": ("our SFT", "TRL SFT", 8.0, ("", "_512")),
    "C9_batch1": ("our SFT", "TRL SFT, batch 1", None, ("",)),
    "C10": ("our REDI", "TRL DPO", 6.0, ("", "_512")),
    "C10_batch1": ("our REDI", "TRL DPO, batch 1", None, ("", "_135M")),
}  # fmt: skip


# ---------------------------------------------------------------- measures


def compare(trainers: dict[str, Trainer], taken: dict[str, list[Step]]) -> None:
    """Raises AssertionError unless trainers of the same rows count the same tokens, those of the
    same objective have the same losses, and REDI and our DPO begin with the same log-probs."""
    first_of: dict[str, str] = {}  # what should be alike -> the first trainer it was seen with
    for name, trainer in trainers.items():
        rows, same = (first_of.setdefault(key, name) for key in (trainer.data, trainer.objective))
        for number, (a, b) in enumerate(zip(taken[name], taken[rows], strict=True), start=1):
            assert a.tokens == b.tokens, f"step {number}: {name} {a.tokens}, {rows} {b.tokens}"
        for number, (a, b) in enumerate(zip(taken[name], taken[same], strict=True), start=1):
            error = abs(a.loss - b.loss) / abs(b.loss)
            assert error < 1e-4, f"step {number}: {name} {a.loss}, {same} {b.loss}"
    if {"our REDI", "our DPO"} <= taken.keys():
        a, b = (taken[name][0].chosen_logp for name in ("our REDI", "our DPO"))
        assert abs(a - b) < 1e-5 * abs(b), f"first log-probs: our REDI {a}, our DPO {b}"


def table(taken: dict[str, list[Step]]) -> None:
    rows = [("", "tokens", "tok/s", "user s", "system s", "GiB", "losses of steps 1, 2, last")]
    for name, steps in taken.items():
        tokens, seconds = steps[0].tokens, [step.seconds for step in steps[1:]]
        speed = statistics.median(tokens / s.total for s in seconds)
        user = statistics.median(s.user for s in seconds)
        system = statistics.median(s.system for s in seconds)
        losses = "  ".join(f"{steps[number].loss:.6f}" for number in (0, 1, -1))
        numbers = (f"{tokens:,}", f"{speed:.0f}", f"{user:.2f}", f"{system:.2f}")
        rows.append((name, *numbers, f"{steps[-1].peak_gib:.2f}", losses))
    print(f"\n{text_table(rows)}")


def measure(suffix: str, sizes: dict[str, Any]) -> dict[str, dict]:
    """All measures of a shape. At SmolLM2's, one after the other, for want of memory."""
    measures = {name: m[:3] for name, m in MEASURES.items() if suffix in m[3]}
    at_once = [[name] for name in measures] if sizes is SMOLLM2_135M else [list(measures)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), sizes)
        for names in at_once:
            sides = [name for measure in names for name in measures[measure][:2]]
            trainers = {name: TRAINERS[name] for name in dict.fromkeys(sides)}
            if {"our REDI", "TRL DPO"} <= trainers.keys():
                trainers["our DPO"] = TRAINERS["our DPO"]  # its losses are compared with both
            taken = take_turns(Path(folder), trainers, STEPS)
            table(taken)
            compare(trainers, taken)
            seconds = {name: [step.seconds for step in steps[1:]] for name, steps in taken.items()}
            for name in names:
                own, peer, goal = measures[name]
                goal = goal if suffix == "" else None
                found[name + suffix] = result(ratios(seconds[peer], seconds[own]), goal, peer)
                if sizes is SMOLLM2_135M:
                    peaks = (taken[side][-1].peak_gib for side in (own, peer))
                    share = next(peaks) / next(peaks)
                    found[f"{name}{suffix}_gib"] = result([share], None, peer)
    return found


def main() -> None:
    results: dict[str, dict] = {}
    for suffix, sizes in SHAPES.items():
        results |= measure(suffix, sizes)
    write("trainer", results)


if __name__ == "__main__":
    main()
