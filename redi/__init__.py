"""redi: Reinforcement Distillation (arXiv 2505.24850) in plain PyTorch."""

__version__ = "0.1.0"
