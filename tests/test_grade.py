r"""A response and the gold answer in, a verdict out; and how a hostile answer is survived."""

import ast
import itertools
import logging
import os
import random
import re
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import pytest
from processes import command, run_command, wait_until
from small_run import refusal

from redi.eval.benchmarks import Benchmark, Problem, load
from redi.eval.completions import Completion
from redi.eval.grade import grade
from redi.eval.grading import workers
from redi.eval.grading.grader import Grader, extract, report_unreadable
from redi.eval.grading.normalize import LONGEST_ANSWER, text_key
from redi.eval.grading.workers import Pool

ENDLESS = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"  # Math-Verify issue 65
HUNGRY = r"10^{10^{9}}+1"  # a number of 1e9 digits


def boxed(answer: str) -> str:
    return rf"<think>\nhm</think> The answer is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def pool():
    with Pool() as shared:
        yield shared


def graded(pool: Pool, *pairs: tuple[str, str], **settings) -> list[str]:
    """Verdicts on (answer, gold) pairs."""
    return Grader(pool, **settings).grade_all((boxed(a), gold, "stop") for a, gold in pairs)


# ---------------------------------------------------------------- Math-Verify and its rules

CASES = [  # gold, correct answers, incorrect answers
    (r"\frac{1}{2}", [r"\dfrac12", "1/2", "0.5"], [r"\frac{1}{3}"]),
    (r"\frac59", ["0.555556"], []),
    (r"\frac13", [], ["0.33"]),
    (r"1\frac{4}{5}", [r"\frac{9}{5}"], []),
    (".0000672", [], [".00006725"]),
    (r"\pi", [], ["3.14"]),
    ("5", ["x = 5"], ["-5"]),
    ("7.", ["7"], []),
    ("33", ["033"], []),
    ("58,500", ["58500"], []),
    ("123456", [], ["1 234 56"]),
    ("12345678.5", ["12 345 678.5"], []),
    ("1000.99", ["1000,99"], []),
    ("0,111", ["0.111"], []),
    ("1.234", [], ["1,234"]),
    ("1.25", [], ["1,24"]),
    ("1234", [], ["1, 234"]),
    (r"11,\! 111,\!111,\! 100", ["11111111100", "11,111,111,100"], []),
    (r"\$18.90", ["18.9"], []),
    (r"\sqrt{8}", [r"2\sqrt{2}"], []),
    ("10^{100}", [], ["10^{100}+1"]),
    ("6 - 5i", ["-5i + 6"], ["6+5i"]),
    ("2i", ["(1+i)^2"], []),
    (r"\ln 2 + i\frac\pi3", [r"\ln(2) + \frac{i \pi}{3}"], []),
    # equations and names
    ("x=5", ["5", r"\boxed{5}"], ["y=5"]),
    (r"m_{\max }=n^{2}-n-1", ["n^2-n-1"], []),
    ("y = 2x + 3", ["2x - y + 3 = 0"], ["y = 2x - 3"]),
    ("y = 1/x", ["2xy - 2 = 0"], []),
    ("x(x-1)=0", [], ["x-1=0"]),
    ("MR=SRMC", [r"\text{MR} = \text{SRMC}"], []),
    (r"x' + \frac{r}{V}x - rc = 0", [r"x'+\frac{rx}{V}=rc"], []),
    (r"m \frac{d v}{d t}+b v=f", [r"\frac{dv}{dt} + \frac{b}{m} v = \frac{f}{m}"], []),
    (r"\frac{dM}{dt} = kM", [], [r"\frac{dM}{dt} = -kM"]),
    (r"\frac{dm}{dt} = k", [], [r"\frac{dm}{dx} = k"]),
    # symbols
    ("6m", [], ["6"]),
    (r"\frac{1}{\sqrt{2}}c", [r"\frac{c}{\sqrt 2}"], [r"\frac{1}{\sqrt{2}}"]),
    (r"\frac{r}{V}", [], [r"\frac{R}{V}"]),
    (r"\Delta", [], [r"\delta"]),
    ("y'+y=0", [], ["y+y=0"]),
    (r"3 \frac{dM}{dt}", [], [r"3 \frac{dm}{dt}"]),
    # intervals, tuples, sets, lists, matrices
    (r"x \in [-2,7]", ["[-2,7]", r"y\in\left[-2, \frac{14}{2}\right]"], []),
    ("[-2,7]", [r"-2 \le x \le 7"], []),
    (r"(2,\infty)", ["x > 2"], [r"x \ge 2"]),
    (r"k \geqslant 2", [r"k\ge 2"], []),
    ("(3,4]", [], ["[3,4]"]),
    (r"(0,9) \cup (9,36)", [r"\left(9,36\right)\cup\left(0,9\right)"], []),
    ("(15,-29)", ["15, -29"], []),
    ("(3,4)", [], ["(4,3)"]),
    ("(1,2)", [], [r"\{1,2\}"]),
    ("3, 5", ["(3, 5)"], ["3, 5, 7"]),
    ("3, 5, 7", [r"\{7, 5, 3\}"], ["3, 5"]),
    ("-2,-2", [], ["-2"]),
    ("100,200", ["200, 100"], []),
    ("1,-2", [r"x = -2 \text{ or } x = 1"], []),
    ("$1$ and $2$", ["2, 1"], []),
    ("(1,2), (3,4)", ["(3,4), (1, 2)"], ["(1,2), (1,2)", "(1,4),(3,2)"]),
    ("$(1,2)$ or $(2,1)$", ["(2,1),(1,2)"], []),
    ("p=5,q=2;p=7,q=2", ["(7,2), (5,2)"], ["(5,7), (2,2)"]),
    (r"\pm 2021", ["{-2021, 2021}"], []),
    (r"1 \pm \sqrt{19}", [r"1-\sqrt{19}, 1+\sqrt{19}"], [r"1+\sqrt{19}"]),
    (r"\lbrace 1, 2 \rbrace", [r"\{2,1\}"], []),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        [r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}"],
        [r"\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}"],
    ),
    # units, percent, powers of ten, bases
    (r"$90^{\circ}$,$60^{\circ}$", ["60, 90"], []),
    (r"90^\circ", ["90", r"90 \text{ degrees}"], []),
    (r"15\mbox{ cm}^2", [r"15\,\mathrm{cm}^{2}"], []),
    (r"5.4 \text{ cents}", ["5.4 cents"], []),
    (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", ["15000"], []),
    (r"10\%", ["10", "0.1"], ["0.01"]),
    ("62.5%", [r"62.5 \%"], []),
    ("0.5", [], [r"0.5\%"]),
    ("4.5e33", [r"4.5 \times 10^{33}"], ["4.5e34"]),
    (r"8.2 \times 10^{-19}", [], [r"2.88 \times 10^{-19}"]),
    ("1e-5", ["10^{-5}"], []),
    ("52_8", ["52_{8}"], ["52_9"]),
    (r"4210_{5}", [r"1053_{8}"], []),  # 4 * 125 + 2 * 25 + 5 = 555 = 512 + 5 * 8 + 3
    # words and letters
    (r"\text{Evelyn}", ["Evelyn"], []),
    ("even", [r"\text{Even}"], []),
    (r"\text{even}", [], [r"\text{odd}"]),
    (r"\text{east}", [], [r"\text{seat}"]),
    (r"\text{(C)}", ["C"], [r"\text{(D)}"]),
    ("B", [r"\textbf{(B)}"], []),
    # several golds, of which any suffices; what is no LaTeX does not hide the next one
    (["0.01", r"\frac{1}{50}"], ["0.02"], ["0.03"]),
    ([r"\frac{", r"\frac12"], ["0.5"], []),
]

