"""The paper's comparison on a small real language model, by the commands that users have.

    python docs/make_real_model.py [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--out out/real]

Base model; stage 1; from it REDI, symmetric, DPO and SimPO on the teacher's pairs, and REDI on the
model's own traces. Learning rates of REDI and DPO are swept on the tuning problems, with seed 1.
Stages whose result exists are skipped, and a stage that was stopped resumes, so the same command
resumes the whole after Ctrl-C. OUT/times.json has the seconds of each stage, OUT/page/ the tables
and pictures. Left out: seeds of the data, a sweep of the other objectives.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import real_task
from stages import ROOT, Stages

sys.path.insert(0, str(ROOT))  # a script finds only its folder

from real_page import write_page

PROBLEMS = {"test": 120, "tuning": 32, "training": 420}
OWN_PROBLEMS = 140  # of training, that the stage-1 model answers for REDI on its own traces
TEACHER = real_task.Teacher()
SEEDS = (1, 2)  # of the order of the rows
RATES = ("1e-5", "3e-5", "1e-4")
OBJECTIVES = {
    "redi": "--objective redi --alpha 0.8",
    "own": "--objective redi --alpha 0.8",  # on other pairs
    "dpo": "--objective dpo --beta 0.1",
    "symmetric": "--objective symmetric",
    "simpo": "--objective simpo --beta 2 --gamma 1",
}
# Objectives that are not swept: REDI's best rate, times the paper's rate for them over its REDI's.
RATIOS = {"symmetric": 2e-7 / 1e-6, "simpo": 5e-7 / 1e-6}
KEPT = (
    "--rope-theta keep --max-position-embeddings keep --max-length 512 --pack-tokens 2048 "
    "--save-every 20 --keep 1 --cache {out}/tokens"
)
STAGE_1 = f"{KEPT} --lr 5e-4 --rows-per-step 4 --epochs 1"
# 72 pairs for all. If the model's own are fewer, some are seen twice.
STAGE_2 = f"{KEPT} --rows-per-step 2 --epochs 2 --max-steps 36"
# No prefix: the base model does not think, and answers are compared if they are read by one rule.
SAMPLED = "--samples 4 --prefix= --slots 128 --grader math-verify --graders 1"
TRAINED = f"{SAMPLED} --user-prompt plain --max-new-tokens 200"
UNTRAINED = f"{SAMPLED} --user-prompt paper --max-new-tokens 200"  # which asks for a box


def make_task(out: Path) -> None:
    """Raw traces and benchmarks. Exits if OUT holds those of other constants."""
    task = real_task.make_task(PROBLEMS, TEACHER)
    task["own"] = task["training"][:OWN_PROBLEMS]
    for name, rows in task.items():
        path, text = out / f"task/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path}: holds another task; choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def train(stages: Stages, run: str, command: str) -> None:
    """`command` without --out, whose checkpoints are not needed once its model is there."""
    stages.run(f"{run}/config.json", f"{command} --out {{out}}/{run}")
    shutil.rmtree(stages.out / run / "checkpoints", ignore_errors=True)


def train_pairs(stages: Stages, method: str, seed: int, rate: str, data: str = "data") -> str:
    """One run of stage 2. Returns its name."""
    run = f"{method}-{seed}-{rate}"
    flags = f"{OBJECTIVES[method]} --lr {rate} --seed {seed} {STAGE_2}"
    model = f"--model {{out}}/sft-{seed} --data {{out}}/{data}/pairs.jsonl"
    train(stages, run, f"redi train-redi {model} {flags}")
    return run


def evaluate(stages: Stages, made: str, model: str, benchmark: str, flags: str = TRAINED) -> None:
    command = f"redi evaluate --model {model} --benchmark {{out}}/task/{benchmark}.jsonl {flags}"
    stages.run(f"{made}/report.md", f"{command} --out {{out}}/{made}")


def best_rate(out: Path, method: str) -> str:
    """The rate with the largest pass@1 on the tuning problems; of equal ones, the smallest."""

    def score(rate: str) -> float:
        report = json.loads((out / f"tuning/{method}-1-{rate}/report.json").read_text())
        return report["mean_pass_at_1"]

    return max(RATES, key=score)


def run_all(stages: Stages, model: str) -> dict[str, str]:
    """Every stage. Returns the trained runs that are compared: name on the page -> folder."""
    stages.run("data/card.json", "redi prepare {out}/task/raw.jsonl --out {out}/data")
    runs = {}
    for seed in SEEDS:
        name = runs[f"sft-{seed}"] = f"sft-{seed}"
        flags = f"--model {model} --data {{out}}/data/positives.jsonl --seed {seed} {STAGE_1}"
        train(stages, name, f"redi train-sft {flags}")
        evaluate(stages, f"test/{name}", f"{{out}}/{name}", "test")  # soon: is the task too hard?
    evaluate(stages, "tuning/sft-1", "{out}/sft-1", "tuning")
    for method in ("dpo", "redi"):
        for rate in RATES:
            run = train_pairs(stages, method, 1, rate)
            evaluate(stages, f"tuning/{run}", f"{{out}}/{run}", "tuning")
    best = {method: best_rate(stages.out, method) for method in ("dpo", "redi")}
    rates = {name: f"{ratio * float(best['redi']):g}" for name, ratio in RATIOS.items()} | best
    for method, rate in rates.items():
        for seed in SEEDS if method in ("dpo", "redi") else SEEDS[:1]:
            runs[f"{method}-{seed}"] = train_pairs(stages, method, seed, rate)
    evaluate(stages, "own/training", "{out}/sft-1", "own")
    stages.run("data_own/card.json", "redi prepare {out}/own/training --out {out}/data_own")
    runs["own-1"] = train_pairs(stages, "own", 1, best["redi"], "data_own")
    for name, run in runs.items():
        evaluate(stages, f"test/{name}", f"{{out}}/{run}", "test")
    evaluate(stages, "test/base", model, "test", UNTRAINED)
    evaluations = " ".join(f"{{out}}/test/{name}" for name in ("base", *runs))
    stages.run("compared.json", f"redi report {evaluations} --out {{out}}/compared.json")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="out/real")
    flags = parser.parse_args()
    out = Path(flags.out).resolve()
    make_task(out)
    stages = Stages(out)
    runs = run_all(stages, flags.model)

    print(write_page(out, runs, RATES))


if __name__ == "__main__":
    main()
