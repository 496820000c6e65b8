"""Two evaluations against each other, from their folders; and the page that shows both."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from processes import main_in_this_process

from redi.config import UserError
from redi.eval import report
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    completions_file,
    marks_file,
    store_problems,
    write_lines,
)
from redi.eval.reporting import page, tables
from redi.eval.reporting.compare import compare, result_rows
from redi.eval.reporting.page import evaluation_page
from redi.eval.reporting.statistics import mcnemar
from redi.eval.reporting.stored import load, read


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
    store_problems(out, test)
    completions, marks = [], []
    for id, letters in enumerate(problems):
        for sample, letter in enumerate(letters):
            key = {"id": str(id), "sample": sample, "num_tokens": 5}
            verdict, answer = ("correct", "2") if letter == "1" else ("incorrect", "3")
            completions.append(Completion(**key, text=text, finish_reason="stop"))
            more = {"extracted": answer, "loops": False, "answer_from": answer_from}
            marks.append(Mark(**key, verdict=verdict, **more))
    write_lines(completions_file(out, name), completions)
    write_lines(marks_file(out, grader, name), marks)
    return out


def two(tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]) -> list[Path]:
    return [evaluation(tmp_path / "first", *first), evaluation(tmp_path / "second", *second)]


# ---------------------------------------------------------------- comparisons


def test_one_sample_per_problem_is_compared_by_mcnemar(tmp_path):
    """Nine problems that only the second solves, one that only the first does, ten that both do:
    8 of 20 more, p = 22/1024."""
    runs = two(tmp_path, (*"0" * 9, "1", *"1" * 10), (*"1" * 9, "0", *"1" * 10))
    [found] = compare(runs)
    assert (found.won, found.lost, found.num_problems) == (9, 1, 20)
    assert found.difference == pytest.approx(8 / 20)
    assert found.p_value == mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert found.test == "McNemar's exact test"
    assert found.sentence().startswith("b: second is better than first. second minus first is +40")
    assert "second is better than first. first minus second" in compare(runs[::-1])[0].sentence()


def test_several_samples_are_compared_by_a_bootstrap_over_problems(tmp_path):
    runs = two(tmp_path, (*["1100"] * 10, *["1000"] * 10), (*["1110"] * 10, *["1000"] * 10))
    [found] = compare(runs)
    assert found.difference == pytest.approx(1 / 8)
    assert found.test == "bootstrap over problems"
    low, high = found.interval
    assert 0 < low < 1 / 8 < high < 1 / 4
    assert found.p_value < 0.01


def test_equal_runs_differ_by_chance_and_the_sentence_says_so(tmp_path):
    [found] = compare(two(tmp_path, ("10", "01", "11"), ("10", "01", "11")))
    assert found.p_value == 1
    expected = "b: chance may explain the difference. second minus first is +0.0"
    assert found.sentence().startswith(expected)


def test_numbers_of_samples_may_differ(tmp_path):
    assert compare(two(tmp_path, ("10",), ("1",)))[0].difference == 0.5


def test_every_two_of_three_runs_are_compared(tmp_path):
    runs = [evaluation(tmp_path / name, "1", "0") for name in ("a", "b", "c")]
    found = [(one.first, one.second) for one in compare(runs)]
    assert found == [("a", "b"), ("a", "c"), ("b", "c")]


def test_both_graders_are_reported_and_the_papers_leads_for_its_benchmarks(tmp_path):
    run, older = tmp_path / "run", evaluation(tmp_path / "older", "10", "11", name="aime24")
    for name in ("aime24", "mine"):
        evaluation(run, "10", "11", name=name)
        evaluation(run, "10", "10", name=name, grader="paper")
    both = read(run, "both")
    first, other = (
        [(s.benchmark, s.grader, s.pass_at_1) for s in scores]
        for scores in (both.scores, both.other_scores)
    )
    assert first == [("aime24", "paper", 0.5), ("mine", "math-verify", 0.75)]
    assert other == [("aime24", "math-verify", 0.75), ("mine", "paper", 0.5)]
    content = json.loads(tables.to_json(both))
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
    assert "graded by paper, math-verify" in evaluation_page([run], "both")
    (run / "config.toml").write_text('grader = "both"\n')
    with pytest.raises(UserError, match="aime24: older is graded by math-verify and run by paper"):
        compare([older, run])
    assert compare([older, run], "math-verify")[0].difference == 0


def test_runs_whose_answers_are_read_in_two_places_are_not_compared(tmp_path):
    runs = [evaluation(tmp_path / "a", "1"), evaluation(tmp_path / "b", "0", answer_from="whole")]
    message = "b: answers of a are read after </think> and those of b in the whole .* for b, or wh"
    with pytest.raises(UserError, match=message):
        compare(runs)
    evaluation(runs[0], "1", grader="paper", answer_from="whole")
    both = "after </think> by math-verify, in the whole response by paper"
    assert f"answers are read {both}" in tables.markdown(read(runs[0], "both"))


def test_runs_of_other_problems_are_neither_compared_nor_shown(tmp_path):
    runs = [evaluation(tmp_path / q, "1", question=q) for q in ("x", "y")]
    with pytest.raises(UserError, match="b: x and y have different problems"):
        compare(runs)
    with pytest.raises(UserError, match="problem '0' is not the same in all runs"):
        evaluation_page(runs)


def test_a_run_without_the_graders_verdicts_names_the_command_that_makes_them(tmp_path):
    run = evaluation(tmp_path / "run", "1")
    with pytest.raises(UserError, match=r"grade regrade .*run --grader paper` does it"):
        load(run, "paper")


def test_the_command_writes_tables_and_page(tmp_path, capsys):
    runs = [evaluation(tmp_path / name, "10", "11", name="aime24") for name in ("sft", "redi")]
    files = tmp_path / "table.json", tmp_path / "page.html"
    assert main_in_this_process(report.main, *runs, "--out", files[0], "--page", files[1]) == 0
    shown = capsys.readouterr().out
    assert "75.0 ± 17.7" in shown
    assert "aime24: chance may explain the difference" in shown
    assert "Nothing in this table was measured here" in shown
    content = json.loads(files[0].read_text())
    assert [row["model"] for row in content["rows"]] == ["sft", "redi"]
    assert content["rows"][0]["pass@2"] == 1
    assert content["paired"][0]["difference"] == 0
    single = [read(evaluation(tmp_path / "single", "1"))]
    assert result_rows(["single"], single)[0]["sem"] is None
    assert "100.0 ± - |" in tables.side_by_side(["single"], single)
    assert data_of(files[1].read_text())["runs"] == ["sft", "redi"]


@pytest.mark.parametrize("flag", ["--out", "--page"])
def test_an_evaluations_own_files_are_not_replaced(tmp_path, capsys, flag):
    own = evaluation(tmp_path / "sft", "10") / "report.json"
    own.write_text("its own")
    assert main_in_this_process(report.main, tmp_path / "sft", flag, own) == 2
    expected = f"error: {flag} {own}: expected a file outside the evaluations\n"
    assert capsys.readouterr().err == expected
    assert own.read_text() == "its own"


# ---------------------------------------------------------------- the page


HOSTILE = (
    "</script><script>document.title = 'x'</script><!--<script><img src=x onerror=alert(1)>"
    " \u2028 &lt;b&gt; \\u003c </textarea>]]> ' \" `"
)


class Elements(HTMLParser):
    """The tags that a browser would see, and the text of the data element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = ("id", "data") in attributes

    def handle_data(self, data):
        self.data += data if self._inside else ""


