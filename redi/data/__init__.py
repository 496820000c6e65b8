"""From teacher data to token arrays: raw rows -> training rows -> tokens on disk.

files.py      rows out of JSONL and Parquet files, each with its place; files written whole
traces.py     OpenR1-Math-Raw rows -> positives and pairs (Section 3 of the paper)
tokenizer.py  a prompt and a response -> token ids, the response ending in the stop token
dataset.py    training rows -> token arrays on disk
"""
