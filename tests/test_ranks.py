"""Invariant 1 on real ranks: gloo processes with FSDP2 give the loss and gradients of one process.

    python -m pytest tests/test_ranks.py

Rows are ragged, so ranks have unequal packs. With a single row, or a single pair kept together, all
ranks but one have no work.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import rank_environments, ranks
from small_step import BETWEEN_CUTS, Rows, assert_close, objective_of, tiny
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from redi import distributed
from redi.batches import TrainData
from redi.checkpoint.reference import _score as reference_logp_sums
from redi.config import RankError, Stopped, UserError, program
from redi.distributed import Parallelism, World, full_tensor, local_rank_zero_first, parallelize
from redi.train import train_step

CASES = [
    (name, tied, dtype, rows, "qwen2")
    for name in ("sft", "redi", "symmetric", "dpo", "simpo")
    for tied in (True, False)
    for dtype in BETWEEN_CUTS
    for rows in (7, 1)
]
# The other code paths of objectives.py.
CASES += [("dpo_norm", True, torch.float64, 7, "qwen2"), ("dft", True, torch.float64, 1, "qwen2")]
CASES += [("redi", True, torch.float64, 7, "qwen3"), ("sft", False, torch.float64, 7, "llama")]
CASES += [
    (f"{name} on labeled rows", True, torch.float64, 7, "qwen2")
    for name in ("redi", "asymre", "uft")
]

# pack_tokens, reshard_after_forward, offload
CUTS = [(1000, False, False), (30, False, False), (30, True, False), (30, False, True)]
CPU = torch.device("cpu")

# ---------------------------------------------------------------- what a rank does


class KeepsGradients(torch.optim.AdamW):
    """Keeps the whole gradients instead of a step."""

    def step(self) -> None:
        [group] = self.param_groups
        self.gradients = [full_tensor(parameter.grad) for parameter in group["params"]]


def one_step(
    case: tuple, world: World, pack_tokens: int = 1000, reshard: bool = False, offload: bool = False
) -> tuple:
    """What train_step returns for a step over all rows, dealt to the ranks, and the gradients."""
    name, tied, dtype, rows, family = case
    name, _, kind = name.partition(" on ")
    kind = kind or ("rows" if name == "sft" else "pairs")
    model, how = tiny(tied, dtype, family=family), Parallelism(dtype, 1, reshard, offload)
    parallelize(model, world, how)
    data = TrainData(Rows(kind, rows), objective_of(name), world, pack_tokens)
    if data.objective.needs_reference:
        reference = tiny(tied, dtype, seed=9)
        parallelize(reference, world, how)
        data = replace(data, reference=reference_logp_sums(reference, data))
    optimizer = KeepsGradients(model.parameters(), lr=1e-2)
    config = SimpleNamespace(clip=1e9, reshard_after_forward=reshard)
    signals = SimpleNamespace(wanted=False)
    stats, record = train_step(model, optimizer, data, data.all_rows(), config, signals)
    logged = stats.summary() | {"squared update": record["update_norm"] ** 2}
    names = [name for name, _ in model.named_parameters()]
    return record["loss"], record["grad_norm"], logged, dict(zip(names, optimizer.gradients))


def in_turn(world: World, failing: int | None) -> str:
    """What a rank does in local_rank_zero_first, where the rank `failing` raises an error. Unless
    it fails, it takes twice as long as ranks usually wait for each other."""
    set_timeout(timedelta(seconds=0.1))
    written = Path(f"node-{world.rank // world.local_world_size}-failing-{failing}")
    with local_rank_zero_first(world):
        if world.rank == failing:
            raise UserError("no such data")
        if world.is_local_rank_zero:
            time.sleep(0.2)
            written.touch()
            did = "wrote"
        else:
            did = "found" if written.exists() else "too early"
    set_timeout(timedelta(minutes=2))
    return did


@program
def run_cases() -> None:
    """Save the results of the CASES with the numbers in sys.argv. The first rank of the last node
    fails at the end."""
    world = distributed.start(timeout_minutes=2)
    results = {}
    for case in (CASES[int(number)] for number in sys.argv[1:]):
        for cut in CUTS:
            results[case, cut] = one_step(case, world, *cut)
    results["in turn"] = [""] * world.world_size
    dist.all_gather_object(results["in turn"], in_turn(world, failing=None))
    backend = distributed._mesh(world).get_group()._get_backend(world.device)  # that FSDP uses
    results["timeout"] = str(backend.options._timeout)
    if world.rank == 0:
        torch.save(results, "results.pt")
    last_leader = world.world_size - world.local_world_size
    with distributed.report_lost_ranks(world, "two minutes"):
        in_turn(world, last_leader)


# ---------------------------------------------------------------- what the ranks must return


def results_of(request, num_ranks: int, folder: Path) -> dict:
    """The results on nodes of two ranks, of the cases that pytest selected for this fixture."""
    items = [item for item in request.session.items if request.fixturename in item.fixturenames]
    selected = [item.callspec.params.get("case") for item in items if hasattr(item, "callspec")]
    numbers = [str(number) for number, case in enumerate(CASES) if case in selected]
    started = ranks(folder, numbers, *[None] * num_ranks, main=run_cases, local_world_size=2)
    for rank in started:
        rank.ends(2, seconds=300)
    errors = [rank.errors for rank in started]
    return torch.load(folder / "results.pt", weights_only=False) | {"errors": errors}


@pytest.fixture(scope="module")
def on_two_ranks(request, tmp_path_factory):
    return results_of(request, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_two_nodes(request, tmp_path_factory):
    return results_of(request, 4, tmp_path_factory.mktemp("nodes"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_give_the_loss_and_gradients_of_one_alone(on_two_ranks, case):
    assert_as_alone(on_two_ranks, case)


# The stricter half of the cases, in fp64; an untied head, one more parameter, with one objective.
ON_NODES = [case for case in CASES if case[2] == torch.float64 and (case[1] or case[0] == "sft")]


@pytest.mark.parametrize("case", ON_NODES, ids=str)
def test_two_nodes_of_two_ranks_give_the_loss_and_gradients_of_one_alone(on_two_nodes, case):
    assert_as_alone(on_two_nodes, case)


def assert_as_alone(results: dict, case: tuple) -> None:
    loss, norm, logged, gradients = one_step(case, World(0, 1, CPU))
    within = BETWEEN_CUTS[case[2]]
    for cut in CUTS:
        together = results[case, cut]
        assert_close(together[3], together[0], (loss, gradients), within)
        assert together[1] == pytest.approx(norm, rel=within)
        # The margin is a small difference of two log-probs: as exact as those.
        assert together[2] == pytest.approx(logged, rel=within, abs=5 * within)


def test_the_first_rank_of_each_node_runs_first_and_takes_the_others_down_if_it_fails(
    on_two_ranks, on_two_nodes
):
    for nodes, results in ((1, on_two_ranks), (2, on_two_nodes)):
        assert results["in turn"] == ["wrote", "found"] * nodes
        first, *others = results["errors"]
        if nodes == 2:
            assert first.startswith("error: rank 0 lost another process, which ended (see its own")
            _, first, *others = results["errors"][1:]
        assert (first, others) == ("error: no such data\n", [""])
        assert results["timeout"] == "0:02:00"  # not NCCL's own, ten minutes


# ---------------------------------------------------------------- what one rank reports


def test_an_error_that_only_a_later_rank_of_a_node_meets_is_reported_by_that_rank(monkeypatch):
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda *_: None)
    world = World(1, 2, CPU, 2)
    with pytest.raises(RankError, match="no such data"), local_rank_zero_first(world):
        raise UserError("no such data")


def test_a_rank_that_cannot_join_ends_in_one_line(monkeypatch):
    def time_out(*_: object, **__: object) -> None:
        raise dist.DistStoreError("1/2 clients joined.\nframe #0")

    monkeypatch.setattr(dist, "init_process_group", time_out)
    for name, value in ("MASTER_ADDR", "127.0.0.1"), ("WORLD_SIZE", "2"), ("RANK", "1"):
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"rank 1 could not join .* 0:01:00: 1/2 clients joined\.$"):
        distributed.start(timeout_minutes=1)


PAIR = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
BUFFER = "[/src/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] "
ADVICE = ". This is typically caused by a remote worker crashing. Check the logs."
NCCL = "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error"
LOST = [
    RuntimeError(f"{PAIR}Connection closed by peer [127.0.0.1]:457{ADVICE}"),
    RuntimeError(f"{PAIR}Read error [127.0.0.1]:432: Connection reset by peer{ADVICE}"),
    RuntimeError(f"{PAIR}Write error [127.0.0.1]:432: Broken pipe{ADVICE}"),
    RuntimeError(f"{BUFFER}Timed out waiting 4000ms for recv operation to complete"),
    RuntimeError(f"{PAIR}Application timeout caused pair closure"),
    dist.DistBackendError(NCCL),
    dist.DistNetworkError("The client socket has timed out after 60s"),
]
OTHERS = [
    RuntimeError("ProcessGroupGloo::allreduce: invalid tensor type at index 0"),
    RuntimeError(f"[enforce fail at {PAIR[1:-2]}] op.preamble.length <= op.nbytes. 200000 vs 8"),
    RuntimeError("CUDA error: out of memory while gloomy"),
    RuntimeError("Timed out waiting for the tokenizer"),
    RuntimeError("Connection closed by peer while the data set was downloaded"),
    dist.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"),
]


@pytest.mark.parametrize("error", [*LOST, *OTHERS], ids=str)
def test_an_error_of_the_exchange_between_ranks_becomes_one_line_and_no_other(
    error, one_process_group
):
    with pytest.raises(RankError if error in LOST else RuntimeError) as raised:
        raise_inside(error, World(1, 2, CPU))
    if error in OTHERS:
        assert raised.value is error
        return
    why = str(error).rpartition("] ")[2].removesuffix(ADVICE)
    assert str(raised.value) == (
        "rank 1 lost another process, which ended (see its own message) or did not answer within "
        f"a week: {why}"
    )
    assert raised.value.__cause__ is error


def raise_inside(error: BaseException, world: World) -> None:
    with distributed.report_lost_ranks(world, "a week"):
        raise error


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_alone_has_lost_no_other_and_leaves_the_group_it_created():
    world, error = World(0, 1, CPU), dist.DistNetworkError("no NCCL here")

    def use_a_group() -> None:
        with distributed.report_lost_ranks(world, ""):
            parallelize(tiny(True, torch.float32), world, Parallelism(torch.bfloat16))
            assert dist.is_initialized()
            raise error

    with pytest.raises(RuntimeError) as raised:
        use_a_group()
    assert raised.value is error
    assert not dist.is_initialized()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_ends_well_leaves_the_group_and_one_that_breaks_does_not_wait_for_it(
    stopped, one_process_group
):
    """If it stayed until the end of the process, gloo's threads would sometimes abort it."""
    world = World(0, 2, CPU)
    with pytest.raises(ZeroDivisionError):
        raise_inside(ZeroDivisionError(), world)
    assert dist.is_initialized()
    with suppress(Stopped), distributed.report_lost_ranks(world, "a week"):
        if stopped:
            raise Stopped("after step 1")
    assert not dist.is_initialized()


# ---------------------------------------------------------------- how CUDA is started


@pytest.fixture
def two_gpus(monkeypatch):
    """torch reports two GPUs, and the environment says nothing about their memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that its value is restored after the test
        monkeypatch.delenv(name)


def test_more_processes_than_gpus_are_refused(two_gpus, monkeypatch):
    for name, value in rank_environments(3)[2].items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"3 processes on .*; torch sees 2: .* --nproc_per_node 2$"):
        distributed.start(timeout_minutes=1)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_segments_are_expandable_unless_the_user_says_something_else(
    two_gpus, monkeypatch, name
):
    distributed.start(timeout_minutes=1)
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv(name, "max_split_size_mb:512")
    distributed.start(timeout_minutes=1)
    assert os.environ[name] == "max_split_size_mb:512"
    assert "expandable_segments:True" not in os.environ.values()