def data_of(text: str) -> dict:
    return json.loads(Elements(text).data)


def test_what_a_model_wrote_is_never_markup(tmp_path):
    run = evaluation(tmp_path / "run", "10", text=HOSTILE, question=HOSTILE)
    (run / "config.toml").write_text(f"model = {json.dumps(HOSTILE)}\n")
    text = evaluation_page([run])
    harmless = evaluation_page([evaluation(tmp_path / "harmless", "10")])
    assert Elements(text).tags == Elements(harmless).tags
    assert f"<title>{html.escape(HOSTILE)}, graded by" in text
    [problem] = data_of(text)["benchmarks"][0]["problems"]
    assert problem["problem"] == HOSTILE
    assert [sample["text"] for sample in problem["runs"][0]] == [HOSTILE] * 2
    # One file that loads nothing.
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", harmless)
    assert "default-src 'none'" in harmless
    assert "innerHTML" not in harmless


def test_a_page_shows_each_problem_with_the_samples_of_both_runs(tmp_path):
    runs = [evaluation(tmp_path / name, "10", text=name) for name in ("sft", "redi")]
    [problem] = data_of(evaluation_page(runs))["benchmarks"][0]["problems"]
    texts = [[s["text"] for s in samples] for samples in problem["runs"]]
    assert texts == [["sft", "sft"], ["redi", "redi"]]
    assert [s["verdict"] for s in problem["runs"][0]] == ["correct", "incorrect"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_a_browser_shows_two_runs_side_by_side_and_runs_nothing_of_theirs(tmp_path):
    runs = [evaluation(tmp_path / n, "10", "11", text=f"{n} {HOSTILE}") for n in ("sft", "redi")]
    path = tmp_path / "page.html"
    path.write_text(evaluation_page(runs))
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


def test_long_completions_are_shortened_in_the_middle_and_short_ones_are_not(tmp_path, monkeypatch):
    """10 + 20 + 2 * 35 characters fit into 100."""
    runs = [
        evaluation(tmp_path / str(number), "1", text="a" * 100 + "b" * (number - 100))
        if number > 100
        else evaluation(tmp_path / str(number), "1", text="a" * number)
        for number in (10, 20, 200, 300)
    ]

    def texts() -> list[str]:
        [problem] = data_of(evaluation_page(runs))["benchmarks"][0]["problems"]
        return [samples[0]["text"] for samples in problem["runs"]]

    assert list(map(len, texts())) == [10, 20, 200, 300]
    monkeypatch.setattr(page, "CHARACTERS", 100)
    assert texts()[:2] == ["a" * 10, "a" * 20]
    assert texts()[3] == f"{'a' * 11}\n\n[... 265 characters left out ...]\n\n{'b' * 24}"
    assert "long completions are shortened" in evaluation_page(runs)
