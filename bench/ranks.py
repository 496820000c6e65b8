"""Two ranks over two processes that train alone (C14), and a rank's memory over the formula of
redi/memory.py.

    python -m bench.ranks              about six minutes on two cores

C14, C14_4: a Qwen2 of 12.6 M parameters, an optimizer step over one pack or four of four rows of
512 tokens, from data to update. Two processes are the ranks of one run (FSDP2 over gloo); two
others train alone, each on what one of the ranks trains on. What remains between them is the cost
of being ranks: gathering weights, summing gradients, waiting. The groups take turns of eight
packs per process, timed by the wall, because waiting is what is measured; the CPU time is beside
it. With a learning rate of 0 both ranks must report the same loss, the mean of the two that train
alone.

memory: the peak of each of two ranks (VmHWM over what the process holds after a step of a tiny
model) in two steps of two packs of 1024 tokens; 50 M parameters; no block checkpointed, then all.
MALLOC_MMAP_THRESHOLD_ makes glibc return every tensor when it is freed; it would otherwise keep a
third more than is alive, in holes. This costs page faults, so the timed processes run without it.
"""

import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.measure import CPUSeconds, Worker, cpu_now, peak_bytes, result, write
from redi import distributed, memory, toy, train
from redi.batches import TrainData
from redi.distributed import World
from redi.doctor.checks import RandomRows
from redi.model import ModelConfig, Transformer
from redi.objectives import sft
from redi.packing import StepPlan
from redi.tables import text_table

RANKS = 2
ROWS = 4  # of a pack
PACKS = 4  # of a turn
ROUNDS = 7
GOALS = {1: 0.90, 4: 0.95}  # packs of a step -> ranks over processes alone
ALONE = "two independent processes"
TIMED = ModelConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1536, num_layers=4, num_heads=6,
    num_kv_heads=6, head_dim=64, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=512,
)  # fmt: skip
WEIGHED = ModelConfig(
    vocab_size=16_384, hidden_size=512, intermediate_size=2048, num_layers=11, num_heads=8,
    num_kv_heads=2, head_dim=64, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=256,
)  # fmt: skip
TINY = replace(WEIGHED, hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1)
SETTINGS = SimpleNamespace(lr=0.0, weight_decay=1e-4, clip=1.0, reshard_after_forward=False)
Work = Callable[[World, list[int]], Callable[[Any], Any]]  # the rows of which processes to take
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


# ---------------------------------------------------------------- what a process does


@dataclass(frozen=True)
class Turn:
    """A question to a process: do optimizer steps of so many packs."""

    packs: int
    steps: int
    lr: float = 1e-4


@dataclass(frozen=True)
class Taken:
    """What it reports of them. loss: the last step's."""

    loss: float
    tokens: int  # its own
    seconds: float  # by the wall
    cpu: CPUSeconds


def step_of(numbers: list[int], packs: int) -> StepPlan:
    """Packs of ROWS rows for each of the processes `numbers`, whatever the others get."""
    rows = np.arange(RANKS * packs * ROWS).reshape(RANKS, packs, ROWS)
    return [list(rows[number]) for number in numbers]


class Training:
    """redi's training of a random model, as run.py puts it together: ask it for a Turn."""

    def __init__(
        self, config: ModelConfig, world: World, numbers: list[int], checkpointed: int = 0
    ):
        self.config, self.world, self.numbers = config, world, numbers
        self.model = Transformer(config)
        toy.initialize(self.model, seed=0)
        how = distributed.Parallelism(checkpointed=checkpointed)
        distributed.parallelize(self.model, world, how)
        self.optimizer = train.make_optimizer(self.model, SETTINGS)

    def __call__(self, turn: Turn) -> Taken:
        pack_tokens = ROWS * self.config.max_positions
        lengths = np.full(RANKS * turn.packs * ROWS, self.config.max_positions)
        rows = RandomRows(lengths, self.config.vocab_size)
        data = TrainData(rows, sft(), self.world, pack_tokens)
        step, signals = step_of(self.numbers, turn.packs), SimpleNamespace(wanted=False)
        for group in self.optimizer.param_groups:
            group["lr"] = turn.lr
        cpu, began = cpu_now(), time.perf_counter()
        for _ in range(turn.steps):
            _, record = train.train_step(self.model, self.optimizer, data, step, SETTINGS, signals)
        seconds = time.perf_counter() - began
        tokens = turn.steps * turn.packs * pack_tokens
        return Taken(record["loss"], tokens, seconds, cpu_now().since(cpu))


class Weighing:
    """The peak of a training: ask with the number of checkpointed blocks, get
    (peak, formula) in bytes."""

    def __init__(self, config: ModelConfig, world: World, numbers: list[int]):
        self.config, self.world, self.numbers = config, world, numbers
        self.train(TINY, TINY.num_layers)  # imports, and what libraries make once

    def __call__(self, checkpointed: int) -> tuple[int, float]:
        peak = peak_bytes(partial(self.train, self.config, checkpointed))
        with torch.device("meta"):
            model = Transformer(self.config)
        tokens, fp32 = ROWS * self.config.max_positions, torch.float32
        formula = memory.step_memory(model, tokens, self.world, fp32).total(checkpointed)
        return peak, formula

    def train(self, config: ModelConfig, checkpointed: int) -> None:
        Training(config, self.world, self.numbers, checkpointed)(Turn(packs=2, steps=2))


