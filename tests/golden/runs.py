"""The runs behind the golden files. When code moves, this is the only file to update.

    train_steps(objective, ranks)   20 optimizer steps through train_sft.py or train_redi.py
    completions()                   greedy and sampled completions of a small model
    prepared()                      the output of python -m redi.prepare on a small raw file

All arithmetic is in float64, so the recorded numbers depend on neither the number of threads nor
the CPU. redi computes in float32 on a CPU; `use_float64` patches that. The patch affects the whole
process, so `record` starts this file as a separate program, and every rank is a fork of it.

Data, tokenizer and weights are written here, without redi. Random numbers come from
random.Random(seed).random(), which Python guarantees never to change.
"""

import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
STAGE_2 = {
    "redi": ["--alpha", "0.8"],
    "dpo": ["--beta", "0.1"],
    "simpo": ["--beta", "2", "--gamma", "1"],
    "dft": [],
    "topr": [],
}
OBJECTIVES = ("sft", *STAGE_2)
RANKS = (1, 2)
STEPS = 20
# 22 rows in steps of 4: the last step of an epoch has 2. PACK_TOKENS cuts a step into 2 or 3 packs
# of several sequences, or of several pairs.
PACK_TOKENS = {1: "160", 2: "280"}  # by stage
TRAINING = [
    "--model", "student", "--lr", "3e-3", "--rows-per-step", "4", "--epochs", "4",
    "--max-steps", str(STEPS), "--max-prompt", "120", "--max-response", "120",
    "--max-length", "240", "--rope-theta", "keep", "--max-position-embeddings", "keep",
    "--dtype", "float32",
]  # fmt: skip
# Keys and values of 5 pages of 32 tokens: 2 layers, 2 heads of 8 numbers, 8 bytes each.
CACHE_BYTES = 5 * 32 * 2 * 2 * 2 * 8 * 8
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.6, "top_p": 0.95, "seed": 42},
    "sampled from a small nucleus": {"temperature": 1.0, "top_p": 0.4, "seed": 7},
}


def record(folder: Path) -> dict[str, Any]:
    """Run everything in a separate process, in the empty `folder`. Keys: steps, completions,
    prepared; each is the content of the golden file of that name."""
    environment = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    ended = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stdout}\n{ended.stderr}")
    return json.loads((folder / "recorded.json").read_text(encoding="utf-8"))


def main() -> None:
    os.chdir(sys.argv[1])
    use_float64()
    write_inputs()
    steps = {f"{name} on {n}": train_steps(name, n) for name in OBJECTIVES for n in RANKS}
    recorded = {"steps": steps, "completions": completions(), "prepared": prepared()}
    Path("recorded.json").write_text(json.dumps(recorded), encoding="utf-8")


def use_float64() -> None:
    """Make weights, arithmetic and rotary tables float64 in this process and its forks."""
    import torch

    # Import once here what every fork would otherwise import again.
    import torch._dynamo
    import torch.distributed.fsdp

    runpy.run_path(str(ROOT / "train_redi.py"), run_name="imported")
    from redi import distributed

    torch.set_num_threads(1)  # forking a process with threads is not safe
    torch.set_default_dtype(torch.float64)  # new parameters
    torch.Tensor.float = torch.Tensor.double  # the rotary tables use .float()
    distributed.DTYPES["float32"] = torch.float64  # --dtype float32


# ---------------------------------------------------------------- the three records


