"""The peers of G4 and G5: TRL's trainers on the same rows, at the same size, on the same GPU.

    SFT   packing=True: packs of 32,768 tokens, one at a time
    DPO   padded (TRL has no other way), a pair at a time, which is the least padding; its reference
          log-probs are precomputed, outside the clock

Both as a user would set them for speed: fp32 weights under bf16 autocast (what ours keeps as well),
Liger's layers where liger-kernel is installed (TRL has a fused head of its own), flash-attn where
it is installed and otherwise torch's SDPA, or flex attention. Activation checkpointing is off, and
on if memory runs out. TRL's metrics stay on. Weights are random, made on the device; a tokenizer of
numbers reads the random tokens. An epoch is one step, as in bench.gpu_steps, and the clock runs
from one step's log to the next one's; the first step is not timed.
"""

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_attention import TOKENS
from bench.gpu_meter import Entries, has, peak
from bench.gpu_steps import PROMPT, SHAPE, pair_lengths, trace_lengths
from bench.measure import result
from redi.model import ModelConfig

STEPS = 4
SECONDS = 75.0  # from the first step's end; the step that passes it is the last
STOP = "<|endoftext|>"


@dataclass(frozen=True)
class Peer:
    """What TRL trains, and how."""

    model: ModelConfig
    lengths: np.ndarray  # (N,) of rows, (N, 2) of pairs
    attention: str  # transformers' attn_implementation
    liger: bool
    checkpointing: bool = False
    steps: int = STEPS
    pack_tokens: int = TOKENS

    @property
    def paired(self) -> bool:
        return self.lengths.ndim == 2

    def __str__(self) -> str:
        parts = ["TRL DPO, padded" if self.paired else "TRL SFT, packing", self.attention]
        parts += ["Liger's layers"] * self.liger + ["activation checkpointing"] * self.checkpointing
        return ", ".join(parts)


# ---------------------------------------------------------------- the same rows, as text


def number_tokenizer(vocabulary: int) -> Any:
    """The stop token, and the numbers below `vocabulary` as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {STOP: 0} | {str(number): number for number in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=STOP))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([STOP])
    names = {"eos_token": STOP, "pad_token": STOP, "unk_token": STOP}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def text_rows(lengths: np.ndarray, vocabulary: int) -> list[dict[str, str]]:
    """Rows (N,) or pairs (N, 2) of random numbers. TRL puts the stop token behind a response."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return "".join(f"{number} " for number in rng.integers(1, vocabulary, count))

    sides = ("completion",) if lengths.ndim == 1 else ("chosen", "rejected")
    rows = []
    for whole in lengths.reshape(len(lengths), -1).tolist():
        prompt = min(PROMPT, min(whole) - 2)
        row = {"prompt": words(prompt)}
        rows.append(row | {s: words(n - prompt - 1) for s, n in zip(sides, whole)})
    return rows


# ---------------------------------------------------------------- a few steps of a trainer


def random_model(config: ModelConfig, attention: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    theirs = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            theirs, dtype=torch.float32, attn_implementation=attention
        )


def settings(peer: Peer, folder: Path, device: torch.device) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 1,
        # Whatever is left at the end of an epoch makes a step: packs are fewer than rows.
        "gradient_accumulation_steps": len(peer.lengths),
        "max_steps": peer.steps,
        "learning_rate": 1e-6,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "max_length": max(peer.pack_tokens, int(peer.lengths.max())),
        "gradient_checkpointing": peer.checkpointing,
        "use_liger_kernel": peer.liger,
        "bf16": device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_steps(peer: Peer, device: torch.device) -> list[float]:
    """Real tokens a second of every step but the first. What TRL prints is lost."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            if "loss" in logs:  # the last log is a summary
                times.append(time.perf_counter())
                counted = int(logs["num_tokens"]) // state.global_step
                assert counted == peer.lengths.sum(), f"TRL counts {counted} tokens a step"
                if times[-1] - times[0] > SECONDS:
                    control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        given = settings(peer, Path(folder), device)
        if peer.paired:
            make, config = DPOTrainer, DPOConfig(**given, precompute_ref_log_probs=True)
        else:
            make, config = SFTTrainer, SFTConfig(**given, packing=True)
        trainer = make(
            model=random_model(peer.model, peer.attention, device),
            args=config,
            train_dataset=Dataset.from_list(text_rows(peer.lengths, peer.model.vocab_size)),
            processing_class=number_tokenizer(peer.model.vocab_size),
            callbacks=[Clock()],
        )
        trainer.train()
    if len(times) < 2:
        raise RuntimeError(f"{peer}: no step after the first")
    return [float(peer.lengths.sum()) / taken for taken in np.diff(times).tolist()]


# ---------------------------------------------------------------- measures


def speed(name: str, lengths: np.ndarray, attention: str, device: torch.device) -> Entries:
    liger = has("liger_kernel", name)
    for checkpointing in (False, True):
        peer = Peer(SHAPE, lengths, attention, liger, checkpointing)
        try:
            taken, speeds = peak(partial(train_steps, peer, device), device)
            break
        except torch.OutOfMemoryError:
            if checkpointing:
                raise
            print(f"{name}: out of memory without activation checkpointing; now with it")
    gib = taken / 2**30
    print(f"{peer}: {len(speeds)} steps, {gib:.1f} GiB")
    return {
        f"{name}_tok_s": result(speeds, None, str(peer)),
        f"{name}_gib": result([gib], None, str(peer)),
    }


def sft(device: torch.device) -> Entries:
    attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    return speed("G4_TRL", trace_lengths(), attention, device)


def sft_flex(device: torch.device) -> Entries:
    return speed("G4_TRL_flex", trace_lengths(), "flex_attention", device)


def dpo(device: torch.device) -> Entries:
    attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    return speed("G5_TRL", pair_lengths(), attention, device)
