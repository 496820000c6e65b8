"""docs/make_real_model.py: its word problems, its teacher's faults, and the whole script in small.

REDI_REAL_MODELS=FOLDER python -m pytest tests/test_real_model_task.py   (lengths: SmolLM2's tokens)
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from operator import add, mul, sub, truediv
from pathlib import Path

import pytest
from processes import ROOT, main_in_this_process
from small_run import read_jsonl, write_jsonl

from redi import __main__ as redi_main
from redi.data.tokenizer import ChatTokenizer
from redi.eval import benchmarks
from redi.eval.grading.grader import extract
from redi.prepare.__main__ import main as prepare

sys.path.insert(0, str(ROOT / "docs"))
import make_real_model
import real_task
import stages
from real_task import Fault, Teacher, draw_fault, draw_problems, draw_traces, write_trace

PROBLEMS = draw_problems(random.Random(0), 400)
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}


def by_hand(problem: real_task.Problem) -> int:
    """The answer, by arithmetic written for this test."""

    def total(amount):
        if amount.share:
            assert amount.size % amount.number == 0
            return amount.size // amount.number
        return amount.number * (amount.size or 1)

    count = total(problem.start)
    for kind, amount in problem.changes:
        change = total(amount)
        count = {"gain": count + change, "lose": count - change, "times": count * change}[kind]
    return count


def equations(text: str) -> list[bool]:
    """Whether each calculation in a trace is right."""
    found = EQUATION.findall(text)
    return [OPERATIONS[sign](int(a), int(b)) == int(result) for a, sign, b, result in found]


def traces_with(kind: str, count: int = 400) -> list[tuple[real_task.Problem, real_task.Trace]]:
    """Traces with a certain fault, of many problems."""
    rng = random.Random(kind)
    teacher = Teacher(**{"skip": 0, "slip": 0, "guess": 0, "luck": 0} | {kind: 1.0})
    problems = PROBLEMS[:count]
    return [(p, write_trace(p, draw_fault(rng, p, teacher), rng.getrandbits(32))) for p in problems]


# ---------------------------------------------------------------- problems


def test_answers_are_those_of_independent_arithmetic():
    for problem in PROBLEMS:
        assert problem.answer == by_hand(problem)
        low, high = real_task.STEPS
        assert low <= problem.steps <= high


def test_problems_name_their_numbers_and_read_as_sentences():
    for problem in PROBLEMS:
        text = real_task.Story(problem).text
        assert re.fullmatch(r"(?:[A-Z\d][^{}.?]*[.] )+[A-Z][^{}.?]*[?]", text), text
        words = dict(zip(real_task.WORDS["numbers"], range(1, 13)))
        said = re.findall(r"\d+|[a-z]+", text.lower())
        said = Counter(int(word) if word.isdigit() else words.get(word) for word in said)
        amounts = [problem.start, *(a for kind, a in problem.changes if kind != "times")]
        assert not Counter(n for a in amounts for n in (a.number, a.size) if n) - said, text


def test_parts_share_no_question_and_do_not_depend_on_later_counts():
    task = real_task.make_task({"test": 100, "tuning": 50, "training": 400}, Teacher())
    texts = {
        name: [row["problem"] for row in task[name]] for name in ("test", "tuning", "training")
    }
    assert [len(part) for part in texts.values()] == [100, 50, 400]
    assert len(set().union(*texts.values())) == 550
    assert texts["training"] == [row["problem"] for row in task["raw"]]
    fewer = real_task.make_task({"test": 100, "tuning": 50, "training": 9}, Teacher())
    assert (fewer["test"], fewer["tuning"]) == (task["test"], task["tuning"])
    assert fewer["raw"] == task["raw"][:9]


def test_no_two_problems_have_the_same_numbers_even_when_few_are_possible(monkeypatch):
    for name, value in {"STEPS": (2, 2), "FIRST": (15, 18), "CHANGE": (6, 8), "GROUPED": 0}.items():
        monkeypatch.setattr(real_task, name, value)
    first = draw_problems(random.Random(1), 30)
    others = draw_problems(random.Random(1), 30, first)
    assert len({problem.numbers for problem in first + others}) == 60


def test_a_benchmark_is_read_with_its_answers(tmp_path):
    rows = real_task.benchmark_rows(PROBLEMS[:20])
    read = benchmarks.load(write_jsonl(tmp_path / "test.jsonl", rows)).problems
    assert [one.answers for one in read] == [[str(by_hand(p))] for p in PROBLEMS[:20]]
    assert [one.difficulty for one in read] == [p.steps for p in PROBLEMS[:20]]


# ---------------------------------------------------------------- the teacher


def test_traces_without_a_fault_are_right_in_every_calculation():
    for problem in PROBLEMS:
        trace = write_trace(problem, Fault("none"), words=problem.words + 1)
        assert int(extract(trace.text)) == trace.answer == by_hand(problem)
        assert equations(trace.text) == [True] * problem.steps, trace.text


def test_a_skip_leaves_out_one_calculation_and_the_rest_follows_from_it():
    for problem, trace in traces_with("skip"):
        assert int(extract(trace.text)) == trace.answer != by_hand(problem)
        assert equations(trace.text) == [True] * (problem.steps - 1), trace.text


def test_a_slip_makes_one_calculation_wrong_and_the_rest_follows_from_it():
    for problem, trace in traces_with("slip"):
        assert int(extract(trace.text)) == trace.answer != by_hand(problem)
        assert Counter(equations(trace.text)) == {True: problem.steps - 1, False: 1}, trace.text
        assert trace.answer == int(EQUATION.findall(trace.text)[-1][-1])


def test_a_guess_stops_calculating_and_is_right_as_often_as_luck_says():
    for problem, trace in traces_with("guess"):
        assert int(extract(trace.text)) == trace.answer != by_hand(problem)
        assert 0 < len(equations(trace.text)) < problem.steps
        assert all(equations(trace.text))
    rng, teacher = random.Random(0), Teacher(skip=0, slip=0, guess=1, luck=0.3)
    lucky = [draw_fault(rng, p, teacher).value == by_hand(p) for p in PROBLEMS * 10]
    assert_share(lucky, 0.3)


def assert_share(drawn: list[bool], share: float) -> None:
    """Within four standard errors."""
    error = math.sqrt(share * (1 - share) / len(drawn))
    assert abs(sum(drawn) / len(drawn) - share) < 4 * error


def test_shares_of_faults_are_those_of_the_teacher():
    rng, teacher = random.Random(0), Teacher(skip=0.2, slip=0.1, guess=0.05)
    kinds = [draw_fault(rng, problem, teacher).kind for problem in PROBLEMS * 20]
    for kind, share in {"skip": 0.2, "slip": 0.1, "guess": 0.05, "none": 0.65}.items():
        assert_share([one == kind for one in kinds], share)


def test_traces_are_drawn_until_one_is_right():
    rng = random.Random(0)
    for problem in PROBLEMS:
        right = [trace.answer == by_hand(problem) for trace in draw_traces(rng, problem, Teacher())]
        assert True not in right[:-1]
        assert right[-1] or len(right) == real_task.MAX_TRACES


@pytest.mark.parametrize("varies", [0.0, 1.0])
def test_traces_of_a_problem_have_the_same_words_or_others(varies):
    """Without a fault, traces differ in nothing but words."""
    rng, same = random.Random(0), []
    for problem in PROBLEMS:
        first, second = draw_traces(rng, problem, Teacher(varies=varies, skip=1, guess=0, slip=0))[
            :2
        ]
        one, other = (write_trace(problem, Fault("none"), trace.words) for trace in (first, second))
        same.append(one.text == other.text)
    assert all(same) if varies == 0 else sum(same) < 0.1 * len(same)


def count_tokens():
    """text -> tokens, by SmolLM2's tokenizer, or nearly so: its words, digits and signs."""
    for folder in Path(os.environ.get("REDI_REAL_MODELS", "/dev/null")).glob("smollm2*"):
        tokenizer = ChatTokenizer.from_folder(folder)
        return lambda text: (
            len(tokenizer.encode_prompt([], text)) - len(tokenizer.encode_prompt([]))
        )
    return lambda text: len(re.findall(r"[A-Za-z]+| (?=\d)|\d|[^\w\s]", text))


