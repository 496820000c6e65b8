"""Two evaluations against each other, from their folders; and the page that shows both."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from redi.config import UserError
from redi.eval import report
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    completions_file,
    keep_problems,
    marks_file,
    write_lines,
)
from redi.eval.reporting import compare, page, tables
from redi.eval.reporting.compare import paired
from redi.eval.reporting.statistics import mcnemar

ROOT = Path(__file__).parent.parent


def evaluation(
    out: Path,
    *problems: str,
    text="…",
    question="1+1?",
    name="b",
    grader="math-verify",
    answer_from="after_think",
) -> Path:
    """A graded evaluation from strings: "10" is a problem solved by sample 0 and not by 1."""
    test = Benchmark(name, [Problem(str(p), question, ["2"]) for p in range(len(problems))])
    keep_problems(out, test)
    places = [(str(p), j, m == "1") for p, ms in enumerate(problems) for j, m in enumerate(ms)]
    write_lines(
        completions_file(out, name),
        [
            Completion(id=id, sample=j, text=text, num_tokens=5, finish_reason="stop")
            for id, j, _ in places
        ],
    )
    write_lines(
        marks_file(out, grader, name),
        [
            Mark(
                id=id,
                sample=j,
                verdict="correct" if right else "incorrect",
                extracted="2" if right else "3",
                num_tokens=5,
                loops=False,
                answer_from=answer_from,
            )
            for id, j, right in places
        ],
    )
    return out


def test_one_sample_a_problem_is_compared_by_mcnemar(tmp_path):
    """Nine problems that only the second solves, one that only the first does, ten that both do:
    8 of 20 more, p = 22/1024."""
    first = evaluation(tmp_path / "first", *"0" * 9, "1", *"1" * 10)
    second = evaluation(tmp_path / "second", *"1" * 9, "0", *"1" * 10)
    [found] = compare.compare([first, second])
    assert (found.won, found.lost, found.num_problems) == (9, 1, 20)
    assert found.difference == pytest.approx(8 / 20)
    assert found.p_value == mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert found.test == "McNemar's exact test"
    assert found.sentence().startswith("b: second is better than first. second less first is +40.0")


def test_several_samples_are_compared_by_a_bootstrap_over_problems(tmp_path):
    first = evaluation(tmp_path / "first", *["1100"] * 10, *["1000"] * 10)
    second = evaluation(tmp_path / "second", *["1110"] * 10, *["1000"] * 10)
    [found] = compare.compare([first, second])
    assert found.difference == pytest.approx(1 / 8)
    assert found.test == "bootstrap over problems"
    low, high = found.interval
    assert 0 < low < 1 / 8 < high < 1 / 4
    assert found.p_value < 0.01


def test_equal_runs_differ_by_chance_and_the_sentence_says_so(tmp_path):
    runs = [evaluation(tmp_path / name, "10", "01", "11") for name in ("a", "c")]
    [found] = compare.compare(runs)
    assert found.p_value == 1
    assert found.sentence().startswith("b: chance may explain the difference. c less a is +0.0")


def test_the_worse_run_is_not_called_better(tmp_path):
    worse = evaluation(tmp_path / "worse", *"0" * 30)
    better = evaluation(tmp_path / "better", *"1" * 30)
    assert "better is better than worse" in compare.compare([better, worse])[0].sentence()
    assert "better is better than worse" in compare.compare([worse, better])[0].sentence()


def test_numbers_of_samples_may_differ(tmp_path):
    test = Benchmark("b", [Problem("0", "?", ["2"])])
    marks = [
        [
            Mark(id="0", sample=j, verdict=v, extracted="2", num_tokens=1, loops=False)
            for j, v in enumerate(verdicts)
        ]
        for verdicts in (["correct", "incorrect"], ["correct"])
    ]
    assert paired(test, ("a", "b"), *marks).difference == 0.5


def test_both_graders_are_reported_and_the_papers_comes_first_for_its_benchmarks(tmp_path):
    run, older = tmp_path / "run", evaluation(tmp_path / "older", "10", "11", name="aime24")
    for name in ("aime24", "mine"):
        evaluation(run, "10", "11", name=name)
        evaluation(run, "10", "10", name=name, grader="paper")
    both = report.read(run, "both")
    first, other = (
        [(s.benchmark, s.grader, s.pass_at_1) for s in scores]
        for scores in (both.scores, both.other_scores)
    )
    assert first == [("aime24", "paper", 0.5), ("mine", "math-verify", 0.75)]
    assert other == [("aime24", "math-verify", 0.75), ("mine", "paper", 0.5)]
    content = json.loads(report.to_json(both))
    assert content["mean_pass_at_1"] == 0.625
    assert [score["grader"] for score in content["other_grader"]] == ["math-verify", "paper"]
    rows = [[c.strip() for c in line.split("|")] for line in tables.summary(both).splitlines()[2:]]
    assert [(row[1], row[2], row[4]) for row in rows] == [
        ("aime24", "paper", "50.0 ± 35.4"),
        ("mine", "math-verify", "75.0 ± 17.7"),
        ("mean", "paper, math-verify", "62.5"),
        ("aime24", "math-verify", "75.0 ± 17.7"),
        ("mine", "paper", "50.0 ± 35.4"),
        ("mean", "math-verify, paper", "62.5"),
    ]
    assert data_of(page.page([run], "both"))["runs"][0]["grader"] == "paper, math-verify"
    (run / "config.toml").write_text('grader = "both"\n')
    with pytest.raises(UserError, match="aime24: older is graded by math-verify and run by paper"):
        compare.compare([older, run])
    assert compare.compare([older, run], "math-verify")[0].difference == 0


def test_runs_whose_answers_are_read_in_two_places_are_not_compared(tmp_path):
    runs = [
        evaluation(tmp_path / "a", "1"),
        evaluation(tmp_path / "b", "0", answer_from="whole"),
    ]
    said = "b: answers of a are read after </think> and those of b in the whole .* for b, or whole"
    with pytest.raises(UserError, match=said):
        compare.compare(runs)
    rows = compare.result_rows(["a", "b"], [report.read(run) for run in runs])
    assert "in the whole response" in compare.comparison_table(rows).splitlines()[-1]
    evaluation(runs[0], "1", grader="paper", answer_from="whole")
    both = "after </think> by math-verify, in the whole response by paper"
    assert f"answers are read {both}" in tables.markdown(report.read(runs[0], "both"))


def test_runs_of_other_problems_are_not_compared(tmp_path):
    runs = [evaluation(tmp_path / q, "1", question=q) for q in ("x", "y")]
    with pytest.raises(UserError, match="b: x and y have different problems"):
        compare.compare(runs)


def test_a_run_without_the_graders_verdicts_names_the_command_that_makes_them(tmp_path):
    run = evaluation(tmp_path / "run", "1")
    with pytest.raises(UserError, match=r"grade regrade .*run --grader paper` does it"):
        report.load(run, "paper")


def test_the_command_writes_tables_and_page(tmp_path):
    runs = [evaluation(tmp_path / name, "10", "11", name="aime24") for name in ("sft", "redi")]
    done = subprocess.run(
        [sys.executable, "-m", "redi.eval.report", *runs, "--out", tmp_path / "table.json",
         "--page", tmp_path / "page.html"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "75.0 ± 17.7" in done.stdout
    assert "aime24: chance may explain the difference" in done.stdout
    assert "Nothing in this table was measured here" in done.stdout
    content = json.loads((tmp_path / "table.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["sft", "redi"]
    assert content["rows"][0]["pass@2"] == 1
    assert content["paired"][0]["difference"] == 0
    row = compare.result_rows(["sft"], [report.read(evaluation(tmp_path / "single", "1"))])
    assert row[0]["sem"] is None
    assert "100.0 ± - |" in compare.comparison_table(row)
    assert data_of((tmp_path / "page.html").read_text())["runs"][1]["name"] == "redi"


@pytest.mark.parametrize("flag", ["--out", "--page"])
def test_an_evaluations_own_files_are_not_replaced(tmp_path, monkeypatch, capsys, flag):
    own = evaluation(tmp_path / "sft", "10") / "report.json"
    own.write_text("its own")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "sft"), flag, str(own)])
    with pytest.raises(SystemExit):
        compare.main()
    assert (
        capsys.readouterr().err == f"error: {flag} {own}: expected a file outside the evaluations\n"
    )
    assert own.read_text() == "its own"


# ---------------------------------------------------------------- the page


HOSTILE = (
    "</script><script>document.title = 'x'</script><!--<script><img src=x onerror=alert(1)>"
    " \u2028 &lt;b&gt; \\u003c </textarea>]]> ' \" `"
)


class Tags(HTMLParser):
    """The elements a browser would see, and the text of the data element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = ("id", "data") in attributes

    def handle_data(self, data):
        if self._inside:
            self.data += data

    def handle_endtag(self, tag):
        self._inside = False


