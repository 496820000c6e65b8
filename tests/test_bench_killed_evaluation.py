"""The bench of killed evaluations counts every token that the model reads."""

import json
import os
import sys

import pytest

from bench.killed_evaluation import command, evaluate_counted, tokens_read
from redi.checkpoint.folder import open_model
from redi.eval.benchmarks import load
from redi.eval.protocol import EvalConfig, make_prompt
from redi.model import Layers
from redi.toy import student as toy


@pytest.mark.slow
def test_the_tokens_counted_are_those_of_prompts_and_answers(tmp_path, monkeypatch):
    """A problem's prompt is read once, and of each answer every token but the last: that one ends
    it. A second evaluation counts on."""
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path), "--problems", "20", "--benchmark", "3"])
    toy.main()
    model, benchmark = str(tmp_path / "student"), str(tmp_path / "benchmark.jsonl")
    test, (_, source) = load(benchmark), open_model(model)
    config = EvalConfig(user_prompt="plain")
    prompts = sum(len(make_prompt(test, p, source, config)[0]) for p in test.problems)

    monkeypatch.setattr(Layers, "forward", Layers.forward)  # as they are: put back at the end
    whole = tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", command(model, benchmark, whole)[2:])
    evaluate_counted()
    lines = (whole / "completions" / "benchmark.jsonl").read_text().splitlines()
    answers = [json.loads(line)["num_tokens"] for line in lines]
    assert tokens_read(whole) == prompts + sum(answers) - len(answers) > 0

    monkeypatch.undo()
    again = tmp_path / "again"
    os.replace(whole.with_suffix(".tokens"), again.with_suffix(".tokens"))
    monkeypatch.setattr(Layers, "forward", Layers.forward)
    monkeypatch.setattr(sys, "argv", command(model, benchmark, again)[2:])
    evaluate_counted()
    assert tokens_read(again) == 2 * (prompts + sum(answers) - len(answers))
