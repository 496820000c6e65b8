"""Every setting of the two training stages. The defaults are the paper's published run.

    TrainConfig     what both stages share, one setting per line with its unit
    SFTConfig       stage 1: Qwen2.5-Math-1.5B on correct traces, 5 epochs at lr 5e-5
    REDIConfig      stage 2: the stage-1 model on pairs, 1 epoch at lr 1e-6, alpha 0.8 (Section 4)

Settings are checked here, when a config is made, so the loop never has to.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from redi.config import UserError, may_change, require
from redi.objectives import OBJECTIVES, Objective, loss_parameters, make_objective

# Values suggested when a flag is missing: those of REDI's paper (redi, dpo, simpo), and of each
# other objective's own paper or code, where it recommends one.
PUBLISHED = {
    "redi": {"alpha": 0.8}, "dpo": {"beta": 0.001}, "simpo": {"beta": 2.0, "gamma": 1.0},
    "dpo_norm": {"beta": 5.0}, "irpo": {"beta": 0.1, "alpha": 1.0}, "orpo": {"alpha": 0.1},
    "dpop": {"beta": 0.3, "alpha": 50.0}, "npo": {"beta": 0.1, "alpha": 1.0},
    "w_reinforce": {"alpha": 0.1}, "uft": {"alpha": 1e-4},
}  # fmt: skip
PARAMETERS = ("alpha", "beta", "gamma", "baseline")  # the parameters of objectives that have a flag


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of both stages. A field without a default here gets its stage's default below."""

    model: Annotated[str, "model to start from: folder or hub id"]
    data: Annotated[str, "training rows: file, folder or hub id"]
    out: Annotated[str, "folder for the trained model and the run's records", may_change]
    lr: Annotated[float, "peak learning rate"]
    rows_per_step: Annotated[int, "rows in an optimizer step"]
    epochs: Annotated[int, "passes over the data"]
    rope_theta: Annotated[float | Literal["keep"], "rotary base of the trained model"]
    max_position_embeddings: Annotated[int | Literal["keep"], "context length, tokens"]
    max_prompt: Annotated[int, "longest prompt, tokens"]
    max_response: Annotated[int, "longest response, tokens with the stop token"]
    max_length: Annotated[int, "longest prompt and response together, tokens"]
    over_length: Annotated[Literal["drop", "error"], "what to do with rows over a limit"] = "drop"
    max_steps: Annotated[int | None, "stop after this many steps; the schedule ends there"] = None
    pack_tokens: Annotated[int, "tokens per pack; a longer trace gets its own"] = 32768
    weight_decay: Annotated[float, "AdamW's, on matrices only"] = 1e-4
    clip: Annotated[float, "largest gradient norm"] = 1.0
    seed: Annotated[int, "seed of the shuffle"] = 42
    eval_data: Annotated[str | None, "held-out rows: their loss is logged"] = None
    eval_benchmark: Annotated[str | None, "benchmark, name or file: pass@1 on it is logged"] = None
    eval_samples: Annotated[int, "completions per problem of the benchmark"] = 4
    eval_temperature: Annotated[float, "sampling temperature there; 0 is greedy"] = 0.6
    eval_every: Annotated[int, "optimizer steps between held-out losses, and between scores"] = 100
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute; auto: bf16 on CUDA"] = "auto"
    reshard_after_forward: Annotated[bool, "free weights after use (ZeRO-3)", may_change] = False
    offload: Annotated[bool, "weights and AdamW's moments in host memory", may_change] = False
    checkpoint_blocks: Annotated[
        int | Literal["auto", "all", "none"], "recompute auto, all, none or N blocks", may_change
    ] = "auto"
    save_every: Annotated[int, "optimizer steps between checkpoints", may_change] = 200
    keep: Annotated[int | Literal["all"], "newest checkpoints to keep", may_change] = 2
    resume: Annotated[Literal["auto", "never"], "resume if unfinished", may_change] = "auto"
    timeout: Annotated[float, "minutes to wait for the other processes", may_change] = 30.0
    collapse_threshold: Annotated[float, "warn if chosen log-probs fall by it", may_change] = 0.5
    collapse_steps: Annotated[int, "... for this many steps in a row", may_change] = 20
    collapse_stop: Annotated[bool, "stop the run at that warning", may_change] = False
    cache: Annotated[str, "folder for tokenized data, kept between runs", may_change] = "out/tokens"
    tracker: Annotated[Literal["none", "tensorboard", "wandb"], "also log to", may_change] = "none"
    dry_run: Annotated[bool, "load, check, plan and report, then stop", may_change] = False

    def __post_init__(self) -> None:
        smallest = {"max_response": 2, "max_length": 2}
        smallest |= dict.fromkeys(("weight_decay", "eval_temperature", "checkpoint_blocks"), 0)
        smallest |= dict.fromkeys(
            ("rows_per_step", "epochs", "pack_tokens", "eval_every", "eval_samples", "max_prompt",
            "save_every", "keep", "collapse_steps", "max_steps"), 1,
        )  # fmt: skip
        for name, least in smallest.items():
            value = getattr(self, name)
            is_word = value is None or isinstance(value, str)  # as none, all, auto
            require(is_word or value >= least, name, value, f"at least {least}")
        for name in ("lr", "clip", "timeout", "collapse_threshold"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "above 0")
        require(self.timeout <= 525_600, "timeout", self.timeout, "at most 525600, a year")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        for name in ("rope_theta", "max_position_embeddings"):
            value = getattr(self, name)
            require(value == "keep" or value > 0, name, value, "keep, or a number above 0")
        same_folder = Path(self.out).resolve() == Path(self.model).resolve()
        require(not same_folder, "out", self.out, "another folder than --model")


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Stage 1: supervised fine-tuning on correct traces (Eq. 1)."""

    model: str = "Qwen/Qwen2.5-Math-1.5B"
    data: str = "data/positives.jsonl"
    out: str = "out/sft"
    lr: float = 5e-5
    rows_per_step: int = 128
    epochs: int = 5  # of the final model; the paper's ablations use 3
    rope_theta: float | str = 300_000.0  # the base model's 10,000 does not carry 32k tokens
    max_position_embeddings: int | str = 32_768
    max_prompt: int = 32_768
    max_response: int = 32_768
    max_length: int = 32_768


@dataclass(kw_only=True)
class REDIConfig(TrainConfig):
    """Stage 2: learning from correct and incorrect traces, in pairs (Eq. 5) or with labels."""

    objective: Annotated[Literal[OBJECTIVES], "what is minimized"] = "redi"
    alpha: Annotated[float | None, "weight of the rejected trace (redi: 0.8) or of a term"] = None
    beta: Annotated[float | None, "sharpness of the sigmoid; dpo, simpo and their kin"] = None
    gamma: Annotated[float | None, "target margin (simpo), or an exponent (redi_weighted)"] = None
    baseline: Annotated[float | None, "subtracted from the reward, 1 if right, else 0 (asymre)"] = (
        None
    )
    model: str = "out/sft"
    data: str = "data/pairs.jsonl"
    out: str = "out/redi"
    lr: float = 1e-6
    rows_per_step: int = 32
    epochs: int = 1
    rope_theta: float | str = "keep"
    max_position_embeddings: int | str = "keep"
    max_prompt: int = 800
    max_response: int = 19_000
    max_length: int = 32_768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "redi" and self.alpha is None:
            self.alpha = PUBLISHED["redi"]["alpha"]
        taken = loss_parameters(self.objective)
        for name in PARAMETERS:
            value = getattr(self, name)
            require(name in taken or value is None, name, value, f"none with {self.objective}")
            if name in taken and value is None:
                published = PUBLISHED.get(self.objective, {}).get(name)
                hint = f" (published: {published:g})" if published else ""
                raise UserError(f"--{name} is missing: {self.objective} needs it{hint}")
        if self.alpha is not None:
            # Above 1, redi_weighted's rejected trace would weigh more than the chosen one, and uft
            # would push right traces down. redi may weigh wrong rows more, if few are wrong.
            most = 1 if self.objective in ("redi_weighted", "uft") else math.inf
            expected = "at least 0" if most > 1 else "within [0, 1]"
            require(0 <= self.alpha <= most, "alpha", self.alpha, expected)
        require(self.beta is None or self.beta > 0, "beta", self.beta, "above 0")
        require(self.baseline is None or self.baseline < 1, "baseline", self.baseline, "below 1")

    def make_objective(self) -> Objective:
        parameters = {name: getattr(self, name) for name in loss_parameters(self.objective)}
        return make_objective(self.objective, **parameters)
