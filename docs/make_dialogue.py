"""The demonstration of situational dialogue, by the commands that users have.

    python docs/make_dialogue.py --model HuggingFaceTB/SmolLM2-135M-Instruct [--out out/dialogue]

Stages whose result exists are skipped, and a stage that was stopped resumes, so the same command
resumes the whole after Ctrl-C. OUT/times.json has the seconds of each stage.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from stages import ROOT, Stages

WORLDS = {1: 700, 2: 520, 3: 1020}  # seed -> dialogues: for the tutor, for judges, to evaluate on
SEEN, UNSEEN = 123, 100  # scenarios to evaluate on: 3 of each seen topic, 10 of each unseen one
TRAIN = (
    "--rope-theta keep --max-position-embeddings keep --max-length 1024 --pack-tokens 2048 "
    "--rows-per-step 4 --epochs 1 --save-every 20"
)
# Fine-tuned models get a shorter prompt: they learn from dialogues how to talk.
SHORT = "--templates docs/dialogue_templates.toml"
PREPARE = f"--test-share 0 {SHORT}"
SCENES = "--scenarios {out}/seen.jsonl --unseen {out}/unseen.jsonl --max-new-tokens 48 --slots 24"
TALK = f"{SCENES} --student world --judge world"
REPLAY = f"--student recorded --judge world --max-new-tokens 48 --slots 24 {SHORT}"
STEPS = {"early": 20, "late": 60}  # of young tutors, whose replies are judged


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_worlds(stages: Stages) -> None:
    """Dialogues to train on, and scenarios and recorded dialogues of both kinds of topics."""
    out = stages.out
    for seed, count in WORLDS.items():
        stages.run(
            f"data{seed}/card.json",
            f"redi.dialogue.world {{out}}/world{seed} --dialogues {count} --seed {seed}",
            f"redi dialogue prepare {{out}}/world{seed} --out {{out}}/data{seed} {PREPARE}",
        )
    for side, count in (("seen", SEEN), ("unseen", UNSEEN)):
        write_rows(out / f"{side}.jsonl", read_rows(out / f"data3/scenarios_{side}.jsonl")[:count])
    topics = json.loads((out / "data3/card.json").read_text())["topics"]
    recorded = {
        (seed, side): [
            row
            for row in read_rows(out / f"world{seed}/dialogues.jsonl")
            if row["scenario"]["topic"] in topics[side]
        ]
        for seed in WORLDS
        for side in topics
    }
    # The dialogues of world 3 that are evaluated on begin its file; these are others.
    parts = {
        "redi": recorded[1, "seen"][:120],
        "labels_early": recorded[2, "seen"][:50],
        "labels_late": recorded[2, "seen"][50:100],
        "dev": recorded[3, "seen"][500:550],
        "test_seen_early": recorded[3, "seen"][600:640],
        "test_seen_late": recorded[3, "seen"][640:720],
        "test_unseen_early": recorded[3, "unseen"][120:150],
        "test_unseen_late": recorded[3, "unseen"][150:200],
    }
    for name, rows in parts.items():
        write_rows(out / f"{name}.jsonl", rows)


def train(stages: Stages, model: str) -> None:
    """The tutor; and a second one, on other dialogues, which judges by likelihood."""
    for name, data in (("tutor", "data1"), ("second", "data2")):
        flags = f"--data {{out}}/{data}/tutor.jsonl --out {{out}}/{name} --lr 5e-4 {TRAIN}"
        stages.run(f"{name}/config.json", f"redi train-sft --model {model} {flags} --keep all")
        for age, step in STEPS.items():
            at = f"{{out}}/{name}/checkpoints/step-{step:06}"
            stages.run(f"{name}_{age}/config.json", f"redi export {at} --out {{out}}/{name}_{age}")
        shutil.rmtree(stages.out / name / "checkpoints", ignore_errors=True)  # 11 GB


def train_judges(stages: Stages) -> None:
    """Replies of young tutors, labeled by the world, teach the judge of labels and set thresholds;
    both judges are measured on the replies of the other tutor."""
    sampled = "--temperature 1"
    for age in STEPS:
        flags = f"--scenarios {{out}}/labels_{age}.jsonl --out {{out}}/replies/labels_{age}"
        model = f"{{out}}/second_{age}"
        made = f"replies/labels_{age}/report.md"
        stages.run(made, f"redi dialogue evaluate {model} {flags} {REPLAY} {sampled}")
    flags = f"--scenarios {{out}}/dev.jsonl --out {{out}}/replies/dev {REPLAY} {sampled}"
    stages.run("replies/dev/report.md", f"redi dialogue evaluate {{out}}/second_late {flags}")
    for age, tutor in (("early", "tutor_early"), ("late", "tutor")):
        flags = (
            f"--scenarios {{out}}/test_seen_{age}.jsonl --unseen {{out}}/test_unseen_{age}.jsonl"
        )
        flags += f" --out {{out}}/replies/test_{age} {REPLAY} {sampled}"
        made = f"replies/test_{age}/report.md"
        stages.run(made, f"redi dialogue evaluate {{out}}/{tutor} {flags}")
    labeled = " ".join(f"{{out}}/replies/labels_{age}" for age in STEPS)
    stages.run(
        "data_judge/card.json",
        f"redi dialogue prepare {labeled} --out {{out}}/data_judge {PREPARE} --unseen-topics 0 "
        "--rubric docs/dialogue_rubric.toml",
    )
    flags = f"--data {{out}}/data_judge/judge.jsonl --out {{out}}/judge --lr 3e-4 {TRAIN}"
    stages.run("judge/config.json", f"redi train-sft --model {{out}}/second {flags}")
    for side in ("seen", "unseen"):
        files = [stages.out / f"replies/test_{age}/dialogues.jsonl" for age in STEPS]
        rows = [row for file in files for row in read_rows(file) if row["side"] == side]
        write_rows(stages.out / f"test_{side}.jsonl", rows)
    for kind, model in (("likelihood", "second"), ("labels", "judge")):
        rubric = " --rubric docs/dialogue_rubric.toml" if kind == "labels" else ""
        stages.run(
            f"agreement_{kind}.json",
            f"redi dialogue agreement {{out}}/{model} {{out}}/test_seen.jsonl --kind {kind} "
            "--unseen {out}/test_unseen.jsonl --dev {out}/replies/dev/dialogues.jsonl "
            f"--out {{out}}/agreement_{kind}.json {SHORT}{rubric}",
        )


def train_redi(stages: Stages) -> None:
    """Stage 2 on pairs of the tutor's own right and wrong replies to one state."""
    flags = f"--scenarios {{out}}/redi.jsonl --out {{out}}/replies/redi {REPLAY}"
    flags += " --samples 4 --temperature 1.2"
    stages.run("replies/redi/report.md", f"redi dialogue evaluate {{out}}/tutor {flags}")
    stages.run(
        "data_redi/card.json",
        f"redi dialogue prepare {{out}}/replies/redi --out {{out}}/data_redi {PREPARE} "
        "--unseen-topics 0",
    )
    flags = f"--data {{out}}/data_redi/pairs.jsonl --out {{out}}/redi --lr 2e-5 {TRAIN}"
    stages.run("redi/config.json", f"redi train-redi --model {{out}}/tutor {flags}")


