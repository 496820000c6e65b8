"""Checkpoints that a run resumes from, to the same bits (on a GPU, up to atomic additions).

    OUT/checkpoints/step-000200/     rank-0.safetensors, ...  weights and both Adam moments, fp32
                                     state.json               format, step, sha256 of the files,
                                                              facts of the run

Every rank writes its own rows and reads its rows from the files of any number of ranks. The plan,
the learning rate and the position in the data are functions of the step, so they are not saved. A
checkpoint is written under another name, flushed to disk and renamed. A damaged checkpoint is
skipped, and a failed save does not end the run: both are warnings. A second failed save in a row
ends it. The files hold no pickles, which can run code: torch.save and torch.distributed.checkpoint
write some. Left out: asynchronous saves. Every 200 steps, a save takes well under 1 % of the time.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from redi.checkpoint.weights import read_rows, write_rows
from redi.config import UserError, one_line
from redi.data.files import folder_to_disk, hash_files, make_folder, write_aside
from redi.distributed import World, all_ranks_ok

FORMAT = 3  # of a checkpoint's files; other formats are refused
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "state.json"
# Facts that may not change while a run resumes.
UNCHANGED = ("parent's weights sha256", "tokenizer", "data sha256", "held-out data sha256")


@dataclass
class Checkpoints:
    """The checkpoints of one run. All ranks must call save, load and newest_valid."""

    out: Path
    world: World
    facts: dict[str, str]  # what the run was made with and from
    keep: int | Literal["all"]  # how many of the newest checkpoints are kept
    pinned: int = 0  # the step of a checkpoint that is kept as well
    failed: int = 0  # saves that failed since the last one that succeeded

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
        """Write the checkpoint of `step`. Returns whether it succeeded; a failure is a warning.
        Raises UserError if the previous save failed too."""
        aside = self.folder / f".writing-{step:06d}"
        hashes, failure = self._on_all_ranks(lambda: self._write(aside, model, optimizer))
        if not failure:
            _, failure = self._on_all_ranks(lambda: self._publish(aside, step, hashes))
        self.failed = self.failed + 1 if failure else 0
        if not failure:
            return True
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        newest = f"step {self.steps()[0]}" if self.steps() else "none"
        what = f"could not be saved ({failure}); newest checkpoint: {newest}"
        if self.failed > 1:
            raise UserError(
                f"{self.folder}: two checkpoints in a row {what}; once that is fixed, the same "
                "command resumes"
            )
        if self.world.rank == 0:
            warning = f"warning: the checkpoint of step {step} {what}; training continues"
            print(warning, file=sys.stderr)
        return False

    def _on_all_ranks(self, action: Callable[[], str]) -> tuple[list[str], str]:
        """(what `action` returns on each rank, the first rank's error or "")."""
        result, failure, bug = "", "", None
        try:
            result = action()
        except Exception as error:
            if self.failed and not isinstance(error, (OSError, UserError)):
                bug = error
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failure = one_line(f"{kind}{error}")
        ranks = [(result, failure)] * self.world.world_size
        if self.world.world_size > 1:
            dist.all_gather_object(ranks, (result, failure))
        if bug:
            raise bug  # its traceback says more than one line
        failures = [f"rank {n}: {text}" for n, (_, text) in enumerate(ranks) if text]
        return [result for result, _ in ranks], (failures or [""])[0]

    def _write(self, aside: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        """Write this rank's rows. Returns the sha256 of its file."""
        make_folder(aside)
        # Nodes hold the same rows, so each node writes its share of the tensors.
        node = self.world.rank // self.world.local_world_size
        tensors = list(tensors_of(model, optimizer).items())[node :: self.world.num_nodes]
        return write_rows(aside / f"rank-{self.world.rank}.safetensors", dict(tensors))

    def _publish(self, aside: Path, step: int, hashes: list[str]) -> str:
        """Give the complete checkpoint its name, and remove old ones."""
        if self.world.rank > 0:
            return ""
        files = {f"rank-{rank}.safetensors": sha256 for rank, sha256 in enumerate(hashes)}
        state = {"format": FORMAT, "step": step, "sha256": files, "facts": self.facts}
        with write_aside(aside / STATE) as file:
            json.dump(state, file, indent=1)
        folder_to_disk(aside)
        os.replace(aside, self.at(step))
        folder_to_disk(self.folder)
        for old in [] if self.keep == "all" else self.steps()[self.keep :]:
            if old != self.pinned:
                shutil.rmtree(self.at(old), ignore_errors=True)
        return ""

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
                refuse_changed_facts(read_state(folder)["facts"], self.facts, str(self.out))
                return step
        return 0

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the checkpoint of `step` into model and optimizer."""
        _read(self.at(step), tensors_of(model, optimizer))
        for state in optimizer.state.values():
            state["step"].fill_(float(step))


def refuse_changed_facts(before: dict[str, str], now: dict[str, str], out: str) -> None:
    """Raise UserError if the run in `out` was made from other weights, tokens or data."""
    for name in UNCHANGED:
        if name in before and before[name] != now[name]:
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
        state = read_state(folder)
        if state.get("format") != FORMAT:
            raise UserError(
                f"{folder}: written by another version of redi; finish or export the run with that "
                "version, or begin it again with --resume never"
            )
        _ = dict(state["facts"]), max(state["sha256"])  # fails if damaged or empty
        for name, sha256 in list(state["sha256"].items())[rank::world_size]:
            if hash_files([folder / name]) != sha256:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return one_line(str(error))
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into an unsharded model. Raises UserError if it is damaged."""
    if problem := damage(folder):
        raise UserError(f"{folder}: not a complete checkpoint ({problem})")
    _read(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()})


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    read_rows([folder / name for name in read_state(folder)["sha256"]], tensors)
