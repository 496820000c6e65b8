"""The bench of whole training steps, at a size that takes seconds: inputs, turns, checks.

TRL is imported by a process of the bench, never here.
"""

from dataclasses import replace

import numpy as np
import pytest

from bench.inputs import lengths, write_inputs
from bench.measure import CPUSeconds, Worker
from bench.trainer import TRAINERS, Step, compare, read_rows, run_trainer, take_turns
from redi.data.tokenizer import ChatTokenizer

LONGEST = 256
TINY = {"hidden": 32, "rows": 9, "pairs": 3, "longest": LONGEST, "vocabulary": 64}
SFT = ("our SFT", "TRL SFT, packing")


def tiny(*names: str) -> dict:
    return {name: replace(TRAINERS[name], longest=LONGEST) for name in names}


def step(loss: float = 1.0, tokens: int = 10, chosen_logp: float = -1.0) -> Step:
    return Step(loss, tokens, chosen_logp, CPUSeconds(1.0, 0.0))


def sft_but(**changed) -> dict[str, list[Step]]:
    """Two steps of both trainers, of which TRL's second one differs."""
    return dict(zip(SFT, ([step(2.0), step()], [step(2.0), step(**changed)])))


# ---------------------------------------------------------------- the inputs


def test_lengths_are_the_quantiles_of_the_law_whatever_their_order():
    """Of three: sixths 1, 3 and 5. 100 exp(0.75 * 0.9674) = 206.6, and 100 / 2.066 = 48.4."""
    drawn = [lengths(np.random.default_rng(seed), 3, 100, 1000) for seed in range(8)]
    assert {tuple(sorted(some)) for some in drawn} == {(48, 100, 206)}
    assert len({tuple(some) for some in drawn}) > 1
    assert max(lengths(np.random.default_rng(0), 3, 100, 150)) == 150


def test_a_rendered_row_has_the_length_that_was_drawn(tmp_path):
    """The median, 256 * 4430 / 32768 = 34.6, is one of nine rows; the chosen sides' is 31.6."""
    write_inputs(tmp_path, **TINY)
    chat = ChatTokenizer.from_folder(tmp_path / "model")

    def rendered(file: str, side: str) -> list[int]:
        rows = read_rows(tmp_path / file)
        return sorted(map(len, chat.encode_rows([(r["prompt"], r[side][0]) for r in rows])))

    of_rows, of_chosen = rendered("rows.jsonl", "completion"), rendered("pairs.jsonl", "chosen")
    assert (len(of_rows), of_rows[4]) == (9, 34)
    assert (len(of_chosen), of_chosen[1]) == (3, 31)


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


def test_a_trainer_that_ends_early_is_an_error_with_its_last_words(tmp_path):
    worker = Worker("ours", tmp_path, run_trainer, TRAINERS["our SFT"], tmp_path)  # no inputs
    with pytest.raises(RuntimeError, match=r"ours:(?s:.*)No such file.*rows\.jsonl"), worker:
        worker.ask("a step")


# ---------------------------------------------------------------- what makes a ratio count


def test_trainers_that_agree_pass():
    compare(tiny(*SFT), {name: [step(2.0), step(1.0)] for name in SFT})


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
    with pytest.raises(AssertionError, match=message):
        compare(tiny(*taken), taken)
