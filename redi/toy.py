"""An impatient teacher: the paper's situation in miniature, for a CPU and a few minutes.

    Compute modulo 10 from left to right: 6-1-9*7=?        <think>
                                                           6-1=5
                                                           5-9=6
                                                           6*7=2
                                                           </think>
                                                           \\boxed{2}

The teacher works such a chain out a line at a time, but before each operation except the last it
may lose patience and state an answer at once, right by luck or else a wrong digit; and each step it
does take may slip by one. Traces are drawn until one is right, so what rejection sampling keeps
holds lucky guesses: the student learns to guess, and cannot do in its head what the teacher does.
Only the wrong traces tell it that guessing fails.

    python -m redi.toy OUT       OUT/raw.parquet      teacher traces, with OpenR1-Math-Raw's fields
                                 OUT/student/         an untrained model, a Hugging Face folder
                                 OUT/benchmark.jsonl  problems that no trace is about

Everything after this file is the real path: the same programs, byte-level BPE with Qwen2's
pre-tokenization, ChatML, a Qwen2 of 0.4 M parameters.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from redi.checkpoint import Source, save_model
from redi.config import UserError, parse, program, require
from redi.data.files import make_folder, write_aside
from redi.data.tokenizer import ChatTokenizer, chatml
from redi.model import ModelConfig, Transformer

MAX_TRACES = 8  # drawn per problem, until one is right
VOCABULARY = 320  # 256 bytes, 3 control tokens, and the merges that this text is worth
# Qwen2's: letters in words, digits one by one, punctuation with the newlines after it.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2's own 0.02 leaves so small a network at chance after eight epochs.
INIT_STD = 0.08
STUDENT = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}


@dataclass(kw_only=True)
class ToyConfig:
    out: Annotated[str, "folder to write"]
    problems: Annotated[int, "that the teacher is asked"] = 5000
    benchmark: Annotated[int, "problems kept for evaluation"] = 300
    operations: Annotated[int, "in a problem"] = 6
    impatience: Annotated[float, "chance to jump to an answer before an operation"] = 0.25
    luck: Annotated[float, "chance that such an answer is right"] = 0.5
    slip: Annotated[float, "chance that a careful step is off by one"] = 0.01
    seed: Annotated[int, "of problems, traces and weights"] = 42

    def __post_init__(self) -> None:
        for name in ("problems", "benchmark", "operations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.operations <= 40, "operations", self.operations, "at most 40")
        for name in ("impatience", "luck", "slip"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "within [0, 1]")


# ---------------------------------------------------------------- the teacher


@dataclass(frozen=True)
class Problem:
    first: int
    steps: tuple[tuple[str, int], ...]  # (operation, operand)

    @property
    def text(self) -> str:
        chain = "".join(f"{operation}{operand}" for operation, operand in self.steps)
        return f"Compute modulo 10 from left to right: {self.first}{chain}=?"

    @property
    def answer(self) -> int:
        value = self.first
        for operation, operand in self.steps:
            value = apply(value, operation, operand)
        return value


def apply(value: int, operation: str, operand: int) -> int:
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operation] % 10


def draw_problem(rng: random.Random, operations: int) -> Problem:
    steps = tuple((rng.choice("+-*"), rng.randint(1, 9)) for _ in range(operations))
    return Problem(rng.randint(1, 9), steps)


def draw_trace(rng: random.Random, problem: Problem, config: ToyConfig) -> tuple[str, bool]:
    """A trace of the teacher's, and whether its answer is right."""
    value, lines = problem.first, []
    for position, (operation, operand) in enumerate(problem.steps):
        if position < len(problem.steps) - 1 and rng.random() < config.impatience:
            value = problem.answer
            if rng.random() >= config.luck:
                value = rng.choice([digit for digit in range(10) if digit != problem.answer])
            break
        result = apply(value, operation, operand)
        if rng.random() < config.slip:
            result = (result + rng.choice((-1, 1))) % 10
        lines.append(f"{value}{operation}{operand}={result}\n")
        value = result
    trace = f"<think>\n{''.join(lines)}</think>\n\\boxed{{{value}}}"
    return trace, value == problem.answer


