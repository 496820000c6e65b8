"""Look at training rows before training: `python -m redi.show DATA` (__main__.py).

facts.py     what the rows are: sources, tokens, texts, the plan of an epoch, as tables
rows.py      one row with its mask, and the tables, for a terminal
page.py      the same as one HTML page, and a picture of the lengths
__main__.py  the program
"""
