"""The toy: an impatient teacher's traces, an untrained student, and a benchmark.

    python -m redi.toy OUT       OUT/raw.parquet      teacher traces, with OpenR1-Math-Raw's fields
                                 OUT/student/         an untrained model, a Hugging Face folder
                                 OUT/benchmark.jsonl  problems that no trace is about
                                 OUT/config.toml      the flags

The teacher (teacher.py) sometimes guesses, and rejection sampling keeps its lucky guesses. So the
student, a Qwen2 of 0.4 M parameters with its byte-level BPE and ChatML, learns to guess, and only
the wrong traces tell it that guessing fails.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from redi.checkpoint.config_json import read_config
from redi.checkpoint.folder import Source, save_model
from redi.config import UserError, may_change, parse, program, require, to_toml
from redi.data.files import make_folder, write_aside
from redi.data.tokenizer import ChatTokenizer, chatml
from redi.model import Transformer
from redi.toy.teacher import Faults, draw_problems, raw_row

VOCABULARY = 320  # 256 bytes, 3 control tokens, and a few merges
# Qwen2's: letters in words, digits one by one, punctuation with the newlines after it.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# With Qwen2's 0.02, so small a network is still at chance after eight epochs.
INIT_STD = 0.08
STUDENT = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "attention_dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Faults):
    out: Annotated[str, "folder to write", may_change]
    problems: Annotated[int, "problems given to the teacher"] = 5000
    benchmark: Annotated[int, "problems kept for evaluation"] = 300
    operations: Annotated[int, "in a problem"] = 6
    seed: Annotated[int, "of problems, traces and weights"] = 42
    benchmark_seed: Annotated[int | None, "of the benchmark; none: it depends on the seed"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("problems", "benchmark", "operations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.operations <= 40, "operations", self.operations, "at most 40")


def train_tokenizer(texts: list[str]):
    """A byte-level BPE over `texts`, built as Qwen2's is."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_student(folder: Path, texts: list[str], seed: int) -> None:
    """Write an untrained model with its tokenizer as a Hugging Face folder."""
    tokenizer = train_tokenizer([*texts, chatml(system=None)])
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    make_folder(folder)
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": chatml(None)}
    files["tokenizer_config.json"] = json.dumps(settings, indent=2)
    for name, content in files.items():
        with write_aside(folder / name) as file:
            file.write(content)
    # Sizes that are multiples of 64 multiply faster, as in Qwen2's padded vocabulary.
    padded = -(-tokenizer.get_vocab_size() // 64) * 64
    config = {**STUDENT, "vocab_size": padded, "eos_token_id": end_of_text}
    model = Transformer(read_config(config, "toy"))
    initialize(model, seed)
    chat = ChatTokenizer.from_folder(folder)
    stop_ids = [chat.stop_id, end_of_text]
    save_model(model, folder, Source("toy", folder, config, {}, torch.float32, chat, stop_ids))


def initialize(model: nn.Module, seed: int) -> None:
    """Matrices and embedding from N(0, INIT_STD^2), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)


@program
def main() -> None:
    import pyarrow.parquet

    config = parse(ToyConfig, "Write raw teacher traces, an untrained student and a benchmark.")
    if config.problems + config.benchmark > 0.5 * 9 * 27**config.operations:
        raise UserError(
            f"--problems {config.problems}: too many for {config.operations} operations"
        )
    # No problem of the benchmark has a trace, in either order of drawing.
    rng, operations = random.Random(config.seed), config.operations
    if config.benchmark_seed is None:
        taught = draw_problems(rng, config.problems, operations)
        held_out = draw_problems(rng, config.benchmark, operations, others=taught)
    else:
        benchmark_rng = random.Random(config.benchmark_seed)
        held_out = draw_problems(benchmark_rng, config.benchmark, operations)
        taught = draw_problems(rng, config.problems, operations, others=held_out)
    verifier = random.Random(f"{config.seed} verifier")
    rows = [raw_row(rng, verifier, problem, config) for problem in taught]

    out = Path(config.out)
    make_folder(out)
    with write_aside(out / "config.toml") as file:
        file.write(to_toml(config))
    with write_aside(out / "raw.parquet", binary=True) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with write_aside(out / "benchmark.jsonl") as file:
        for number, problem in enumerate(held_out):
            row = {"id": number, "problem": problem.text, "answer": str(problem.answer)}
            file.write(json.dumps(row) + "\n")
    # A thousand rows hold every merge that a vocabulary of this size has room for.
    texts = [text for row in rows[:1000] for text in (row["problem"], *row["generations"])]
    make_student(out / "student", texts, config.seed)
    right = sum(row["correctness"]["llama_verification"][0] for row in rows) / len(rows)
    traces = sum(len(row["generations"]) for row in rows)
    print(
        f"{out}: raw.parquet ({len(rows):,} problems, {traces:,} traces, {right:.0%} right at the "
        f"first try), student/, benchmark.jsonl ({config.benchmark:,} problems)"
    )
