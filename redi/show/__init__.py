"""Look at training rows before training: `python -m redi.show DATA` (__main__.py).

rows.py    a row with its mask, token by token, and what the chat template did to its messages
page.py    report and rows as one HTML page, with a picture of the lengths
"""
