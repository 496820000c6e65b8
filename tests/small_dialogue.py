"""A tiny model that talks nonsense in the world's scenarios."""

import json
from pathlib import Path

import pytest

from redi import toy
from redi.dialogue.oracle import topics
from redi.dialogue.scenario import Scenario
from redi.dialogue.world import make_dialogue, make_scenario


def world_scenarios(count: int, first: int = 0) -> list[Scenario]:
    """Of as many topics."""
    names = list(topics())[first : first + count]
    return [make_scenario(name, 0, seed=1) for name in names]


def make_talker(folder: Path, context: int = 1024) -> Path:
    """A tiny random model whose tokenizer knows the world's words. Every tenth token ends its turn,
    so that its dialogues have several."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    texts = [m["content"] for one in world_scenarios(10) for m in make_dialogue(one, 1)]
    texts += [one.prompt(view) for one in world_scenarios(10) for view in ("tutor", "student")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STUDENT", {**toy.STUDENT, **sizes, "max_position_embeddings": context})
        patch.setattr(toy, "VOCABULARY", 640)
        toy.make_student(folder, texts, seed=0)
    stops = {"eos_token_id": list(range(0, 640, 10))}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    return folder
