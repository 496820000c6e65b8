"""Invariant 1 on real ranks: gloo processes with FSDP2 give the loss and gradients of one process.

    python -m pytest tests/test_ranks.py

This file is also the program that the ranks run; `torchrun`'s environment is set by hand. Rows are
ragged, so ranks have unequal packs. With a single row, or a single pair kept together, all ranks
but one have no work.
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

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
from redi.checkpoint.reference import _score as reference_logp_sums
from redi.config import RankError
from redi.distributed import Parallelism, World, full_tensor, local_rank_zero_first, parallelize
from redi.monitor import StepSums, squared_update_norm

CASES = [
    (name, tied, dtype, rows)
    for name in ("sft", "redi", "symmetric", "dpo", "simpo")
    for tied in (True, False)
    for dtype in BETWEEN_CUTS
    for rows in (7, 1)
]
# The other code paths of objectives.py.
CASES += [("dpo_norm", True, torch.float64, 7), ("dft", True, torch.float64, 1)]


def torchrun(program: list[str], ranks: int, local_world_size: int, **environment: str) -> list:
    """Start a program once per rank, as torchrun does. Returns the processes."""
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
    """Loss, statistics and whole gradients of a step over all rows, dealt to the ranks."""
    reference = tiny(tied, dtype, seed=9)
    model = tiny(tied, dtype)
    for each in (reference, model):
        parallelize(each, world, Parallelism(dtype, 1, reshard_after_forward=reshard))
    data = TrainData(Rows.draw(name != "sft", rows), objective_of(name), world, pack_tokens)
    if data.objective.needs_reference:
        data = replace(data, reference=reference_logp_sums(reference, data))
    step = data.all_rows()
    totals, sums = data.totals(step), StepSums(data, step)
    packs = len(step[world.rank])
    for number, batch in enumerate(data.batches(step, totals), start=1):
        distributed.last_pack(model, number == packs, reshard)
        result = data.loss(model, batch, totals)
        result.loss.backward()
        sums.add(batch, result)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    update = squared_update_norm(torch.optim.AdamW(model.parameters(), lr=1e-2)) / world.num_nodes
    stats = sums.gather([update])
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    logged = stats.logp_summary() | stats.entropy_summary() | {"squared update": stats.scalars[0]}
    return stats.loss, full_tensor(norm).item(), logged, grads, packs


def in_turn(world: World, folder: Path, failing: int | None) -> str:
    """What a rank does in local_rank_zero_first, in which the rank `failing` raises an error."""
    written = folder / f"node-{world.rank // world.local_world_size}-failing-{failing}"
    try:
        with local_rank_zero_first(world):
            if world.rank == failing:
                raise OSError("disk full")
            if world.is_local_rank_zero:
                time.sleep(0.2)
                written.touch()
                did = "wrote"
            else:
                did = "found" if written.exists() else "too early"
    except (OSError, SystemExit) as error:
        return str(error)
    return did


def gather(value: str, world: World) -> list[str]:
    values = [""] * world.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def main(out: str, *numbers: str) -> None:
    """Run the CASES with these numbers, and save what they give."""
    world = distributed.start(timeout_minutes=2)
    results = {}
    for case in (CASES[int(number)] for number in numbers):
        for cut in CUTS:
            results[case, cut] = one_step(*case, world, *cut)
    last_leader = world.world_size - world.local_world_size
    for failing in (None, last_leader):
        results["in turn", failing] = gather(in_turn(world, Path(out).parent, failing), world)
    if world.rank == 0:
        torch.save(results, out)
    torch.distributed.barrier()


# ---------------------------------------------------------------- what they must give


def results_of(request, ranks: int, local_world_size: int, folder: Path) -> dict:
    """Of the cases that pytest selected for this test's fixture: a single one takes seconds."""
    out = folder / "results.pt"
    items = [item for item in request.session.items if request.fixturename in item.fixturenames]
    selected = [item.callspec.params.get("case") for item in items if hasattr(item, "callspec")]
    numbers = [str(number) for number, case in enumerate(CASES) if case in selected]
    processes = torchrun([__file__, str(out), *numbers], ranks, local_world_size)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def on_two_ranks(request, tmp_path_factory):
    return results_of(request, 2, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_two_nodes(request, tmp_path_factory):
    return results_of(request, 4, 2, tmp_path_factory.mktemp("nodes"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_give_the_loss_and_gradients_of_one_alone(on_two_ranks, case):
    assert_as_alone(on_two_ranks, case)


# In fp64 only, the stricter half of the cases.
@pytest.mark.parametrize("case", [case for case in CASES if case[2] == torch.float64], ids=str)
def test_two_nodes_of_two_ranks_give_the_loss_and_gradients_of_one_alone(on_two_nodes, case):
    assert_as_alone(on_two_nodes, case)


def assert_as_alone(results: dict, case: tuple) -> None:
    loss, norm, summary, gradients, _ = one_step(*case, World(0, 1, torch.device("cpu")))
    within = BETWEEN_CUTS[case[2]]
    for cut in CUTS:
        together = results[case, cut]
        assert_close(together[3], together[0], (loss, gradients), within)
        assert together[1] == pytest.approx(norm, rel=within)
        # The margin is a small difference of two log-probs: as exact as those.
        assert together[2] == pytest.approx(summary, rel=within, abs=5 * within)


@pytest.mark.parametrize("fixture", ["on_two_ranks", "on_two_nodes"])
def test_the_first_rank_of_each_node_runs_first_and_takes_the_others_down_if_it_fails(
    request, fixture
):
    results = request.getfixturevalue(fixture)
    turns = {failing: result for (name, failing), result in results.items() if name == "in turn"}
    [(_, done), (leader, failed)] = turns.items()
    ranks = len(done)
    assert done == ["wrote", "found"] * (ranks // 2)
    assert failed == ["2"] * leader + ["disk full"] + ["2"] * (ranks - leader - 1)


PAIR = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
BUFFER = "[/src/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] "
ADVICE = ". This is typically caused by a remote worker crashing. Check the logs."
LOST = [
    (RuntimeError, f"{PAIR}Connection closed by peer [127.0.0.1]:457{ADVICE}"),
    (RuntimeError, f"{PAIR}Read error [127.0.0.1]:432: Connection reset by peer{ADVICE}"),
    (RuntimeError, f"{PAIR}Write error [127.0.0.1]:432: Broken pipe{ADVICE}"),
    (RuntimeError, f"{BUFFER}Timed out waiting 4000ms for recv operation to complete"),
    (RuntimeError, f"{PAIR}Application timeout caused pair closure"),
    (torch.distributed.DistBackendError, "NCCL error: remote process exited"),
    (torch.distributed.DistNetworkError, "The client socket has timed out after 60s"),
]


@pytest.mark.parametrize(("kind", "text"), LOST)
def test_an_error_of_the_exchange_between_ranks_becomes_one_line(kind, text):
    world = World(1, 2, torch.device("cpu"))
    with pytest.raises(RankError) as raised, distributed.report_lost_ranks(world, "a week"):
        raise kind(text)
    why = text.rpartition("] ")[2].removesuffix(ADVICE)
    assert str(raised.value) == (
        f"rank 1 lost another process, which died or did not answer within a week: {why}"
    )


OTHERS = [
    "ProcessGroupGloo::allreduce: invalid tensor type at index 0",
    f"[enforce fail at {PAIR[1:-2]}] op.preamble.length <= op.nbytes. 200000 vs 8",
    "CUDA error: out of memory while gloomy",
    "Timed out waiting for the tokenizer",
    "Connection closed by peer while the data set was downloaded",
]


@pytest.mark.parametrize("text", OTHERS)
def test_any_other_error_passes_through_as_it_is(text):
    world, error = World(1, 2, torch.device("cpu")), RuntimeError(text)
    with pytest.raises(RuntimeError) as raised, distributed.report_lost_ranks(world, "a week"):
        raise error
    assert raised.value is error


def test_a_process_alone_has_lost_no_other():
    world, error = World(0, 1, torch.device("cpu")), torch.distributed.DistError("no NCCL here")
    with pytest.raises(RuntimeError) as raised, distributed.report_lost_ranks(world, "a week"):
        raise error
    assert raised.value is error


def test_a_rank_that_ends_well_leaves_the_group_and_one_that_breaks_does_not_wait_for_it():
    """If it stayed until the end of the process, gloo's threads would sometimes abort it."""
    import torch.distributed as dist

    world = World(0, 2, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ZeroDivisionError), distributed.report_lost_ranks(world, "a week"):
        1 / 0  # noqa: B018
    assert dist.is_initialized()
    with distributed.report_lost_ranks(world, "a week"):
        pass
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(*sys.argv[1:])