# ---------------------------------------------------------------- groups of processes


class Group:
    """RANKS processes that work at the same time: the ranks of one run, or each alone."""

    def __init__(
        self, stack: ExitStack, folder: Path, work: Work, together: bool, **environment: str
    ):
        self.workers, port = [], free_port()
        for number in range(RANKS):
            numbers = list(range(RANKS)) if together else [number]
            settings = environment | (torchrun(number, port) if together else {"WORLD_SIZE": "1"})
            name = f"{len(list(folder.iterdir()))}"
            worker = Worker(name, folder, serve, work, numbers, **settings)
            self.workers.append(stack.enter_context(worker))

    def ask(self, question: Any) -> list[Any]:
        for worker in self.workers:
            worker.send(question)
        return [worker.receive() for worker in self.workers]


def serve(work: Work, numbers: list[int], pipe: Connection) -> None:
    """In a process of a group: answer until the question is None."""
    world = distributed.start(timeout_minutes=2.0)
    answer = work(world, numbers)
    while (question := pipe.recv()) is not None:
        pipe.send(answer(question))
    if world.world_size > 1:
        torch.distributed.destroy_process_group()


def torchrun(rank: int, port: int) -> dict[str, str]:
    """The environment that torchrun would give a rank."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (ranks | where).items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---------------------------------------------------------------- measures


def speed(taken: list[Taken]) -> float:
    """Tokens per second of processes that work side by side."""
    return sum(each.tokens / each.seconds for each in taken)


def cpu_speed(taken: list[Taken]) -> float:
    return sum(each.tokens for each in taken) / sum(each.cpu.total for each in taken)


def compare(together: list[Taken], alone: list[Taken]) -> None:
    """Raises AssertionError unless the ranks have one loss, the mean of those alone."""
    mean = statistics.mean(each.loss for each in alone)
    for each in together:
        assert each.loss == together[0].loss, f"ranks report {together[0].loss} and {each.loss}"
    error = abs(together[0].loss - mean) / abs(mean)
    assert error < 1e-5, f"ranks' loss {together[0].loss}, mean of those alone {mean}"


def take_turns(ranks: Group, alone: Group, rounds: int) -> dict[int, dict[str, list[list[Taken]]]]:
    """packs of a step -> {"ranks": a turn's reports in every round, "alone": ...}."""
    for packs in GOALS:
        once = Turn(packs, steps=1, lr=0.0)
        compare(ranks.ask(once), alone.ask(once))
    groups = {"ranks": ranks, "alone": alone}
    taken = {packs: {name: [] for name in groups} for packs in GOALS}
    order = [(packs, name) for packs in GOALS for name in groups]
    for _ in range(rounds):
        for packs, name in order:
            taken[packs][name].append(groups[name].ask(Turn(packs, PACKS // packs)))
        order.reverse()
    return taken


def timed(config: ModelConfig, rounds: int) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = (Group(stack, folder, partial(Training, config), t) for t in (True, False))
        taken = take_turns(*groups, rounds)
    found = {}
    rows = [("tokens/s, of the wall and of CPU time", "packs a step", "ranks", "alone")]
    for packs, of in taken.items():
        name = "C14" if packs == 1 else f"C14_{packs}"
        for key, measure, goal in ((name, speed, GOALS[packs]), (f"{name}_cpu", cpu_speed, None)):
            speeds = {who: [measure(turn) for turn in turns] for who, turns in of.items()}
            ratios = [a / b for a, b in zip(speeds["ranks"], speeds["alone"])]
            found[key] = result(ratios, goal, ALONE)
            medians = (f"{statistics.median(each):.0f}" for each in speeds.values())
            rows.append((key, str(packs), *medians))
    print(f"\n{text_table(rows)}")
    return found


def weighed(config: ModelConfig) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        group = Group(stack, folder, partial(Weighing, config), True, **GIVE_BACK)
        settings = {"memory": 0, "memory_checkpointed": config.num_layers}
        answers = {name: group.ask(count) for name, count in settings.items()}
    found, rows = {}, [("MiB of a rank", "peak", "formula")]
    for name, ranks in answers.items():
        ratios = [peak / formula for peak, formula in ranks]
        found[f"{name}_ratio"] = result(ratios, None, "the formula of redi/memory.py")
        off = [abs(ratio - 1) for ratio in ratios]
        found[f"{name}_off"] = result(off, 0.15, "|peak / redi.memory's formula - 1|")
        rows += [(name, *(f"{size / 2**20:.0f}" for size in sizes)) for sizes in ranks]
    print(f"\n{text_table(rows)}")
    return found


def main() -> None:
    write("ranks", weighed(WEIGHED) | timed(TIMED, ROUNDS))


if __name__ == "__main__":
    main()
