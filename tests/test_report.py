"""The numbers of the results table, worked by hand; the report in its forms; evaluations against
each other; and the page."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path

import pytest
from processes import main_in_this_process
from small_run import refusal

from redi.config import to_toml
from redi.eval import report
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import (
    Completion,
    Mark,
    by_problem,
    completions_file,
    marks_file,
    store_inputs,
    write_lines,
)
from redi.eval.protocol import EvalConfig
from redi.eval.reporting import page, paper_results, scores
from redi.eval.reporting.compare import compare
from redi.eval.reporting.page import evaluation_page
from redi.eval.reporting.scores import score
from redi.eval.reporting.stored import Evaluation, GradedBenchmark, load, run_names
from redi.eval.reporting.tables import card, markdown, score_table
from redi.tables import markdown_table

VERDICTS = {
    "1": "correct", "0": "incorrect", "t": "truncated", "n": "no_answer", "h": "timeout",
}  # fmt: skip


def graded(
    *problems: str, name="b", grader="math-verify", question="1+1?", subjects=(), difficulties=(),
    answer_from="after_think",
) -> GradedBenchmark:  # fmt: skip
    """Marks from strings: "10" is a problem whose sample 0 is correct and sample 1 incorrect."""
    rows = list(zip_longest(problems, subjects, difficulties))
    test = [Problem(str(p), question, ["2"], *about) for p, (_, *about) in enumerate(rows)]
    marks = [
        Mark(
            id=str(p), sample=k, verdict=VERDICTS[letter], num_tokens=5, loops=False,
            extracted=None if letter == "n" else letter, answer_from=answer_from,
        )
        for p, letters in enumerate(problems) for k, letter in enumerate(letters)
    ]  # fmt: skip
    benchmark = Benchmark(name, test)
    return GradedBenchmark(benchmark, grader, by_problem(benchmark, marks))


def marks_of(graded: GradedBenchmark) -> list[Mark]:
    return [mark for row in graded.rows for mark in row]


def evaluation(*tests: GradedBenchmark) -> Evaluation:
    settings = {"model": "m", "seed": 42}
    return Evaluation(Path("m"), settings, "math-verify", {g.benchmark.name: [g] for g in tests})


def report_of(*tests: GradedBenchmark) -> scores.Report:
    return scores.report(evaluation(*tests))


def saved(out: Path, *tests: GradedBenchmark, text="…", model="m", grader="math-verify") -> Path:
    """The folder of an evaluation, with this text as every completion."""
    for one in tests:
        store_inputs(out, [one.benchmark])
        completions = [
            Completion(id=m.id, sample=m.sample, text=text, num_tokens=5, finish_reason="stop")
            for m in marks_of(one)
        ]
        write_lines(completions_file(out, one.benchmark.name), completions)
        write_lines(marks_file(out, one.grader, one.benchmark.name), marks_of(one))
    names = list(dict.fromkeys(one.benchmark.name for one in tests))
    settings = EvalConfig(model=model, grader=grader, benchmark=names)
    (out / "config.toml").write_text(to_toml(settings))
    return out


def page_of(*runs: Path) -> str:
    loaded = {run.name: load(run) for run in runs}
    return evaluation_page(loaded, score_table(scores.report(loaded[runs[0].name])))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# ---------------------------------------------------------------- scores


def test_the_numbers_of_three_problems_with_four_samples():
    """Runs of 3/3, 2/3, 1/3, 2/3: mean 2/3, SEM sqrt(1/18) / 2. c = 4, 3, 1 of n = 4: pass@2 is
    (1 + 1 + 1/2) / 3, pass@3 (1 + 1 + 3/4) / 3. The majority is right twice, then wrong."""
    test = graded("1111", "1101", "1000")
    result = score(test)
    assert (result.num_problems, result.num_samples) == (3, 4)
    assert result.pass_at_1 == pytest.approx(2 / 3)
    assert result.sem == pytest.approx(1 / (6 * math.sqrt(2)))
    assert result.pass_at_k == pytest.approx([2 / 3, 2.5 / 3, 2.75 / 3, 1])
    assert result.majority == pytest.approx(2 / 3)


def test_the_interval_is_over_problems_and_the_sem_over_samples():
    """Half of the problems always right, half never: every run scores 1/2, so the SEM is 0."""
    result = score(graded(*["11"] * 20, *["00"] * 20))
    low, high = result.interval
    assert low < result.pass_at_1 == 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)
    assert result.sem == 0


def test_tokens_and_shares():
    """Tokens 10, 20, 30, 100: mean 160/4 = 40, median (20 + 30)/2 = 25."""
    test = graded("t", "t", "n", "h")
    changed = zip(marks_of(test), [10, 20, 30, 100], [False, True, False, False])
    rows = [[replace(m, num_tokens=n, loops=loops)] for m, n, loops in changed]
    test = replace(test, rows=rows)
    result = score(test)
    assert (result.mean_tokens, result.median_tokens) == (40, 25)
    assert (result.truncated, result.no_answer, result.timeout) == (0.5, 0.25, 0.25)
    assert (result.loops, result.pass_at_1) == (0.25, 0)
    # Unknown if one completion does not state them.
    unknown = replace(test, rows=[[replace(rows[0][0], num_tokens=None)], *rows[1:]])
    assert score(unknown).mean_tokens is None
    assert "unknown" in markdown(report_of(unknown))


@pytest.mark.parametrize(
    "samples",
    [
        [("correct", "1"), ("truncated", "2"), ("truncated", "2"), ("no_answer", None)],
        [("correct", r"\dfrac{1}{2}"), ("correct", r"\frac12"), ("incorrect", "7"),
         ("incorrect", "8")],
    ],
)  # fmt: skip
def test_only_finished_answers_vote_and_spellings_of_one_answer_vote_together(samples):
    test = graded("1" * len(samples))
    changed = zip(marks_of(test), samples)
    test = replace(test, rows=[[replace(m, verdict=v, extracted=e) for m, (v, e) in changed]])
    assert score(test).majority == 1


def test_groups_are_scored_apart_and_sorted():
    result = score(
        graded("11", "10", "00", "01", subjects=["Geometry", None, "Algebra", "Algebra"],
               difficulties=[5.0, 4.5, 5.0, 10.0])
    )  # fmt: skip
    found = [(g.name, g.num_problems, g.pass_at_1) for g in result.by_difficulty]
    assert found == [("4.5", 1, 0.5), ("5", 2, 0.5), ("10", 1, 0.5)]
    found = [(g.name, g.pass_at_1) for g in result.by_subject]
    assert found == [("Algebra", 0.25), ("Geometry", 1), ("not said", 0.5)]
    assert score(graded("1", "0")).by_subject == []
    assert score(graded("1", "0", subjects=["Algebra"] * 2)).by_subject == []


# ---------------------------------------------------------------- forms


def test_report_json_keeps_its_fields():
    content = asdict(report_of(graded("10", "00")))
    assert " ".join(content) == "model grader settings mean_pass_at_1 benchmarks other_grader"
    assert " ".join(content["benchmarks"][0]) == (
        "benchmark grader num_problems answer_from num_samples pass_at_1 sem interval pass_at_k "
        "majority mean_tokens median_tokens truncated no_answer timeout loops by_difficulty "
        "by_subject"
    )


def test_a_table_is_aligned_and_a_bar_in_a_cell_does_not_end_it():
    lines = markdown_table([("a|b", "c"), ("1", "222")]).splitlines()
    assert lines == [r"| a\|b |   c |", "| ---- | --: |", "| 1    | 222 |"]


def test_the_score_table_has_a_row_per_benchmark_and_their_mean_if_there_are_several():
    """Every benchmark counts the same in the mean. A single sample has no SEM."""
    _, *rows = score_table(report_of(graded("10", "00", name="math500"), graded("11", name="amc")))
    assert rows[0][:4] == ("math500", "math-verify", "2 x 2", "25.0 ± 17.7")
    assert rows[0][5:7] == ("50.0", "25.0")
    assert rows[1][2:6] == ("1 x 2", "100.0 ± 0.0", "100.0 to 100.0", "100.0")
    assert rows[2][:5] == ("mean", "math-verify", "", "62.5", "")
    single = report_of(graded("1", "0"))
    assert score_table(single)[1][:4] == ("b", "math-verify", "2 x 1", "50.0 ± -")
    assert single.benchmarks[0].sem is None


def test_every_k_has_a_row():
    text = markdown(report_of(graded("10000000", "11000000"), graded("01", "10", name="c")))
    rows = cells(text.split("## pass@k")[1].split("##")[0].strip())[2:]
    assert [row[0] for row in rows] == [str(k) for k in range(1, 9)]
    assert (rows[1][2], rows[2][2]) == ("100.0", "")


def test_the_papers_figures_are_marked_as_such_and_only_beside_its_benchmarks():
    """Their averages over the five are those that it prints, to its rounding."""
    text = markdown(report_of(graded("1", name="aime24"), graded("1", name="mine")))
    assert "Nothing in this table was measured here" in text
    header, _, *rows = cells(text.split("## The paper's results")[1].strip().split("\n\n")[1])
    assert header[1:] == ["aime24"]
    assert next(row for row in rows if "Qwen-REDI-1.5B" in row[0])[1] == "28.1 / 66.7"
    assert "The paper's results" not in markdown(report_of(graded("1", name="mine")))
    printed = {"SFT 3 epochs": 41.9, "SFT 5 epochs": 45.8, "DeepSeek-R1-Distill-Qwen-1.5B": 48.6,
               "Qwen-REDI-1.5B (SFT 5 + REDI)": 49.5, "SFT 3 + REDI": 48.3,
               "SFT 3 + symmetric": 47.7, "SFT 3 + DPO": 47.2, "SFT 3 + SimPO": 47.2}  # fmt: skip
    assert {row[0] for row in rows} == printed.keys()
    for model, figures in paper_results.RESULTS.items():
        assert sum(p for p, _ in figures) / 5 == pytest.approx(printed[model], abs=0.1)


def test_runs_are_named_by_the_shortest_ends_of_their_paths_that_differ(tmp_path):
    assert run_names([tmp_path / "sft", tmp_path / "redi"]) == ["sft", "redi"]
    paths = [tmp_path / "sft" / "eval", tmp_path / "redi" / "eval"]
    assert run_names(paths) == ["sft/eval", "redi/eval"]
    assert "twice" in refusal(run_names, [tmp_path, tmp_path])


# ---------------------------------------------------------------- comparisons

CHANCE = "b: chance may explain the difference. second minus first is"
COMPARISONS = [  # two runs; difference, bounds of its interval, won, lost, p, words
    # One sample per problem. Nine problems that only the second solves, one that only the first
    # does, ten that both do: 8 of 20 more, p = 22/1024.
    ((*"0" * 9, "1", *"1" * 10), (*"1" * 9, "0", *"1" * 10), 8 / 20, (0, 1), 9, 1, 22 / 1024,
     "b: second is better than first. second minus first is +40"),
    ((*"1" * 9, "0", *"1" * 10), (*"0" * 9, "1", *"1" * 10), -8 / 20, (-1, 0), 1, 9, 22 / 1024,
     "b: first is better than second. second minus first is -40"),
    ((*["1100"] * 10, *["1000"] * 10), (*["1110"] * 10, *["1000"] * 10), 1 / 8, (0.01, 0.24), 10, 0,
     2 / 2**10, "b: second is better than first."),
    # Ahead by all samples on one problem, behind by half of them on four: in halves +2 and four
    # times -1. Of 32 choices of signs, all but 2 x 4 have a sum as far from 0 as -2.
    (("0000", *["1111"] * 4), ("1111", *["1100"] * 4), -1 / 5, (-1, 1), 1, 4, 24 / 32,
     f"{CHANCE} -20.0"),
    (("10", "01", "11"), ("10", "01", "11"), 0, (-1, 1), 0, 0, 1, f"{CHANCE} +0.0"),
    (("10",), ("1",), 0.5, (0, 1), 1, 0, 1, "b: "),  # numbers of samples may differ
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "difference", "bounds", "won", "lost", "p", "words"), COMPARISONS
)
def test_two_runs_are_compared_problem_by_problem(
    first, second, difference, bounds, won, lost, p, words
):
    runs = {"first": evaluation(graded(*first)), "second": evaluation(graded(*second))}
    [found] = compare(runs)
    assert (found.won, found.lost, found.num_problems) == (won, lost, len(first))
    assert found.difference == pytest.approx(difference)
    low, high = found.interval
    assert bounds[0] <= low <= difference <= high <= bounds[1]
    assert found.p_value == pytest.approx(p)
    assert found.sentence().startswith(words)


def test_both_graders_are_reported_and_the_papers_leads_for_its_benchmarks(tmp_path):
    tests = [
        graded(*problems, name=name, grader=grader)
        for name in ("aime24", "mine")
        for grader, problems in (("math-verify", ("10", "11")), ("paper", ("10", "10")))
    ]
    both = load(saved(tmp_path, *tests, grader="both"))
    report = scores.report(both)
    assert report.mean_pass_at_1 == 0.625
    assert [(row[0], row[1], row[3]) for row in score_table(report)[1:]] == [
        ("aime24", "paper", "50.0 ± 35.4"),
        ("mine", "math-verify", "75.0 ± 17.7"),
        ("mean", "paper, math-verify", "62.5"),
        ("aime24", "math-verify", "75.0 ± 17.7"),
        ("mine", "paper", "50.0 ± 35.4"),
        ("mean", "math-verify, paper", "62.5"),
    ]
    other = evaluation(tests[0])
    refused = refusal(compare, {"other": other, "run": both})
    assert re.search(r"aime24: other is graded by math-verify .*, run by paper", refused)
    found = compare({"x": other, "run": load(tmp_path, "math-verify"), "y": other})
    names = [("x", "run"), ("x", "y"), ("run", "y")]  # every two
    assert [(one.first, one.second, one.difference) for one in found] == [(*n, 0) for n in names]


def test_what_is_not_comparable_is_refused(tmp_path):
    x, y = evaluation(graded("1")), evaluation(graded("1", question="2+2?"))
    whole = evaluation(graded("1", answer_from="whole"))
    assert "b: x and y have different problems" in refusal(compare, {"x": x, "y": y})
    assert (
        "b: x is graded by math-verify after </think>, whole by math-verify in the whole response; "
        "choose"
    ) in refusal(compare, {"x": x, "whole": whole})
    run = saved(tmp_path / "run", graded("1"))
    assert f"grade regrade {run} --grader paper` does it" in refusal(load, run, "paper")
    assert "holds no evaluation" in refusal(load, tmp_path)


def test_the_command_writes_tables_and_page_outside_the_evaluations(tmp_path, capsys):
    runs = [saved(tmp_path / name, graded("10", "11", name="aime24")) for name in ("sft", "redi")]
    files = tmp_path / "table.json", tmp_path / "page.html"
    assert main_in_this_process(report.main, *runs, "--out", files[0], "--page", files[1]) == 0
    shown = capsys.readouterr().out
    assert "75.0 ± 17.7" in shown
    assert max(map(len, shown.partition("arXiv")[0].splitlines())) <= 100
    assert files[1].read_text().count("after &lt;/think&gt;") == 2  # the columns left out above
    assert "aime24: chance may explain the difference" in shown
    assert "Nothing in this table was measured here" in shown
    content = json.loads(files[0].read_text())
    assert [row["model"] for row in content["rows"]] == ["sft", "redi"]
    assert content["rows"][0]["pass@2"] == 1
    assert content["paired"][0]["difference"] == 0
    assert Elements(files[1].read_text()).texts["h1"] == ["sft | redi"]
    own = runs[0] / "report.json"
    for flag in ("--out", "--page"):
        assert main_in_this_process(report.main, *runs, flag, own) == 2
        error = f"error: {flag} {own}: expected a file outside the evaluations\n"
        assert capsys.readouterr().err.endswith(error)
    assert not own.exists()
    assert main_in_this_process(report.main, *runs, "--out", "z", "--page", "./z") == 2
    assert "--page ./z: would overwrite z" in capsys.readouterr().err


def test_a_card_says_so_if_another_program_sampled():
    scored = report_of(graded("1"))
    assert "Sampled by another program; pass@n" in card(replace(scored, settings={"samples": 1}))
    assert "Sampled with seed 42; pass@n" in card(scored)


VERDICTS_OF_B, COMPLETIONS_OF_B = "verdicts/math-verify/b.jsonl", "completions/b.jsonl"
BROKEN = [  # a file of the evaluation; its lines -> what replaces them; words of the error
    (VERDICTS_OF_B, lambda old: [], r"jsonl: b: problem '0' has 0 samples"),
    (VERDICTS_OF_B, lambda old: old[1:], r"problem '0' has 1 samples, expected 0 to 1"),
    (COMPLETIONS_OF_B, lambda old: old[1:], "holds other samples than were graded"),
    (COMPLETIONS_OF_B, lambda old: [*old, old[0].replace("0", "9")], "holds other samples"),
    ("problems/c.jsonl", lambda old: ['{"problem": "?", "answer": "1"}'], "expected b; holds b, c"),
    ("config.toml", lambda old: [s for s in old if "bench" not in s], "'benchmark': expected a li"),
    ("config.toml", lambda old: old[:-1], "'grade_seconds': expected a finite number; got None"),
]


@pytest.mark.parametrize(("name", "change", "words"), BROKEN)
def test_a_file_that_does_not_fit_the_others_is_named(tmp_path, capsys, name, change, words):
    run = saved(tmp_path / "run", graded("10", "11"))
    lines = (run / name).read_text().splitlines() if (run / name).exists() else []
    (run / name).write_text("".join(f"{line}\n" for line in change(lines)))
    page_file = tmp_path / "page.html"
    assert main_in_this_process(report.main, run, "--page", page_file) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert str(run / name) in error or str((run / name).parent) in error
    assert not page_file.exists()


# ---------------------------------------------------------------- the page

HOSTILE = (
    "</script><script>document.title = 'x'</script><!--<script><img src=x onerror=alert(1)>"
    " \u2028 &lt;b&gt; \\u003c </textarea>]]> ' \" `"
)


class Elements(HTMLParser):
    """What a browser would see: tags, the texts of some elements, and what the filters know."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.filtered, self._into = [], {}, [], [""]
        self.values = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.values += [attributes["value"]] if tag == "option" else []
        self._into = self.texts.setdefault(attributes.get("class", tag), [])
        self._into.append("")
        if "data-tags" in attributes:
            self.filtered.append(json.loads(attributes["data-tags"]))

    def handle_endtag(self, tag):
        self._into = [""]

    def handle_data(self, data):
        self._into[-1] += data