def data_of(text: str) -> dict:
    return json.loads(Tags(text).data)


def test_what_a_model_wrote_is_never_markup(tmp_path):
    run = evaluation(tmp_path / "run", "10", text=HOSTILE, question=HOSTILE)
    text = page.page([run])
    assert Tags(text).tags == Tags(page.TEMPLATE.read_text()).tags
    [problem] = data_of(text)["benchmarks"][0]["problems"]
    assert problem["problem"] == HOSTILE
    assert [sample["text"] for sample in problem["runs"][0]] == [HOSTILE] * 2


def test_the_page_is_one_file_that_loads_nothing():
    text = page.TEMPLATE.read_text()
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "innerHTML" not in text
    assert text.count(page.PLACE) == 1


def test_two_runs_lie_side_by_side_in_each_problem(tmp_path):
    runs = [evaluation(tmp_path / name, "10", text=name) for name in ("sft", "redi")]
    content = data_of(page.page(runs))
    [problem] = content["benchmarks"][0]["problems"]
    assert [[s["text"] for s in samples] for samples in problem["runs"]] == [
        ["sft", "sft"],
        ["redi", "redi"],
    ]
    assert [s["verdict"] for s in problem["runs"][0]] == ["correct", "incorrect"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_a_browser_shows_two_runs_side_by_side_and_runs_nothing_of_theirs(tmp_path):
    runs = [evaluation(tmp_path / n, "10", "11", text=f"{n} {HOSTILE}") for n in ("sft", "redi")]
    path = tmp_path / "page.html"
    path.write_text(page.page(runs))
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    body = shown.split("<nav")[1].split('<script type="application/json"')[0]
    assert "2 of 2 problems" in shown
    assert body.count('class="pane"') == 2
    assert body.count("&lt;/script&gt;&lt;script&gt;document.title") == 2  # as text, in each pane
    assert "<img" not in body
    assert "<title>x</title>" not in shown


def test_a_problem_that_differs_between_runs_is_an_error(tmp_path):
    runs = [evaluation(tmp_path / q, "1", question=q) for q in ("x", "y")]
    with pytest.raises(UserError, match="problem '0' is not the same in all runs"):
        page.page(runs)


def test_long_completions_are_shortened_in_the_middle_and_short_ones_are_not(monkeypatch):
    monkeypatch.setattr(page, "CHARACTERS", 100)
    limit = page._limit([10, 20, 200, 300])
    assert limit == 35  # 10 + 20 + 2 * 35
    assert page._shortened("a" * 35, limit) == "a" * 35
    text = page._shortened("a" * 100 + "b" * 200, limit)
    assert text.startswith("a" * 11)
    assert text.endswith("b" * 24)
    assert "265 characters left out" in text


def test_completions_that_fit_are_whole():
    assert page._limit([5, 7]) == 7
    assert page._limit([]) == 0


def test_every_two_of_three_runs_are_compared(tmp_path):
    runs = [evaluation(tmp_path / name, "1", "0") for name in ("a", "b", "c")]
    found = [(one.first, one.second) for one in compare.compare(runs)]
    assert found == [("a", "b"), ("a", "c"), ("b", "c")]