PAPER_CASES = [  # as above; the authors' grader gives each case the same verdict
    ("5", ["5.0", "x=5", r"5\text{ cm}"], ["6", "5.01", ""]),
    ("1234", ["1,234"], []),
    (r"\frac{1}{2}", [r"\dfrac12", "1/2", "0.5"], [r"\frac{2}{4}"]),
    (r"\frac{3}{4}", ["0.75"], []),
    (r"\frac{1}{3}", [], ["0.33"]),
    (r"\sqrt{2}", [r"\sqrt2"], []),
    ("90", [r"90^\circ"], []),
    ("50", [r"50\%"], []),
    (r"\text{Evelyn}", ["evelyn"], []),
    (r"\left(3,\frac{\pi}{2}\right)", [r"(3, \pi/2)"], []),
    # whole numbers in a tuple are compared as they are written
    ("(1,2)", ["(1, 2.0)"], ["(2,1)", "(1, 4/2)", "[1,2]", "(1,2,3)"]),
    ("x+2", ["2+x"], []),
    ("x+y+z", [], ["z+y+x"]),  # three letters: never evaluated
    ("2^{10}", [], ["1024"]),  # nor is an exponent of two digits
    (r"1\frac{1}{2}", [r"\frac{3}{2}"], []),
    (r"2\sqrt{3}", [r"\sqrt{3}+\sqrt{3}"], []),
    (
        r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} \frac{1}{2} \\ 2 \end{pmatrix}"],
        [],
    ),
    # a fault that is part of the rules: both are flattened to 1+x/2
    (r"\frac{1+x}{2}", [r"1+\frac{x}{2}"], []),
    ("7-x", [], ["__import__('os')"]),
    ("7", [], ["", "{", "}", r"\frac", r"\sqrt", r"\sqrt[", "(,)", r"\left", "="]),
    ("3, 5", [], ["5, 3"]),  # here the other grader differs, as on an unreduced fraction
    ("R", ["r"], []),  # and here
]


