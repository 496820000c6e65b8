"""The model card: what a reader of a saved model needs, and scores that replace older ones."""

import platform
from pathlib import Path

import pytest
import tokenizers
from processes import main_in_this_process

from redi.checkpoint.card import add_scores, model_card
from redi.config import UserError, to_toml
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
from redi.eval.protocol import EvalConfig
from redi.recipe import REDIConfig

FACTS = {"redi": "0.1.0", "torch": "2.13.0", "parent": "org/base", "data sha256": "abc"}

UTF_8 = {"encoding": "utf-8", "errors": "surrogateescape"}
B, E = "<!-- scores -->\n", "<!-- end of scores -->\n"


def test_the_card_names_parent_data_versions_settings_and_the_paper():
    card = model_card(REDIConfig(model="org/base", out="out/redi", alpha=0.5), FACTS)
    _, head, body = card.split("---\n")
    assert "base_model: org/base\n" in head
    python, library = platform.python_version(), tokenizers.__version__
    for line in (
        "# redi", "- torch: 2.13.0", "- data sha256: abc", f"- python: {python}",
        f"- tokenizers: {library}", "alpha = 0.5",
        "Xu et al., ACL 2026: https://aclanthology.org/2026.acl-long.74/",
    ):  # fmt: skip
        assert line in body.splitlines(), line
    assert "base_model" not in model_card(REDIConfig(model="out/sft"), FACTS)  # a local folder


def test_scores_are_added_once_and_the_rest_stays(tmp_path):
    card = model_card(REDIConfig(), FACTS) + "not UTF-8: \udcff\n"
    path = tmp_path / "README.md"
    path.write_text(card, **UTF_8)
    for scores in (["| old |"], ["| new |", "sampled"]):
        assert add_scores(tmp_path, scores) == path
    section = "\n## Scores\n\n| new |\n\nsampled\n\n"
    assert path.read_text(**UTF_8) == card.replace(B + E, B + section + E)


STRANGE = [None, "# A model of someone else\n", B, E, E + B, f"{B}{E}mine\n{B}{E}", f"{B}{E}x{E}"]


@pytest.mark.parametrize("text", STRANGE)
def test_a_model_without_a_card_of_ours_is_left_alone(text, tmp_path):
    path = tmp_path / "README.md"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=r"README\.md: expected the model card"):
        add_scores(tmp_path, ["| new |"])
    assert [file.read_text() for file in tmp_path.iterdir()] == ([text] if text else [])


def test_report_adds_the_table_of_each_evaluation_to_the_card_of_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/README.md").write_text(model_card(REDIConfig(out="out"), FACTS))
    for run, verdict in (("first", "correct"), ("second", "incorrect")):
        benchmark = Benchmark("sums", [Problem("0", "1+1?", ["2"])])
        store_inputs(Path(run), [benchmark])
        given = {"id": "0", "sample": 0, "num_tokens": 5}
        completion = Completion(**given, text="2", finish_reason="stop")
        mark = Mark(**given, verdict=verdict, loops=False, extracted="2", answer_from="after_think")
        write_lines(completions_file(Path(run), "sums"), [completion])
        write_lines(marks_file(Path(run), "paper", "sums"), [mark])
        settings = EvalConfig(model="out", grader="paper", benchmark=["sums"])
        (Path(run) / "config.toml").write_text(to_toml(settings))
    assert main_in_this_process(report.main, "first", "second", "--card") == 0
    first, second = Path("out/README.md").read_text().split("Sampled with temperature 0.6,")[:2]
    assert ("100.0 ± -" in first, "100.0 ± -" in second, " 0.0 ± -" in second) == (
        True,
        False,
        True,
    )
