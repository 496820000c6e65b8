"""Look at training rows before training: `python -m redi.show DATA` (__main__.py).

rows.py      a row with its mask, token by token, and what the chat template did to its messages
facts.py     the report: files, sources, token lengths, texts, the plan of an epoch
page.py      report and rows as one HTML page, with a picture of the lengths
__main__.py  the program
"""
