"""redi: Reinforcement Distillation (arXiv 2505.24850) in plain PyTorch."""

import os

__version__ = "0.1.0"
# Before torch loads OpenMP: threads that wait for others should not keep their cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
