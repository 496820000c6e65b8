"""A response -> a verdict: correct, incorrect, no_answer, truncated or timeout.

grader.py         which answer a response gives, and the verdict on it
normalize.py      one spelling for answers that only typography tells apart
equivalence.py    whether two answers are the same mathematics, around Math-Verify
paper_grader.py   the paper's own rules
workers.py        processes that compare answers and may be killed
repetition.py     whether a text ends in repetition
"""
