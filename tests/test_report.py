"""The numbers of the results table, worked by hand, and the report in its forms."""

import math
from dataclasses import asdict

import pytest

from redi.config import UserError
from redi.eval.benchmarks import Benchmark, Problem
from redi.eval.completions import Mark
from redi.eval.reporting import paper_results
from redi.eval.reporting.scores import Report, mean_pass_at_1, score
from redi.eval.reporting.stored import run_names
from redi.eval.reporting.tables import markdown, summary
from redi.tables import markdown_table


def mark(id="p", sample=0, verdict="correct", num_tokens=10, extracted="1", loops=False) -> Mark:
    return Mark(
        id=id, sample=sample, verdict=verdict, num_tokens=num_tokens, extracted=extracted,
        loops=loops,
    )  # fmt: skip


def grid(*problems: str) -> list[Mark]:
    """Marks from strings: "10" is a problem whose sample 0 is right and sample 1 wrong."""
    return [
        mark(str(p), j, "correct" if letter == "1" else "incorrect", extracted=letter)
        for p, letters in enumerate(problems)
        for j, letter in enumerate(letters)
    ]


def scored(marks: list[Mark], name: str = "b", subject=None, difficulty=None):
    """subject, difficulty: one per problem."""
    ids = list(dict.fromkeys(mark.id for mark in marks))
    subject, difficulty = subject or [None] * len(ids), difficulty or [None] * len(ids)
    test = [Problem(id, "?", ["1"], *more) for id, *more in zip(ids, subject, difficulty)]
    return score(Benchmark(name, test), marks, "math-verify")


def report(**marks: list[Mark]) -> Report:
    scores = [scored(group, name) for name, group in marks.items()]
    return Report(
        model="m", grader="math-verify", settings={"seed": 42}, benchmarks=scores, other_grader=[],
        mean_pass_at_1=mean_pass_at_1(scores),
    )  # fmt: skip


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# ---------------------------------------------------------------- scores


def test_the_numbers_of_three_problems_with_four_samples():
    """Runs of 3/3, 2/3, 1/3, 2/3: mean 2/3, SEM sqrt(1/18) / 2. c = 4, 3, 1 of n = 4: pass@2 is
    (1 + 1 + 1/2) / 3, pass@3 (1 + 1 + 3/4) / 3. The majority is right twice, then wrong."""
    marks = grid("1111", "1101", "1000")
    result = scored(marks)
    assert (result.num_problems, result.num_samples) == (3, 4)
    assert result.pass_at_1 == pytest.approx(2 / 3)
    assert result.sem == pytest.approx(1 / (6 * math.sqrt(2)))
    assert result.pass_at_k == pytest.approx([2 / 3, 2.5 / 3, 2.75 / 3, 1])
    assert result.majority == pytest.approx(2 / 3)
    in_another_order = [m for p in "012" for m in marks[::-1] if m.id == p]
    assert scored(in_another_order) == result


def test_the_interval_is_over_problems_and_the_sem_over_samples():
    """Half of the problems always right, half never: every run scores 1/2, so the SEM is 0."""
    result = scored(grid(*["11"] * 20, *["00"] * 20))
    low, high = result.interval
    assert low < result.pass_at_1 == 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)
    assert result.sem == 0


def test_tokens_and_shares():
    """Tokens 10, 20, 30, 100: mean 160/4 = 40, median (20 + 30)/2 = 25."""
    verdicts = zip(["truncated", "truncated", "no_answer", "timeout"], [10, 20, 30, 100])
    result = scored([mark(str(k), 0, v, n, loops=k == 1) for k, (v, n) in enumerate(verdicts)])
    assert (result.mean_tokens, result.median_tokens) == (40, 25)
    assert (result.truncated, result.no_answer, result.timeout) == (0.5, 0.25, 0.25)
    assert (result.loops, result.pass_at_1) == (0.25, 0)
    # Unknown if one completion does not state them.
    assert scored([mark("p"), mark("q", num_tokens=None)]).mean_tokens is None
    assert "unknown" in summary(report(b=[mark("p", num_tokens=None)]))


