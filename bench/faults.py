"""Runs killed with SIGKILL at random moments: do they end in the same bits as an undisturbed one?

    python -m bench.faults             about seven minutes on two cores

train_sft.py trains the toy's student for 60 steps, once undisturbed on 1 rank and once on 2
(torchrun). After every 5 steps it computes a held-out loss and saves a checkpoint, of which it
keeps 2. Then 30 runs are killed, every process of them at once, some of them twice, and started
again with the same command until they end:

    any moment        while it trains, by the clock
    a save            at a random part of the time that a checkpoint takes
    the end of an epoch    at a random part of what lies between two epochs: the end of a step,
                      the held-out loss, a checkpoint, the beginning of a step
    the last save     while the model's folder is written

A kill was inside a save if OUT/checkpoints/.writing-NNNNNN still stands there; of the model, if
OUT/.saving-PID does. A run survived if

    after a kill, the 2 newest checkpoints are whole, by their hashes
    after a kill, no model is there that would load, or the whole one
    it did no more steps again than lie between two checkpoints
    at the end the model's files are bitwise those of the undisturbed run on as many ranks
    at the end its metrics.jsonl too, but for the fields "seconds" and "memory_gib"

    survived          share of the killed runs that did
    inside_a_save     kills that were inside a checkpoint's
    inside_last_save  kills that were inside the model's
    redone_steps      recorded before a kill and done again after it
    two_to_one        a run on 2 ranks, killed, that resumes on 1: the largest difference of a
                      weight from the undisturbed one, over the largest weight; its peer says for
                      how many steps. Adam divides a gradient by its own size, so what differs by
                      rounding alone may move a weight by a whole step of the learning rate, and
                      differences grow with the steps that are left
    two_to_one_epoch  the same for a whole epoch of steps, shown without a goal

Left out: kills while a run starts (tests/test_resume.py kills before every change of the disk),
power cuts and broken disks (it damages checkpoints), kills of single ranks, signals and full disks
(tests/test_faults.py).
"""

import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.killed_runs import EPOCH_STEPS, SAVE_EVERY, STEPS, Failed, Run, make_toy
from bench.measure import result, write
from redi.checkpoint.resume import damage

SEED = 0
RUNS = {  # moment -> killed runs on 1 rank, on 2
    "any moment": (6, 3),
    "a save": (8, 6),
    "the end of an epoch": (2, 2),
    "the last save": (2, 1),
}
TWICE = 3  # every third run is killed again on its way
INSIDE = 10  # kills, at least, inside a save
NEAR = 1e-6  # from 2 ranks to 1
LAST_STEPS = {"two_to_one": SAVE_EVERY, "two_to_one_epoch": EPOCH_STEPS}  # done on 1 rank
NOT_THE_MODEL = {"metrics.jsonl", "config.toml", "README.md"}  # name their folder, or time


