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
    store_inputs,
    write_lines,
)
from redi.eval.reporting import page, tables
from redi.eval.reporting.compare import compare
from redi.eval.reporting.page import evaluation_page
from redi.eval.reporting.stored import load, read


def evaluation(
    out: Path, *problems: str, text="…", question="1+1?", name="b", grader="math-verify", **more
) -> Path:
    """A graded evaluation from strings: "10" is a problem solved by sample 0 and not by 1."""
    store_inputs(
        out, [Benchmark(name, [Problem(str(p), question, ["2"]) for p in range(len(problems))])]
    )
    completions, marks = [], []
    for id, letters in enumerate(problems):
        for sample, letter in enumerate(letters):
            key = {"id": str(id), "sample": sample, "num_tokens": 5}
            verdict, answer = ("correct", "2") if letter == "1" else ("incorrect", "3")
            completions.append(Completion(**key, text=text, finish_reason="stop"))
            marks.append(Mark(**key, verdict=verdict, extracted=answer, loops=False, **more))
    write_lines(completions_file(out, name), completions)
    write_lines(marks_file(out, grader, name), marks)
    return out


# ---------------------------------------------------------------- comparisons

MCNEMAR, BOOTSTRAP = "McNemar's exact test", "bootstrap over problems"
CHANCE = "b: chance may explain the difference. second minus first is"
COMPARISONS = [  # two runs; difference, bounds of its interval, won, lost, bounds of p, test, words
    # One sample per problem. Nine problems that only the second solves, one that only the first
    # does, ten that both do: 8 of 20 more, p = 22/1024.
    ((*"0" * 9, "1", *"1" * 10), (*"1" * 9, "0", *"1" * 10), 8 / 20, (0, 1), 9, 1,
     (22 / 1024, 22 / 1024), MCNEMAR, "b: second is better than first. second minus first is +40"),
    ((*"1" * 9, "0", *"1" * 10), (*"0" * 9, "1", *"1" * 10), -8 / 20, (-1, 0), 1, 9,
     (22 / 1024, 22 / 1024), MCNEMAR, "b: first is better than second. second minus first is -40"),
    ((*["1100"] * 10, *["1000"] * 10), (*["1110"] * 10, *["1000"] * 10), 1 / 8, (0.01, 0.24), 10, 0,
     (0, 0.01), BOOTSTRAP, "b: second is better than first."),
    (("10", "01", "11"), ("10", "01", "11"), 0, (-1, 1), 0, 0, (1, 1), BOOTSTRAP, f"{CHANCE} +0.0"),
    (("10",), ("1",), 0.5, (0, 1), 1, 0, (0, 1), BOOTSTRAP, "b: "),  # numbers of samples may differ
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "difference", "bounds", "won", "lost", "p", "test", "words"), COMPARISONS
)
def test_two_runs_are_compared_problem_by_problem(
    tmp_path, first, second, difference, bounds, won, lost, p, test, words
):
    runs = [evaluation(tmp_path / "first", *first), evaluation(tmp_path / "second", *second)]
    [found] = compare(runs)
    assert (found.won, found.lost, found.num_problems) == (won, lost, len(first))
    assert found.difference == pytest.approx(difference)
    low, high = found.interval
    assert bounds[0] <= low <= difference <= high <= bounds[1]
    assert p[0] <= found.p_value <= p[1]
    assert found.test == test
    assert found.sentence().startswith(words)


def test_both_graders_are_reported_and_the_papers_leads_for_its_benchmarks(tmp_path):
    run, older = tmp_path / "run", evaluation(tmp_path / "older", "10", "11", name="aime24")
    for name in ("aime24", "mine"):
        evaluation(run, "10", "11", name=name)
        evaluation(run, "10", "10", name=name, grader="paper")
    both = read(run, "both")
    assert both.mean_pass_at_1 == 0.625
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
    with pytest.raises(UserError, match=r"aime24: older is graded by math-verify .*, run by paper"):
        compare([older, run])
    evaluation(tmp_path / "third", "10", "11", name="aime24")
    found = compare([older, run, tmp_path / "third"], "math-verify")
    names = [("older", "run"), ("older", "third"), ("run", "third")]  # every two
    assert [(one.first, one.second, one.difference) for one in found] == [(*n, 0) for n in names]


def test_what_is_not_comparable_is_refused(tmp_path):
    x, y, whole = (
        evaluation(tmp_path / name, "1", **more)
        for name, more in (
            ("x", {}), ("y", {"question": "2+2?"}), ("whole", {"answer_from": "whole"}),
        )
    )  # fmt: skip
    for attempt, message in (
        (lambda: compare([x, y]), "b: x and y have different problems"),
        (lambda: evaluation_page([x, y]), "problem '0' is not the same in all runs"),
        (lambda: compare([x, whole]),
         "b: x is graded by math-verify after </think>, whole by .* in the whole response; choose"),
        (lambda: load(x, "paper"), r"grade regrade .*x --grader paper` does it"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            attempt()
    evaluation(x, "1", grader="paper", answer_from="whole")
    both = "after </think> by math-verify, in the whole response by paper"
    assert f"answers are read {both}" in tables.markdown(read(x, "both"))


def test_the_command_writes_tables_and_page_outside_the_evaluations(tmp_path, capsys):
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
    assert data_of(files[1].read_text())["runs"] == ["sft", "redi"]
    own = runs[0] / "report.json"
    for flag in ("--out", "--page"):
        assert main_in_this_process(report.main, *runs, flag, own) == 2
        error = f"error: {flag} {own}: expected a file outside the evaluations\n"
        assert capsys.readouterr().err.endswith(error)
    assert not own.exists()


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
    samples = [(sample["text"], sample["verdict"]) for sample in problem["runs"][0]]
    assert samples == [(HOSTILE, "correct"), (HOSTILE, "incorrect")]
    # One file that loads nothing.
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", harmless)
    assert "default-src 'none'" in harmless
    assert "innerHTML" not in harmless


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
    """Each of four may have 40 of 160 characters."""
    texts = ["a" * 10, "a" * 40, "a" * 100 + "b" * 100, "a" * 100 + "b" * 200]
    runs = [evaluation(tmp_path / str(len(text)), "1", text=text) for text in texts]

    def shown() -> list[str]:
        """A problem has the samples of all runs."""
        [problem] = data_of(evaluation_page(runs))["benchmarks"][0]["problems"]
        return [samples[0]["text"] for samples in problem["runs"]]

    assert shown() == texts
    monkeypatch.setattr(page, "CHARACTERS", 160)
    found = shown()
    assert found[:2] == texts[:2]
    assert found[3] == f"{'a' * 13}\n\n[... 260 characters left out ...]\n\n{'b' * 27}"
    assert "long completions are shortened" in evaluation_page(runs)
