"""Training rows -> token arrays on disk -> the sequences that a run trains on.

files.py      rows from JSONL and Parquet files; files that are written completely or not at all
formats.py    rows of every usual shape -> a prompt and the responses to learn from
tokenizer.py  chat messages -> token ids; a response ends with the stop token
store.py      tokenized rows on disk, memory-mapped
dataset.py    the rows of a store that fit a run's length limits
"""