# ---------------------------------------------------------------- moments


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, and how long its parts took."""

    run: Run
    training: float  # seconds from the first record to the last
    save: float  # seconds of a checkpoint, the median


def undisturbed(toy: Path, ranks: int) -> Undisturbed:
    saves = []
    with Run(toy, f"whole-{ranks}", ranks) as run:
        run.start()
        run.wait_until(lambda: run.trained() > 0)
        began = time.monotonic()
        for step in range(SAVE_EVERY, STEPS, SAVE_EVERY):
            run.wait_until(lambda step=step: run.reached_save(step))
            seen = time.monotonic()
            run.wait_until(run.checkpoint(step).exists)
            saves.append(time.monotonic() - seen)
        run.wait_until(run.finished)
        training = time.monotonic() - began
        run.end()
    return Undisturbed(run, training, sorted(saves)[len(saves) // 2])


def wait_for(moment: str, run: Run, whole: Undisturbed, more: int, rng: random.Random) -> None:
    """Return at a random moment of this kind, of those still to come that leave room for so many
    more of them; or at the end of the run if none is to come."""
    done = run.trained()

    def one_of(every: int) -> int:
        ahead = range((done // every + 1) * every, STEPS, every)
        return rng.choice(ahead[: len(ahead) - more] or [STEPS])

    if moment == "any moment":
        run.wait_until(lambda: run.trained() > done)
        time.sleep(rng.uniform(0.0, whole.training * (STEPS - done) / STEPS / (1 + more)))
    elif moment == "a save":
        step = one_of(SAVE_EVERY)
        run.wait_until(lambda: run.reached_save(step))
        time.sleep(rng.uniform(0.0, whole.save))
    elif moment == "the end of an epoch":
        step = one_of(EPOCH_STEPS)
        run.wait_until(lambda: run.trained() >= step)
        time.sleep(rng.uniform(0.0, whole.save + whole.training / STEPS))
    else:
        run.wait_until(lambda: run.inside() == "model")


# ---------------------------------------------------------------- a killed run


@dataclass
class Killed:
    """What became of a run that was killed."""

    moment: str
    ranks: int
    inside: list[str] = field(default_factory=list)  # a kill each: the save that it was in
    redone: list[int] = field(default_factory=list)  # a kill each: steps
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = [
            f"{steps}" + (f" (in a save: {inside})" if inside else "")
            for steps, inside in zip(self.redone, self.inside)
        ]
        return (
            f"{self.ranks} rank{'s' * (self.ranks > 1):<3}{self.moment:<21}"
            f"{'; '.join(self.problems) or 'the same bits'}; steps done again: "
            f"{', '.join(kills)}"
        )


def kill_and_go_on(
    moment: str, times: int, run: Run, whole: Undisturbed, rng: random.Random
) -> Killed:
    """Kill a run so many times on its way, let it end and compare. A run that survived is removed,
    of another one the folder stays."""
    outcome = Killed(moment, run.ranks)
    try:
        with run:
            run.start()
            while len(outcome.redone) < times:
                wait_for(moment, run, whole, times - len(outcome.redone) - 1, rng)
                run.kill()
                if not run.finished():
                    go_on(run, whole.run, outcome)
                elif outcome.redone:
                    break  # it ended before it was killed again
                else:  # too late: once more from the beginning
                    shutil.rmtree(run.out)
                    run.start()
            else:
                run.end()
        outcome.problems += differences(run, whole.run)
    except Failed as problem:
        outcome.problems.append(str(problem))
    if not outcome.problems:
        shutil.rmtree(run.out)
    return outcome


def go_on(run: Run, whole: Run, outcome: Killed) -> None:
    """Look at what a kill left, and start the run again up to the first step that is new."""
    outcome.inside.append(run.inside())
    outcome.problems += half_written(run, whole)
    done = run.trained()
    run.start()
    run.wait_until(lambda: run.trained() > done)  # or its end, if no step was left
    redone = done - run.resumed_after()
    outcome.redone.append(redone)
    if redone > SAVE_EVERY:
        outcome.problems.append(f"{redone} steps done again")


def half_written(run: Run, whole: Run) -> list[str]:
    """What would load, and is not whole."""
    found = [f"{folder.name}: {wrong}" for folder in run.newest() if (wrong := damage(folder))]
    if (run.out / "config.json").exists() and not same_model(run, whole):
        found.append("half a model loads")
    return found


def same_model(run: Run, whole: Run) -> bool:
    files = [f for f in whole.out.iterdir() if f.is_file() and f.name not in NOT_THE_MODEL]
    pairs = [(file, run.out / file.name) for file in files]
    return all(b.exists() and a.read_bytes() == b.read_bytes() for a, b in pairs)


def differences(run: Run, whole: Run) -> list[str]:
    same = {"model": same_model(run, whole), "metrics": run.records() == whole.records()}
    return [f"another {name}" for name, is_same in same.items() if not is_same]


# ---------------------------------------------------------------- from 2 ranks to 1


def two_to_one(name: str, whole: Undisturbed) -> float:
    """Kill a run on 2 ranks before its last steps and have it end on 1 rank; see above."""
    begin = STEPS - LAST_STEPS[name]
    with Run(whole.run.toy, name, ranks=2) as run:
        run.start()
        run.wait_until(run.checkpoint(begin).exists)
        run.kill()
        run.ranks = 1
        run.start()
        run.end()
    if run.resumed_after() != begin:
        raise RuntimeError(f"{name}: resumed after step {run.resumed_after()}, not {begin}")
    return distance(run, whole.run)


def distance(run: Run, whole: Run) -> float:
    """The largest difference between two runs' weights, over the largest weight."""
    ours, theirs = (load_file(one.out / "model.safetensors") for one in (run, whole))
    ours, theirs = (torch.cat([w[name].flatten() for name in theirs]) for w in (ours, theirs))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---------------------------------------------------------------- all


