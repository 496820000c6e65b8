"""Tiny Qwen2 models and tokenizers, saved by the libraries that the tests compare with."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from redi.data.tokenizer import chatml
from redi.toy.student import train_tokenizer

# Without a GPU, Triton runs kernels in its interpreter. It reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples at every run: a suite that fails by chance tells nobody which change broke it.
settings.register_profile("redi", derandomize=True)
settings.load_profile("redi")

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Runs of spaces and newlines become tokens, so that a cut in the wrong place shows.
WORDS = ["Compute 6-1-9*7=? <think>\n6-1=5\n</think>\n\\boxed{2}", *["a\n\nb  c \n\n\nd"] * 20]


@pytest.fixture(scope="session")
def save_qwen2() -> Callable:
    """save_qwen2(folder, **configuration) -> the random transformers model it saved there."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def save(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
        settings = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        }
        model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes})).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():  # biases and norms too
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_((1 if "norm" in name else 0) + 0.2 * noise)
        model.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer, trained on a few words."""
    return train_tokenizer([*WORDS, chatml()] * 4).to_str()


@pytest.fixture(scope="session")
def save_tokenizer(tokenizer_json: str) -> Callable:
    """save_tokenizer(folder, template, **settings) writes tokenizer.json and its settings."""

    def save(folder: Path, template: str | None = None, **settings) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer_json)
        defaults = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        settings = {**defaults, "chat_template": template or chatml(), **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return save
