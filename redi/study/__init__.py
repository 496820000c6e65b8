"""Many runs compared: `python -m redi.study STUDY.toml` (__main__.py).

plan.py      STUDY.toml -> its settings, methods and models
commands.py  models -> jobs: command lines, and the jobs that each job needs
jobs.py      runs the jobs that are not done, several at a time
results.py   the files of runs and evaluations -> means, SEMs, paired t-tests
figures.py   accuracy and log-probs over steps; gains against every setting that was varied
page.py      the report: a table and one HTML page
"""