def test_thoughts_have_40_to_120_tokens():
    tokens, rng, lengths = count_tokens(), random.Random(0), []
    for problem in PROBLEMS:
        for trace in draw_traces(rng, problem, Teacher()):
            thought = re.fullmatch(r"<think>\n(.*)\n</think>\n.*\\boxed\{\d+\}.*", trace.text)
            lengths.append(tokens(thought[1]))
    assert sum(40 <= length <= 120 for length in lengths) >= 0.98 * len(lengths)
    assert min(lengths) >= 30
    assert max(lengths) <= 135


# ---------------------------------------------------------------- from raw traces to a page


def test_prepare_reads_the_raw_rows_and_counts_them_as_expected(tmp_path):
    raw = real_task.make_task({"test": 1, "tuning": 1, "training": 300}, Teacher())["raw"]
    file = write_jsonl(tmp_path / "raw.jsonl", raw)
    assert main_in_this_process(prepare, file, "--out", tmp_path / "data", "--workers", 1) == 0
    labels = [row["correctness"]["llama_verification"] for row in raw]
    card = json.loads((tmp_path / "data/card.json").read_text())
    assert card["format"] == "OpenR1-Math-Raw"
    assert card["rows"] == 300
    assert card["positives"] == sum(any(row) for row in labels)
    assert card["pairs"] == sum(any(row) and not all(row) for row in labels) > 0
    usable = [row for row, right in zip(raw, labels) if any(right) and not all(right)]
    for row, pair in zip(usable, read_jsonl(tmp_path / "data/pairs.jsonl")):
        assert extract(pair["chosen"][0]["content"]) == row["answer"]
        assert extract(pair["rejected"][0]["content"]) != row["answer"]


