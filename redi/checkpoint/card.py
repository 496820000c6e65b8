"""The model card: README.md of a saved model, with what it was made from, versions and scores.

Training writes the card without scores. `redi report RUN --card` puts them between two comments, in
place of earlier ones.
"""

import platform
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from redi.config import UserError, to_toml
from redi.data.files import write_aside
from redi.hub import is_hub_id
from redi.recipe import TrainConfig

BEGIN, END = "<!-- scores -->\n", "<!-- end of scores -->\n"
PAPER = "Xu et al., ACL 2026: https://aclanthology.org/2026.acl-long.74/"


def model_card(config: TrainConfig, facts: dict[str, str]) -> str:
    """README.md of a model that a run of `config` saved. facts: what it was made with and from."""
    parent = f"base_model: {config.model}\n" if is_hub_id(config.model) else ""
    versions = {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
    lines = "".join(f"- {key}: {value}\n" for key, value in (facts | versions).items())
    return (
        f"---\nlibrary_name: transformers\ntags: [redi]\n{parent}---\n\n"
        f"# {Path(config.out).name}\n\nTrained with redi (Reinforcement Distillation, arXiv "
        f"2505.24850).\n\n{BEGIN}{END}\n## Made with and from\n\n{lines}\n"
        f"## Settings\n\n```toml\n{to_toml(config)}```\n\n## Citation\n\n{PAPER}\n"
    )


def add_scores(model: Path, scores: Iterable[str]) -> Path:
    """Put paragraphs of Markdown into the card of a model, in place of earlier scores. Returns the
    card. Raises UserError if the model has no card that training wrote."""
    path = model / "README.md"
    utf_8 = {"encoding": "utf-8", "errors": "surrogateescape"}  # other bytes stay as they are
    text = path.read_text(**utf_8) if path.is_file() else ""
    if re.findall(f"{BEGIN}|{END}", text) != [BEGIN, END]:
        raise UserError(f"{path}: expected the model card of a run, with one pair {BEGIN} {END}")
    joined = "\n\n".join(scores)
    before, after = text.split(BEGIN)[0], text.split(END)[-1]
    with write_aside(path, binary=True) as file:
        file.write(f"{before}{BEGIN}\n## Scores\n\n{joined}\n\n{END}{after}".encode(**utf_8))
    return path