@pytest.mark.parametrize(("gold", "correct", "incorrect"), CASES)
def test_an_answer_is_correct_if_it_is_the_gold_in_other_words(pool, gold, correct, incorrect):
    verdicts = graded(pool, *((answer, gold) for answer in correct + incorrect))
    assert verdicts == ["correct"] * len(correct) + ["incorrect"] * len(incorrect)


@pytest.mark.parametrize(("gold", "correct", "incorrect"), PAPER_CASES)
def test_the_papers_rules_give_the_verdicts_of_the_authors_grader(gold, correct, incorrect):
    verdicts = [workers.judge("paper", answer, gold) for answer in correct + incorrect]
    assert verdicts == ["correct"] * len(correct) + ["incorrect"] * len(incorrect)


# ---------------------------------------------------------------- which answer

BOXES = [  # response; the answer after the thinking, in the whole response, by the paper's rules
    (r"<think> 2+3 </think> \boxed{5}", "5", "5", "5"),
    (r"2+3 </think> \boxed{5}", "5", "5", "5"),  # <think> was in the prompt
    (r"<think> \boxed{4}? </think> \boxed{5}", "5", "5", "5"),
    (r"<think> \boxed{5} </think> So that is it.", None, None, None),
    (r"<think> 1 </think> \boxed{4} <think> 2 </think> \boxed{5}", "5", "5", "5"),
    (r"<think> It is \boxed{5}", None, None, None),
    (r"\boxed{5} <think> Let me check.", None, None, None),
    (r"\boxed{4}, or rather \boxed{5}", None, "5", None),
    (r"So it is \boxed{5", None, None, None),
    ("The answer is 5.", None, None, None),
    ("</think> The answer is 5.", None, None, None),
    ("", None, None, None),
    (r"</think> \boxed{1}, \fbox{2}", "2", "2", "1"),
    (r"</think> \fbox{7}", "7", "7", None),
    (r"</think> \boxed{\frac{1}{\sqrt{2}}}.", *[r"\frac{1}{\sqrt{2}}"] * 3),
    (r"</think> \boxed{\{1, 2\}}", *[r"\{1, 2\}"] * 3),
    (r"</think> \boxed{\{1}", r"\{1", r"\{1", None),
    (r"</think> \boxed {7}", "7", "7", None),
    (r"</think> \boxed{1} and \boxed{2", "1", "1", None),  # the last one is not closed
    (r"</think> \boxed{1 and \boxed{2}", "2", "2", "2"),
    (r"</think> \boxed{\boxed{3}}", "3", "3", "3"),
    (r"</think> \boxed{4} as asked, in \boxed{}.", "4", "4", ""),
    (r"</think> \boxed{ }", None, None, " "),
    (r"</think> }{ \boxed{5} }", "5", "5", "5"),
    ("</think> \\boxed{1 \\\\\n 2}", *["1 \\\\\n 2"] * 3),
]


@pytest.mark.parametrize(("response", "after_think", "whole", "paper"), BOXES)
def test_the_answer_is_the_last_box_after_the_thinking(response, after_think, whole, paper):
    assert extract(response) == after_think
    assert extract(response, "whole") == whole
    assert extract(response, grader="paper") == paper
    if "</think>" not in response:
        assert extract(response, "whole", "paper") == whole