def kill_all(toy: Path, wholes: dict[int, Undisturbed]) -> list[Killed]:
    rng, outcomes = random.Random(SEED), []
    planned = [
        (moment, ranks)
        for moment, counts in RUNS.items()
        for ranks, count in zip((1, 2), counts)
        for _ in range(count)
    ]
    for number, (moment, ranks) in enumerate(planned, start=1):
        times = 2 if number % TWICE == 0 and moment != "the last save" else 1
        run = Run(toy, f"killed-{number}", ranks)
        outcomes.append(kill_and_go_on(moment, times, run, wholes[ranks], rng))
        print(f"{number:>3}/{len(planned)}  {outcomes[-1]}", flush=True)
    return outcomes


def report(outcomes: list[Killed], distances: dict[str, float]) -> int:
    """Print and write the results; the exit status."""
    survived = sum(not outcome.problems for outcome in outcomes) / len(outcomes)
    inside = [mark for outcome in outcomes for mark in outcome.inside]
    redone = [steps for outcome in outcomes for steps in outcome.redone]
    kills = f"{len(inside)} kills of {len(outcomes)} runs"
    results = {
        "survived": result([survived], 1.0, f"the undisturbed run; {kills}"),
        "inside_a_save": result([inside.count("checkpoint")], INSIDE, kills),
        "inside_last_save": result([inside.count("model")], None, kills),
        "redone_steps": result(redone, SAVE_EVERY, "steps between two checkpoints, at most"),
    }
    for name, steps in LAST_STEPS.items():
        goal = NEAR if name == "two_to_one" else None
        peer = f"the largest weight; the last {steps} of {STEPS} steps on 1 rank"
        results[name] = result([distances[name]], goal, peer)
    print(f"{'':<18}{'median':>10}{'max':>10}")
    for name, entry in results.items():
        print(
            f"{name:<18}{entry['median']:>10.3g}{entry['max']:>10.3g}   goal {entry['goal']}   "
            f"{entry['peer']}"
        )
    write("faults", results)
    enough = inside.count("checkpoint") >= INSIDE
    return int(not (survived == 1.0 and enough and distances["two_to_one"] <= NEAR))


def main() -> int:
    toy = Path(tempfile.mkdtemp(prefix="faults-"))
    make_toy(toy)
    wholes = {ranks: undisturbed(toy, ranks) for ranks in (1, 2)}
    for ranks, whole in wholes.items():
        print(
            f"undisturbed on {ranks} rank{'s' * (ranks > 1)}: {STEPS} steps in "
            f"{whole.training:.1f} s, a checkpoint in {whole.save:.3f} s",
            flush=True,
        )
    outcomes = kill_all(toy, wholes)
    status = report(outcomes, {name: two_to_one(name, wholes[2]) for name in LAST_STEPS})
    if status:
        print(f"{toy} stays: the runs that did not survive, and what they printed")
    else:
        shutil.rmtree(toy)
    return status


if __name__ == "__main__":
    sys.exit(main())
