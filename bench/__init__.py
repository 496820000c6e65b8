"""How fast and how large: every number is a ratio to a named peer, measured in the same run.

measure.py      interleaved rounds of CPU time, peaks of memory, one results file per benchmark
loss.py         the head's loss and gradients: memory and time over its peers (C1 to C6)
attention.py    packed attention over other ways to write it on a CPU (C7)
trainer.py      whole training steps over TRL's (C8 to C10), on a model and rows of inputs.py
ranks.py        two ranks over two processes alone (C14), their memory over the formula
plan.py         balance, micro-batches and seconds of the step plan (C11, C12)
data.py         raw rows to tokens over datasets.map (D1), its memory on a file of 2 GB
gpu.py          everything that needs a GPU (G0 to G9), the most valuable facts first
generate.py     sampling over transformers generate, refilled slots over static batches (C15, C16)

Results: bench/results/NAME.json, {"machine", "versions", "results": {id: {"median", "min", "max",
"n", "goal", "peer"}}}. On a CPU: one thread and process CPU time, because wall time of two threads
can invert a ranking on a shared machine; D1 alone is of all cores, by the wall.
"""
