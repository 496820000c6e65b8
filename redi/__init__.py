"""redi: Reinforcement Distillation (arXiv 2505.24850) in plain PyTorch."""
