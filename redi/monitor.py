"""How far an optimizer step moves the weights, told before it is made.

    delta = -lr * (m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) + decay * weight)

with m and v AdamW's moments after the gradient at hand. The norm of delta over all weights is the
update norm of the paper's Figures 4 and 5: it spikes when a run collapses, where the gradient's,
once clipped, does not.

It is worked out from the moments, so no copy of the weights is kept, and before the step, so that
it travels with the loss in the step's one exchange between ranks. A block of a weight is small
enough that what is made of it stays in the cache. Left out: other optimizers.
"""

import torch
from torch import Tensor

from redi.distributed import local

BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # weights at a time


@torch.no_grad()
def squared_update(optimizer: torch.optim.AdamW) -> Tensor:
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
    weight, gradient = (local(t.detach()).reshape(-1) for t in (parameter, parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    if state:
        mean, square = (local(state[name]).reshape(-1) for name in ("exp_avg", "exp_avg_sq"))
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
