"""Check this machine: python -m redi.doctor. checks.py has the numbers, for bench/gpu.py too."""
