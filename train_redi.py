"""Stage 2: learn from right and wrong traces of the same problem (Eq. 5 of arXiv 2505.24850).

    python train_redi.py                                      the published run
    python train_redi.py --config recipes/toy_redi.toml
    python train_redi.py --config recipes/dpo.toml            a baseline of the paper

Reads the stage-1 model and pairs {"prompt": [messages], "chosen": [message], "rejected":
[message]}, as `python -m redi.prepare` writes them, and minimises per pair

    redi        -M_w + alpha M_l                              alpha 0.8
    symmetric   -M_w + M_l
    dpo         -log sigmoid(beta [(S_w - S_w_ref) - (S_l - S_l_ref)])
    simpo       -log sigmoid(beta (M_w - M_l) - gamma)

with M the mean and S the sum of a response's log-probs, or an objective of redi/related_losses.py:
positives, dpo_norm, irpo, dpop, ipo, apo_zero, orpo, npo, topr, dft, redi_weighted. Writes a
Hugging Face folder.
"""

import inspect
from dataclasses import dataclass
from typing import Annotated, Literal

from redi.config import UserError, parse, program, require
from redi.objectives import OBJECTIVES, Objective
from redi.run import run
from redi.train import TrainConfig

# The paper's values (Section 4). REDI's is the default; the others are quoted when missing.
PUBLISHED = {"redi": {"alpha": 0.8}, "dpo": {"beta": 0.001}, "simpo": {"beta": 2.0, "gamma": 1.0}}
# Those of the papers that the other objectives are from, where they settled on one; quoted too.
SOURCES = {
    "dpo_norm": {"beta": 5.0}, "irpo": {"beta": 0.1, "alpha": 1.0}, "orpo": {"alpha": 0.1},
    "dpop": {"beta": 0.3, "alpha": 50.0}, "npo": {"beta": 0.1, "alpha": 1.0},
}  # fmt: skip
PARAMETERS = ("alpha", "beta", "gamma")
SHARES = ("redi", "redi_weighted")  # their alpha is a share of the chosen trace's weight


@dataclass(kw_only=True)
class REDIConfig(TrainConfig):
    objective: Annotated[Literal[tuple(OBJECTIVES)], "what is minimised"] = "redi"
    alpha: Annotated[
        float | None, "weight of the rejected trace (redi: none = 0.8), or of a second term"
    ] = None
    beta: Annotated[float | None, "sharpness of the sigmoid; dpo, simpo and their kin"] = None
    gamma: Annotated[float | None, "target margin (simpo), or an exponent (redi_weighted)"] = None
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
        takes = inspect.signature(OBJECTIVES[self.objective]).parameters
        for name in set(takes) - set(PARAMETERS):
            raise UserError(
                f"{self.objective} takes {name!r}: REDIConfig needs a field of that name, and "
                "PARAMETERS a word (train_redi.py)"
            )
        for name in PARAMETERS:
            given = getattr(self, name)
            require(name in takes or given is None, name, given, f"none with {self.objective}")
            if name in takes and given is None:
                quoted = self._quoted(name)
                raise UserError(f"--{name} is missing: {self.objective} needs it{quoted}")
        if self.alpha is not None:
            share, alpha = self.objective in SHARES, self.alpha
            expected = "within [0, 1]" if share else "at least 0"
            require(alpha >= 0 and (alpha <= 1 or not share), "alpha", alpha, expected)
        require(self.beta is None or self.beta > 0, "beta", self.beta, "above 0")

    def _quoted(self, name: str) -> str:
        for whose, values in (("the paper's", PUBLISHED), ("its own paper's", SOURCES)):
            if name in values.get(self.objective, {}):
                return f" ({whose} is {values[self.objective][name]:g})"
        return ""

    def make_objective(self) -> Objective:
        given = {name: getattr(self, name) for name in PARAMETERS}
        return OBJECTIVES[self.objective](**{k: v for k, v in given.items() if v is not None})


@program
def main() -> None:
    config = parse(REDIConfig, "Stage 2 of REDI: learning from pairs of right and wrong traces.")
    run(config, config.make_objective(), paired=True, model_made_by="python train_sft.py")


if __name__ == "__main__":
    main()
