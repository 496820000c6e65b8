"""Invariant 1 over real ranks: gloo processes with FSDP2 give the loss and gradients of one alone.

    python -m pytest tests/test_ranks.py

This file is also the program that the ranks run, `torchrun`'s environment set by hand. Rows are
ragged, so ranks have unequal packs; of a single row, or pair kept together, one rank has nothing.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch
from test_invariance import (
    BETWEEN_CUTS,
    Rows,
    assert_close,
    objective_of,
    tiny,
)

from redi import distributed
from redi.batches import TrainData
from redi.checkpoint.reference import reference_logps
from redi.config import RankError
from redi.distributed import Parallelism, World, full_tensor, parallelize
from redi.monitor import SequenceStats, gather_step_stats, squared_update_norm

CASES = [
    (name, tied, dtype, rows)
    for name in ("sft", "redi", "symmetric", "dpo", "simpo")
    for tied in (True, False)
    for dtype in BETWEEN_CUTS
    for rows in (7, 1)
]
# Ways of their own through objectives.py.
CASES += [("dpo_norm", True, torch.float64, 7), ("dft", True, torch.float64, 1)]


def torchrun(program: list[str], ranks: int, local_world_size: int, **environment: str) -> list:
    """Start a program once a rank, as torchrun does: the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        settings = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % local_world_size,
            "LOCAL_WORLD_SIZE": local_world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(sys.path), **environment,
        }  # fmt: skip
        env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *program], env=env, **pipes))
    return processes


CUTS = [(1000, False), (30, False), (30, True)]  # pack_tokens, reshard_after_forward

# ---------------------------------------------------------------- what a rank does


def one_step(
    name: str,
    tied: bool,
    dtype: torch.dtype,
    rows: int,
    world: World,
    pack_tokens: int = 1000,
    reshard: bool = False,
):
    """Loss, summary and whole gradients of a step over all rows, dealt to the ranks."""
    reference = tiny(tied, dtype, seed=9)
    model = tiny(tied, dtype)
    for each in (reference, model):
        parallelize(each, world, Parallelism(dtype, 1, reshard_after_forward=reshard))
    task = TrainData(Rows.draw(name != "sft", rows), objective_of(name), world, pack_tokens)
    task = with_reference(reference, task)
    step = task.everything()
    totals, parts, loss = task.totals(step), [], torch.zeros((), dtype=torch.float64)
    packs = len(step[world.rank])
    for number, batch in enumerate(task.batches(step, totals), start=1):
        distributed.last_pack(model, number == packs, reshard)
        entropies = torch.zeros_like(batch.token_weights)
        share, logps = task.loss(model, batch, totals, entropies)
        share.backward()
        loss += share.detach()
        parts.append(SequenceStats.of(batch, logps, name != "sft", entropies))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    update = squared_update_norm(torch.optim.AdamW(model.parameters(), lr=1e-2)) / world.num_nodes
    reading = read(task, step, parts, [loss, update], [full_tensor(norm)], with_entropies=True)
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    logged = reading.summary() | {"squared update": reading.added[1]}
    return reading.added[0], reading.replicated[0], logged, grads, packs


def main(out: str) -> None:
    world = distributed.start(timeout_minutes=2)
    results = {}
    for case in CASES:
        for cut in CUTS:
            results[case, cut] = one_step(*case, world, *cut)
    if world.rank == 0:
        torch.save(results, out)
    torch.distributed.barrier()


# ---------------------------------------------------------------- what is asked of them


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["2 ranks", "2 nodes of 2"])
def results(request, tmp_path_factory):
    ranks, local_world_size = request.param
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    processes = torchrun([__file__, str(out)], ranks, local_world_size)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_give_the_loss_and_gradients_of_one_alone(results, case):
    loss, norm, summary, gradients, _ = one_step(*case, World(0, 1, torch.device("cpu")))
    within = BETWEEN_CUTS[case[2]]
    for cut in CUTS:
        together = results[case, cut]
        assert_close(together[3], together[0], (loss, gradients), within)
        assert together[1] == pytest.approx(norm, rel=within)
        # The margin is a small difference of two log-probs: as exact as those.
        assert together[2] == pytest.approx(summary, rel=within, abs=5 * within)


if __name__ == "__main__":
    main(sys.argv[1])


def test_a_rank_that_ends_well_leaves_the_group_and_one_that_breaks_does_not_wait_for_it():
    """Left to the end of the process, gloo's threads abort it now and then."""
    import torch.distributed as dist

    world = World(0, 2, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ZeroDivisionError), distributed.report_lost_ranks(world, "a week"):
        1 / 0  # noqa: B018
    assert dist.is_initialized()
    with distributed.report_lost_ranks(world, "a week"):
        pass
    assert not dist.is_initialized()
