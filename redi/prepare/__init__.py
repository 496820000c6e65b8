"""Teachers' raw traces -> training files: `python -m redi.prepare RAW --out DIR` (__main__.py).

raw.py         four forms of teacher data -> a problem with its traces and their votes
own_traces.py  the same from an evaluation of redi
traces.py      a problem with its traces -> a positive and its pairs, or why there is none
labels.py      votes by our grader, for traces without labels
overlap.py     problems that occur twice, or in a benchmark
__main__.py    the program: from file to file, with an account of every row
"""
