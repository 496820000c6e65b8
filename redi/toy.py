"""The paper's situation in miniature: an impatient teacher's traces, an untrained student, and a
benchmark, for a CPU and a few minutes.

    python -m redi.toy OUT       OUT/raw.parquet      teacher traces, with OpenR1-Math-Raw's fields
                                 OUT/student/         an untrained model, a Hugging Face folder
                                 OUT/benchmark.jsonl  problems that no trace is about
                                 OUT/rows.jsonl       with --right-rows: labeled traces
                                 OUT/config.toml      the flags

    Compute modulo 10 from left to right: 6-1-9*7=?        <think>
                                                           6-1=5
                                                           5-9=6
                                                           6*7=2
                                                           </think>
                                                           \\boxed{2}

The teacher sometimes guesses, and rejection sampling keeps its lucky guesses. So the student, a
Qwen2 of 0.4 M parameters with its byte-level BPE and ChatML, learns to guess, and only the wrong
traces tell it that guessing fails. The teacher can have other faults (ToyConfig).

Traces are drawn until one is right. Mislabelled traces have a random generator to themselves, so a
larger share of them includes those of a smaller one, and all other traces stay the same. None is a
trace that its problem has already, so no pair is lost.

Labeled traces are ten per problem, of which --right-rows are right, drawn from what the teacher
writes when it is right, and the others from what it writes when it is wrong. They too have a
generator to themselves, and those of one problem and position are the same whatever --right-rows.
"""

import json
import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from redi.checkpoint.config_json import read_config
from redi.checkpoint.folder import Source, save_model
from redi.config import UserError, may_change, parse, program, require, to_toml
from redi.data.files import make_folder, write_aside
from redi.data.tokenizer import ChatTokenizer
from redi.model import Transformer

MAX_TRACES = 8  # drawn per problem, until one is right
MAX_REPEATS = 2  # of the chain, in a rambling trace
MAX_TRIES = 10_000  # for a trace with a given label
ROWS_PER_PROBLEM = 10
VOCABULARY = 320  # 256 bytes, 3 control tokens, and a few merges
# Qwen2's: letters in words, digits one by one, punctuation with the newlines after it.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
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
class ToyConfig:
    """The faults of teacher and verifier have the demo's defaults. After a slip, the lines that
    follow are wrong too; multiplications first may be right by accident; rambling is as often right
    as the rest."""

    out: Annotated[str, "folder to write", may_change]
    problems: Annotated[int, "problems given to the teacher"] = 5000
    benchmark: Annotated[int, "problems kept for evaluation"] = 300
    operations: Annotated[int, "in a problem"] = 6
    seed: Annotated[int, "of problems, traces and weights"] = 42
    benchmark_seed: Annotated[int | None, "of the benchmark; none: it depends on the seed"] = None
    impatience: Annotated[float, "chance to jump to an answer before an operation"] = 0.25
    luck: Annotated[float, "chance that such an answer is right"] = 0.5
    slip: Annotated[float, "chance that a careful step is off by one"] = 0.01
    precedence: Annotated[float, "chance to do multiplications first in a trace"] = 0.0
    rambling: Annotated[float, "chance to go over the chain again, twice at most"] = 0.0
    mislabelled_rejected: Annotated[float, "share of the traces called wrong that are right"] = 0.0
    right_rows: Annotated[int | None, "also write rows: 10 per problem, this many right"] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):
                require(0 <= value <= 1, name, value, "within [0, 1]")
        for name in ("problems", "benchmark", "operations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.operations <= 40, "operations", self.operations, "at most 40")
        in_range = self.right_rows is None or 0 < self.right_rows < ROWS_PER_PROBLEM
        require(in_range, "right_rows", self.right_rows, f"1 to {ROWS_PER_PROBLEM - 1}")


# ---------------------------------------------------------------- problems


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


def apply(left: int, operation: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operation] % 10


def draw_problems(
    rng: random.Random, count: int, operations: int, others: Iterable[Problem] = ()
) -> list[Problem]:
    """`count` different problems, none of them in `others`."""
    problems = {problem.text: problem for problem in others}
    first = len(problems)
    while len(problems) < first + count:
        steps = tuple((rng.choice("+-*"), rng.randint(1, 9)) for _ in range(operations))
        problem = Problem(rng.randint(1, 9), steps)
        problems.setdefault(problem.text, problem)
    return list(problems.values())[first:]


# ---------------------------------------------------------------- traces


def draw_trace(rng: random.Random, problem: Problem, faults: ToyConfig) -> tuple[str, bool]:
    """(trace, whether its answer is right)"""
    lines, repeats = [], 0
    precedence = happens(rng, faults.precedence)
    value = _calculate(rng, problem, faults, precedence, lines)
    while value is not None and repeats < MAX_REPEATS and happens(rng, faults.rambling):
        value, repeats = _calculate(rng, problem, faults, precedence, lines), repeats + 1
    if value is None:  # a guess
        value = problem.answer
        if rng.random() >= faults.luck:
            value = rng.choice([digit for digit in range(10) if digit != problem.answer])
    trace = f"<think>\n{''.join(lines)}</think>\n\\boxed{{{value}}}"
    return trace, value == problem.answer


def _calculate(
    rng: random.Random, problem: Problem, faults: ToyConfig, precedence: bool, lines: list[str]
) -> int | None:
    """The teacher's result, or None once it is impatient. precedence: multiplications first, as is
    usual, but not what the problem says. Adds to the trace's lines."""
    operations, operands = map(list, zip(*problem.steps))
    values = [problem.first, *operands]
    while operations:
        if len(operations) > 1 and rng.random() < faults.impatience:
            return None
        at = operations.index("*") if precedence and "*" in operations else 0
        left, operation, right = values[at], operations.pop(at), values.pop(at + 1)
        values[at] = apply(left, operation, right)
        if rng.random() < faults.slip:
            values[at] = (values[at] + rng.choice((-1, 1))) % 10
        lines.append(f"{left}{operation}{right}={values[at]}\n")
    return values[0]


def happens(rng: random.Random, chance: float) -> bool:
    """Draws no random number for a chance of 0, so a fault that is left out changes no trace."""
    return chance > 0 and rng.random() < chance


# ---------------------------------------------------------------- rows


def raw_row(
    rng: random.Random, verifier: random.Random, problem: Problem, faults: ToyConfig
) -> dict[str, Any]:
    """Traces drawn until one is called right, as a row of OpenR1-Math-Raw."""
    traces: list[str] = []
    labels: list[bool] = []
    while len(traces) < MAX_TRACES and True not in labels:
        trace, is_right = draw_trace(rng, problem, faults)
        traces.append(trace)
        labels.append(is_right)
    drawn = tuple(traces)
    for position, is_right in enumerate(labels):
        draw, trace_rng = verifier.random(), random.Random(verifier.getrandbits(64))
        if not is_right and draw < faults.mislabelled_rejected:
            traces[position] = draw_labeled(trace_rng, problem, faults, True, drawn)
    verifiers = ("llama_verification", "math_verify_answer", "math_verify_reparsed_answer")
    return {
        "problem": problem.text, "solution": "", "answer": str(problem.answer),
        "problem_type": "Algebra", "question_type": "math-word-problem",
        "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "toy", "synthetic": True,
        "generations": traces, "generations_count": len(traces),
        "correctness": dict.fromkeys(verifiers, labels),
        "reparsed_answers": [trace[trace.index("{") + 1 : -1] for trace in traces],
    }  # fmt: skip


def labeled_rows(
    rng: random.Random, problem: Problem, faults: ToyConfig
) -> Iterator[dict[str, Any]]:
    """Rows of stage 2, of which `right_rows` are right. Which positions these are, and a position's
    right and wrong trace, depend on rng alone."""
    order = rng.sample(range(ROWS_PER_PROBLEM), ROWS_PER_PROBLEM)
    for rank in order:
        seeds = {label: rng.getrandbits(64) for label in (True, False)}
        label = rank < faults.right_rows
        trace = draw_labeled(random.Random(seeds[label]), problem, faults, label)
        yield {"prompt": problem.text, "completion": trace, "label": label}


def draw_labeled(
    rng: random.Random,
    problem: Problem,
    faults: ToyConfig,
    label: bool,
    known: Collection[str] = (),
) -> str:
    """A right or a wrong trace that is not among the known ones. Raises UserError if this teacher
    never writes one."""
    for _ in range(MAX_TRIES):
        trace, is_right = draw_trace(rng, problem, faults)
        if is_right == label and trace not in known:
            return trace
    flag, kind = ("--mislabelled-rejected", "other ") if known else ("--right-rows", "")
    raise UserError(
        f"{flag}: this teacher writes no {kind}{'right' if label else 'wrong'} trace of "
        f"{problem.text!r} in {MAX_TRIES:,} tries; change its other faults"
    )


# ---------------------------------------------------------------- the student


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
    tokenizer = train_tokenizer([*texts, CHATML])
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    make_folder(folder)
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHATML}
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