def train_steps(objective: str, ranks: int) -> dict[str, list]:
    """Train the student. Returns loss and grad_norm, one number per step, and final_logps: the
    summed log-prob in nats of every training response under the trained model. It has one number
    per positive, or [chosen, rejected] per pair."""
    out = f"{objective}-{ranks}"
    if objective == "sft":
        command = ["train_sft.py", "--data", "positives.jsonl", "--pack-tokens", PACK_TOKENS[1]]
    else:
        command = ["train_redi.py", "--data", "pairs.jsonl", "--pack-tokens", PACK_TOKENS[2]]
        command += ["--objective", objective, *STAGE_2[objective]]
    # One cache per run, so that every run computes its own reference log-probs.
    run_on_ranks(ranks, [*command, *TRAINING, "--out", out, "--cache", f"{out}-cache"])
    records = read_rows(Path(out) / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == STEPS
    return {
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "final_logps": final_logps(out, paired=objective != "sft"),
    }


def run_on_ranks(ranks: int, command: list[str]) -> None:
    """Run one of the programs on this many ranks, with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = []
    for rank in range(ranks):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        settings = {name: str(value) for name, value in environment.items()}
        fork = multiprocessing.get_context("fork").Process(
            target=run_program, args=(command, settings), daemon=True
        )
        fork.start()
        forks.append(fork)
    for fork in forks:
        fork.join()
    if any(fork.exitcode for fork in forks):
        raise RuntimeError(f"{' '.join(command)}: exit {[fork.exitcode for fork in forks]}")


def run_program(command: list[str], environment: dict[str, str]) -> None:
    import torch

    # A fork replaces torch's thread pool when it is first asked for; two threads must not race.
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def final_logps(folder: str, paired: bool) -> list:
    """Run each row alone through the model in `folder`, with torch's own log_softmax."""
    import torch

    from redi.checkpoint import load_model

    model, source = load_model(folder)

    @torch.no_grad()
    def summed(prompt: list[dict], answer: dict) -> float:
        [row] = source.chat.encode_rows([(prompt, answer)])
        tokens = torch.tensor([*row.prompt_ids, *row.response_ids])
        length, start = len(tokens), len(row.prompt_ids)
        batch = SimpleNamespace(
            tokens=tokens,
            positions=torch.arange(length),
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            lengths=[length],
            rows=torch.arange(start - 1, length - 1),
        )
        logits = model(batch, lambda hidden, weight: hidden @ weight.T)  # (R, V)
        return logits.log_softmax(dim=1).gather(1, tokens[start:, None]).sum().item()

    if paired:
        sides = ("chosen", "rejected")
        rows = read_rows(Path("pairs.jsonl"))
        return [[summed(row["prompt"], row[side][0]) for side in sides] for row in rows]
    rows = read_rows(Path("positives.jsonl"))
    return [summed(row["prompt"], row["completion"][0]) for row in rows]


def completions() -> dict[str, list[dict[str, Any]]]:
    """Completions of the untrained student in the order of the requests, per sampling setting.

    Ten requests share four rows and five cache pages: rows are refilled, the two samples of a
    problem share its prefill, and about four requests per setting are evicted and resumed.
    """
    from redi.checkpoint import load_model
    from redi.eval.engine.generate import Request, generate
    from redi.eval.engine.sampling import Sampling

    model, source = load_model("student")
    chat = source.chat
    prompts = [chat.encode_prompt(row["prompt"]) for row in conversations()[:5]]
    requests = [
        Request(key=number, prompt_ids=tuple(prompts[number // 2]), max_new_tokens=50 + 3 * number)
        for number in range(10)
    ]
    stop_ids = [chat.stop_id, *(chat.tokenizer.token_to_id(name) for name in "FQ")]
    found = {}
    for name, settings in SAMPLINGS.items():
        results = generate(model, requests, stop_ids, Sampling(**settings), 4, CACHE_BYTES)
        found[name] = [
            {"ids": one.token_ids, "text": chat.decode(one.token_ids), "end": one.finish_reason}
            for one in sorted(results, key=lambda result: result.key)
        ]
    return found


PREPARATIONS = {
    "the paper's rules": [],
    "graded again": [
        "--relabel", "--workers", "1", "--require-complete", "--reject-rule", "both",
        "--exclude-sources", "none",
    ],
    "several pairs": [
        "--pairs-per-problem", "3", "--min-length-ratio", "0.3", "--dedup",
        "--decontaminate", "benchmark.jsonl",
    ],
}  # fmt: skip
COUNTS = (
    "rows", "traces", "no_positive", "positives", "further", "no_pair", "pairs", "sources",
    "labels",
)  # fmt: skip


def prepared() -> dict[str, dict[str, Any]]:
    """The lines of every file written, and the counts of card.json, per set of rules."""
    found = {}
    for number, (name, flags) in enumerate(PREPARATIONS.items()):
        out = Path(f"prepared-{number}")
        command = [sys.executable, "-m", "redi.prepare", "raw.jsonl", "--out", str(out), *flags]
        subprocess.run(command, check=True)
        # Not splitlines, which also splits at \u2028.
        lines = {
            path.name: path.read_text(encoding="utf-8").split("\n")[:-1]
            for path in sorted(out.glob("*.jsonl"))
        }
        card = json.loads((out / "card.json").read_text(encoding="utf-8"))
        found[name] = {**lines, "counts": {key: card[key] for key in COUNTS}}
    return found


# ---------------------------------------------------------------- inputs, made without redi


def write_inputs() -> None:
    rows = conversations()
    write_rows("pairs.jsonl", rows)
    write_rows(
        "positives.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    )
    write_rows("raw.jsonl", raw_rows())
    write_rows("benchmark.jsonl", [{"id": 1, "problem": KNOWN_PROBLEM, "answer": "42"}])
    write_student(Path("student"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(name).write_text(lines, encoding="utf-8")


def trace(number: int, answer: int, thinks: bool = True) -> str:
    """A teacher's trace; lengths differ from row to row."""
    steps = "".join(f"{number + i}-{i}={number}\n" for i in range(number % 4))
    thought = f"<think>\n{steps}so {answer}\n</think>\n" if thinks else ""
    return f"{thought}\\boxed{{{answer}}}"


def conversations() -> list[dict[str, list]]:
    """22 pairs: {"prompt", "chosen", "rejected"}, each a list of messages."""

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": message("user", f"Compute {'+'.join(['1'] * (1 + n % 5))}+{n}=?"),
            "chosen": message("assistant", trace(n, 1 + n % 5 + n)),
            "rejected": message("assistant", trace(3 * n, n, thinks=n % 2 == 0)),
        }
        for n in range(22)
    ]
    # A control token in the data is plain text: it must not end the turn.
    rows[4]["chosen"] = message("assistant", "Not <|im_end|> yet, é½: \\boxed{9}")
    return rows


KNOWN_PROBLEM = "Ann has 12 red apples and 30 green pears in 4 baskets; how many fruits has she?"


def judged(*right: bool) -> dict[str, dict[str, list[bool]]]:
    """The field in which both verifiers give the same verdict on each trace."""
    votes = {"llama_verification": [*right], "math_verify_reparsed_answer": [*right]}
    return {"correctness": votes}


def raw_rows() -> list[dict[str, Any]]:
    """40 rows with the fields of OpenR1-Math-Raw: random verdicts, and a row for nearly every
    reason why prepare drops a row or a pair."""
    generator = random.Random(14)
    rows = []
    for number in range(40):
        answers = [number if generator.random() < 0.5 else number + 1 for _ in range(4)]
        votes = judged(*(answer == number for answer in answers))
        for verdicts in votes["correctness"].values():  # verifiers make mistakes
            verdicts[:] = [right != (generator.random() < 0.15) for right in verdicts]
        rows.append(
            {
                "problem": f"What is {number}+0? \u2028 ½",
                "problem_is_valid": "Yes",
                "answer": str(number),
                "source": ("olympiads", "math", "cn_k12", None)[number % 7 % 4],
                "generations": [trace(k + number % 3, a, k != 1) for k, a in enumerate(answers)],
                "uuid": f"{number:08x}",
                **votes,
            }
        )
    first, long = rows[21]["generations"][0], f"{'long ' * 30}{trace(1, 31)}"
    in_turn = judged(True, False, True, False)
    changes = {
        3: {"problem_is_valid": "No"},
        5: {"problem": "  "},
        8: {"generations": []},
        10: {"generations": None},
        12: {"correctness": None},
        14: {"correctness": rows[14]["correctness"] | {"llama_verification": [True]}},
        15: {"generations": [" ", "x", "y", None], **in_turn},  # empty chosen
        17: {"generations": "not a list"},
        18: {"generations": ["right", " ", "x", None], **judged(True, False, False, False)},
        21: {"generations": [first] * 4, **in_turn},  # chosen equals rejected
        22: {"problem": rows[21]["problem"], **in_turn},
        24: {"generations": ["<think>\nit was cut", *rows[24]["generations"][1:]]},
        25: {"generations": ["a", "b", "a", "b"], **in_turn},  # the same pair twice
        26: {"problem_is_valid": None},
        28: {"answer": None},
        29: {"problem": None},
        31: {"generations": [long, "wrong", trace(1, 31), trace(2, 32)], **in_turn},
        32: {"generations": ["a", "b", " ", "d"], **in_turn},  # empty further chosen
        33: {"problem": KNOWN_PROBLEM, **in_turn},
        35: in_turn,
        36: {"problem": f"${rows[35]['problem']}$", **in_turn},
        39: {"problem": KNOWN_PROBLEM.replace("12", "18"), **in_turn},
    }
    return [row | changes.get(number, {}) for number, row in enumerate(rows)]


CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("i", "n"), ("th", "in"), ("thin", "k"), ("o", "x"), ("<", "/")]
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' "
    "+ '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def write_student(folder: Path) -> None:
    """A random Qwen2 in float64 with a byte-level tokenizer: a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    pieces = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGES))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": CONTROLS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "eos_token_id": 0, **SIZES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    generator = random.Random(5)

    def draw(*shape: int, around: float = 0.0, within: float = 0.3) -> torch.Tensor:
        count = torch.Size(shape).numel()
        drawn = [around + within * (2 * generator.random() - 1) for _ in range(count)]
        return torch.tensor(drawn, dtype=torch.float64).reshape(shape)

    size, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = size * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    weights = {"model.embed_tokens.weight": draw(SIZES["vocab_size"], size)}
    weights["model.norm.weight"] = draw(size, around=1.0)
    for number in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = draw(size, around=1.0)
        for projection, rows in (("q", size), ("k", keys), ("v", keys)):
            weights[f"{layer}.self_attn.{projection}_proj.weight"] = draw(rows, size)
            weights[f"{layer}.self_attn.{projection}_proj.bias"] = draw(rows)
        weights[f"{layer}.self_attn.o_proj.weight"] = draw(size, size)
        for projection, shape in (("gate", (wide, size)), ("up", (wide, size))):
            weights[f"{layer}.mlp.{projection}_proj.weight"] = draw(*shape)
        weights[f"{layer}.mlp.down_proj.weight"] = draw(size, wide)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
