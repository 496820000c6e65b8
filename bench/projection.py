"""A PROJECTION, never a result: hours of the paper's two stages on 8 A100 and on one H200.

    python -m bench.projection         two seconds on one core

    hours = tokens of the stage / (GPUs * tokens/s of one GPU * balance) / 3600

Stage 1 is 77,629 traces, 5 epochs; stage 2 is 53,175 pairs, 1 epoch. Their lengths, and the balance
of 8 ranks on them, are those of bench/plan.py. The tokens/s are measured where there is a
bench/results/gpu.json (`python -m bench.gpu` writes it on a CUDA machine), and an A100 is taken to
reach the same MFU. Without it they follow from utilisations that are assumed. The table and
bench/results/projection.json name every assumption.

Left out: the paper's evaluation (20 h), which waits for memory, so that FLOPs say nothing about it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bench.plan as law
from bench.measure import RESULTS
from redi.config import UserError, program
from redi.data.files import make_folder, write_aside
from redi.model import ModelConfig
from redi.monitor import PEAK_FLOPS, training_flops
from redi.packing import StepPlan, plan

QWEN = ModelConfig(  # Qwen2.5-Math-1.5B
    vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
    num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-6, tied=True, max_positions=4096,
)  # fmt: skip
EPOCHS = {"sft": 5, "redi": 1}
PAPER_HOURS = {"sft": 13.0, "redi": 4 + 10 / 60}  # its Table 5, on 8 x A100-80GB
MEASURES = {"sft": "G4_tok_s", "redi": "G5_tok_s"}
ASSUMED = ((law.RANKS, "A100", 0.40, 312e12), (1, "H200", 0.45, 790e12))  # a share, of FLOP/s


@dataclass(frozen=True)
class Stage:
    tokens: int  # of all its epochs
    flops_per_token: float
    balance: float  # mean over maximum of the ranks' work in a step


@dataclass(frozen=True)
class Speed:
    name: str
    gpus: int
    tok_s: dict[str, float]  # by stage, of one GPU that has work


# ---------------------------------------------------------------- the arithmetic


def hours(stage: Stage, tok_s: float, gpus: int) -> float:
    balance = stage.balance if gpus > 1 else 1.0  # one GPU waits for nobody
    return stage.tokens / (gpus * tok_s * balance) / 3600


def paper_mfu(stage: Stage, paper_hours: float) -> float:
    """Of the paper's A100s, waits included."""
    tok_s = stage.tokens / (law.RANKS * paper_hours * 3600)
    return tok_s * stage.flops_per_token / PEAK_FLOPS["A100"]


def assumed_speeds(stages: dict[str, Stage]) -> list[Speed]:
    speeds = []
    for gpus, gpu, share, peak in ASSUMED:
        tok_s = {key: share * peak / stage.flops_per_token for key, stage in stages.items()}
        name = f"{gpus} x {gpu}, ASSUMED {share:.0%} of {peak / 1e12:.0f} TFLOP/s"
        speeds.append(Speed(name, gpus, tok_s))
    return speeds


def measured_speeds(gpu: str, tok_s: dict[str, float]) -> list[Speed]:
    ratio = PEAK_FLOPS["A100"] / PEAK_FLOPS[gpu]
    on_a100 = {key: rate * ratio for key, rate in tok_s.items()}
    return [
        Speed(f"{law.RANKS} x A100, ASSUMED the MFU of the {gpu}", law.RANKS, on_a100),
        Speed(f"1 x {gpu}, extrapolated from measured tokens/s", 1, tok_s),
    ]


# ---------------------------------------------------------------- the law, and the GPU's numbers


def draw_stages() -> dict[str, Stage]:
    """On the lengths and plans of bench.plan: the same draws, in the same order."""
    rng = np.random.default_rng(0)
    traces = law.draw(rng, law.TRACES, law.MEDIAN_TRACE, law.LONGEST_TRACE)
    medians = (law.MEDIAN_CHOSEN, law.MEDIAN_REJECTED)
    pairs = np.stack([law.draw(rng, law.PAIRS, m, law.LONGEST_OF_PAIR) for m in medians], axis=1)
    of_pairs = plan(pairs, law.PAIRS_PER_STEP, law.PACK_TOKENS, law.RANKS)
    return {
        "sft": _stage(traces, law.plan_sft(traces), EPOCHS["sft"]),
        "redi": _stage(pairs.reshape(-1), of_pairs, EPOCHS["redi"]),
    }


def _stage(lengths: np.ndarray, steps: list[StepPlan], epochs: int) -> Stage:
    tokens = int(lengths.sum())
    flops = training_flops(QWEN, lengths.tolist(), supervised=tokens)
    balance = law.balances(law.by_rank(steps), lengths).mean()
    return Stage(epochs * tokens, flops / tokens, float(balance))


