"""Make the pictures of docs/curves.md, and print the numbers it quotes, from runs on the toy.

    python docs/make_curves.py       -> docs/curves/*.png; the runs stay in out/curves

Trains the toy's student (stage 1, shorter than `make demo`), another on few problems until it knows
them by heart, and four runs of stage 2 from the first, two of which learn too fast. They start as a
user starts them; finished ones are not made again. Left out: seeds and error bars. The pictures
show shapes; numbers differ a little between machines.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from matplotlib.figure import Figure
from PIL import Image

from redi.data.files import make_folder, write_aside
from redi.monitor import CollapseGuard
from redi.recipe import REDIConfig
from redi.runlog import read_metrics

WORK, PICTURES = "out/curves", Path("docs/curves")
TOYS = {
    "toy": "--benchmark 100",
    "toy_few": "--problems 256",
    "held_out": "--problems 300 --seed 7",
}
STAGE_1 = {"sft": "toy --epochs 5 --eval-every 25",  # run -> toy, flags
           "few": "toy_few --epochs 40 --eval-every 8 --rows-per-step 32"}  # fmt: skip
BY_HEART = 80  # a step from which "few", 8 steps an epoch, no longer learns much that is new
STAGE_2 = {"redi": "", "dpo": "--objective dpo --beta 0.1", "redi_fast": "--lr 4e-4",
           "symmetric_fast": "--lr 4e-4 --objective symmetric"}  # fmt: skip
NAMES = {"sft": "5,000 problems, 5 epochs", "few": "256 problems, 40 epochs",
         "redi": "REDI, lr 1e-4", "dpo": "DPO, lr 1e-4", "redi_fast": "REDI, lr 4e-4",
         "symmetric_fast": "symmetric, lr 4e-4"}  # fmt: skip
KEEP = "--save-every 5 --keep 6"  # so that one from before a collapse is there to be kept
LOGGED = ("loss", "chosen_logp", "rejected_logp", "margin", "ranked_right")
TAIL, GREY = 10, "0.35"  # steps that a run's end is the mean of; lines that are no curves
DEFAULTS = REDIConfig()  # the guard's, and the clip


def python(command: str) -> None:
    print(f"$ python {command}", flush=True)
    if status := subprocess.run([sys.executable, *command.split()], check=False).returncode:
        sys.exit(status)  # it has said why


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
    out, toy = f"{WORK}/eval/{model}", f"--benchmark {WORK}/toy/benchmark.jsonl --samples 4"
    python(f"evaluate.py --config recipes/toy_eval.toml {toy} --model {WORK}/{model} --out {out}")
    return json.loads(Path(out, "report.json").read_text())["mean_pass_at_1"]


def make_runs() -> dict[str, float]:
    """Model -> share of its answers that are right."""
    for toy, flags in TOYS.items():
        python(f"-m redi.toy {WORK}/{toy} {flags}")
        python(f"-m redi.prepare {WORK}/{toy}/raw.parquet --out {WORK}/{toy}")
    stage = f"train_sft.py --config recipes/toy_sft.toml --cache {WORK}/tokens"
    for run, (toy, *flags) in ((run, line.split()) for run, line in STAGE_1.items()):
        rows = f"--data {WORK}/{toy}/positives.jsonl --eval-data {WORK}/held_out/positives.jsonl"
        model = f"--model {WORK}/{toy}/student --out {WORK}/{run}"
        python(f"{stage} {model} {rows} {' '.join(flags)}")
    stage = f"train_redi.py --config recipes/toy_redi.toml --cache {WORK}/tokens {KEEP}"
    for run, flags in STAGE_2.items():
        model = f"--model {WORK}/sft --out {WORK}/{run}"
        python(f"{stage} {model} --data {WORK}/toy/pairs.jsonl {flags}")
    right = {run: share_right(run) for run in ("sft", *STAGE_2)}
    for run in filter(warned, STAGE_2):
        if not Path(WORK, f"{run}_kept", "config.json").is_file():
            python(f"-m redi.checkpoint export {kept(run)} --out {WORK}/{run}_kept")
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
    figure.savefig(drawn := io.BytesIO(), dpi=90, format="png")
    with write_aside(PICTURES / f"{name}.png", binary=True) as file:
        Image.open(drawn).convert("RGB").quantize(64).save(file, "png")  # a third of the bytes


def losses(axis, run: str) -> None:
    axis.plot(*series(run, "loss"), lw=1, label="training rows")
    axis.plot(*series(run, "loss", "eval"), "o", ms=4, label="held-out rows")
    axis.set(title=NAMES[run], ylabel="loss (nats per token)", ylim=(0, 2))


def norms(axis, run: str) -> None:
    axis.plot(*series(run, "grad_norm"), lw=1, label=NAMES[run])
    axis.axhline(DEFAULTS.clip, color=GREY, ls="--", lw=1, label="clipped above")
    axis.set(title="gradient norm before clipping", yscale="log")


def log_probs(axis, run: str, lowest: float) -> None:
    for key, color in (("chosen", "C0"), ("rejected", "C3")):
        axis.plot(*series(run, f"{key}_logp"), color=color, lw=1.2, label=key)
    if step := warned(run):
        limit = series(run, "chosen_logp")[1][0] - DEFAULTS.collapse_threshold
        axis.axhline(limit, color=GREY, ls="--", lw=1, label="the guard's threshold")
        axis.axvline(int(kept(run).name[5:]), color=GREY, ls=":", label=f"kept: {kept(run).name}")
        axis.axvline(step, color=GREY, lw=1.5, label=f"the guard warned: step {step}")
    axis.set(title=NAMES[run], ylabel="mean log-prob (nats per token)", ylim=(lowest, 0))


def margins(axis, right: dict[str, float], *runs: str) -> None:
    for run in runs:
        label = f"{NAMES[run]}: {right[run]:.0%} right"
        axis.plot(*series(run, "margin"), lw=1.2, label=label)
    _, top = axis.get_ylim()
    axis.set(title="margin, and answers right", ylabel="nats per token", ylim=(None, 1.35 * top))


def print_numbers(right: dict[str, float]) -> None:
    for run in NAMES:
        norm = series(run, "grad_norm")[1]
        print(f"{run}: {len(norm)} steps, {sum(n > DEFAULTS.clip for n in norm)} clipped, gradient")
        print(
            f"    norm {max(norm):.1f} at most; warned: {warned(run)}; first -> last {TAIL} steps"
        )
        for key in LOGGED if run in STAGE_2 else LOGGED[:1]:
            values = series(run, key)[1]
            print(f"    {key:<14} {values[0]:7.3f} -> {mean(values[-TAIL:]):7.3f}")
    for run in STAGE_1:
        low, step = min(zip(*reversed(series(run, "loss", "eval"))))
        print(f"{run}: held out {low:.3f} at {step}, {series(run, 'loss', 'eval')[1][-1]:.3f} last")
    loss = series("few", "loss")[1]
    at_epochs = sum(loss[n - 1] - loss[n] for n in range(BY_HEART, len(loss), 8))
    print(f"few: {loss[BY_HEART - 1]:.3f} at step {BY_HEART}; falls {at_epochs:.3f} at new epochs")
    rows = map(json.loads, Path(WORK, "toy/pairs.jsonl").read_text().splitlines())
    texts = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in rows]
    parted = [next(i for i, (a, b) in enumerate(zip(*pair)) if a != b) for pair in texts]
    alike = mean(i / len(rejected) for i, (_, rejected) in zip(parted, texts))
    print(f"pairs: {alike:.2f} of a rejected trace's characters come before the two part")
    print("right: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()))


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # as in the Makefile
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    make_folder(PICTURES)
    right = make_runs()
    fast = (log_probs, "redi_fast", -4.5), (log_probs, "symmetric_fast", -4.5)
    picture("stage_1", (losses, "sft"), (losses, "few"), (norms, "sft"))
    picture("stage_2", *((log_probs, run, -0.7) for run in ("redi", "dpo")),
            (margins, right, "redi", "dpo"))  # fmt: skip
    picture("collapse", *fast, (margins, right, "redi", "redi_fast", "symmetric_fast"))
    print_numbers(right)


if __name__ == "__main__":
    main()
