"""Many runs compared: `python -m redi.study STUDY.toml` (__main__.py).

plan.py      STUDY.toml -> its settings, methods and models
commands.py  models -> jobs: command lines and the jobs they need
jobs.py      runs jobs side by side, each once, however often the study is killed
results.py   the files of runs and evaluations -> means, SEMs, paired t-tests
figures.py   the paper's Figures 2 to 7, drawn from the results
page.py      the report, as Markdown and as one HTML page
"""
