r"""A response and the gold answer in, a verdict out; and what must survive a hostile answer."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from redi.config import UserError
from redi.eval import grade as grade_module
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import Completion
from redi.eval.grade import Grader, extract, grade
from redi.eval.grading import workers
from redi.eval.grading.normalize import LONGEST_ANSWER, as_integer, text_key

ROOT = Path(__file__).parent.parent
ENDLESS = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"  # Math-Verify issue 65
HUNGRY = r"10^{10^{9}}+1"  # a number of 1e9 digits


def boxed(answer: str) -> str:
    return rf"<think>\nhm</think> The answer is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as pool:
        yield pool


EQUAL = [  # gold, answer
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac59", "0.555556"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"137 \frac{1}{2}", "137.5"),
    (".35625", "0.35625"),
    ("142", "142.0"),
    ("33", "033"),
    ("58,500", "58500"),
    ("1000", "1 000"),
    ("12345678.5", "12 345 678.5"),
    ("1000.99", "1000,99"),
    ("0,111", "0.111"),
    ("(1,2), (3,4)", "(3,4), (1,2), (3, 4)"),
    (r"\pm 2021", "{-2021, 2021}"),
    ("p=5,q=2;p=7,q=2", "(7,2), (5,2)"),
    (r"10,\!080", "10,080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\$32,\!348", "32348"),
    (r"\$18.90", "18.9"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}"),
    ("p - q", "-q+p"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("6 - 5i", "-5i + 6"),
    ("2i", "(1+i)^2"),
    (r"\ln 2 + i\frac\pi3", r"\ln(2) + \frac{i \pi}{3}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("f(x)=2x", "2x"),
    (r"m_{\max }=n^{2}-n-1", "n^2-n-1"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z=4"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"x \in [-2,7]", r"y\in\left[-2, \frac{14}{2}\right]"),
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"(2,\infty)", "x > 2"),
    (r"k \geqslant 2", r"k\ge 2"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(0.6, 8/3]"),
    (r"(0,9) \cup (9,36)", r"\left(9,36\right)\cup\left(0,9\right)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("(15,-29)", "15, -29"),
    ("3, 5, 7", r"\{7, 5, 3\}"),
    ("3, 5", "(3, 5)"),
    ("1,-2", r"x = -2 \text{ or } x = 1"),
    ("$1$ and $2$", "2, 1"),
    ("100,200", "200, 100"),
    ("x=5", r"\boxed{5}"),
    ("$(1,2)$ or $(2,1)$", "(2,1),(1,2)"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\lbrace 1, 2 \rbrace", r"\{2,1\}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    (r"$90^{\circ}$,$60^{\circ}$", "60, 90"),
    (r"90^\circ", "90"),
    (r"90^\circ", r"90 \text{ degrees}"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"15\mbox{ cm}^2", r"15\,\mathrm{cm}^{2}"),
    (r"5.4 \text{ cents}", "5.4 cents"),
    (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"),
    (r"10\%", "10"),
    (r"10\%", "0.1"),
    ("62.5%", r"62.5 \%"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"1.7 \cdot 10^{-6}", "0.0000017"),
    ("1e-5", "10^{-5}"),
    ("52_8", "52_{8}"),
    # 4 * 125 + 2 * 25 + 5 = 555 = 512 + 5 * 8 + 3
    (r"4210_{5}", "1053_{8}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("even", r"\text{Even}"),
    (r"\text{(C)}", "C"),
    ("B", r"\textbf{(B)}"),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}",
    ),
    (r"\frac{1}{\sqrt{2}}c", r"\frac{c}{\sqrt 2}"),
    (r"\frac{e^{-2t}}{15}", r"\frac{1}{15 e^{2t}}"),
    (r"m_{p} c^{2}(\gamma^{2}-1) \sin ^{2} \theta", r"m_p c^2 (\gamma^2 - 1)\sin^2\theta"),
    (r"x' + \frac{r}{V}x - rc = 0", r"x'+\frac{rx}{V}=rc"),
    (r"m \frac{d v}{d t}+b v=f", r"\frac{dv}{dt} + \frac{b}{m} v = \frac{f}{m}"),
    ("y = 1/x", "2xy - 2 = 0"),
    ("MR=SRMC", r"\text{MR} = \text{SRMC}"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    ("7.", "7"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_the_same_answer_written_differently_is_correct(grader, gold, answer):
    assert grader.grade(boxed(answer), gold) == "correct"


DIFFERENT = [  # gold, answer
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac13", "0.33"),
    (r"\pi", "3.14"),
    ("5", "-5"),
    ("12", "1 2"),
    ("123456", "1 234 56"),
    ("1.234", "1,234"),
    ("1.25", "1,24"),
    ("(1,2), (3,4)", "(1,2), (1,2)"),
    ("p=5,q=2;p=7,q=2", "(5,7), (2,2)"),
    ("12", "21"),
    ("1,234", "1,243"),
    ("1234", "1, 234"),
    ("2^{1009}", "2^{1009}-1"),
    ("10^{100}", "10^{100}+1"),
    (r"8.2 \times 10^{-19}", r"2.88 \times 10^{-19}"),
    (".0000672", ".00006725"),
    ("4.5e33", "4.5e34"),
    ("x=5", "y=5"),
    ("6m", "6"),
    (r"\frac{1}{\sqrt{2}}c", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{r}{V}", r"\frac{R}{V}"),
    (r"\Delta", r"\delta"),
    ("y'+y=0", "y+y=0"),
    ("P'", "P"),
    (r"3 \frac{dM}{dt}", r"3 \frac{dm}{dt}"),
    (r"\Gamma+1", r"\gamma+1"),
    ("6-5i", "6+5i"),
    ("(3,4]", "[3,4]"),
    ("(3,4)", "(4,3)"),
    ("(1,2)", r"\{1,2\}"),
    (r"(2,\infty)", r"x \ge 2"),
    ("3, 5, 7", "3, 5"),
    ("3, 5", "3, 5, 7"),
    ("-2,-2", "-2"),
    ("(1,2),(3,4)", "(1,4),(3,2)"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    ("52_8", "52_9"),
    (r"10\%", "0.01"),
    ("0.5", r"0.5\%"),
    (r"\text{east}", r"\text{seat}"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{(C)}", r"\text{(D)}"),
    (r"2\sqrt{2}", r"\sqrt{6}"),
    ("n^{2}-n+1", "n^{2}-n-1"),
    ("y = 2x + 3", "y = 2x - 3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\frac{dM}{dt} = kM", r"\frac{dM}{dt} = -kM"),
    (r"\frac{dm}{dt} = k", r"\frac{dm}{dx} = k"),
    ("x(x-1)=0", "x-1=0"),
    (r"\sin x", r"\cos x"),
]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_an_answer_that_is_nearly_the_gold_is_incorrect(grader, gold, answer):
    assert grader.grade(boxed(answer), gold) == "incorrect"


def test_any_answer_of_a_list_suffices(grader):
    golds = ["0.01", r"\frac{1}{50}"]
    assert grader.grade(boxed("0.02"), golds) == "correct"
    assert grader.grade(boxed("0.03"), golds) == "incorrect"


def test_a_gold_that_is_no_latex_does_not_hide_the_next_one(grader):
    assert grader.grade(boxed("0.5"), [r"\frac{", r"\frac12"]) == "correct"


# ---------------------------------------------------------------- which answer


READ = [  # response to a problem whose answer is 5, verdict by after_think, verdict by whole
    (r"<think> 2+3 </think> \boxed{5}", "correct", "correct"),
    (r"2+3 </think> \boxed{5}", "correct", "correct"),  # <think> was in the prompt
    (r"<think> \boxed{4}? </think> \boxed{5}", "correct", "correct"),
    (r"<think> \boxed{5} </think> So that is it.", "no_answer", "no_answer"),
    (r"<think> 1 </think> \boxed{4} <think> 2 </think> \boxed{5}", "correct", "correct"),
    (r"<think> It is \boxed{5}", "no_answer", "no_answer"),
    (r"\boxed{5} <think> Let me check.", "no_answer", "no_answer"),
    (r"So it is \boxed{5}.", "no_answer", "correct"),
    (r"\boxed{4}, or rather \boxed{5}", "no_answer", "correct"),
    (r"\boxed{5}, or rather \boxed{4}", "no_answer", "incorrect"),
    (r"So it is \boxed{5", "no_answer", "no_answer"),
    ("The answer is 5.", "no_answer", "no_answer"),
    ("</think> The answer is 5.", "no_answer", "no_answer"),
    ("", "no_answer", "no_answer"),
]


@pytest.mark.parametrize("name", ["math-verify", "paper"])
def test_where_an_answer_is_read_depends_on_whether_the_model_thinks(name):
    for column, answer_from in enumerate(("after_think", "whole"), start=1):
        with Grader(name=name, answer_from=answer_from) as grader:
            found = grader.grade_all([(response, "5", "stop") for response, *_ in READ])
        assert found == [row[column] for row in READ]


def test_a_response_cut_off_at_the_limit_is_truncated_but_the_paper_reads_its_box():
    cut = [  # response, rule, verdict of math-verify, of paper
        (boxed("5"), "after_think", "truncated", "correct"),
        (r"<think> \boxed{5}", "after_think", "truncated", "truncated"),
        (r"So \boxed{5} and", "after_think", "truncated", "truncated"),
        (r"So \boxed{5} and", "whole", "truncated", "correct"),
        (r"<think> \boxed{5}", "whole", "truncated", "truncated"),
    ]
    for response, rule, ours, theirs in cut:
        assert grade(response, "5", "length", rule) == ours
        assert Grader(name="paper", answer_from=rule).grade(response, "5", "length") == theirs


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"</think> \boxed{1} or rather \boxed{2}", "2"),
        (r"</think> \boxed{1}, \fbox{2}", "2"),
        (r"\boxed{1}</think> none", None),
        (r"</think> \boxed{1} </think> \boxed{2}", "2"),
        (r"</think> \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"</think> \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"</think> \boxed{\{1}", r"\{1"),
        (r"</think> \boxed {7}", "7"),
        (r"</think> \boxed{1} and \boxed{2", "1"),
        (r"</think> \boxed{1 and \boxed{2}", "2"),
        (r"</think> \boxed{\boxed{3}}", "3"),
        (r"</think> \boxed{4} as asked, in \boxed{}.", "4"),
        (r"</think> \boxed{ }", None),
        (r"</think> }{ \boxed{5} }", "5"),
        ("</think> \\boxed{1 \\\\\n 2}", "1 \\\\\n 2"),
        (r"no end \boxed{5}", None),
    ],
)
def test_the_answer_is_the_last_balanced_box_after_the_thinking(response, answer):
    assert extract(response) == answer


def test_extraction_takes_linear_time_on_boxes_that_never_close():
    started = time.perf_counter()
    assert extract("</think>" + r"\boxed{x " * 100_000) is None
    assert time.perf_counter() - started < 5


# ---------------------------------------------------------------- hostile answers


def test_an_endless_power_is_a_timeout_and_the_next_answer_is_graded():
    with Grader(workers=1, limit_s=1.5) as grader:
        started = time.perf_counter()
        items = [(boxed(ENDLESS), "1", "stop"), (boxed(r"\frac{2}{4}"), "0.5", "stop")]
        assert grader.grade_all(items) == ["timeout", "correct"]
        assert time.perf_counter() - started < 20


def test_a_memory_bomb_stays_within_its_limit_and_the_next_answer_is_graded():
    with Grader(workers=1, limit_s=2) as grader:
        assert grader.grade(boxed(HUNGRY), "7-x") in ("timeout", "incorrect")
        assert grader.grade(boxed(r"\frac{2}{4}"), "0.5") == "correct"


def test_a_worker_cannot_hold_more_memory_than_its_limit(grader):
    assert grader.grade(boxed("1/2"), "0.5") == "correct"
    soft, _ = resource.prlimit(grader.pool._idle[0]._process.pid, resource.RLIMIT_AS)
    assert soft == workers.MEMORY_LIMIT


def test_running_out_of_memory_is_a_timeout(monkeypatch):
    def exhaust(gold, answer):
        raise MemoryError

    monkeypatch.setitem(workers.RULES, "math-verify", exhaust)
    assert workers.judge("math-verify", "1/2", "0.5") == "timeout"


def test_a_worker_that_dies_is_replaced():
    with Grader(workers=1) as grader:
        assert grader.grade(boxed("1/2"), "0.5") == "correct"
        first = grader.pool._idle[0]._process.pid
        os.kill(first, signal.SIGKILL)
        grader.pool._idle[0]._process.wait()
        assert grader.grade(boxed("1/4"), "0.25") == "correct"
        assert grader.pool._idle[0]._process.pid != first


def test_a_worker_that_dies_during_a_question_is_a_timeout():
    with Grader(workers=1, limit_s=30) as grader:
        grader.grade(boxed("1/2"), "0.5")
        worker = grader.pool._idle[0]._process
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {worker.pid}"])
        started = time.perf_counter()
        assert grader.grade(boxed(ENDLESS), "1") == "timeout"
        assert time.perf_counter() - started < 15
        killer.wait()


def test_a_worker_that_cannot_start_is_an_error_and_not_a_verdict(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader, pytest.raises(UserError, match="no such thing"):
        grader.grade(boxed("1/2"), "0.5")


def test_workers_end_when_their_parent_is_killed():
    code = (
        "import time\n"
        "from redi.eval.grade import Grader\n"
        "grader = Grader()\n"
        r"grader.grade(r'</think> \boxed{1/2}', '0.5')" + "\n"
        "print(grader.pool._idle[0]._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    assert _is_running(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() not in ("", "Z", "Zs")


def test_a_worker_whose_alarm_was_turned_off_is_killed_by_the_parent(monkeypatch, tmp_path):
    """Math-Verify's own timeouts end in signal.alarm(0), which would turn off the worker's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal\nsignal.setitimer = lambda *arguments: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "GRACE_S", 0.5)
    with Grader(workers=1, limit_s=1) as grader:
        started = time.perf_counter()
        assert grader.grade(boxed(ENDLESS), "1") == "timeout"
        assert time.perf_counter() - started < 20
        assert grader.grade(boxed("1/2"), "0.5") == "correct"


