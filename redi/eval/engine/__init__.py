"""Sampling completions with a paged key/value cache. In reading order:

sampling.py         the next token from logits: temperature and nucleus, without a sort
cache.py            keys and values in pages, and the table of which row owns which
page_attention.py   decode attention over the pages on a CPU
decode_kernel.py    the same in Triton, for CUDA
decoder.py          a decode step on a CPU
kernel_steps.py     a decode step on CUDA, replayed from CUDA graphs
generate.py         the queue, prefill, refilled rows, eviction: generate()
complete.py         the prompted samples of an evaluation -> completions
"""
