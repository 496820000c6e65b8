"""Marks -> reports. In reading order:

statistics.py      pass@k, SEM, intervals and p-values of small arrays
paper_results.py   the paper's numbers, for reference
stored.py          an evaluation's folder -> Evaluation: settings and marks
scores.py          Evaluation -> Report: a BenchmarkScore per benchmark
tables.py          Report -> Markdown
compare.py         several evaluations -> Comparison
page.py            evaluations -> one HTML page
"""