def test_an_interrupt_kills_the_busy_worker(monkeypatch):
    grader = Grader(workers=1, limit_s=60)
    started = []

    def interrupted(self):
        started.append(self._process)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers._Worker, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grader.grade(boxed("1/2"), "0.5")
    assert started[0].poll() is not None


# ---------------------------------------------------------------- many answers


def test_grade_all_keeps_the_order_of_its_items():
    items = []
    for k in range(1, 31):
        items.append((boxed(rf"\frac{{{2 * k}}}{{4}}"), f"{k}/2", "stop"))  # algebra: right
        items.append((boxed(str(k)), str(k + 1), "stop"))  # integers: wrong
        items.append((boxed(rf"\frac{{{k}}}{{7}}"), f"{k}/8", "stop"))  # algebra: wrong
        items.append((boxed(str(k)), str(k), "length"))
    with Grader(workers=2) as grader:
        verdicts = grader.grade_all(items)
    assert verdicts == ["correct", "incorrect", "incorrect", "truncated"] * 30


def test_threads_may_share_a_grader():
    """Math-Verify's timeouts are signal handlers, which only the main thread may set."""
    with Grader(workers=2) as grader, ThreadPoolExecutor(4) as threads:
        items = [(boxed(rf"\frac{{{2 * k}}}{{6}}"), f"{k}/3") for k in range(1, 21)]
        verdicts = list(threads.map(lambda item: grader.grade(*item), items))
    assert verdicts == ["correct"] * 20


