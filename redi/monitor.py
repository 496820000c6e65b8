"""How far an optimizer step moves the weights, told before it is made.

    delta = -lr * (m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) + decay * weight)

with m and v AdamW's moments after the gradient at hand. The norm of delta over all weights is the
update norm of the paper's Figures 4 and 5: it spikes when a run collapses, where the gradient's,
once clipped, does not.

It is worked out from the moments, so no copy of the weights is kept, and before the step, so that
it travels with the loss in the step's one exchange between ranks. A block of a weight is small
enough that what is made of it stays in the cache. Left out: other optimizers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redi.checkpoint.resume import Checkpoints
from redi.distributed import local_shard
from redi.model import ModelConfig

BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # weights at a time


@torch.no_grad()
def squared_update_norm(optimizer: torch.optim.AdamW) -> Tensor:
    """Sum of squares of what the next `optimizer.step()` adds to this rank's weights: (), float64.

    Gradients are those at hand, clipped already. Exact but for the rounding of the sum into a
    weight.
    """
    parts = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state[parameter]
                parts.append(group["lr"] ** 2 * _squared(parameter, state, group))
    return torch.stack(parts).sum()


def _squared(parameter: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
    """The same of one parameter, for a learning rate of 1."""
    beta1, beta2 = group["betas"]
    weight, gradient = (local_shard(t.detach()).reshape(-1) for t in (parameter, parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    if state:
        mean, square = (local_shard(state[name]).reshape(-1) for name in ("exp_avg", "exp_avg_sq"))
        step = state["step"].double() + 1.0
    else:  # AdamW makes it in its first step
        mean = square = weight.new_zeros(()).expand_as(weight)
        step = torch.ones_like(total)
    root = (1.0 - beta2**step).sqrt()  # on the device: the host does not wait
    eps, times = group["eps"] * root, root / (1.0 - beta1**step)
    size = min(BLOCK[weight.device.type], len(weight))
    buffers = weight.new_empty(2, size)  # fresh memory for every block would cost more than its use
    for at in range(0, len(weight), max(1, size)):
        block = slice(at, at + size)
        g = gradient[block]
        update, scale = buffers[:, : len(g)]
        torch.lerp(mean[block], g, 1.0 - beta1, out=update)
        torch.mul(square[block], beta2, out=scale).addcmul_(g, g, value=1.0 - beta2).sqrt_()
        update.div_(scale.add_(eps)).mul_(times)
        if group["weight_decay"]:
            update.add_(weight[block], alpha=group["weight_decay"])
        total += update.dot(update)
    return total


# ---------------------------------------------------------------- collapse


@dataclass
class CollapseGuard:
    """Watches the chosen traces' mean log-prob, a record a step.

    threshold: nats per token below the first record. steps: in a row below that until it warns,
    and again after a recovery.
    """

    threshold: float
    steps: int
    began: float | None = None
    low: int = 0  # steps in a row
    warned: bool = False

    def look(self, record: dict[str, Any]) -> str:
        """The warning at the step where one is due."""
        now = record["chosen_logp"]
        self.began = now if self.began is None else self.began
        fell = self.began - now
        self.low = self.low + 1 if fell > self.threshold else 0
        if self.low != self.steps:
            return ""
        self.warned = True
        return (
            f"collapse: chosen traces have been {self.threshold:g} nats a token less likely than "
            f"at the start for {self.low} steps (now {fell:.2f}: {self.began:.2f} -> {now:.2f}); "
            "a smaller --lr helps"
        )


def watch(guard: CollapseGuard, step: int, record: dict[str, Any], checkpoints: Checkpoints) -> str:
    """Show the guard a step's record; as long as the log-prob is low, and for good once it has
    warned, the newest checkpoint from before the fall is kept. -> the warning, if one is due."""
    settled = guard.warned
    warning = guard.look(record)
    if not settled and guard.low == 1:
        # The record is of the model before the step's update: of that after step - 1.
        checkpoints.pin_before(step - 2)
    elif not settled and not guard.low:
        checkpoints.pinned = 0
    if not warning:
        return ""
    kept = checkpoints.at(checkpoints.pinned) if checkpoints.pinned else "no checkpoint"
    return f"step {step}: {warning}; kept from before the fall: {kept}"


# ---------------------------------------------------------------- FLOPs and MFU

# Dense bf16, by the makers' data sheets; looked up in the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def training_flops(config: ModelConfig, lengths: list[int], supervised: int) -> float:
    """FLOPs of forward and backward over documents of `lengths` tokens, the head over `supervised`
    rows: 6 per weight and token, and 6 * H * d * L^2 per layer for causal attention.

    Qwen2.5-Math-1.5B over one document of 8,192 tokens, all supervised: 11.4 GFLOP a token.
    """
    heads = config.num_heads * config.head_dim
    attention = config.hidden_size * 2 * (heads + config.num_kv_heads * config.head_dim)
    mlp = config.hidden_size * 3 * config.intermediate_size
    body = config.num_layers * (attention + mlp)
    head = config.vocab_size * config.hidden_size
    squares = sum(length**2 for length in lengths)
    return 6.0 * (body * sum(lengths) + head * supervised + config.num_layers * heads * squares)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
