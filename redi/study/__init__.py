"""Many runs compared: `python -m redi.study STUDY.toml` (__main__.py).

plan.py     STUDY.toml -> its settings, methods and models
jobs.py     models -> jobs: command lines, which are run several at a time
results.py  the files of runs and evaluations -> means, SEMs, paired t-tests
report.py   the report: a table, three figures, and one HTML page with all of it
"""
