"""Make the pictures of docs/curves.md from runs on the toy.

    python docs/make_curves.py       -> docs/curves/*.png; the runs stay in out/curves

Trains the toy's student (stage 1, shorter than `make demo`), another one on so few problems that it
overfits, and four runs of stage 2 from the first, two of which learn too fast. They run as a user
runs them; finished runs are skipped. Left out: seeds and error bars; the numbers of the page, which
are in the runs' metrics.jsonl. The pictures show shapes; numbers differ a little between machines.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from matplotlib.figure import Figure

from redi.curves import smooth
from redi.data.files import make_folder
from redi.monitor import CollapseGuard
from redi.recipe import REDIConfig
from redi.runlog import read_metrics

WORK, PICTURES = "out/curves", Path("docs/curves")
TOYS = {"toy": "--benchmark 100", "few": "--problems 256", "held_out": "--problems 300 --seed 7"}
STAGE_1 = {"sft": "toy --epochs 5 --eval-every 25",  # run -> toy, flags
           "few": "few --epochs 40 --eval-every 8 --rows-per-step 32"}  # fmt: skip
STAGE_2 = {"redi": "", "dpo": "--objective dpo --beta 0.1", "redi_fast": "--lr 4e-4",
           "symmetric_fast": "--lr 4e-4 --objective symmetric"}  # fmt: skip
NAMES = {"sft": "5,000 problems, 5 epochs", "few": "256 problems, 40 epochs",
         "redi": "REDI, lr 1e-4", "dpo": "DPO, lr 1e-4", "redi_fast": "REDI, lr 4e-4",
         "symmetric_fast": "symmetric, lr 4e-4"}  # fmt: skip
GRAY = "0.35"  # lines that are no curves
DEFAULTS = REDIConfig()


def python(command: str) -> None:
    print(f"$ python {command}", flush=True)
    if status := subprocess.run([sys.executable, *command.split()], check=False).returncode:
        sys.exit(status)  # its own message is enough


def series(run: str, key: str, kind: str = "train") -> tuple[list[int], list[float]]:
    """(steps, values) of a run."""
    records = [r for r in read_metrics(Path(WORK, run)) if r["kind"] == kind]
    return [r["step"] for r in records], [r[key] for r in records]


def warned(run: str) -> int | None:
    """The step at which the guard warned, if it did."""
    guard = CollapseGuard(DEFAULTS.collapse_threshold, DEFAULTS.collapse_steps)
    steps, chosen = series(run, "chosen_logp")
    return next((s for s, c in zip(steps, chosen) if guard.check({"chosen_logp": c})), None)


def kept(run: str) -> Path:
    """The checkpoint that the guard kept: older than the newest ones."""
    return min(Path(WORK, run, "checkpoints").glob("step-*"))


def share_right(model: str) -> float:
    out, toy = f"{WORK}/eval/{model}", f"--benchmark {WORK}/data/toy/benchmark.jsonl --samples 4"
    python(f"evaluate.py --config recipes/toy_eval.toml {toy} --model {WORK}/{model} --out {out}")
    return json.loads(Path(out, "report.json").read_text())["mean_pass_at_1"]


def make_runs() -> dict[str, float]:
    """Model -> share of its answers that are right."""
    for toy, flags in TOYS.items():
        python(f"-m redi.toy {WORK}/data/{toy} {flags}")
        python(f"-m redi.prepare {WORK}/data/{toy}/raw.parquet --out {WORK}/data/{toy}")
    held_out = f"--eval-data {WORK}/data/held_out/positives.jsonl --cache {WORK}/tokens"
    for run, line in STAGE_1.items():
        toy, flags = line.split(maxsplit=1)
        data = f"--model {WORK}/data/{toy}/student --data {WORK}/data/{toy}/positives.jsonl"
        program = f"train_sft.py --config recipes/toy_sft.toml --out {WORK}/{run}"
        python(f"{program} {data} {held_out} {flags}")
    # Six checkpoints, so that one from before a collapse is there to be kept.
    data = f"--model {WORK}/sft --data {WORK}/data/toy/pairs.jsonl --save-every 5 --keep 6"
    for run, flags in STAGE_2.items():
        program = f"train_redi.py --config recipes/toy_redi.toml --out {WORK}/{run}"
        python(f"{program} {data} --cache {WORK}/tokens {flags}")
    right = {run: share_right(run) for run in ("sft", *STAGE_2)}
    for run in filter(warned, STAGE_2):
        if not Path(WORK, f"{run}_kept", "config.json").is_file():
            python(f"-m redi export {kept(run)} --out {WORK}/{run}_kept")
        right[f"{run}_kept"] = share_right(f"{run}_kept")
    return right


def picture(name: str, *panels: tuple) -> None:
    """Write a PNG; a panel is a function and what it takes after the axis."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axis, (draw, *arguments) in zip(figure.subplots(1, len(panels)), panels):
        draw(axis, *arguments)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", framealpha=0.9)
    figure.savefig(PICTURES / f"{name}.png", dpi=90)


def losses(axis, run: str) -> None:
    axis.plot(*series(run, "loss"), lw=1, label="training rows")
    axis.plot(*series(run, "loss", "eval"), "o", ms=4, label="held-out rows")
    axis.set(title=NAMES[run], ylabel="loss (nats per token)", ylim=(0, 2))


def norms(axis, run: str) -> None:
    axis.plot(*series(run, "grad_norm"), lw=1, label=NAMES[run])
    axis.axhline(DEFAULTS.clip, color=GRAY, ls="--", lw=1, label="clipped above")
    axis.set(title="gradient norm before clipping", yscale="log")


def log_probs(axis, run: str, lowest: float) -> None:
    for key, color in (("chosen", "C0"), ("rejected", "C3")):
        steps, values = series(run, f"{key}_logp")
        axis.plot(steps, values, color=color, lw=0.8, alpha=0.3)
        axis.plot(steps, smooth(values), color=color, lw=1.5, label=key)
    if step := warned(run):
        limit = series(run, "chosen_logp")[1][0] - DEFAULTS.collapse_threshold
        axis.axhline(limit, color=GRAY, ls="--", lw=1, label="the guard's threshold")
        axis.axvline(int(kept(run).name[5:]), color=GRAY, ls=":", label=f"kept: {kept(run).name}")
        axis.axvline(step, color=GRAY, lw=1.5, label=f"the guard warned: step {step}")
    axis.set(title=NAMES[run], ylabel="mean log-prob (nats per token)", ylim=(lowest, 0))


def margins(axis, right: dict[str, float], *runs: str) -> None:
    for run in runs:
        axis.plot(*series(run, "margin"), lw=1.2, label=f"{NAMES[run]}: {right[run]:.0%} right")
    _, top = axis.get_ylim()
    axis.set(title="margin, and answers right", ylabel="nats per token", ylim=(None, 1.35 * top))


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # as in the Makefile
    make_folder(PICTURES)
    right = make_runs()
    fast = (log_probs, "redi_fast", -4.5), (log_probs, "symmetric_fast", -4.5)
    slow = (log_probs, "redi", -0.7), (log_probs, "dpo", -0.7)
    picture("stage_1", (losses, "sft"), (losses, "few"), (norms, "sft"))
    picture("stage_2", *slow, (margins, right, "redi", "dpo"))
    picture("collapse", *fast, (margins, right, "redi", "redi_fast", "symmetric_fast"))
    print("right: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()))


if __name__ == "__main__":
    main()
