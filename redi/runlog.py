"""What a run writes beside its model: config.toml, metrics.jsonl, a progress line, curves.

metrics.jsonl has one JSON object a line: {"kind": "train", "step": 12, "loss": ..., ...}, then
"eval" (held-out data), "benchmark" (scores between steps), and last "finished".
`python -m redi.runlog RUN [RUN ...]` draws what is there as RUN/curves.png; several runs are laid
over each other.

Left out: anything that needs a server. TensorBoard and W&B are fed the same records when asked.
"""

import fcntl
import json
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from tqdm import tqdm

from redi.config import UserError, fields_that_may_change, one_line, parse, program, to_toml
from redi.data.files import make_folder, write_aside

QUIET_SECONDS = 10.0  # between progress lines where there is no terminal


def is_finished(out: str, config: Any) -> bool:
    """Whether this run is complete in `out` already.

    Raises UserError if the folder holds another run or somebody's files.
    """
    folder, settings = Path(out), tomllib.loads(to_toml(config))
    if folder.is_file():
        raise UserError(f"--out {out}: is a file; expected a folder")
    # What a run writes first; one killed that early has left nothing else.
    begun = ("metrics.jsonl", ".part")
    if not folder.is_dir() or all(path.name.endswith(begun) for path in folder.iterdir()):
        return False
    recorded = folder / "config.toml"
    if not recorded.is_file():
        raise UserError(f"--out {folder}: holds files that no run made; choose another folder")
    try:
        old = tomllib.loads(recorded.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{recorded}: not readable ({error}); choose another --out") from None
    changed = [
        f"{key} was {old.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted({*old, *settings} - fields_that_may_change(type(config)))
        if old.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"--out {folder}: holds another run ({'; '.join(changed)}); choose another folder"
        )
    records = list(read_metrics(folder))
    return bool(records) and records[-1]["kind"] == "finished"


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run. A last line cut short by a kill is left out."""
    path = run / "metrics.jsonl"
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                kind = record["kind"]
            except (ValueError, KeyError, TypeError):
                kind = None
            if not isinstance(kind, str):
                raise UserError(f"{path}:{number}: not a record of a run")
            yield record


class RunLog:
    """Writes a run's config.toml, and its metrics.jsonl as records come."""

    def __init__(
        self,
        out: str,
        config: Any,
        notes: dict[str, str],
        tracker: str = "none",
        begin: int = 0,
    ):
        """notes: facts that are not settings (versions, data hash), kept as TOML comments. begin:
        the step that the run goes on from; records of later ones go."""
        self.folder = Path(out)
        self._track = TRACKERS[tracker](self.folder, to_toml(config))
        make_folder(self.folder)
        self._metrics = _open_alone(self.folder / "metrics.jsonl", begin)
        for left in self.folder.glob("config.toml.*.part"):  # by a process that was killed
            left.unlink()
        comments = "".join(f"# {key}: {one_line(value)}\n" for key, value in notes.items())
        with write_aside(self.folder / "config.toml") as file:
            file.write(comments + to_toml(config))

    def record(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, **values}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self._track(kind, step, values)

    def finish(self) -> None:
        """The last record: the run is complete and its model saved."""
        self._metrics.write(json.dumps({"kind": "finished"}) + "\n")
        self._metrics.close()


class NoLog:
    """What ranks other than the first write."""

    def record(self, kind: str, step: int, **values: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def _open_alone(path: Path, begin: int) -> TextIO:
    """Open `path` for writing after its records of step `begin`. Raises UserError while another
    process has it open: two runs in one folder would write over each other."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it is the run's, to its end)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"--out {path.parent}: another process is running there") from None
    kept = 0
    with open(path, "rb") as lines:
        for line in lines:
            # A line cut short by a kill is of a later step: a checkpoint follows its records.
            if not line.endswith(b"\n") or json.loads(line).get("step", begin + 1) > begin:
                break
            kept += len(line)
    file.truncate(kept)
    return file


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line on stdout every few seconds; nothing where
    it is not `shown`. A context manager: leaving it ends the bar."""

    def __init__(self, total: int, name: str, unit: str, shown: bool = True, done: int = 0):
        quiet = None if shown else True  # None: on a terminal only
        self._bar = tqdm(
            total=total, desc=name, unit=unit, disable=quiet, dynamic_ncols=True, initial=done
        )
        self._name, self._total, self._done, self._shown = name, total, done, shown
        self._first = done
        self._began = self._said = time.monotonic()

    def update(self, values: dict[str, str]) -> None:
        self._done += 1
        text = " ".join(f"{key} {value}" for key, value in values.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        last = self._done == self._total
        if self._shown and self._bar.disable and (now - self._said > QUIET_SECONDS or last):
            self._said = now
            pace = (now - self._began) / (self._done - self._first)
            left = pace * (self._total - self._done)
            print(f"{self._name} {self._done}/{self._total} [{left:.0f} s left] {text}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


# ---------------------------------------------------------------- other places to send records

Track = Callable[[str, int, dict[str, Any]], None]


def _to_nowhere(folder: Path, settings: str) -> Track:
    return lambda kind, step, values: None


def _to_tensorboard(folder: Path, settings: str) -> Track:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tracker tensorboard: pip install tensorboard first") from None
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", f"```\n{settings}```")

    def track(kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    return track


def _to_wandb(folder: Path, settings: str) -> Track:
    try:
        import wandb
    except ImportError:
        raise UserError("--tracker wandb: pip install wandb first") from None
    run = wandb.init(project="redi", name=folder.name, config=tomllib.loads(settings))
    return lambda kind, step, values: run.log(
        {f"{kind}/{name}": value for name, value in values.items()}, step=step
    )


TRACKERS = {"none": _to_nowhere, "tensorboard": _to_tensorboard, "wandb": _to_wandb}


# ---------------------------------------------------------------- curves


@dataclass(kw_only=True)
class CurvesConfig:
    runs: Annotated[list[str], "folders of runs; the picture goes into the first"]


PANELS = {
    "loss": "loss",
    "chosen_logp": "mean log-prob, chosen (nats per token)",
    "rejected_logp": "mean log-prob, rejected (nats per token)",
    "margin": "margin, chosen - rejected (nats per token)",
    "ranked_right": "share of pairs ranked right",
    "chosen_entropy": "entropy at chosen tokens (nats)",
    "rejected_entropy": "entropy at rejected tokens (nats)",
    "grad_norm": "gradient norm before clipping",
    "update_norm": "norm of the update of the weights",
    "pass_at_1": "pass@1 between steps",
    "mean_tokens": "tokens a completion",
    "lr": "learning rate",
}


STYLES = {"train": "-", "eval": "o", "benchmark": ".-"}


def draw(runs: list[Path], path: Path) -> None:
    """Write the curves of `runs` as a PNG: a panel a quantity, a colour a run, dots held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    histories = {run: list(read_metrics(run)) for run in runs}
    seen = {key for records in histories.values() for r in records for key in r}
    panels = [key for key in PANELS if key in seen]
    if not panels:
        raise UserError(f"{runs[0] / 'metrics.jsonl'}: holds nothing to draw")
    columns = max(1, min(3, len(panels)))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes.flat, panels):
        for number, (run, records) in enumerate(histories.items()):
            for kind, style in STYLES.items():
                points = [(r["step"], r[key]) for r in records if r["kind"] == kind and key in r]
                if points:
                    name = f"{run}" + (", held out" if kind == "eval" else "")
                    axis.plot(*zip(*points), style, color=f"C{number}", lw=1, ms=4, label=name)
        axis.set(title=PANELS[key], xlabel="optimizer step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="small")
    with write_aside(path, binary=True) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


@program
def main() -> None:
    config = parse(CurvesConfig, "Draw the curves of runs as RUN/curves.png.")
    runs = [Path(run) for run in config.runs]
    for run in runs:
        if not any(r["kind"] == "train" for r in read_metrics(run)):
            raise UserError(f"{run}: no training records in {run / 'metrics.jsonl'}")
    draw(runs, runs[0] / "curves.png")
    print(runs[0] / "curves.png")


if __name__ == "__main__":
    main()
