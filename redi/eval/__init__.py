"""Evaluate a model: sample answers to benchmarks, grade them, report. In reading order:

benchmarks.py     the five benchmarks, and files of problems and answers
protocol.py       the prompts, and the settings of sampling
completions.py    an evaluation on disk: problems, completions, marks
engine/           sampling with a paged cache, on all ranks
grading/          response -> verdict
reporting/        marks -> scores, tables, pages
report.py         the program that writes reports and puts several evaluations side by side
grade.py          grade one response; the program that grades completions again
external.py       completions of another program
evaluation.py     the whole of evaluate.py
in_training.py    a small evaluation between two training steps
"""
