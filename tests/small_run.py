"""A small training run: a student of two layers, its rows, the programs' settings, an oracle."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks
from safetensors.torch import load_file

from redi import programs, recipe
from redi import run as run_module
from redi.batches import TrainData
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.distributed import World
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.model import Transformer
from redi.objectives import Objective, sft
from redi.runlog import read_metrics

PAIRS = 10
HERE = World(0, 1, torch.device("cpu"))
HOT = Sampling(temperature=1.0, top_p=0.95, seed=1)


def conversation(number: int) -> dict[str, list]:
    """A problem, a right trace and a wrong one, of lengths that differ from row to row."""
    digits = "+".join(str((number * 7 + i) % 10) for i in range(2 + number % 3))
    right = sum(map(int, digits.split("+")))

    def trace(answer: int, sure: bool) -> list[dict[str, str]]:
        thought = f"<think>\n{digits} is {answer}\n</think>\n" if sure else ""
        return [{"role": "assistant", "content": f"{thought}\\boxed{{{answer}}}"}]

    return {
        "prompt": [{"role": "user", "content": f"Compute {digits}=?"}],
        "chosen": trace(right, sure=True),
        "rejected": trace(right + 1, sure=number % 2 == 0),
    }


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def labeled(rows: list[dict]) -> list[dict]:
    """Each pair as two labeled rows, the right one first."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in rows
        for side, label in sides
    ]


def as_positive(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion": row["chosen"]}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------- settings of the two programs

LENGTHS = {"max_prompt": 100, "max_response": 100, "max_length": 200}
SETTINGS = {"model": "student", "out": "run", "lr": 1e-3, "rows_per_step": 4, **LENGTHS}
KEEP = {"rope_theta": "keep", "max_position_embeddings": "keep"}
OF_SFT = {**SETTINGS, **KEEP, "data": "positives.jsonl"}
OF_REDI = {**SETTINGS, "data": "pairs.jsonl"}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


# 10 rows, 4 per step, 2 epochs: 6 steps; step 3 ends an epoch. Checkpoints after steps 2 and 4,
# right after a held-out loss, which is a pass without gradients: the save must find shards again.
TWICE = {"cache": "tokens", "epochs": 2}
SAVED = {"save_every": 2, "keep": 1, "eval_data": "positives.jsonl", "eval_every": 2}
SFT = flags({**OF_SFT, **TWICE, **SAVED})
REDI = flags({**OF_REDI, **TWICE})


def sft_config(**changes) -> recipe.SFTConfig:
    return recipe.SFTConfig(**{**OF_SFT, "epochs": 1, **changes})


def redi_config(**changes) -> recipe.REDIConfig:
    return recipe.REDIConfig(**{**OF_REDI, "epochs": 1, **changes})


def objective_of(config: recipe.TrainConfig) -> Objective:
    return config.make_objective() if isinstance(config, recipe.REDIConfig) else sft()


def run(config: recipe.TrainConfig) -> list[dict]:
    """Run the program of this configuration in this process. Returns its records."""
    run_module.run(config, objective_of(config), programs.prepare_score)
    return list(read_metrics(Path(config.out)))


def steps(records: list[dict], kind: str = "train") -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def loaded(config) -> tuple[Transformer, TrainData]:
    """The model and the rows of this configuration, without a run."""
    model, source = load_model(config.model)
    objective = objective_of(config)
    dataset = run_module.load_data(config.data, config, source, objective)
    return model, TrainData(dataset, objective, HERE, config.pack_tokens)


class Oracle:
    """transformers' Qwen2 in float64, one row at a time, with the template rendered by hand."""

    def __init__(self, folder: str):
        from tokenizers import Tokenizer
        from transformers import Qwen2ForCausalLM

        self.model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def logps(self, row: dict, field: str) -> torch.Tensor:
        """Log-probs of the response's tokens, <|im_end|> the last of them."""
        logps, response = self.all_logps(row, field)
        return logps.gather(1, response[:, None])[:, 0]

    def all_logps(self, row: dict, field: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of all tokens at all positions of a response (|y|, V), and its ids (|y|,)."""
        user, answer = row["prompt"][0]["content"], row[field][0]["content"]
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = self.tokenizer.encode(prompt).ids
        response_ids = self.tokenizer.encode(f"{answer}<|im_end|>").ids
        logits = self.model(torch.tensor([prompt_ids + response_ids])).logits[0]
        positions = torch.arange(len(prompt_ids), len(prompt_ids) + len(response_ids))
        return F.log_softmax(logits, -1)[positions - 1], torch.tensor(response_ids)

    def entropy(self, row: dict, field: str) -> float:
        """Mean, over the response's tokens, of the entropy they were predicted with."""
        logps = self.all_logps(row, field)[0].detach()
        return -(logps.exp() * logps).sum(-1).mean().item()

    def gradient_norm(self) -> float:
        return math.sqrt(sum(p.grad.pow(2).sum().item() for p in self.model.parameters()))


# ---------------------------------------------------------------- what a run leaves behind

TIMING = {"seconds", "memory_gib"}  # the fields of a record that differ from run to run

RUN_FILES = {"checkpoints", "config.toml", "metrics.jsonl"}
MODEL_FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def records(out: str | Path = "run") -> list[dict[str, Any]]:
    """Metrics without timing fields and without the records of a stop."""
    found = [record for record in read_metrics(Path(out)) if record["kind"] != "stopped"]
    return [{key: r[key] for key in r if key not in TIMING} for r in found]


def assert_same_bits(out: str | Path, as_out: str | Path) -> None:
    assert records(out) == records(as_out)
    one, other = (Path(folder, "model.safetensors").read_bytes() for folder in (out, as_out))
    assert one == other


def saved(out: str | Path = "run") -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    return sorted(int(p.name.removeprefix("step-")) for p in Path(out).glob("checkpoints/step-*"))


def files_in(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refusal(call: Callable, *arguments: Any, **settings: Any) -> str:
    """The message, of one line, of the UserError that this call raises."""
    with pytest.raises(UserError) as refused:
        call(*arguments, **settings)
    message = str(refused.value)
    del refused  # its traceback would keep a run's lock
    assert "\n" not in message
    return message


def assert_resumes_to_the_same_bits(folder: Path, num_ranks: int = 1) -> str:
    """Start the command SFT again: run/ ends with the bits of whole/. Returns what it printed."""
    again, *_ = run_ranks(folder, SFT, num_ranks)
    assert_same_bits(folder / "run", folder / "whole")
    return again.shown


# ---------------------------------------------------------------- requests for answers


def random_requests(count: int, seed: int = 0, longest: int = 128) -> list[Request]:
    """Prompts of 1 to 40 of 320 tokens, three samples each, and up to `longest` new tokens, in a
    context of 128."""
    rng = np.random.default_rng(seed)
    requests = []
    for key in range(count):
        if key % 3 == 0:
            prompt = tuple(rng.integers(0, 320, rng.integers(1, 41)).tolist())
        limit = int(rng.integers(1, min(longest, 128 - len(prompt)) + 1))
        requests.append(Request(key, prompt, limit))
    return requests


def answers(model, requests, slots, sampling=HOT, stop_ids=(), budget=None, usage=None):
    """What `generate` returns, in the order of the keys."""
    found = generate(model, requests, stop_ids, sampling, slots, budget, usage)
    return sorted(found, key=lambda result: result.key)


def bytes_of_pages(model, count: int, tokens: int = 4) -> int:
    """Of keys and values of so many tokens per page."""
    config, dtype = model.config, model.output_weight.dtype
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    return count * tokens * per_token
