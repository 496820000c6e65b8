"""Marks -> reports. In reading order:

statistics.py      pass@k, SEM, intervals and p-values of small arrays
scores.py          marks -> Score, Report
paper_results.py   the paper's numbers, for reference
stored.py          an evaluation's folder -> marks, Report
tables.py          Report -> Markdown
compare.py         two evaluations -> Comparison
page.py            evaluations -> one HTML page (page.css, page.js)
"""