def test_what_a_model_wrote_is_never_markup(tmp_path):
    run = saved(tmp_path, graded("10", question=HOSTILE), text=HOSTILE, model=HOSTILE)
    report.write(run)
    text = (run / "report.html").read_text()
    harmless = page_of(saved(tmp_path / "harmless", graded("10")))
    assert Elements(text).tags == Elements(harmless).tags
    assert f"<title>{html.escape(HOSTILE)}</title>" in text
    assert Elements(text).texts["question"] == [HOSTILE]
    assert Elements(text).texts["pre"] == [HOSTILE, HOSTILE]
    # One file that loads nothing.
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", harmless)
    assert "default-src 'none'" in harmless
    assert "innerHTML" not in harmless
    assert "script-src 'sha256-" in harmless  # a browser shows that it fits the script


def test_the_filters_know_benchmark_subject_difficulty_and_verdicts(tmp_path):
    about = {"subjects": ["Algebra", 'Set  "theory"'], "difficulties": [2, 3]}
    sft = saved(tmp_path / "sft", graded("1t", "00", **about))
    redi = saved(tmp_path / "redi", graded("11", "00", **about))
    found = Elements(page_of(sft, redi))
    about = [(one["benchmark"], one["subject"], one["difficulty"]) for one in found.filtered]
    assert about == [(["b"], ["Algebra"], ["2"]), (["b"], ['Set  "theory"'], ["3"])]
    # The script compares an option's value with these; without the attribute it has single spaces.
    assert {"Algebra", 'Set  "theory"', "redi is ahead"} <= set(found.values)
    first, second = (one["verdicts"] for one in found.filtered)
    assert first == ["some correct", "has correct", "has truncated", "redi is ahead"]
    assert second == ["none correct", "has incorrect"]
    assert found.texts["option"].count("redi is ahead") == 1