RIGHT = {"sft": 3, "dpo": 5, "symmetric": 5, "simpo": 5, "redi": 7, "own": 9}  # of ten samples


def answer(run: str, problem: dict, sample: int) -> str:
    is_right = (7 * (4 * problem["id"] + sample)) % 10 < RIGHT[run]
    number = int(problem["answer"]) + (not is_right)
    return f"<think>\nIt is {number}.\n</think>\nI say \\boxed{{{number}}}."


class Runs:
    """Runs a stage's command in this process instead of a new one. Trained models, which are tiny
    and random, do not answer: their evaluations get made-up completions."""

    def __init__(self, out: Path):
        self.out, self.commands, self.fails = out, [], None

    def __call__(self, words: list[str]) -> int:
        _, *module, name = words[:4]
        assert module == ["-m", "redi"]
        flags = words[4:]
        self.commands.append(" ".join(words[3:]))
        if self.fails and self.fails in self.commands[-1]:
            return 2
        if (name, flags[0]) == ("prepare", str(self.out / "own/training")):
            shutil.copytree(self.out / "data", self.out / "data_own")
            return 0
        folder = Path(flags[flags.index("--out") + 1])
        if name == "evaluate" and folder.name != "base":
            flags += ["--completions", self.completions(folder, flags)]
        return main_in_this_process(redi_main.main, name, *flags)

    def completions(self, folder: Path, flags: list[str]) -> Path:
        run = Path(flags[flags.index("--model") + 1]).name.split("-")[0]
        rows = [
            {"id": problem["id"], "sample": sample, "text": answer(run, problem, sample),
             "num_tokens": 9}
            for problem in read_jsonl(flags[flags.index("--benchmark") + 1])
            for sample in range(4)
        ]  # fmt: skip
        return write_jsonl(self.out / f"{folder.parent.name}-{folder.name}.jsonl", rows)


@pytest.fixture
def small(tmp_path, monkeypatch, save_model_of, save_tokenizer) -> tuple[Path, Runs]:
    """(a random model, what runs the stages), with the script's constants made small."""
    model = tmp_path / "model"
    save_model_of("Llama", model, max_position_embeddings=2048)
    save_tokenizer(model)
    made_small = {"--max-length 512": "--max-length 2000", "--max-steps 36": "--max-steps 3"}
    made_small |= {"--max-new-tokens 200": "--max-new-tokens 8"}
    for name in ("STAGE_1", "STAGE_2", "UNTRAINED"):
        flags = getattr(make_real_model, name)
        for long, short in made_small.items():
            flags = flags.replace(long, short)
        monkeypatch.setattr(make_real_model, name, flags)
    problems = {"test": 20, "tuning": 5, "training": 40}
    monkeypatch.setattr(make_real_model, "PROBLEMS", problems)
    monkeypatch.setattr(make_real_model, "OWN_PROBLEMS", 4)
    runs = Runs(tmp_path / "out")
    monkeypatch.setattr(stages, "call", runs)
    return model, runs


