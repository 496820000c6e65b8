"""Hugging Face folders in and out, and the checkpoints that a run resumes from.

config_json.py   config.json -> ModelConfig
weights.py       safetensors <-> parameters, each rank its own rows
folder.py        load_model, save_model
card.py          the model card, README.md
resume.py        weights and Adam moments of a run
reference.py     cached log-probs of the reference model
"""

from redi.checkpoint.folder import load_model, save_model  # noqa: F401 (re-exported)
