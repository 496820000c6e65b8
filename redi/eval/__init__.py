"""Benchmarks, generation, grading and the report: what `evaluate.py` is made of."""
