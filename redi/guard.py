"""The collapse guard: minimising the log-prob of rejected traces can drag that of the chosen ones
down with it, and the model with that (docs/curves.md; the paper's Figures 4 and 5).

    chosen log-prob    -0.5  -0.6  -0.9  -1.2  -1.4  ...     threshold 0.5 below the first
    low                   0     0     0     1     2          at `steps`: a warning
                                      ^ made by the last good model: its checkpoint is kept

Whether a fall is a collapse only answers tell: it warns, and stops only if asked to.
"""

from dataclasses import dataclass
from typing import Any

from redi.resume import Checkpoints


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
