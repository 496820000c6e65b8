"""From teacher data to token arrays: raw rows -> training rows -> tokens on disk.

files.py      rows out of JSONL and Parquet files, each with its place; files written whole
raw.py        teacher data in four forms -> a problem, its traces and what verifiers said of them
traces.py     problems with traces -> positives and pairs (Section 3 of the paper)
overlap.py    problems that occur twice, or in a benchmark
formats.py    training rows of every usual shape -> a prompt and what is learned from after it
tokenizer.py  a prompt and a response -> token ids, the response ending in the stop token
store.py      training rows -> token arrays on disk, made in blocks (blocks.py)
dataset.py    the rows of a store that a run trains on
"""
