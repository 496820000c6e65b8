"""The bench of whole training steps, at a size that takes seconds: inputs, turns, checks.

TRL is imported by a process of the bench, never here.
"""

from dataclasses import replace

import pytest

from bench.inputs import write_inputs
from bench.measure import CPUSeconds
from bench.trainer import TRAINERS, Step, compare, take_turns

LONGEST = 256
SIZES = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": 64}
TINY = {"sizes": SIZES, "rows": 9, "pairs": 3, "longest": LONGEST}
SFT = ("our SFT", "TRL SFT, packing")


def tiny(*names: str) -> dict:
    return {name: replace(TRAINERS[name], longest=LONGEST) for name in names}


def step(loss: float = 1.0, tokens: int = 10, chosen_logp: float = -1.0) -> Step:
    return Step(loss, tokens, chosen_logp, CPUSeconds(1.0, 0.0))


def sft_but(**changed) -> dict[str, list[Step]]:
    """Two steps of both trainers, of which TRL's second one differs."""
    return dict(zip(SFT, ([step(2.0), step()], [step(2.0), step(**changed)])))


# ---------------------------------------------------------------- turns


@pytest.mark.slow
def test_our_sft_and_trls_take_the_same_steps(tmp_path):
    write_inputs(tmp_path, **TINY)
    trainers = tiny(*SFT)
    taken = take_turns(tmp_path, trainers, steps=2)
    compare(trainers, taken)
    for name in SFT:
        first, second = taken[name]
        assert first.tokens > LONGEST, "one pack: packing is not tested"
        assert second.loss < first.loss
        assert second.seconds.total > 0


# ---------------------------------------------------------------- what makes a ratio count


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (sft_but(loss=1.001), r"step 2: TRL SFT, packing 1\.001, our SFT 1\.0"),
        (sft_but(loss=float("nan")), "step 2: TRL SFT, packing nan"),
        (sft_but(tokens=11), "step 2: TRL SFT, packing 11, our SFT 10"),
        ({"our REDI": [step(2.0)], "our DPO": [step(0.7, chosen_logp=-1.1)]}, "first log-probs"),
    ],
)
def test_a_planted_difference_in_one_step_is_found(taken, message):
    compare(tiny(*SFT), sft_but())  # no difference
    with pytest.raises(AssertionError, match=message):
        compare(tiny(*taken), taken)
