"""Hugging Face folders in and out, and the checkpoints a killed run resumes from.

weights.py       safetensors -> parameters, checked by their headers first
folder.py        the model folder: load_model, save_model
resume.py        weights and optimizer state of a run, to resume to the same bits
reference.py     cached log-probs of the reference model
__main__.py      export a checkpoint as a model folder
"""

from redi.checkpoint.folder import load_model, save_model

__all__ = ["load_model", "save_model"]