@pytest.mark.parametrize(
    "samples",
    [
        [("correct", "1"), ("truncated", "2"), ("truncated", "2"), ("no_answer", None)],
        [("correct", r"\dfrac{1}{2}"), ("correct", r"\frac12"), ("incorrect", "7"),
         ("incorrect", "8")],
    ],
)  # fmt: skip
def test_only_finished_answers_vote_and_spellings_of_one_answer_vote_together(samples):
    votes = [mark(sample=k, verdict=v, extracted=answer) for k, (v, answer) in enumerate(samples)]
    assert scored(votes).majority == 1


def test_groups_are_scored_apart_and_sorted():
    result = scored(
        grid("11", "10", "00"), difficulty=[5.0, 4.5, 5.0], subject=["Geometry", None, "Algebra"]
    )
    found = [(g.name, g.num_problems, g.pass_at_1) for g in result.by_difficulty]
    assert found == [("4 to 5", 1, 0.5), ("5", 2, 0.5)]
    found = [(g.name, g.pass_at_1) for g in result.by_subject]
    assert found == [("Algebra", 0), ("Geometry", 1), ("not said", 0.5)]
    assert scored(grid("1", "0")).by_subject == []
    assert scored(grid("1", "0"), subject=["Algebra"] * 2).by_subject == []


# ---------------------------------------------------------------- forms


def test_report_json_keeps_its_fields():
    content = asdict(report(b=grid("10", "00")))
    assert " ".join(content) == "model grader settings mean_pass_at_1 benchmarks other_grader"
    assert " ".join(content["benchmarks"][0]) == (
        "benchmark grader num_problems answer_from num_samples pass_at_1 sem interval pass_at_k "
        "majority mean_tokens median_tokens truncated no_answer timeout loops by_difficulty "
        "by_subject"
    )


def test_a_table_is_aligned_and_a_bar_in_a_cell_does_not_end_it():
    lines = markdown_table([("a|b", "c"), ("1", "222")]).splitlines()
    assert lines == [r"| a\|b |   c |", "| ---- | --: |", "| 1    | 222 |"]


def test_the_summary_has_a_row_per_benchmark_and_their_mean_if_there_are_several():
    """Every benchmark counts the same in the mean. A single sample has no SEM."""
    rows = cells(summary(report(math500=grid("10", "00"), amc=grid("11"))))
    assert rows[2][:4] == ["math500", "math-verify", "2 x 2", "25.0 ± 17.7"]
    assert rows[2][5:7] == ["50.0", "25.0"]
    assert rows[3][2:6] == ["1 x 2", "100.0 ± 0.0", "100.0 to 100.0", "100.0"]
    assert rows[4][:5] == ["mean", "math-verify", "", "62.5", ""]
    single = report(b=grid("1", "0"))
    assert [row[:4] for row in cells(summary(single))[2:]] == [
        ["b", "math-verify", "2 x 1", "50.0 ± -"]
    ]
    assert single.benchmarks[0].sem is None


def test_every_k_has_a_row():
    text = markdown(report(b=grid("10000000", "11000000"), c=grid("01", "10")))
    rows = cells(text.split("## pass@k")[1].split("##")[0].strip())[2:]
    assert [row[0] for row in rows] == [str(k) for k in range(1, 9)]
    assert (rows[1][2], rows[2][2]) == ("100.0", "")


def test_the_papers_figures_are_marked_as_such_and_only_beside_its_benchmarks():
    """Their averages over the five are those that it prints, to its rounding."""
    text = markdown(report(aime24=grid("1"), mine=grid("1")))
    assert "Nothing in this table was measured here" in text
    header, _, *rows = cells(text.split("## The paper's results")[1].strip().split("\n\n")[1])
    assert header[1:] == ["aime24"]
    assert next(row for row in rows if "Qwen-REDI-1.5B" in row[0])[1] == "28.1 / 66.7"
    assert "The paper's results" not in markdown(report(mine=grid("1")))
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
    with pytest.raises(UserError, match="twice"):
        run_names([tmp_path, tmp_path])