def raw_row(rng: random.Random, problem: Problem, config: ToyConfig) -> dict[str, Any]:
    """Traces drawn until one is right, as a row of OpenR1-Math-Raw."""
    traces: list[str] = []
    labels: list[bool] = []
    while len(traces) < MAX_TRACES and True not in labels:
        trace, is_right = draw_trace(rng, problem, config)
        traces.append(trace)
        labels.append(is_right)
    return {
        "problem": problem.text,
        "solution": "",
        "answer": str(problem.answer),
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "toy",
        "synthetic": True,
        "generations": traces,
        "generations_count": len(traces),
        "correctness": {
            "llama_verification": labels,
            "math_verify_answer": labels,
            "math_verify_reparsed_answer": labels,
        },
        "reparsed_answers": [trace[trace.index("{") + 1 : -1] for trace in traces],
    }


# ---------------------------------------------------------------- the student


def train_tokenizer(texts: list[str]):
    """A byte-level BPE over `texts`, built as Qwen2's is."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_student(folder: Path, texts: list[str], seed: int) -> None:
    """Write an untrained model with its tokenizer as a Hugging Face folder."""
    tokenizer = train_tokenizer([*texts, chatml(system=None)])
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(chatml(system=None))
    # Sizes that are multiples of 64 multiply faster, as in Qwen2's padded vocabulary.
    padded = -(-tokenizer.get_vocab_size() // 64) * 64
    config = {**STUDENT, "vocab_size": padded, "eos_token_id": end_of_text}
    model = Transformer(ModelConfig.from_json(config, "toy"))
    initialise(model, seed)
    chat = ChatTokenizer.from_folder(folder)
    stop_ids = [chat.stop_id, end_of_text]
    source = Source("toy", folder, config, {}, torch.float32, chat, stop_ids)
    save_model(model, folder, source)


def initialise(model: nn.Module, seed: int) -> None:
    """Matrices and embedding from N(0, INIT_STD^2), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)
        else:
            nn.init.zeros_(parameter)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)


@program
def main() -> None:
    config = parse(
        ToyConfig, "Write the toy: raw teacher traces, an untrained student, a benchmark."
    )
    rng = random.Random(config.seed)
    problems: dict[str, Problem] = {}
    wanted = config.problems + config.benchmark
    if wanted > 0.5 * 9 * 27**config.operations:
        raise UserError(
            f"--problems {config.problems}: too many for {config.operations} operations"
        )
    while len(problems) < wanted:  # all different: the benchmark is about none of the traces
        problem = draw_problem(rng, config.operations)
        problems[problem.text] = problem
    asked = list(problems.values())
    rows = [raw_row(rng, problem, config) for problem in asked[: config.problems]]

    out = Path(config.out)
    make_folder(out)
    write_parquet(rows, out / "raw.parquet")
    with write_aside(out / "benchmark.jsonl") as file:
        for number, problem in enumerate(asked[config.problems :]):
            row = {"id": number, "problem": problem.text, "answer": str(problem.answer)}
            file.write(json.dumps(row) + "\n")
    # A thousand rows hold every merge that a vocabulary of this size has room for.
    texts = [text for row in rows[:1000] for text in (row["problem"], *row["generations"])]
    make_student(out / "student", texts, config.seed)
    right = sum(row["correctness"]["llama_verification"][0] for row in rows)
    traces = sum(len(row["generations"]) for row in rows)
    print(
        f"{out}: raw.parquet ({len(rows):,} problems, {traces:,} traces; the "
        f"teacher's first try is right on {right / len(rows):.0%}), student/, benchmark.jsonl "
        f"({config.benchmark:,} problems)"
    )


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with write_aside(path, binary=True) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


if __name__ == "__main__":
    main()
