"""Check this machine: python -m redi.doctor

__main__.py    packages, memory, devices; one line for each thing that is broken
checks.py      small computations against float64; bench/gpu.py runs them at larger sizes
"""
