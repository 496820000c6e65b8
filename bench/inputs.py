"""What whole training steps are measured on: a model without training, and rows of random words.

    folder/model         a Hugging Face folder with its tokenizer, a word a token
    folder/rows.jsonl    {"prompt", "completion"}, as train_sft.py and TRL's SFT read them
    folder/pairs.jsonl   {"prompt", "chosen", "rejected"}, as train_redi.py and TRL's DPO read them

Lengths follow the log-normal law of bench/plan.py, scaled to the longest row: 1024 tokens for a
median of 138. Left out: real text. A step's time knows lengths, not words.
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from redi.eval.engine.generate import Request
from redi.model import ModelConfig, Transformer
from redi.trace import published as law

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["user", "assistant"]
FIRST_WORD = len(CONTROL) + len(ROLES)
FRAME = 6  # <|im_start|> user ... <|im_end|> <|im_start|> assistant ... <|im_end|>
LONGEST, VOCABULARY = 1024, 8192
ROWS, PAIRS = 16, 8
SMOLLM2_135M = {  # of HuggingFaceTB/SmolLM2-135M's config.json
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49_152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def write_inputs(
    folder: Path,
    sizes: dict[str, Any],
    rows: int = ROWS,
    pairs: int = PAIRS,
    longest: int = LONGEST,
) -> None:
    """FOLDER/model, FOLDER/rows.jsonl and FOLDER/pairs.jsonl; the same for the same arguments.
    sizes: fields of config.json, in place of those of the toy's student."""
    write_model(folder / "model", {**sizes, "max_position_embeddings": longest})
    vocabulary = sizes["vocab_size"]
    rng, scale = np.random.default_rng(0), longest / law.LONGEST_TRACE
    traces = lengths(rng, rows, scale * law.MEDIAN_TRACE, longest)
    write_jsonl(folder / "rows.jsonl", rng, {"completion": traces}, vocabulary)
    sides = {
        "chosen": lengths(rng, pairs, scale * law.MEDIAN_CHOSEN, longest),
        "rejected": lengths(rng, pairs, scale * law.MEDIAN_REJECTED, longest),
    }
    write_jsonl(folder / "pairs.jsonl", rng, sides, vocabulary)


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from redi.checkpoint.config_json import read_config
    from redi.checkpoint.folder import Source, save_model
    from redi.toy import CHATML, STUDENT, initialize

    config = {**STUDENT, **sizes}
    model = Transformer(read_config(config, "bench"))
    initialize(model, seed=0)
    stop_ids = [CONTROL.index("<|im_end|>")]
    save_model(model, folder, Source("bench", folder, config, {}, torch.float32, None, stop_ids))

    words = [*CONTROL, *ROLES, *map(str, range(FIRST_WORD, config["vocab_size"]))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=CONTROL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(CONTROL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=CONTROL[0],
        unk_token=CONTROL[0],
        chat_template=CHATML,
    ).save_pretrained(folder)


def lengths(rng: np.random.Generator, count: int, median: float, longest: int) -> list[int]:
    """Of `count` rows, prompt included: the quantiles of the law, so that a few rows are as uneven
    as many, in random order."""
    normal = statistics.NormalDist()
    scores = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    drawn = np.minimum(median * np.exp(law.SIGMA * scores), longest)
    return [int(length) for length in rng.permutation(drawn)]


def write_jsonl(
    path: Path, rng: np.random.Generator, sides: dict[str, list[int]], vocabulary: int = VOCABULARY
) -> None:
    """A row for each length. sides: the name of an answer -> tokens of prompt and answer together
    (a word of each is the least there is)."""

    def words(count: int) -> str:
        return " ".join(map(str, rng.integers(FIRST_WORD, vocabulary, max(count, 1))))

    with open(path, "w", encoding="utf-8") as file:
        for whole in zip(*sides.values()):
            question = int(rng.integers(2, 8))
            row = {"prompt": [{"role": "user", "content": words(question)}]}
            for side, length in zip(sides, whole):
                answer = words(length - question - FRAME)
                row[side] = [{"role": "assistant", "content": answer}]
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- without files


def random_model(config: ModelConfig, device: torch.device) -> Transformer:
    """In fp32, made on the device: weights from N(0, 0.02^2) as in Qwen2, norms 1, biases 0."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
    return model


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Fields of config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
    }


def random_requests(config: ModelConfig, counts: np.ndarray, limit: int) -> list[Request]:
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(config.vocab_size, size=count).tolist()) for count in counts]
    return [Request(key, prompt, limit) for key, prompt in enumerate(ids)]


def requests_under_way(
    config: ModelConfig, slots: int, median: float, prompt: int
) -> list[Request]:
    """Requests of an evaluation that has run for long: first texts at a random position of answers
    drawn in proportion to their length, then fresh prompts, 16 answers to each. median: of the
    answers' lengths; prompt: tokens."""
    rng, prompt = np.random.default_rng(0), min(prompt, config.max_positions // 4)
    answers = law.draw(rng, 100_000, median, config.max_positions - prompt)
    met = rng.choice(answers, slots, p=answers / answers.sum())
    written = (rng.random(slots) * met).astype(np.int64)
    begun = random_requests(config, prompt + written, limit=0)
    requests = [replace(r, max_new_tokens=int(left)) for r, left in zip(begun, met - written)]
    problems = random_requests(config, np.full(slots // 4 + 1, prompt), limit=0)
    for number, limit in enumerate(rng.choice(answers, 16 * len(problems)).tolist()):
        requests.append(Request(slots + number, problems[number // 16].prompt_ids, limit))
    return requests
