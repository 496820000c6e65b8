"""How far SimPO's update is from the symmetric objective's, as beta falls (Appendix B).

    python docs/appendix_b.py out/demo/sft out/demo/pairs.jsonl

Both gradients are taken over all pairs as one step, at the model given. Left out: an optimizer.
AdamW divides the gradient's size away, so its direction is what counts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its folder

from redi.batches import TrainData
from redi.checkpoint.folder import load_model
from redi.config import parse, program
from redi.distributed import World
from redi.objectives import Objective, make_objective
from redi.recipe import REDIConfig
from redi.run import load_data

BETAS = (10.0, 2.0, 0.1, 0.01, 0.001)
GAMMA = 1.0


@dataclass(kw_only=True)
class AngleConfig:
    model: Annotated[str, "where to take the gradients: folder or hub id"]
    data: Annotated[str, "pairs: file, folder or hub id"]
    cache: Annotated[str, "folder for tokenized data, kept"] = REDIConfig.cache


def cosines(config: AngleConfig) -> dict[float, float]:
    """beta -> cosine of the angle between the gradients of SimPO and of the symmetric objective."""
    model, source = load_model(config.model)
    context = source.config["max_position_embeddings"]
    rows = REDIConfig(model=config.model, data=config.data, cache=config.cache, max_length=context)
    takes_pairs = make_objective("simpo", beta=BETAS[0], gamma=GAMMA)
    dataset = load_data(config.data, rows, source, takes_pairs)

    def gradient(objective: Objective) -> torch.Tensor:
        data = TrainData(dataset, objective, World(0, 1, torch.device("cpu")), rows.pack_tokens)
        model.zero_grad()
        for batch in data.batches(data.all_rows()):
            data.objective.loss(model, batch).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    symmetric = gradient(make_objective("symmetric"))
    return {
        beta: torch.cosine_similarity(
            gradient(make_objective("simpo", beta=beta, gamma=GAMMA)), symmetric, dim=0
        ).item()
        for beta in BETAS
    }


@program
def main() -> None:
    config = parse(AngleConfig, "The angle between the gradients of SimPO and symmetric.")
    for beta, cosine in cosines(config).items():
        print(f"beta {beta:<6g} cosine {cosine:.9f}   1 - cosine {1 - cosine:.1e}")


if __name__ == "__main__":
    main()
