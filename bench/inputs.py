"""What whole training steps are measured on: a model without training, and rows of random words.

    folder/model         a Hugging Face folder with its tokenizer, a word a token
    folder/rows.jsonl    {"prompt", "completion"}, as train_sft.py and TRL's SFT read them
    folder/pairs.jsonl   {"prompt", "chosen", "rejected"}, as train_redi.py and TRL's DPO read them

Lengths follow the log-normal law of bench/plan.py, scaled to the longest row: 1024 tokens for a
median of 138. Left out: real text. A step's time knows lengths, not words.
"""

import json
import statistics
from pathlib import Path

import numpy as np

import bench.plan as law

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["user", "assistant"]
FIRST_WORD = len(CONTROL) + len(ROLES)
FRAME = 6  # <|im_start|> user ... <|im_end|> <|im_start|> assistant ... <|im_end|>
LONGEST, VOCABULARY = 1024, 8192
ROWS, PAIRS = 16, 8


def write_inputs(
    folder: Path,
    hidden: int,
    rows: int = ROWS,
    pairs: int = PAIRS,
    longest: int = LONGEST,
    vocabulary: int = VOCABULARY,
) -> None:
    """FOLDER/model, FOLDER/rows.jsonl and FOLDER/pairs.jsonl; the same for the same arguments."""
    write_model(
        folder / "model",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        max_position_embeddings=longest,
    )
    rng, scale = np.random.default_rng(0), longest / law.LONGEST_TRACE
    traces = lengths(rng, rows, scale * law.MEDIAN_TRACE, longest)
    write_jsonl(folder / "rows.jsonl", rng, {"completion": traces}, vocabulary)
    sides = {
        "chosen": lengths(rng, pairs, scale * law.MEDIAN_CHOSEN, longest),
        "rejected": lengths(rng, pairs, scale * law.MEDIAN_REJECTED, longest),
    }
    write_jsonl(folder / "pairs.jsonl", rng, sides, vocabulary)


def write_model(folder: Path, **sizes: int) -> None:
    """sizes: fields of config.json, in place of those of the toy's student."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from redi.checkpoint.config_json import read_config
    from redi.checkpoint.folder import Source, save_model
    from redi.data.tokenizer import chatml
    from redi.model import Transformer
    from redi.toy.student import STUDENT, initialise

    config = {**STUDENT, **sizes}
    model = Transformer(read_config(config, "bench"))
    initialise(model, seed=0)
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
        chat_template=chatml(system=None),
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