def test_a_response_cut_off_at_the_limit_is_truncated_but_the_paper_reads_its_box(pool):
    cut = [  # response, rule, verdict of math-verify, of paper
        (boxed("5"), "after_think", "truncated", "correct"),
        (r"<think> \boxed{5}", "after_think", "truncated", "truncated"),
        (r"So \boxed{5} and", "after_think", "truncated", "truncated"),
        (r"So \boxed{5} and", "whole", "truncated", "correct"),
        (r"<think> \boxed{5}", "whole", "truncated", "truncated"),
    ]
    for response, rule, ours, paper in cut:
        assert grade(response, "5", "length", rule) == ours
        assert Grader(pool, "paper", rule).grade_all([(response, "5", "length")]) == [paper]


UNITS = [r"\boxed{x ", r"\text{a}", "a, ", "{", r"\frac", "1", r"\{", "((", "a\\ "]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("length", [LONGEST_ANSWER, 10 * LONGEST_ANSWER, 800_000])
def test_an_endless_answer_is_decided_at_once(unit, length):
    """Such answers come from models that loop; none may keep the parent, which nobody kills."""
    answer = (unit * length)[:length]
    started = time.perf_counter()
    parent = Grader(Mock(ask=lambda questions: dict.fromkeys(questions, "incorrect")))
    parent.grade_all([(rf"</think> \boxed{{{answer}}}", "5", "stop")])
    assert time.perf_counter() - started < (1 if length < 100_000 else 5)


def test_a_response_cannot_be_graded_against_no_answers():
    with pytest.raises(ValueError, match="empty list"):
        grade(boxed("5"), [])


# ---------------------------------------------------------------- hostile answers


def workers_of(parent: int) -> set[int]:
    """The process ids of a parent's workers that are alive."""
    shown = subprocess.run(
        ["ps", "-ewwo", "ppid=,pid=,stat=,args="], capture_output=True, text=True
    )
    rows = [line.split(maxsplit=3) for line in shown.stdout.splitlines()]
    return {
        int(pid) for ppid, pid, state, name in rows
        if int(ppid) == parent and "grading.workers" in name and state[0] != "Z"
    }  # fmt: skip


def test_an_endless_power_is_a_timeout_once_for_all_its_samples_and_others_are_graded(
    monkeypatch, tmp_path
):
    """The parent kills the worker, even where a library took the worker's own timer away."""
    (tmp_path / "sitecustomize.py").write_text("import signal\nsignal.setitimer = print\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    items = [(boxed(ENDLESS), "1", "stop")] * 20 + [(boxed(r"\frac{2}{4}"), "0.5", "stop")]
    with Pool(limit_s=1.5) as pool:
        started = time.perf_counter()
        assert Grader(pool).grade_all(items) == ["timeout"] * 20 + ["correct"]
        assert time.perf_counter() - started < 20


def test_a_worker_cannot_hold_more_memory_than_its_limit(monkeypatch):
    before = workers_of(os.getpid())
    with Pool(limit_s=2) as pool:
        assert graded(pool, ("1/2", "0.5")) == ["correct"]
        [worker] = workers_of(os.getpid()) - before
        assert resource.prlimit(worker, resource.RLIMIT_AS)[0] == workers.MEMORY_LIMIT
        assert graded(pool, (HUNGRY, "7-x"))[0] in ("timeout", "incorrect")
        assert graded(pool, (r"\frac{2}{4}", "0.5")) == ["correct"]
    monkeypatch.setitem(workers.RULES, "paper", Mock(side_effect=MemoryError))
    assert workers.judge("paper", "1/2", "0.5") == "timeout"


def test_a_worker_that_dies_is_replaced_and_its_question_is_a_timeout():
    before = workers_of(os.getpid())
    with Pool(limit_s=60) as pool, ThreadPoolExecutor(1) as thread:
        assert graded(pool, ("1/2", "0.5")) == ["correct"]
        [first] = workers_of(os.getpid()) - before
        os.kill(first, signal.SIGKILL)  # while it has nothing to do
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert graded(pool, ("1/4", "0.25")) == ["correct"]
        [second] = workers_of(os.getpid()) - before
        verdicts = thread.submit(graded, pool, (ENDLESS, "1"))
        time.sleep(0.5)
        os.kill(second, signal.SIGKILL)
        assert verdicts.result(timeout=15) == ["timeout"]
        assert graded(pool, ("1/8", "0.125")) == ["correct"]


def test_a_worker_that_cannot_start_is_an_error_and_not_a_verdict(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Pool() as pool:
        assert "(ImportError: no such thing); pip" in refusal(graded, pool, ("1/2", "0.5"))


@pytest.mark.parametrize("answer", ["1/2", ENDLESS])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(how, answer):
    """Ctrl-C in the parent's terminal, or a kill; while the worker waits, or cannot be stopped."""
    parent = command(
        "-c",
        "import sys, time\n"
        "from redi.eval.grading.workers import Pool\n"
        "with Pool(limit_s=int(sys.argv[1])) as pool:\n"
        "    pool.ask([('math-verify', '1/4', '0.25')])\n"
        "    print('ready', flush=True)\n"
        "    pool.ask([('math-verify', sys.argv[2], '0.5')])\n"
        "    time.sleep(60)\n",
        3 if how == signal.SIGKILL else 60,  # a killed parent's worker ends at its limit
        answer,
    )
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    [worker] = workers_of(parent.pid)
    parent.send_signal(how)
    parent.communicate(timeout=15)
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), seconds=15)


