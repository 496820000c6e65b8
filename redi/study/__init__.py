"""Many runs compared: `python -m redi.study STUDY.toml` (__main__.py).

plan.py      STUDY.toml -> its settings, methods and models
commands.py  models -> jobs, each a few command lines and what it waits for
jobs.py      jobs run side by side, each once, however often the study is killed
results.py   what runs and evaluations left on disk -> means, SEMs, paired t-tests
figures.py   the paper's Figures 2 to 7 of it
page.py      the report, as Markdown and as one HTML page
"""
