"""The runs behind the golden files. When code moves, this is the only file to update.

    steps         20 optimizer steps of train_sft.py or train_redi.py, per objective and ranks
    completions   greedy and sampled completions of a small model, per way of sampling
    prepared      the output of python -m redi.prepare on a small raw file, per set of rules

Training and sampling are in float64, so the recorded numbers depend on neither the number of
threads nor the CPU. redi computes in float32 on a CPU; `use_float64` patches that for a whole
process, so these runs are child processes (see processes.py).

Data, tokenizer and weights are written here, without redi. Random numbers come from
random.Random(seed).random(), which Python guarantees never to change.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import child, ranks, run_command
from safetensors.torch import save_file
from small_run import read_jsonl, steps
from small_step import row_logps
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from redi import distributed, programs
from redi.checkpoint import load_model
from redi.eval.engine.generate import Request, generate
from redi.eval.engine.sampling import Sampling
from redi.packing import TokenSequence
from redi.runlog import read_metrics

STAGE_2 = {
    "redi": ["--alpha", "0.8"],
    "dpo": ["--beta", "0.1"],
    "simpo": ["--beta", "2", "--gamma", "1"],
    "dft": [],
    "topr": [],
}
CASES = {f"{name} on {ranks}": (name, ranks) for name in ("sft", *STAGE_2) for ranks in (1, 2)}
STEPS = 20
TRAINING = [
    "--model", "student", "--lr", "3e-3", "--rows-per-step", "4", "--epochs", "4",
    "--max-steps", str(STEPS), "--max-prompt", "120", "--max-response", "120",
    "--max-length", "240", "--rope-theta", "keep", "--max-position-embeddings", "keep",
    "--dtype", "float32",
]  # fmt: skip
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.6, "top_p": 0.95, "seed": 42},
    "sampled from a small nucleus": {"temperature": 1.0, "top_p": 0.4, "seed": 7},
}
# Keys and values of 5 pages of 32 tokens: 2 layers, 2 heads of 8 numbers, 8 bytes each.
CACHE_BYTES = 5 * 32 * 2 * 2 * 2 * 8 * 8
PREPARATIONS = {
    "the paper's rules": [],
    "graded again": [
        "--relabel", "--workers", "1", "--require-complete", "--reject-rule", "both",
        "--exclude-sources", "none",
    ],
    "several pairs": [
        "--pairs-per-problem", "3", "--min-length-ratio", "0.3", "--dedup", "--decontaminate",
    ],
}  # fmt: skip
COUNTS = (
    "rows", "traces", "no_positive", "positives", "further", "no_pair", "pairs", "sources",
    "labels",
)  # fmt: skip


def record(folder: Path) -> dict[str, Any]:
    """Run everything in the empty `folder`. Keys: steps, completions, prepared; each is the content
    of the golden file of that name."""
    write_inputs(folder)
    for objective, number in CASES.values():
        train(folder, objective, number)
    child(folder, [], use_float64, measure, CUDA_VISIBLE_DEVICES="").ends(0, seconds=300)
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return {**measured, "prepared": prepared(folder)}


def use_float64() -> None:
    """Make weights, arithmetic and rotary tables float64 in this process."""
    torch.set_default_dtype(torch.float64)  # new parameters
    torch.Tensor.float = torch.Tensor.double  # the rotary tables use .float()
    distributed.DTYPES["float32"] = torch.float64  # --dtype float32


def train(folder: Path, objective: str, number: int) -> None:
    """Train the student on this many ranks. 22 rows in steps of 4: the last step of an epoch has 2.
    A pack's budget cuts a step into 2 or 3 packs of several sequences, or of several pairs."""
    out, main = f"{objective}-{number}", programs.train_sft
    flags = ["--data", "positives.jsonl", "--pack-tokens", "160"]
    if objective != "sft":
        main, flags = programs.train_redi, ["--data", "pairs.jsonl", "--pack-tokens", "280"]
        flags += ["--objective", objective, *STAGE_2[objective]]
    # One cache per run, so that every run computes its own reference log-probs.
    flags += [*TRAINING, "--out", out, "--cache", f"{out}-cache"]
    for rank in ranks(folder, flags, *[use_float64] * number, main=main):
        rank.ends(0, seconds=300)


