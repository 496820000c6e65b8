"""Tiny models and tokenizers saved by the libraries that tests compare with; small runs."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton runs kernels in its interpreter. It reads this when it is imported, as
# processes.py does through torch._dynamo.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from processes import after_step, run_ranks
from small_run import PAIRS, SFT, as_positive, conversation, run, write_jsonl
from small_template import chatml

from redi import toy
from redi.checkpoint.folder import load_model
from redi.config import Stopped
from redi.data.tokenizer import ChatTokenizer
from redi.model import Transformer
from redi.runlog import NoLog, RunLog

# The same examples at every run: a suite that fails by chance tells nobody which change broke it.
settings.register_profile("redi", derandomize=True)
settings.load_profile("redi")

# The bits of a run depend on the number of threads.
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Runs of spaces and newlines become tokens, so that a cut in the wrong place shows.
WORDS = ["Compute 6-1-9*7=? <think>\n6-1=5\n</think>\n\\boxed{2}", *["a\n\nb  c \n\n\nd"] * 20]


@pytest.fixture(scope="session")
def save_model_of() -> Callable:
    """save_model_of("Qwen3", folder, **configuration) -> the random transformers model of that
    family that it saved there. A field of the configuration that is ... is left out."""
    import transformers

    def save(
        family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes
    ):
        settings = {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 128, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }  # fmt: skip
        settings = {k: v for k, v in {**settings, **changes}.items() if v is not ...}
        config = getattr(transformers, f"{family}Config")(**settings)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():  # biases and norms too
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_((1 if "norm" in name else 0) + 0.2 * noise)
        model.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session")
def save_qwen2(save_model_of) -> Callable:
    """save_qwen2(folder, **configuration) -> the random transformers model it saved there."""
    return partial(save_model_of, "Qwen2")


@pytest.fixture(scope="session")
def qwen2(save_qwen2, tmp_path_factory) -> tuple[Any, Transformer, Transformer]:
    """The same model as transformers has it, as redi loads it, and as redi loads it in float64."""
    folder = tmp_path_factory.mktemp("qwen2")
    peer = save_qwen2(folder)
    return peer, load_model(folder)[0], load_model(folder)[0].double()


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer, trained on a few words."""
    return toy.train_tokenizer([*WORDS, chatml()] * 4).to_str()


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


@pytest.fixture(scope="session")
def make_chat(save_tokenizer: Callable) -> Callable[..., ChatTokenizer]:
    """make_chat(folder, template, **settings) -> the tokenizer of a folder saved with these."""
    return lambda *given, **settings: ChatTokenizer.from_folder(save_tokenizer(*given, **settings))


# ---------------------------------------------------------------- small runs (small_run.py)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """student/, pairs.jsonl and positives.jsonl."""
    folder = tmp_path_factory.mktemp("train")
    rows = [conversation(number) for number in range(PAIRS)]
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "positives.jsonl", [as_positive(row) for row in rows])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STUDENT", {**toy.STUDENT, **sizes})
        texts = [row["chosen"][0]["content"] for row in rows]
        toy.make_student(folder / "student", texts, seed=0)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working folder with the student and its data."""
    monkeypatch.chdir(tmp_path)
    return with_data(tmp_path, made)


@pytest.fixture
def stop_at() -> Callable:
    """stop_at(config, step): run it until SIGTERM stops it after that step."""

    def stop(config, step: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for log in (RunLog, NoLog):  # as they are now, to be restored afterwards
                patch.setattr(log, "record", log.record)
            after_step(step - 1, partial(os.kill, os.getpid(), signal.SIGTERM))()
            with pytest.raises(Stopped, match=f"after step {step} of"):
                run(config)

    return stop


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory) -> Callable[[int], Path]:
    """whole(ranks): a folder with whole/, an undisturbed run on so many ranks, and its tokens."""

    @cache
    def on(num_ranks: int) -> Path:
        folder = with_data(tmp_path_factory.mktemp("whole"), made)
        run_ranks(folder, [*SFT, "--out", "whole"], num_ranks)
        return folder

    return on


@pytest.fixture
def alone(whole, monkeypatch) -> Path:
    """The folder of one rank as the working folder, without run/."""
    return without_run(whole(1), monkeypatch)


@pytest.fixture
def together(whole, monkeypatch) -> Path:
    """The same of two ranks."""
    return without_run(whole(2), monkeypatch)


def without_run(folder: Path, monkeypatch) -> Path:
    shutil.rmtree(folder / "run", ignore_errors=True)
    monkeypatch.chdir(folder)
    return folder


def with_data(folder: Path, made: Path) -> Path:
    """Link the student and its data into the folder."""
    for name in ("student", "pairs.jsonl", "positives.jsonl"):
        (folder / name).symlink_to(made / name)
    return folder
