"""What a run writes beside its model, config.toml and metrics.jsonl, and its progress line.

metrics.jsonl has one JSON object per line: {"kind": "train", "step": 12, "loss": ..., ...}, also of
kind "eval" (held-out data) and "benchmark" (scores during training), and finally "finished".
`python -m redi.runlog RUN [RUN ...]` draws the records of one or several runs as RUN/curves.png.
Left out: a tracker of its own. TensorBoard and W&B get the same records on request.
"""

import contextlib
import json
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from redi.config import UserError, fields_that_may_change, load_toml, parse, program, to_toml
from redi.data.files import lock, make_folder, whole_lines, write_aside


def is_finished(out: str, config: Any) -> bool:
    """Whether `out` holds this run, complete. Raises UserError if `out` holds anything else."""
    folder, config_file = Path(out), Path(out) / "config.toml"
    if folder.is_file():
        raise UserError(f"--out {out}: is a file; expected a folder")
    if all(p.name.endswith(("metrics.jsonl", "tensorboard", ".part")) for p in folder.glob("*")):
        return False  # no files at all, or only those of a run that was killed at its start
    if not config_file.is_file():
        raise UserError(f"--out {folder}: holds files but no run; choose another folder")
    old = load_toml(config_file, str(config_file))
    new = tomllib.loads(to_toml(config))
    changes = "; ".join(
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted((old.keys() | new.keys()) - fields_that_may_change(type(config)))
        if old.get(key) != new.get(key)
    )
    if changes:
        raise UserError(f"--out {folder}: holds another run ({changes}); choose another folder")
    return any(record["kind"] == "finished" for record in read_metrics(folder))


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, if it has any; see `whole_lines`. Raises UserError for another line."""
    path = run / "metrics.jsonl"
    if path.is_file():
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                record = json.loads(line)
                known = record["kind"] == "finished" or type(record["step"]) is int
                known &= {type(record[key]) for key in record.keys() - {"kind"}} <= {int, float}
            except (ValueError, KeyError, TypeError, RecursionError):
                known = False
            if not known:
                raise UserError(f"{path}:{number}: not a record of a run")
            yield record


class RunLog:
    """Holds a run's folder; writes config.toml at the start, then each record to metrics.jsonl."""

    def __init__(self, out: str, config: Any, tracker: str = "none"):
        """Lock the folder until this process ends. What is in it does not change before `start`.
        Raises UserError if another process holds it, ModuleNotFoundError without the tracker."""
        self.folder, self._settings = Path(out), to_toml(config)
        self._track = TRACKERS[tracker](self.folder, self._settings)
        make_folder(self.folder)
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if not lock(self._metrics):
            self._metrics.close()
            raise UserError(f"--out {out}: another process is running there")

    def start(self, facts: dict[str, str], begin: int = 0) -> None:
        """Write config.toml, and remove the records of steps after `begin`, where the run resumes.
        facts: what is not a setting (versions, hash of the data), written as TOML comments."""
        kept = 0
        # Only a later step's line can be cut short: a checkpoint is written after its records.
        for line, record in zip(whole_lines(Path(self._metrics.name)), read_metrics(self.folder)):
            if record.get("step", begin + 1) > begin:
                break
            kept += len(line)
        self._metrics.truncate(kept)
        for part in self.folder.glob("config.toml.*.part"):  # of a process that was killed
            part.unlink()
        comments = "".join(f"# {key}: {' '.join(value.split())}\n" for key, value in facts.items())
        with write_aside(self.folder / "config.toml") as file:
            file.write(comments + self._settings)

    def record(self, kind: str, step: int, **values: float) -> None:
        self._write({"kind": kind, "step": step, **values})
        self._track(kind, step, values)

    def finish(self) -> None:
        """Write the last record: the run is complete and its model is saved."""
        self._write({"kind": "finished"})
        self._metrics.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            print(json.dumps(record), file=self._metrics, flush=True)
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be written would be tried again
                self._metrics.close()
            raise UserError(f"{self._metrics.name}: cannot be written ({error.strerror})") from None


class NoLog:
    """The log of every rank but rank 0: writes nothing."""

    def record(self, *_: Any, **__: Any) -> None:
        pass

    start = finish = record


def read_facts(folder: Path) -> dict[str, str]:
    """The facts that RunLog wrote as comments, "# key: value", into config.toml."""
    lines = (folder / "config.toml").read_text(encoding="utf-8").split("\n")
    facts = (line[2:].partition(": ") for line in lines if line.startswith("# "))
    return {key: value for key, colon, value in facts if colon}  # else a user's own comment


class Progress(contextlib.AbstractContextManager):
    """A bar on a terminal; elsewhere a plain line every ten seconds; nothing unless `shown`."""

    def __init__(self, total: int, name: str, unit: str, shown: bool = True, done: int = 0):
        disable = None if shown else True  # None: tqdm checks whether there is a terminal
        self._bar = tqdm(
            total=total, desc=name, unit=unit, initial=done, disable=disable, dynamic_ncols=True
        )
        self._name, self._total, self._shown = name, total, shown
        self._first = self._done = done
        self._start = self._last_line = time.monotonic()

    def update(self, values: dict[str, str]) -> None:
        """Count one more unit as done and show `values` beside the count."""
        self._done += 1
        text = " ".join(f"{key} {value}" for key, value in values.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        is_due = now - self._last_line > 10 or self._done == self._total
        if self._shown and self._bar.disable and is_due:
            self._last_line = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            print(f"{self._name} {self._done}/{self._total} [{left:.0f} s left] {text}", flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


Track = Callable[[str, int, dict[str, float]], None]  # gets each record: kind, step, values


def _tensorboard(folder: Path, settings: str) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", f"```\n{settings}```")

    def track(kind: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    return track


def _wandb(folder: Path, settings: str) -> Track:
    import wandb

    run = wandb.init(project="redi", name=folder.name, config=tomllib.loads(settings))
    return lambda kind, step, values: run.log(
        {f"{kind}/{name}": value for name, value in values.items()}, step=step
    )


TRACKERS = {"none": lambda *_: lambda *_: None, "tensorboard": _tensorboard, "wandb": _wandb}


@dataclass(kw_only=True)
class CurvesConfig:
    runs: Annotated[list[str], "folders of runs; the picture is written into the first one"]


@program
def main() -> None:
    config = parse(CurvesConfig, "Draw the curves of runs as RUN/curves.png.")
    histories = {str(run): list(read_metrics(run)) for run in map(Path, config.runs)}
    for run, records in histories.items():
        if not any(record["kind"] == "train" for record in records):
            raise UserError(f"{Path(run) / 'metrics.jsonl'}: no training records")
    from redi import curves  # imports Matplotlib, which training does not need

    path = Path(config.runs[0]) / "curves.png"
    curves.draw(histories, path)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