def run_script(model: Path, out: Path) -> int:
    return main_in_this_process(make_real_model.main, "--model", model, "--out", out)


def test_the_whole_script_in_small_and_again_without_work(small):
    model, runs = small
    runs.fails = "out/dpo-1-1e-4 "
    assert run_script(model, runs.out) == 2
    stopped = runs.commands.copy()
    runs.fails = None
    assert run_script(model, runs.out) == 0
    assert stopped[-1] == runs.commands[len(stopped)]  # the stage that failed, and none before it
    assert len(set(runs.commands)) == len(runs.commands) - 1
    trained = {"sft-1", "sft-2", "symmetric-1-2e-06", "simpo-1-5e-06", "own-1-1e-5"}
    trained |= {f"{m}-1-{rate}" for m in ("dpo", "redi") for rate in make_real_model.RATES}
    trained |= {"dpo-2-1e-5", "redi-2-1e-5"}
    assert {path.parent.name for path in runs.out.glob("*/metrics.jsonl")} == trained
    assert not list(runs.out.glob("*/checkpoints"))
    count = len(runs.commands)
    assert run_script(model, runs.out) == 0
    assert len(runs.commands) == count
    check_page(runs.out)


def check_page(out: Path) -> None:
    """Its figures against those of the made-up answers."""
    text = (out / "page/results.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    rows = {tuple(row[1:3]): row for row in reversed(cells) if len(row) > 3}
    assert rows["REDI, seed 2", "1e-05"][3].startswith("70.0 ±")
    assert rows["stage 1, seed 1", "0.0005"][3].startswith("30.0 ±")
    assert rows["base", ""][3] == "0.0 ± 0.0"
    assert rows["REDI, own traces against REDI", "1"][3] == "+20.0"
    assert rows["REDI against stage 1", "both"][3:] == [
        # the same made-up answers for both seeds
        *rows["REDI against stage 1", "1"][3:]
    ]
    assert rows["REDI against DPO", "2"][3] == "+20.0"
    kinds = re.findall(r"\*\*(.*)\*\* \(problem (\d+), answer (\d+)\)", text)
    assert [kind for kind, *_ in kinds] == ["repaired"] * 2 + ["still wrong", "still right"]
    assert text.count("```text") == 2 * len(kinds)
    steps = {"sft": 10, "redi": 3, "dpo": 3, "symmetric": 3, "simpo": 3, "own": 3}
    records = [
        json.loads(line)
        for path in out.glob("*/metrics.jsonl")
        for line in path.read_text().splitlines()[:-1]
        if len(path.read_text().splitlines()) - 1 == steps[path.parent.name.split("-")[0]]
    ]
    assert f"- {sum(record['tokens'] for record in records):,} tokens trained in 13 runs" in text
    for name in ("stage_1", "log_probs", "accuracy"):
        assert (out / f"page/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_of_other_constants_is_refused(small, monkeypatch):
    model, runs = small
    make_real_model.make_task(runs.out)
    monkeypatch.setattr(real_task, "FIRST", (15, 20))
    assert "holds another task; choose another --out" in str(run_script(model, runs.out))
    assert runs.commands == []


def test_ctrl_c_waits_until_the_command_has_saved_its_state(tmp_path):
    """A terminal sends Ctrl-C to the script and to the command that it runs."""
    saves = (
        "import signal, time, pathlib\n"
        "def save(*_):\n"
        "    time.sleep(1); pathlib.Path('saved').touch(); raise SystemExit(75)\n"
        "signal.signal(signal.SIGINT, save); pathlib.Path('ready').touch(); time.sleep(60)"
    )
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT / 'docs')!r})\n"
        f"import stages; stages.ROOT = {str(tmp_path)!r}\n"
        f"sys.exit(stages.call([sys.executable, '-c', {saves!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()
