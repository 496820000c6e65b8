"""Raw rows to tokens: how fast, in how much memory, beside datasets.map (D1).

    python -m bench.data TOKENIZER SAMPLE      about ten minutes on two idle cores, 6 GB of disk

TOKENIZER is a folder with the student's tokenizer.json (Qwen2's), SAMPLE a file with
OpenR1-Math-Raw's fields. Raw rows are put together from the sample's problems and paragraphs, one
to four traces per row with lengths by the law of bench/plan.py, until the file has 2 GB.

    prepare_rows_s, prepare_peak_gib       redi.prepare on the 2 GB
    D1_rows_s, D1_tokens_s, D1_peak_gib    load_store of all positives that it wrote
    D1                 tokens/s by wall time over datasets.map: batches of 1000 rows, 2 processes
    D1_one_process     the same with one process: more of them switch the tokenizer's threads off
    D1_cpu, D1_one_process_cpu    in CPU time of all processes: the machine's other work moves D1

D1 is measured on the first ROWS positives, in turns, every side in a new process with an empty
cache. The peer does what TRL does: prompt and whole conversation through apply_chat_template with
the same template, the mask is the difference. Its clock runs for map alone; ours for all of
load_store: hashing the data, tokenizing, writing, verifying. All sides must give the same ids.
Memory is what is resident of a process and its children, sampled; shared pages count in each.
"""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import result, write
from bench.plan import LONGEST_TRACE, MEDIAN_TRACE, draw
from redi.config import UserError, program
from redi.data.files import read_rows
from redi.data.tokenizer import ChatTokenizer
from redi.toy import CHATML

RAW_BYTES = 2 * 10**9
CHARS_PER_TOKEN = 3  # of such traces in Qwen2's tokens; it sets the size of the rows
TRACES_A_ROW = ([1, 2, 3, 4], [0.15, 0.5, 0.25, 0.1])
RIGHT = 0.6  # of the traces
ROWS, ROUNDS = 2500, 4
VERIFIERS = ("llama_verification", "math_verify_answer", "math_verify_reparsed_answer")


# ---------------------------------------------------------------- raw rows


def write_raw(path: Path, sample: Path, size: int = RAW_BYTES) -> int:
    """Rows until the file has `size` bytes; how many."""
    rows = [row for _, row in read_rows(sample)]
    pieces = [p.strip("\n") for row in rows for g in row["generations"] for p in g.split("\n\n")]
    pieces = np.array([p for p in pieces if p.strip()], dtype=object)
    mean = np.mean([len(p) + 2 for p in pieces])
    rng, number = np.random.default_rng(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            count = rng.choice(TRACES_A_ROW[0], p=TRACES_A_ROW[1])
            lengths = draw(rng, count, MEDIAN_TRACE, LONGEST_TRACE) * CHARS_PER_TOKEN
            traces = ["\n\n".join(rng.choice(pieces, 1 + int(n / mean))) for n in lengths]
            right = [bool(value) for value in rng.random(count) < RIGHT]
            made = {
                "problem": f"{rows[number % len(rows)]['problem']} ({number})",
                "generations": traces,
                "generations_count": int(count),
                "correctness": dict.fromkeys(VERIFIERS, right),
                "reparsed_answers": [""] * int(count),
            }
            row = {**rows[number % len(rows)], **made}
            row |= {"problem_is_valid": "Yes", "source": "olympiads"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    return number


# ---------------------------------------------------------------- a process, watched


def seconds_since(began: list[float] | None = None) -> list[float]:
    """[wall, CPU] seconds since `began`; CPU of this process and of children it waited for."""
    now = [time.perf_counter(), sum(os.times()[:4])]
    return now if began is None else [after - before for after, before in zip(now, began)]


def watch(*command: str, **environment: str) -> tuple[str, float, float]:
    """Run `python -m COMMAND` -> (its output, wall seconds, peak GiB of it and its children)."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, output = 0, None
    while output is None:
        peak = max(peak, resident(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, errors = process.communicate(timeout=0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{errors[-3000:]}")
    return output.strip(), time.monotonic() - began, peak / 2**30


def resident(pid: int) -> int:
    """Bytes of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * resource.getpagesize() + sum(map(resident, children))


# ---------------------------------------------------------------- sides, in processes of their own


@dataclass(frozen=True)
class Side:
    """What one side measured. hash: SHA-256 of all ids."""

    wall: float
    cpu: float
    rows: int
    tokens: int
    hash: str
    peak_gib: float = 0.0


def ours(tokenizer: Path, data: Path, work: Path) -> Side:
    from tokenizers import Tokenizer

    from redi.data.files import hash_files
    from redi.data.store import load_store

    chat = ChatTokenizer(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), CHATML)
    began = seconds_since()
    store = load_store([data], chat, ["rows"], work / "cache")
    wall, cpu = seconds_since(began)
    rows, tokens = len(store.row_numbers), len(store.tokens)
    return Side(wall, cpu, rows, tokens, hash_files([store.folder / "tokens.bin"]))


def peer(tokenizer: Path, data: Path, work: Path, processes: int | None) -> Side:
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    chat = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), chat_template=CHATML
    )

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        prompts, answers = batch["prompt"], batch["completion"]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers)]
        first = chat.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
        every = chat.apply_chat_template(whole, return_dict=True)["input_ids"]
        pairs = zip(first["input_ids"], every)
        mask = [[0] * len(a) + [1] * (len(b) - len(a)) for a, b in pairs]
        return {"input_ids": every, "completion_mask": mask}

    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(work / "peer"))
    columns = {"remove_columns": rows.column_names}
    began = seconds_since()
    tokenized = rows.map(tokenize, batched=True, num_proc=processes, **columns)
    wall, cpu = seconds_since(began)
    digest, total = hashlib.sha256(), 0
    for row in tokenized.with_format("numpy"):
        ids = row["input_ids"][:-1]  # the template's newline behind the stop token
        digest.update(ids.astype(np.int32).tobytes())
        total += len(ids)
    return Side(wall, cpu, len(tokenized), total, digest.hexdigest())