def evaluate(stages: Stages, model: str) -> None:
    models = {
        "tutor": f"{{out}}/tutor --hints {SHORT}",
        "redi": f"{{out}}/redi {SHORT}",
        "prompted": model,
    }
    for name, tutor in models.items():
        flags = f"{TALK} --out {{out}}/eval/{name}"
        stages.run(f"eval/{name}/report.md", f"redi dialogue evaluate {tutor} {flags}")
    flags = f"{SCENES} {SHORT} --student world --judge {{out}}/second --out {{out}}/eval/judged"
    flags += " --judge-settings {out}/agreement_likelihood.json"
    stages.run("eval/judged/report.md", f"redi dialogue evaluate {{out}}/tutor {flags}")
    for first, second in (("prompted", "tutor"), ("tutor", "redi")):
        print(f"\n{second} against {first}:")
        runs = [str(stages.out / "eval" / name) for name in (first, second)]
        compare = ["redi", "dialogue", "report", *runs]
        subprocess.run([sys.executable, "-m", *compare], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="out/dialogue")
    flags = parser.parse_args()
    out = Path(flags.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    make_worlds(stages)
    train(stages, flags.model)
    train_judges(stages)
    train_redi(stages)
    evaluate(stages, flags.model)


if __name__ == "__main__":
    main()
