"""Checkpoints that a run resumes from, to the same bits (on a GPU, up to atomic additions).

    OUT/checkpoints/step-000200/     rank-0.safetensors, ...  weights and both Adam moments, fp32
                                     state.json               format, step, sha256 of the files,
                                                              facts of the run

Every rank writes its own rows and reads its rows from the files of any number of ranks. The plan,
the learning rate and the position in the data are functions of the step, so they are not saved. The
files hold no pickles, which can run code: torch.save and torch.distributed.checkpoint write some.
Left out: asynchronous saves. Every 200 steps, a save takes well under 1 % of the time.
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
from safetensors import SafetensorError
from torch import Tensor, nn

from redi.checkpoint.weights import read_shards, write_shards
from redi.config import UserError, one_line
from redi.data.files import folder_to_disk, hash_files, make_folder, to_disk, write_aside
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

    def remove_after(self, step: int) -> None:
        """Remove later checkpoints (damaged, or of an earlier run) and unfinished ones."""
        if self.world.rank == 0:
            later = [self.at(s) for s in self.steps() if s > step]
            if later:
                print(f"removed checkpoints: {', '.join(map(str, later))}", flush=True)
            for path in [*later, *self.folder.glob(".writing-*")]:
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

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
        if self.world.is_local_rank_zero:  # of each node: the folder may not be shared
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

    def _on_all_ranks(self, action: Callable[[], Any]) -> tuple[list[Any], str]:
        """(what `action` returns on each rank, the first rank's error or "")."""
        result, failure = "", ""
        try:
            result = action()
        except (OSError, SafetensorError, UserError) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failure = one_line(f"{kind}{error}")
        ranks = [(result, failure)] * self.world.world_size
        if self.world.world_size > 1:
            dist.all_gather_object(ranks, (result, failure))
        failures = [f"rank {n}: {text}" for n, (_, text) in enumerate(ranks) if text]
        return [result for result, _ in ranks], (failures or [""])[0]

    def _write(self, aside: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        """Write this rank's rows. Returns the sha256 of its file."""
        make_folder(aside)
        path = aside / f"rank-{self.world.rank}.safetensors"
        return write_shards(path, tensors_of(model, optimizer))

    def _publish(self, aside: Path, step: int, hashes: list[str]) -> None:
        """Give the complete checkpoint its name, and remove old ones."""
        if self.world.rank > 0:
            return
        files = {f"rank-{rank}.safetensors": sha256 for rank, sha256 in enumerate(hashes)}
        state = {"format": FORMAT, "step": step, "sha256": files, "facts": self.facts}
        with write_aside(aside / STATE) as file:
            json.dump(state, file, indent=1)
        read_state(aside)  # fails if another node has written to a disk of its own
        folder_to_disk(aside)
        for metrics in self.out.glob("metrics.jsonl"):  # resuming needs the records of all steps
            with open(metrics, "rb") as file:
                to_disk(file)
        os.replace(aside, self.at(step))
        folder_to_disk(self.folder)
        for old in [] if self.keep == "all" else self.steps()[self.keep :]:
            if old != self.pinned:
                shutil.rmtree(self.at(old), ignore_errors=True)

    def newest_valid(self, recorded: int) -> int:
        """The step of the newest valid checkpoint, or 0. recorded: the steps in metrics.jsonl.
        Raises UserError if there are fewer than that step, if nodes see different files, and for a
        checkpoint of another format or a run of other facts."""
        seen, _ = self._on_all_ranks(lambda: (recorded, self.steps()))
        if any(files != seen[0] for files in seen):
            raise UserError(f"--out {self.out}: expected a folder that all nodes share")
        for step in self.steps():
            folder = self.at(step)
            problem = damage(folder, self.world.rank, self.world.world_size)
            if problem:
                print(f"warning: {folder} is damaged and skipped: {problem}", file=sys.stderr)
            if all_ranks_ok(not problem, self.world):
                if step > recorded:
                    raise UserError(
                        f"{self.out}/metrics.jsonl: has {recorded} steps, fewer than {folder}; "
                        "restore that file, or begin again with --resume never"
                    )
                refuse_changed_facts(read_state(folder)["facts"], self.facts, str(self.out))
                return step
        return 0

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the checkpoint of `step` into model and optimizer."""
        read_shards(list(read_state(self.at(step))["sha256"]), tensors_of(model, optimizer))
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
        for path, sha256 in list(read_state(folder)["sha256"].items())[rank::world_size]:
            if hash_files([path]) != sha256:
                return f"{path.name} has changed since it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return one_line(str(error))
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint, and sha256 of its files (by path, in the order of ranks). Raises
    UserError for one of another format, and what `damage` catches for a damaged one."""
    state = json.loads((folder / STATE).read_text())
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder}: written by another version of redi; finish or export the run with that "
            "version, or begin it again with --resume never"
        )
    hashes, number = state["sha256"], folder.name.removeprefix("step-")
    names = [f"rank-{rank}.safetensors" for rank in range(max(len(hashes), 1))]
    if not all((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"expected the files listed in {STATE}; all nodes must share --out")
    if number.isdecimal() and int(number) != state["step"]:
        raise ValueError(f"{STATE} is of step {state['step']}: the folder was renamed")
    sha256 = {folder / name: hashes[name] for name in names}
    return {"facts": state["facts"], "sha256": sha256}


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into an unsharded model. Raises UserError if it is damaged."""
    if problem := damage(folder):
        raise UserError(f"{folder}: not a complete checkpoint ({problem})")
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    read_shards(list(read_state(folder)["sha256"]), tensors)