def test_integers_are_graded_without_starting_a_worker():
    with Grader() as grader:
        items = [(boxed(str(k % 7)), str(k % 5), "stop") for k in range(5000)]
        verdicts = grader.grade_all(items)
        assert grader.pool._idle == []
    assert verdicts == ["correct" if k % 7 == k % 5 else "incorrect" for k in range(5000)]


def test_an_answer_that_occurs_many_times_is_judged_once(monkeypatch):
    sent = []
    send = workers._Worker.send
    monkeypatch.setattr(workers._Worker, "send", lambda self, q: (sent.append(q), send(self, q)))
    with Grader() as grader:
        verdicts = grader.grade_all([(boxed("1/2"), "0.5", "stop")] * 100)
    assert verdicts == ["correct"] * 100
    assert sent == [("math-verify", "1/2", "0.5")]


def test_grading_imports_neither_torch_nor_sympy():
    code = "import sys, redi.eval.grade; print({'torch', 'sympy', 'math_verify'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_nothing_is_correct_against_no_answers():
    with pytest.raises(ValueError, match="empty list"):
        grade(boxed("5"), [])


@pytest.mark.parametrize("unit", [r"\text{a}", "a, ", "{", r"\frac", "1", r"\{", "((", "a\\ "])
def test_an_endless_answer_is_decided_at_once(unit):
    """Such answers come from models that loop; none may keep the parent, which has no alarm."""
    for length in (LONGEST_ANSWER, 10 * LONGEST_ANSWER):
        answer = (unit * length)[:length]
        started = time.perf_counter()
        Grader()._decide(rf"</think> \boxed{{{answer}}}", "5", "stop")
        assert time.perf_counter() - started < 1


