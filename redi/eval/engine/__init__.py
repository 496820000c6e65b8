"""Sampling completions with a paged key/value cache. In reading order:

sampling.py         the next token from logits: temperature and nucleus, without a sort
cache.py            keys and values in pages, and the table of which row owns which
decoder.py          prefills; a decode step on a CPU
decode_kernel.py    decode attention in Triton, for CUDA
kernel_steps.py     a decode step on CUDA, replayed from CUDA graphs
generate.py         the queue, refilled rows, eviction: generate()
streaming.py        one text, token by token, on the cache of the last one: redi chat
complete.py         the prompted samples of an evaluation -> completions
"""