SIDES: dict[str, Callable[[Path, Path, Path], Side]] = {
    "ours": ours,
    "2 processes": lambda *given: peer(*given, processes=2),
    "one process": lambda *given: peer(*given, processes=None),
}


def run_side(name: str, tokenizer: Path, data: Path) -> Side:
    with tempfile.TemporaryDirectory(dir=data.parent) as work:
        paths = (str(tokenizer), str(data), work)
        output, _, peak = watch("bench.data", "side", name, *paths, TOKENIZERS_PARALLELISM="true")
    side = replace(Side(**json.loads(output.splitlines()[-1])), peak_gib=peak)
    print(f"{name}: {side}", flush=True)
    return side


# ---------------------------------------------------------------- measures


def measure(tokenizer: Path, sample: Path, folder: Path) -> dict[str, dict[str, Any]]:
    raw, positives = folder / "raw.jsonl", folder / "data" / "positives.jsonl"
    rows = write_raw(raw, sample)
    size = raw.stat().st_size / 1e9
    print(f"{rows:,} rows, {size:.2f} GB; 516,000: {size * 516_000 / rows:.0f} GB", flush=True)
    output, seconds, peak = watch("redi.prepare", str(raw), "--out", str(folder / "data"))
    raw.unlink()
    print(f"prepare: {seconds:.1f} s, {peak:.2f} GiB\n{output}")

    size, whole = f"{positives.stat().st_size / 1e9:.2f} GB", run_side("ours", tokenizer, positives)
    found = {
        "prepare_rows_s": result([rows / seconds], None, "rows/s of 2 GB"),
        "prepare_peak_gib": result([peak], 1.0, "GiB, at most"),
        "D1_rows_s": result([whole.rows / whole.wall], None, f"rows/s, {size} of positives"),
        "D1_tokens_s": result([whole.tokens / whole.wall], None, f"tokens/s, {size} of positives"),
        "D1_peak_gib": result([whole.peak_gib], 1.0, f"GiB, at most; {size} of positives"),
    }
    few = folder / "few.jsonl"
    with open(positives, "rb") as source, open(few, "wb") as file:
        file.writelines(itertools.islice(source, ROWS))
    positives.unlink()
    taken: dict[str, list[Side]] = {name: [] for name in SIDES}
    order = list(SIDES)
    for _ in range(ROUNDS):
        for name in order:
            taken[name].append(run_side(name, tokenizer, few))
        order.reverse()
    assert len({side.hash for sides in taken.values() for side in sides}) == 1, "ids differ"
    for name, sides in taken.items():
        key = f"D1_{name.replace(' ', '_')}_peak_gib"
        found[key] = result([side.peak_gib for side in sides], None, f"GiB, {ROWS} rows")
    for key, name, goal in (("D1", "2 processes", 1.5), ("D1_one_process", "one process", None)):
        both, peer = list(zip(taken[name], taken["ours"])), f"datasets.map, {name}, {ROWS} rows"
        found[key] = result([other.wall / own.wall for other, own in both], goal, peer)
        found[f"{key}_cpu"] = result([other.cpu / own.cpu for other, own in both], None, peer)
    return found


@program
def main() -> None:
    if sys.argv[1:2] == ["side"]:
        name, *paths = sys.argv[2:]
        print(json.dumps(asdict(SIDES[name](*map(Path, paths)))))
        return
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "tokenizer.json").is_file():
        raise UserError("usage: python -m bench.data TOKENIZER SAMPLE (a folder, a file)")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder))
    write("data", found)


if __name__ == "__main__":
    main()