def test_whitespace_between_digits_is_significant():
    assert text_key("1 2") != text_key("12")
    assert as_integer("1 2") is None


# ---------------------------------------------------------------- stored completions


TEST = Benchmark(
    "b",
    [
        Problem("sum", "1/4 + 1/4?", [r"\frac{1}{2}"]),
        Problem("word", "Who?", [r"\text{Evelyn}", "Eve"]),
        Problem("broken", "?", [r"\frac{1}{", "7"]),
    ],
)


def stored(id: str, sample: int, text: str, finish_reason: str = "stop") -> Completion:
    return Completion(id=id, sample=sample, text=text, num_tokens=9, finish_reason=finish_reason)


def test_marks_say_what_was_extracted_and_follow_the_completions():
    completions = [
        stored("word", 0, boxed("Eve")),
        stored("sum", 1, boxed("0.5")),
        stored("sum", 0, boxed("0.5"), "length"),
        stored("broken", 0, "</think> seven"),
    ]
    with Grader() as grader:
        marks = grader.marks(TEST, completions)
    assert [(m.id, m.sample, m.verdict, m.extracted, m.num_tokens) for m in marks] == [
        ("word", 0, "correct", "Eve", 9),
        ("sum", 1, "correct", "0.5", 9),
        ("sum", 0, "truncated", "0.5", 9),
        ("broken", 0, "no_answer", None, 9),
    ]