def test_the_page_of_an_evaluation_begins_with_its_model_and_scores(tmp_path):
    report.write(saved(tmp_path, graded("10", "11"), model="out/redi"))
    _, body = (tmp_path / "report.html").read_text().split("<body>")
    assert body.strip().startswith('<h1>out/redi</h1>\n<div class="wide"><table><tr><th>benchmark')
    assert body.index("75.0 ± 17.7") < body.index('class="problem"')


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_a_browser_shows_two_runs_side_by_side_and_runs_nothing_of_theirs(tmp_path):
    runs = [saved(tmp_path / n, graded("10", "11"), text=f"{n} {HOSTILE}") for n in ("sft", "redi")]
    path = tmp_path / "page.html"
    path.write_text(page_of(*runs))
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert "2 of 2 problems" in shown
    assert shown.count("&lt;/script&gt;&lt;script&gt;document.title") == 8  # as text
    assert "<img" not in shown
    assert "<title>x</title>" not in shown


def test_long_completions_are_shortened_in_the_middle_and_short_ones_are_not(tmp_path, monkeypatch):
    """Each of four may have 40 of 160 characters."""
    texts = ["a" * 10, "a" * 40, "a" * 100 + "b" * 100, "a" * 100 + "b" * 200]
    runs = [saved(tmp_path / str(len(t)), graded("1"), text=t) for t in texts]

    def shown() -> list[str]:
        return Elements(page_of(*runs)).texts["pre"]

    assert shown() == texts
    monkeypatch.setattr(page, "CHARACTERS", 160)
    found = shown()
    assert found[:2] == texts[:2]
    assert found[3] == f"{'a' * 13}\n\n[... 260 characters left out ...]\n\n{'b' * 27}"
    assert "Long completions are shortened" in page_of(*runs)