# ---------------------------------------------------------------- many answers


def test_verdicts_are_in_the_order_of_the_items_and_threads_may_share_a_grader():
    """Math-Verify's timeouts are signal handlers, which only the main thread may set."""
    items = []
    for k in range(1, 31):
        items.append((boxed(rf"\frac{{{2 * k}}}{{4}}"), f"{k}/2", "stop"))  # algebra: right
        items.append((boxed(str(k)), str(k + 1), "stop"))  # integers: wrong
        items.append((boxed(rf"\frac{{{k}}}{{7}}"), f"{k}/8", "stop"))  # algebra: wrong
        items.append((boxed(str(k)), str(k), "length"))
    expected = ["correct", "incorrect", "incorrect", "truncated"] * 30
    with Pool(processes=2) as pool, ThreadPoolExecutor(4) as threads:
        assert Grader(pool).grade_all(items) == expected
        one_by_one = threads.map(lambda item: Grader(pool).grade_all([item]), items)
        assert [verdict for [verdict] in one_by_one] == expected


def test_integers_are_graded_without_starting_a_worker():
    before = workers_of(os.getpid())
    with Pool() as pool:
        verdicts = graded(pool, *((str(k % 7), str(k % 5)) for k in range(5000)))
        assert workers_of(os.getpid()) == before
    assert verdicts == ["correct" if k % 7 == k % 5 else "incorrect" for k in range(5000)]


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import redi.eval.grade", {"torch", "sympy", "math_verify"}),
        ("from redi.eval.grading.workers import judge; judge('math-verify', 'x', '2x')", {"torch"}),
    ],
)
def test_grading_imports_no_torch_and_only_workers_import_sympy(code, unneeded):
    shown = run_command("-c", f"{code}; import sys; print({unneeded} & {{*sys.modules}})")[1]
    assert shown == "set()\n"


# ---------------------------------------------------------------- stored completions

BENCHMARK = Benchmark(
    "b",
    [Problem("sum", "1/4 + 1/4?", [r"\frac{1}{2}"]), Problem("word", "Who?", ["Evelyn", "Eve"]),
     Problem("broken", "?", [r"\frac{1}{", "7"])],
)  # fmt: skip


def test_marks_report_what_was_extracted_and_follow_the_completions(pool):
    rows = [  # id, sample, text, finish_reason; extracted, verdict
        ("word", 0, boxed("Eve"), "stop", "Eve", "correct"),
        ("sum", 1, boxed("0.5"), "stop", "0.5", "correct"),
        ("sum", 0, boxed("0.5"), "length", "0.5", "truncated"),
        ("broken", 0, "</think> seven", "stop", None, "no_answer"),
    ]
    completions = [
        Completion(id=id, sample=sample, text=text, num_tokens=9, finish_reason=reason)
        for id, sample, text, reason, *_ in rows
    ]
    marks = Grader(pool).marks(BENCHMARK, completions)
    found = [(m.id, m.sample, m.extracted, m.verdict, m.num_tokens) for m in marks]
    assert found == [(id, sample, *more, 9) for id, sample, _, _, *more in rows]


