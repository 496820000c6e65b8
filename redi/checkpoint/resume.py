"""Checkpoints that a run resumes from, to the same bits (on a GPU, up to atomic additions).

    OUT/checkpoints/step-000200/     __0_0.distcp, ...   weights and both Adam moments, fp32
                                     hashes-0.json, ...  sha256 of the files of each rank
                                     state.json          format, step, facts of the run

torch.distributed.checkpoint writes the tensors, every rank its own shards, and reads them on any
number of ranks. The plan, the learning rate and the position in the data are functions of the step,
so they are not saved. A checkpoint is written under another name, flushed to disk and renamed. A
damaged checkpoint is skipped, and a failed save does not end the run: both are warnings.
Left out: asynchronous saves. Every 200 steps, a save takes well under 1 % of the time.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from redi.config import UserError, one_line
from redi.data.files import folder_to_disk, hash_files, write_aside
from redi.distributed import World, all_ranks_ok

FORMAT = 2  # of a checkpoint's files; other formats are refused
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "state.json"
UNCHANGED = ("parent's weights sha256", "tokenizer", "data sha256")  # facts, while a run resumes


@dataclass
class Checkpoints:
    """The checkpoints of one run. All ranks must call save, load and newest_valid."""

    out: Path
    world: World
    facts: dict[str, str]  # what the run was made with and from
    keep: int  # how many of the newest checkpoints are kept
    pinned: int = 0  # the step of a checkpoint that is kept as well

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        numbers = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def pin_before(self, step: int) -> None:
        """Keep the newest checkpoint up to `step`, however many are newer."""
        self.pinned = max((s for s in self.steps() if s <= step), default=0)

    def remove_after(self, step: int) -> None:
        """Remove later checkpoints (damaged, or of an earlier run) and unfinished ones."""
        if self.world.rank == 0:
            later = [self.at(s) for s in self.steps() if s > step]
            for path in [*later, *self.folder.glob(".writing-*")]:
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Write the checkpoint of `step`. Returns whether it succeeded; a failure is a warning."""
        aside = self.folder / f".writing-{step:06d}"
        saved = self._try(step, lambda: self._write(aside, model, optimizer))
        saved = saved and self._try(step, lambda: self._publish(aside, step))
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # after a failure
        return saved

    def _try(self, step: int, action: Callable[[], None]) -> bool:
        """Whether `action` succeeds on every rank. Failures are printed as warnings."""
        from torch.distributed.checkpoint import CheckpointException  # a BaseException

        ok = True
        try:
            action()
        except (CheckpointException, Exception) as error:  # all ranks get the former
            ok = False
            if self.world.rank == 0 or not isinstance(error, CheckpointException):
                newest = f"step {self.steps()[0]}" if self.steps() else "none"
                print(
                    f"warning: the checkpoint of step {step} could not be saved ({_cause(error)}); "
                    f"training continues; newest checkpoint: {newest}",
                    file=sys.stderr,
                )
        return all_ranks_ok(ok, self.world)

    def _write(self, aside: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write this rank's shards and their hashes."""
        import torch.distributed.checkpoint as dcp

        rank, tensors = self.world.rank, tensors_of(model, optimizer)
        writer = dcp.FileSystemWriter(aside, thread_count=1, sync_files=True)  # makes the folder
        with warnings.catch_warnings(action="ignore"):  # about the missing process group
            dcp.save(tensors, storage_writer=writer, no_dist=self.world.world_size == 1)
        files = [*aside.glob(f"__{rank}_*"), *([aside / ".metadata"] if rank == 0 else [])]
        with write_aside(aside / f"hashes-{rank}.json") as file:
            json.dump({path.name: hash_files([path]) for path in files}, file, indent=1)

    def _publish(self, aside: Path, step: int) -> None:
        """Give the complete checkpoint its name, and remove old ones."""
        if self.world.rank > 0:
            return
        state = {"format": FORMAT, "step": step, "ranks": self.world.world_size}
        with write_aside(aside / STATE) as file:
            json.dump({**state, "facts": self.facts}, file, indent=1)
        folder_to_disk(aside)
        os.replace(aside, self.at(step))
        folder_to_disk(self.folder)
        for old in self.steps()[self.keep :]:
            if old != self.pinned:
                shutil.rmtree(self.at(old), ignore_errors=True)

    def newest_valid(self, recorded: int) -> int:
        """The step of the newest valid checkpoint, or 0.

        recorded: the steps in metrics.jsonl. Checkpoints without their records are ignored.
        Raises UserError for a checkpoint of another format, or of a run with other facts.
        """
        for step in [s for s in self.steps() if s <= recorded]:
            folder = self.at(step)
            problem = damage(folder, self.world.rank, self.world.world_size)
            if problem:
                print(f"warning: {folder} is damaged and skipped: {problem}", file=sys.stderr)
            if all_ranks_ok(not problem, self.world):
                facts = json.loads((folder / STATE).read_text())["facts"]
                refuse_changed_facts(facts, self.facts, str(self.out))
                return step
        return 0

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the checkpoint of `step` into model and optimizer."""
        _read(self.at(step), tensors_of(model, optimizer), self.world.world_size)
        for state in optimizer.state.values():
            state["step"].fill_(float(step))


def refuse_changed_facts(before: dict[str, str], now: dict[str, str], out: str) -> None:
    """Raise UserError if the run in `out` was made from other weights, tokens or data."""
    for name in UNCHANGED:
        if before.get(name, now[name]) != now[name]:
            raise UserError(
                f"--out {out}: holds a run whose {name} was {before[name]}; it is {now[name]} now; "
                "choose another --out (or, if it is unfinished, --resume never to begin again)"
            )


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and Adam moments by name, which share memory with model and optimizer."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:  # before the first step: the same as what AdamW creates
            state["step"] = torch.zeros((), device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    return tensors


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files, or "". Raises UserError for a
    checkpoint of another format."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"{folder}: written by another version of redi; --resume never begins the run again"
            )
        dict(state["facts"])  # fails if the facts are damaged
        hashes: dict[str, str] = {}
        for writer in range(state["ranks"]):
            hashes |= json.loads((folder / f"hashes-{writer}.json").read_text())
        if ".metadata" not in hashes:
            return "its hashes are incomplete"
        for name in sorted(hashes)[rank::world_size]:
            if hash_files([folder / name]) != hashes[name]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return one_line(str(error))
    return ""


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into an unsharded model. Raises UserError if it is damaged."""
    if problem := damage(folder):
        raise UserError(f"{folder}: not a complete checkpoint ({problem})")
    _read(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()}, 1)


def _read(folder: Path, tensors: dict[str, Tensor], world_size: int) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(action="ignore"):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=world_size == 1)


def _cause(error: BaseException) -> str:
    """The original error, which torch wraps several times."""
    if failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return one_line(str(error))[:300] or type(error).__name__
