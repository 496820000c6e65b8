"""Situational dialogue (Xu et al., arXiv 2403.20005): `redi dialogue COMMAND` (__main__.py).

scenario.py      a scene, read from a file, and each side's prompt
dialogues.py     dialogues in files, and the replies in them
examples.py      a dialogue -> rows to train tutor, student and judge on
prepare.py       the program for it
rubric.py        the labels of a judge, and what it is asked
prefix_trees.py  log-probs of several answers to many prompts, in one pass
judge.py         two judges: by labels, and by likelihood
figures.py       how far a judge agrees with labels, and a rate corrected for it: pure functions
agreement.py     the program for it
talk.py          many dialogues side by side
evaluate.py      the program that holds and judges them
report.py        its rates, tables and comparisons
page.py          its dialogues as an HTML page
lesson.py        a scenario in redi chat
oracle.py        what a reply means in the generated world, and whether it is right
world.py         the generated world: scenarios, a good tutor, a student
"""