def test_golds_that_are_not_mathematics_are_named_in_one_line_and_words_are_not(pool, capsys):
    report_unreadable(pool, [BENCHMARK])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("b: 1 gold answers cannot be read as mathematics")
    assert "broken: '\\\\frac{1}{'" in line


# ---------------------------------------------------------------- slow: all golds, many answers

BENCHMARKS = os.environ.get("REDI_BENCHMARKS")
EXAMPLES = os.environ.get("REDI_MATH_VERIFY")
PROSE = re.compile(r"\$|boxed|\\[(\[]|[a-zA-Z]{2,}[ .,]+[a-zA-Z]{2,}")


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS, reason="REDI_BENCHMARKS: expected a folder of benchmark files")
@pytest.mark.parametrize("name", ["math-verify", "paper"])
def test_every_gold_is_its_own_answer_and_not_that_of_the_problem_before(name):
    for path in sorted(Path(BENCHMARKS).glob("*.jsonl")):
        problems = load(path).problems
        own = [(gold, problem.answers) for problem in problems for gold in problem.answers]
        others = [
            (before.answers[0], problem.answers)
            for before, problem in itertools.pairwise(problems)
            if text_key(before.answers[0]) not in map(text_key, problem.answers)
        ]
        with Pool(2) as pool:
            assert set(graded(pool, *own, name=name)) == {"correct"}, path.name
            verdicts = graded(pool, *others, name=name)
        # two problems may have the same answer in other words
        assert verdicts.count("incorrect") >= 0.995 * len(verdicts), path.name


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES, reason="REDI_MATH_VERIFY: expected tests/ of its repository")
def test_verdicts_on_math_verifys_own_examples_are_those_of_verify(pool):
    """Of the examples that are formulas; those of finding an answer in prose are left out."""
    from math_verify import parse, verify

    trees = (ast.parse(path.read_text()) for path in Path(EXAMPLES).glob("test_*.py"))
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tables = [call.args for call in calls if "parametrize" in ast.dump(call.func)]
    rows = [row.elts[:2] for names, rows in tables if re.match("gold, ?pred", names.value)
            for row in rows.elts if isinstance(row, ast.Tuple)]  # fmt: skip
    texts = {tuple(getattr(cell, "value", "boxed") for cell in row) for row in rows}
    bare = {pair: tuple(text.strip(" $") for text in pair) for pair in texts}
    pairs = [pair for pair in texts if not PROSE.search(" | ".join(bare[pair]))]
    assert len(pairs) > 100
    logging.disable()  # Math-Verify warns of what it cannot read
    plain = [verify(parse(gold), parse(answer)) for gold, answer in pairs]
    logging.disable(logging.NOTSET)
    verdicts = graded(pool, *(bare[pair][::-1] for pair in pairs))
    same = sum((verdict == "correct") == bool(is_same) for verdict, is_same in zip(verdicts, plain))
    assert same >= 0.98 * len(pairs)


PLANTED = {
    "math-verify": (ENDLESS, HUNGRY, r"\sqrt{" * 300 + "x" + "}" * 300, r"\sum_{k=1}^{10^9} k^k"),
    "paper": ("9**9**9**9", "10**(10**10)", "(" * 900 + "1" + ")" * 900, "factorial(10**8)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_no_sum_is_misjudged_among_planted_answers_that_hang_or_eat_memory(name):
    rows = [(rf"{answer}+{k}", "7-x", "") for answer in PLANTED[name] for k in range(3)]
    for k in range(2, 202):
        total = Fraction(k, 7) + Fraction(1, k) + Fraction(k % 2, 61)
        answer = rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
        verdict = "incorrect" if k % 2 else "correct"
        rows.append((answer, rf"\frac{{{k}}}{{7}}+\frac{{1}}{{{k}}}", verdict))
    random.Random(0).shuffle(rows)
    with Pool(2, 3.0) as pool:
        verdicts = graded(pool, *(row[:2] for row in rows), name=name)
    for (answer, gold, expected), verdict in zip(rows, verdicts, strict=True):
        allowed = {expected} if expected else {"timeout", "incorrect"}
        assert verdict in allowed, f"{answer} against {gold}"
