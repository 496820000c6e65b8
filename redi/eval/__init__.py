"""Evaluate a model: sample answers to benchmarks, grade them, report.

benchmarks.py     the five benchmarks and files like them
protocol.py       what is asked of a model, and with which settings
engine/           sampling with a paged cache
completions.py    what is on disk: completions, problems, marks
grading/          answer -> verdict
grade.py          response -> verdict; `regrade`
reporting/        verdicts -> scores, tables, pages
report.py         the report of one evaluation; several side by side
external.py       completions of another program
evaluation.py     the whole of evaluate.py
in_training.py    a small evaluation between the steps of a training run
"""
