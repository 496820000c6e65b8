"""The numbers of the results table, worked by hand."""

import itertools
import json
import math

import pytest

from redi.config import UserError
from redi.eval.report import Completion, Report, pass_at_k, summary, table, to_json


def completion(id="p", sample=0, verdict="correct", num_tokens=10, benchmark="b", **fields):
    fields = {"text": "…", "finish_reason": "stop", "extracted": "1", **fields}
    return Completion(
        benchmark=benchmark, id=id, sample=sample, verdict=verdict, num_tokens=num_tokens, **fields
    )


def grid(*problems: str, benchmark="b"):
    """Completions from strings: "10" is a problem whose sample 0 is right and sample 1 wrong."""
    return [
        completion(str(p), j, "correct" if mark == "1" else "incorrect", benchmark=benchmark)
        for p, marks in enumerate(problems)
        for j, mark in enumerate(marks)
    ]


def one(completions):
    (score,) = summary(completions).scores
    return score


def test_pass_at_1_and_sem_of_three_problems_with_four_samples():
    """The j-th samples score 3/3, 2/3, 1/3, 2/3: mean 8/12 = 2/3, deviations 1/3, 0, -1/3, 0,
    variance (1/9 + 1/9) / 4 = 1/18, SEM sqrt(1/18) / sqrt(4) = 1 / (6 sqrt 2)."""
    score = one(grid("1111", "1101", "1000"))
    assert score.pass_at_1 == pytest.approx(2 / 3)
    assert score.sem == pytest.approx(1 / (6 * math.sqrt(2)))
    assert (score.num_problems, score.num_samples) == (3, 4)


def test_sem_is_between_samples_and_not_between_problems():
    """Half of the problems always right, half never: every run scores 1/2, so the SEM is 0."""
    assert one(grid("1111", "0000")).sem == 0


def test_sem_of_one_sample_is_zero():
    assert one(grid("1", "0", "0")).sem == 0


def test_pass_at_k_of_three_problems_with_four_samples():
    """c = 4, 3, 1 of n = 4.  k = 2: 1, 1, 1 - C(3,2)/C(4,2) = 1 - 3/6: mean 2.5/3.
    k = 3: 1, 1, 1 - C(3,3)/C(4,3) = 3/4: mean 2.75/3.  k = 4: all have one: 1."""
    score = one(grid("1111", "1101", "1000"))
    assert score.pass_at_k == pytest.approx([2 / 3, 2.5 / 3, 2.75 / 3, 1])
    assert score.pass_at_k[0] == pytest.approx(score.pass_at_1)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_tokens_and_shares():
    """Tokens 10, 20, 30, 100: mean 160/4 = 40, median (20 + 30)/2 = 25."""
    verdicts = ["truncated", "truncated", "no_answer", "timeout"]
    score = one(
        completion(str(k), 0, verdict, tokens)
        for k, (verdict, tokens) in enumerate(zip(verdicts, [10, 20, 30, 100]))
    )
    assert (score.mean_tokens, score.median_tokens) == (40, 25)
    assert (score.truncated, score.no_answer, score.timeout) == (0.5, 0.25, 0.25)
    assert score.pass_at_1 == 0


def test_the_mean_counts_every_benchmark_the_same():
    report = summary([*grid("1", "1", "1", benchmark="big"), *grid("0", benchmark="small")])
    assert [score.benchmark for score in report.scores] == ["big", "small"]
    assert report.mean_pass_at_1 == 0.5


def test_the_order_of_completions_does_not_matter():
    completions = grid("1101", "1000", "0010")
    assert summary(completions[::-1]) == summary(completions)


def test_one_problem_id_in_two_benchmarks_is_two_problems():
    report = summary([*grid("1", benchmark="x"), *grid("0", benchmark="y")])
    assert [score.num_problems for score in report.scores] == [1, 1]


def test_a_missing_sample_is_an_error_that_names_the_problem():
    with pytest.raises(UserError, match=r"b: problem '1' has samples \[0\], expected 0 to 1"):
        summary(grid("11", "1"))


def test_a_sample_given_twice_is_an_error():
    with pytest.raises(UserError, match="b: problem 'p' has sample 0 twice"):
        summary([completion(), completion()])


def test_no_completions_is_an_error():
    with pytest.raises(UserError, match="no completions"):
        summary([])


def test_a_completion_survives_its_json_line():
    original = completion(text='a\n"b" π \u2028', extracted=None, finish_reason="length")
    line = original.to_json()
    assert "\n" not in line
    assert Completion.from_json(line) == original


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row: row.pop("verdict"), "expected the fields .*verdict; got"),
        (lambda row: row.update(score=1), "expected the fields"),
        (lambda row: row.update(num_tokens="10"), "field 'num_tokens'"),
        (lambda row: row.update(sample=True), "field 'sample'"),
        (lambda row: row.update(id=3), "field 'id'"),
    ],
)
def test_a_line_that_is_no_completion_is_an_error(edit, message):
    row = json.loads(completion().to_json())
    edit(row)
    with pytest.raises(UserError, match=message):
        Completion.from_json(json.dumps(row))


def test_half_a_line_is_an_error():
    with pytest.raises(UserError, match="not valid JSON"):
        Completion.from_json(completion().to_json()[:-5])


def test_the_json_holds_every_number():
    content = json.loads(to_json(summary(grid("10", "00"))))
    assert content["mean_pass_at_1"] == 0.25
    (score,) = content["benchmarks"]
    assert score["benchmark"] == "b"
    assert score["pass_at_k"] == [0.25, 0.5]
    assert score["sem"] == pytest.approx(0.25 / math.sqrt(2))  # runs 1/2 and 0: std 1/4


def test_the_table_is_markdown_with_aligned_columns():
    report = summary([*grid("10", "00", benchmark="math500"), *grid("11", benchmark="amc")])
    lines = table(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:4] == ["math500", "2 x 2", "25.0 ± 17.7", "50.0"]
    assert cells[3][:4] == ["amc", "1 x 2", "100.0 ± 0.0", "100.0"]
    assert cells[4][:4] == ["mean", "", "62.5", ""]
    assert set("".join(cells[1])) == {"-", ":"}


def test_a_single_benchmark_has_no_mean_row():
    assert "mean |" not in table(summary(grid("1"))).split("\n", 2)[2]
    assert isinstance(summary(grid("1")), Report)