# ---------------------------------------------------------------- the three records


def measure() -> None:
    """In the working folder, write measured.json: the records of steps and completions."""
    recorded = {
        "steps": {case: train_steps(*settings) for case, settings in CASES.items()},
        "completions": completions(),
    }
    Path("measured.json").write_text(json.dumps(recorded), encoding="utf-8")


def train_steps(objective: str, number: int) -> dict[str, list]:
    """Loss and grad_norm, one number per step, and final_logps: the summed log-prob in nats of
    every training response under the trained model, one number per positive, or [chosen, rejected]
    per pair; each row alone, with torch's own log_softmax."""
    out = f"{objective}-{number}"
    trained = steps(read_metrics(Path(out)))
    assert len(trained) == STEPS
    model, source = load_model(out)

    @torch.no_grad()
    def logp(row: dict, side: str) -> float:
        [encoded] = source.chat.encode_rows([(row["prompt"], row[side][0])])
        tokens, prompt = [*encoded.prompt_ids, *encoded.response_ids], len(encoded.prompt_ids)
        return row_logps(model, TokenSequence(np.array(tokens), prompt, 0, 1)).sum().item()

    if objective == "sft":
        logps = [logp(row, "completion") for row in read_jsonl("positives.jsonl")]
    else:
        sides, rows = ("chosen", "rejected"), read_jsonl("pairs.jsonl")
        logps = [[logp(row, side) for side in sides] for row in rows]
    recorded = {name: [step[name] for step in trained] for name in ("loss", "grad_norm")}
    return {**recorded, "final_logps": logps}


def completions() -> dict[str, list[dict[str, Any]]]:
    """Completions of the untrained student in the order of the requests, per sampling setting.

    Ten requests share four rows and five cache pages: rows are refilled, the two samples of a
    problem share its prefill, and about four requests per setting are evicted and resumed.
    """
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


def prepared(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of every file written, and the counts of card.json, per set of rules."""
    found = {}
    for name, flags in PREPARATIONS.items():
        out = folder / name
        if flags and flags[-1] == "--decontaminate":
            flags = [*flags, folder / "benchmark.jsonl"]
        program = ("-m", "redi.prepare", folder / "raw.jsonl", "--out", out)
        status, _, errors = run_command(*program, *flags, seconds=300)
        assert status == 0, errors
        # Not splitlines, which also splits at \u2028.
        lines = {
            path.name: path.read_text(encoding="utf-8").split("\n")[:-1]
            for path in sorted(out.glob("*.jsonl"))
        }
        card = json.loads((out / "card.json").read_text(encoding="utf-8"))
        found[name] = {**lines, "counts": {key: card[key] for key in COUNTS}}
    return found


# ---------------------------------------------------------------- inputs, made without redi


def write_inputs(folder: Path) -> None:
    rows = conversations()
    positives = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    files = {
        "pairs.jsonl": rows,
        "positives.jsonl": positives,
        "raw.jsonl": raw_rows(),
        "benchmark.jsonl": [{"id": 1, "problem": KNOWN_PROBLEM, "answer": "42"}],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")
    write_student(folder / "student")


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


def write_student(folder: Path) -> None:
    """A random Qwen2 in float64 with a byte-level tokenizer: a Hugging Face folder."""
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
        "eos_token_id": 0, "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    layer = {
        "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32), "self_attn.q_proj.bias": (32,),
        "self_attn.k_proj.weight": (16, 32), "self_attn.k_proj.bias": (16,),
        "self_attn.v_proj.weight": (16, 32), "self_attn.v_proj.bias": (16,),
        "self_attn.o_proj.weight": (32, 32), "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48),
    }  # fmt: skip
    shapes = {"embed_tokens.weight": (320, 32), "norm.weight": (32,)}
    shapes |= {f"layers.{n}.{name}": shape for n in (0, 1) for name, shape in layer.items()}
    generator, weights = random.Random(5), {}
    for name, shape in shapes.items():
        around = 1.0 if "norm" in name else 0.0
        drawn = [around + 0.3 * (2 * generator.random() - 1) for _ in range(math.prod(shape))]
        weights[f"model.{name}"] = torch.tensor(drawn, dtype=torch.float64).reshape(shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