def read_gpu(path: Path) -> tuple[str, dict[str, float], dict[str, Any]] | None:
    """(GPU, tokens/s by stage, where they are from), None without a file. Raises UserError."""
    try:
        content = json.loads(path.read_bytes())
        tok_s = {key: content["results"][name]["median"] for key, name in MEASURES.items()}
        origin = {"machine": content["machine"], "versions": content["versions"]}
    except FileNotFoundError:
        return None
    except KeyError as missing:
        raise UserError(f"{path}: the field {missing} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a file of bench.gpu ({error})") from None
    for key, rate in tok_s.items():
        if type(rate) not in (int, float) or not 0 < rate < 1e6:
            expected = "expected tokens/s, above 0 and below a million"
            raise UserError(f"{path}: {MEASURES[key]} is {rate!r}; {expected}")
    gpu = next((name for name in PEAK_FLOPS if name in json.dumps(origin["machine"])), None)
    if gpu is None:
        raise UserError(f"{path}: its machine names no GPU of {', '.join(PEAK_FLOPS)}")
    return gpu, tok_s, origin


# ---------------------------------------------------------------- what is said


def assumptions(stages: dict[str, Stage], gpu: str | None) -> list[str]:
    sft, redi = stages["sft"], stages["redi"]
    if gpu is None:
        speed = (
            "No GPU was measured: the shares of FLOP/s are aims. 790 TFLOP/s is what an H200's "
            "matmuls are taken to reach; its data sheet says 989. A token costs "
            f"{sft.flops_per_token / 1e9:.1f} GFLOP (SFT) and {redi.flops_per_token / 1e9:.1f} "
            "(REDI), all tokens supervised, recomputing not counted."
        )
    else:
        speed = (
            f"The measured tokens/s of one {gpu} hold for whole runs on the lengths below. An A100 "
            "reaches the same share of its data-sheet peak, tokens/s times "
            f"{PEAK_FLOPS['A100'] / 1e12:.0f} / {PEAK_FLOPS[gpu] / 1e12:.0f}, though 80 GB may ask "
            "for more recomputing."
        )
    used = {key: paper_mfu(stage, PAPER_HOURS[key]) for key, stage in stages.items()}
    return [
        speed,
        "The lengths are the log-normal law of bench/plan.py; the real ones are not published. "
        f"SFT: {law.TRACES:,} traces, {EPOCHS['sft']} epochs, {sft.tokens / 1e9:.2f}e9 tokens; "
        f"REDI: {law.PAIRS:,} pairs, {EPOCHS['redi']} epoch, {redi.tokens / 1e9:.2f}e9 tokens.",
        f"{law.RANKS} GPUs wait in every step for the one with most work: balance "
        f"{sft.balance:.3f} (SFT) and {redi.balance:.3f} (REDI), from the plan. One GPU: 1.",
        "Communication, loading and saving take no time.",
        f"On these lengths the paper's hours are {used['sft']:.0%} (SFT) and {used['redi']:.0%} "
        "(REDI) MFU of an A100, waits included.",
    ]


def table(stages: dict[str, Stage], speeds: list[Speed]) -> str:
    rows = [["PROJECTION, not a result", "SFT hours", "REDI hours", "SFT tokens/s a GPU", "REDI"]]
    for speed in speeds:
        took = [f"{hours(stages[key], speed.tok_s[key], speed.gpus):.1f}" for key in stages]
        rows.append([speed.name, *took, *(f"{speed.tok_s[key]:,.0f}" for key in stages)])
    paper = [f"{PAPER_HOURS[key]:.1f}" for key in stages]
    rows.append([f"the paper's own hours, {law.RANKS} x A100", *paper, "", ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


@program
def main() -> None:
    found = read_gpu(RESULTS / "gpu.json")
    stages = draw_stages()
    if found is None:
        gpu, speeds, origin = None, assumed_speeds(stages), None
        print("No GPU measurement (bench/results/gpu.json): tokens/s from ASSUMED utilisations.\n")
    else:
        gpu, tok_s, origin = found
        speeds = measured_speeds(gpu, tok_s)
        print(f"Tokens/s of one {gpu} from bench/results/gpu.json.\n")
    told = assumptions(stages, gpu)
    print(table(stages, speeds))
    print("\nAssumptions of this projection:\n", *(f"- {line}" for line in told), sep="\n")
    content = {
        "projection": True,
        "assumptions": told,
        "hours": {
            s.name: {key: round(hours(stages[key], s.tok_s[key], s.gpus), 2) for key in stages}
            for s in speeds
        },
        "tok_s_of_one_gpu": {s.name: {k: round(v) for k, v in s.tok_s.items()} for s in speeds},
        "measured_on": origin,
        "paper_hours": {key: round(value, 2) for key, value in PAPER_HOURS.items()},
    }
    make_folder(RESULTS)
    path = RESULTS / "projection.json"
    with write_aside(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