def test_golds_that_are_no_mathematics_are_named_and_words_are_not():
    with Grader() as grader:
        assert grader.unreadable(TEST) == [("broken", r"\frac{1}{")]


def test_unreadable_golds_are_said_in_one_line(capsys):
    with Grader() as grader:
        grade_module.report_unreadable(grader, [TEST])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("b: 1 gold answers cannot be read as mathematics")
    assert "broken: '\\\\frac{1}{'" in line


# ---------------------------------------------------------------- the paper's grader


def test_the_two_graders_differ_where_their_rules_do():
    """An unreduced fraction, a list in another order, capitals."""
    cases = [(r"\frac{2}{4}", r"\frac{1}{2}"), ("3, 5", "5, 3"), ("R", "r")]
    items = [(boxed(answer), gold, "stop") for answer, gold in cases]
    with Grader() as ours, Grader(name="paper") as theirs:
        assert ours.grade_all(items) == ["correct", "correct", "incorrect"]
        assert theirs.grade_all(items) == ["incorrect", "incorrect", "correct"]


def test_the_paper_grader_survives_a_hostile_answer():
    with Grader(limit_s=2, name="paper") as grader:
        items = [
            (boxed(answer), "7-x", "stop") for answer in ("9^9^9^9", "9**9**9**9**9", "(" * 900)
        ]
        verdicts = grader.grade_all([*items, (boxed("-x+7"), "7-x", "stop")])
    assert verdicts[3] == "correct"
    assert set(verdicts[:3]) <= {"timeout", "incorrect"}
