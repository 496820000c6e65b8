"""Stage 1: fine-tune on the teacher's correct traces (Eq. 1 of arXiv 2505.24850).

    python train_sft.py                                       the published run
    python train_sft.py --config recipes/toy_sft.toml
    python train_sft.py --data my_traces.jsonl --dry-run      look before training

Reads a model folder or hub id and rows {"prompt": [messages], "completion": [message]}, as
`python -m redi.prepare` writes them. Minimises minus the mean log-prob of the response tokens over
each optimizer step. Writes a Hugging Face folder, which is where train_redi.py starts.
"""

from dataclasses import dataclass

from redi.config import parse, program
from redi.objectives import SFT
from redi.run import run
from redi.train import TrainConfig


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
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


@program
def main() -> None:
    config = parse(SFTConfig, "Stage 1 of REDI: supervised fine-tuning on correct traces.")
    run(config, SFT, paired=False, model_made_by=None)


if __name__ == "__main__":
    main()
