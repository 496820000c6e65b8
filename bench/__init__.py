"""How fast and how large: every number is a ratio to a named peer, measured in the same run.

measure.py    interleaved rounds of CPU time, peaks of memory, one results file per benchmark
loss.py       the head's loss and gradients: memory and time over plain logits (C1, C2)
attention.py  packed attention over other ways to write it on a CPU (C7)
plan.py       balance, micro-batches and seconds of the step plan (C11, C12)
import_time.py  seconds to import the trainer beyond torch (C18)
grader.py     the grader on benchmarks' own answers

Results lie in bench/results/NAME.json: {"machine", "versions", "results": {id: {"median", "min",
"max", "n", "goal", "peer"}}}. One thread and process CPU time throughout: on a shared machine
wall-clock time of two threads can invert a ranking.
"""
