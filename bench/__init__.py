"""How fast and how large: every number is a ratio to a named peer, measured in the same run.

measure.py    interleaved rounds of CPU time, peaks of memory, one results file per benchmark
loss.py       the head's loss and gradients: memory and time over plain logits (C1, C2)
grader.py     the grader on benchmarks' own answers

Results lie in bench/results/NAME.json: {"machine", "versions", "results": {id: {"median", "min",
"max", "n", "goal", "peer"}}}. One thread and process CPU time throughout: on a shared machine
wall-clock time of two threads can invert a ranking.
"""
