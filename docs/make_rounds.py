"""A second round on the toy: REDI on the teacher's pairs, then on the student's own traces.

    python docs/make_rounds.py [--out out/rounds] [--seeds 1 2 3]     prints a table for study.md

The toy and stage 1 are those of recipes/study_toy.toml. Every model of stage 2 has the same flags;
they differ in the model that they start from and in the pairs. A round on own traces samples the
training problems as the benchmark's, and pairs the first right answer of a problem with its first
wrong one. The control learns once more from the teacher's pairs: what a second round gains only
because it is more training.

Stages whose result exists are skipped, so the same command resumes the whole after Ctrl-C.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from make_cliff import with_p
from stages import ROOT, Stages

sys.path.insert(0, str(ROOT))  # a script finds only its own folder

from redi.study.results import sem
from redi.tables import markdown_table

TOY = (
    "--operations 8 --problems 2800 --benchmark 200 --benchmark-seed 42 --impatience 0.25 "
    "--luck 0.4 --slip 0.03"
)
STAGE_1 = (
    "--lr 4e-3 --rows-per-step 64 --epochs 8 --max-length 256 --rope-theta keep "
    "--max-position-embeddings keep"
)
STAGE_2 = "--lr 1e-4 --max-response 128 --max-length 256"
EVALUATION = (
    "--samples 4 --temperature 1.0 --user-prompt plain --max-new-tokens 96 --slots 256 --graders 1"
)
# Model -> (its name in the table, the model that it starts from, the folder of its pairs)
MODELS = {
    "sft": ("stage 1", None, None),
    "redi": ("REDI on the teacher's pairs", "sft", "data"),
    "redi_again": ("... then on the teacher's pairs again", "redi", "data"),
    "redi_own": ("... then on its own traces", "redi", "own/redi"),
    "sft_own": ("stage 1, then its own traces alone", "sft", "own/sft"),
}
# The models that the table compares with
OTHERS = {"stage 1": "sft", "REDI": "redi", "the teacher's pairs again": "redi_again"}


def make_models(stages: Stages, seed: int, toy: str) -> None:
    """All models of a seed, each with its evaluation on the benchmark."""
    stages.run(
        "data/card.json",
        f"redi.toy {{out}}/data --seed {seed} {toy}",
        "redi prepare {out}/data/raw.parquet --out {out}/data",
    )
    for model, (_, start, pairs) in MODELS.items():
        if start is None:
            data = "--model {out}/data/student --data {out}/data/positives.jsonl"
            command = f"redi train-sft {data} {STAGE_1}"
        else:
            if pairs != "data":
                make_own_pairs(stages, start, pairs)
            data = f"--model {{out}}/{start} --data {{out}}/{pairs}/pairs.jsonl"
            command = f"redi train-redi {data} {STAGE_2}"
        shared = f"--seed {seed} --cache {{out}}/tokens --out {{out}}/{model}"
        stages.run(f"{model}/config.json", f"{command} {shared}")
        evaluate(stages, model, "data/benchmark.jsonl", f"{model}/eval")


def make_own_pairs(stages: Stages, model: str, pairs: str) -> None:
    """Pairs of a model's answers to the problems that it was trained on."""
    evaluate(stages, model, "data/raw.parquet", f"{model}/taught")
    stages.run(f"{pairs}/card.json", f"redi prepare {{out}}/{model}/taught --out {{out}}/{pairs}")


def evaluate(stages: Stages, model: str, benchmark: str, out: str) -> None:
    where = f"--model {{out}}/{model} --benchmark {{out}}/{benchmark} --out {{out}}/{out}"
    stages.run(f"{out}/report.json", f"redi evaluate {where} {EVALUATION}")


def table(folders: list[Path]) -> str:
    """Markdown: every model over its seeds, with its gain over each model above it in OTHERS."""

    def read(file: str) -> list[dict]:
        return [json.loads((folder / file).read_text(encoding="utf-8")) for folder in folders]

    scores: dict[str, list[float]] = {}
    gains = (f"gain over {one}" for one in OTHERS)
    lines = [("model", "pairs", "pass@1 ± SEM", "tokens", *gains)]
    for model, (name, _, pairs) in MODELS.items():
        reports = read(f"{model}/eval/report.json")
        number = fmean(card["pairs"] for card in read(f"{pairs}/card.json")) if pairs else None
        tokens = fmean(report["benchmarks"][0]["mean_tokens"] for report in reports)
        ours = [report["mean_pass_at_1"] for report in reports]
        line = [name, "" if number is None else f"{number:,.0f}"]
        line += [f"{fmean(ours):.3f} ± {sem(ours) or 0:.3f}", f"{tokens:.1f}"]
        for other in OTHERS.values():
            theirs = scores.get(other)
            line.append(with_p([a - b for a, b in zip(ours, theirs)]) if theirs else "")
        lines.append(line)
        scores[model] = ours
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/rounds", type=Path)
    parser.add_argument("--seeds", nargs="+", default=[1, 2, 3], type=int)
    parser.add_argument("--toy", default=TOY, help="flags of redi.toy: fewer problems for a trial")
    args = parser.parse_args()
    folders = [args.out.resolve() / f"seed-{seed}" for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders):
        folder.mkdir(parents=True, exist_ok=True)
        make_models(Stages(folder), seed, args.toy)
    print(table(folders))


if __name__ == "__main__":
    main()