# ---------------------------------------------------------------- the program


@program
def main() -> None:
    import pyarrow.parquet

    config = parse(ToyConfig, "Write raw teacher traces, an untrained student and a benchmark.")
    operations = config.operations
    if config.problems + config.benchmark > 0.5 * 9 * 27**operations:
        raise UserError(f"--problems {config.problems}: too many for {operations} operations")
    # No problem of the benchmark has a trace, in either order of drawing.
    rng = random.Random(config.seed)
    if config.benchmark_seed is None:
        taught = draw_problems(rng, config.problems, operations)
        held_out = draw_problems(rng, config.benchmark, operations, others=taught)
    else:
        benchmark_rng = random.Random(config.benchmark_seed)
        held_out = draw_problems(benchmark_rng, config.benchmark, operations)
        taught = draw_problems(rng, config.problems, operations, others=held_out)
    verifier = random.Random(f"{config.seed} verifier")
    rows = [raw_row(rng, verifier, problem, config) for problem in taught]
    tests = [
        {"id": number, "problem": problem.text, "answer": str(problem.answer)}
        for number, problem in enumerate(held_out)
    ]
    files = {"benchmark.jsonl": tests}
    if config.right_rows:
        rng = random.Random(f"{config.seed} rows")
        files["rows.jsonl"] = [row for one in taught for row in labeled_rows(rng, one, config)]

    out = Path(config.out)
    make_folder(out)
    with write_aside(out / "config.toml") as file:
        file.write(to_toml(config))
    with write_aside(out / "raw.parquet", binary=True) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for name, content in files.items():
        with write_aside(out / name) as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
    # A thousand rows hold every merge that a vocabulary of this size has room for.
    texts = [text for row in rows[:1000] for text in (row["problem"], *row["generations"])]
    make_student(out / "student", texts, config.seed)
    right = sum(row["correctness"]["llama_verification"][0] for row in rows) / len(rows)
    traces = sum(len(row["generations"]) for row in rows)
    print(
        f"{out}: raw.parquet ({len(rows):,} problems, {traces:,} traces, {right:.0%} right at the "
        "first try), student/, "
        + ", ".join(f"{name} ({len(content):,} rows)" for name, content in files.items())
    )


if __name__ == "__main__":
    main()
