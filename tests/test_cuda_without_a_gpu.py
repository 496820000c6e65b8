"""The CUDA path as far as it goes without a GPU (redi/trace/fake.py): training steps and generation
at the published size on fake tensors and fake ranks, Triton kernels compiled to machine code.

No number is computed. What is checked: that every operator accepts its tensors, where the host
waits for the device, what ranks exchange, the peak of memory, registers and shared memory.
The last section of tests/mutants.py has faults that these tests must notice.
"""

import json

import pytest
from processes import run_command

from redi.trace import why_unavailable

LAYERS = 2

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# Every place where the host waits for the device: in training with the number of waits in a step.
TRAINING_WAITS = {"monitor.StepSums.gather: copy to the host": 1}
GENERATION_WAITS = {
    "kernel_steps.KernelDecoder.__init__: copy from memory that is not pinned",  # once
    "sampling.refused: nonzero()",  # per token
    "sampling.sample: copy to the host",  # per token
}
GATHERING_WAITS = {"folder._gather: copy to the host": 12 * LAYERS + 2}  # per tensor

# What ranks exchange in a step: each block and the root is gathered once and its gradients are
# reduced once; the gradient's norm and the step's statistics are summed.
EXCHANGED = {
    "allgather_base": LAYERS + 1, "reduce_scatter_base": LAYERS + 1, "all_reduce": 1,
    "allreduce": 1,
}  # fmt: skip
STEPS = {
    "train-step objective=sft world_size=1": {},
    "train-step objective=dpo world_size=1": {},
    "train-step objective=sft world_size=8": EXCHANGED,
    "train-step objective=dpo world_size=8": EXCHANGED,
}
SLOW_STEPS = {
    "train-step objective=sft family=qwen3": EXCHANGED,
    "train-step objective=sft family=llama": EXCHANGED,
    "train-step objective=redi": EXCHANGED,
    "train-step objective=simpo": EXCHANGED,
    "train-step objective=dpo packs=2": EXCHANGED,
    # ZeRO-3 gathers the blocks again in backward.
    "train-step objective=sft reshard=True": {**EXCHANGED, "allgather_base": 2 * LAYERS + 1},
    "train-step objective=redi world_size=16": EXCHANGED,  # two nodes
}
# Gradients are awaited before the host clips them: one by one, as FSDP2 does it.
OFFLOAD_WAITS = {**TRAINING_WAITS, "train.train_step: synchronize()": 12 * LAYERS + 2}
OFFLOADED = {
    "train-step objective=redi world_size=1 offload=True": {},
    "train-step objective=sft packs=2 offload=True": EXCHANGED,
}
# The published step, on GPUs of 80 and 141 GB.
PUBLISHED_STEPS = [
    f"train-step objective={objective} {ranks} layers=28 packs=2"
    for objective in ("sft", "redi")
    for ranks in ("", "world_size=1", "memory=141e9", "world_size=16")
]
KERNELS = [
    f"compile capability={capability} dtype={dtype}{size}"
    for capability in (80, 89, 90, 100)
    for dtype in ("bfloat16", "float32")
    for size in ("", " batch=1 width=1")  # Triton makes an integer of 1 a constant
]
SHARED_MEMORY = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10}  # bytes
LAUNCHED = [
    "_row", "_row", "_split", "_add_up", "_rotate", "_swiglu", "_swiglu_gradients",
]  # fmt: skip
WIDE_LOADS = [2, 4]  # of _row: a thread loads 8 fp32 logits of a block; twice with the gradient


# ---------------------------------------------------------------- cases, in a process without a GPU


def slow(cases) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def results(request) -> dict[str, dict]:
    """Case -> its result, from one process for all: imports take longer than most cases."""
    selected = [item for item in request.session.items if item.path == request.path]
    cases = dict.fromkeys(item.callspec.params["case"] for item in selected)
    command = ("-m", "fake_cuda.cases", *cases)
    status, shown, errors = run_command(
        *command, seconds=60 + 120 * len(cases), TRITON_INTERPRET=""
    )
    assert status == 0, errors
    return {result["case"]: result for result in map(json.loads, shown.splitlines())}


@pytest.fixture
def result(case: str, results: dict[str, dict]) -> dict:
    assert "error" not in results[case], results[case]["error"]
    return results[case]


@pytest.mark.parametrize("case", [*STEPS, *slow(SLOW_STEPS)])
def test_a_training_step_waits_once_and_exchanges_each_block_once(case, result):
    exchanged = {**STEPS, **SLOW_STEPS}[case]
    assert result["waits"] == TRAINING_WAITS
    assert result["collectives"] == exchanged
    assert result["backends"] == ["cpu:gloo,cuda:nccl", *["gloo"] * bool(exchanged)]
    assert set(result["launches"]) == {"_row", "_rotate", "_swiglu", "_swiglu_gradients"}
    assert result["update_on"] == ["cuda"]
    assert result["peak_gib"] <= result["formula_gib"]


@pytest.mark.parametrize("case", OFFLOADED)
def test_with_offload_weights_and_adam_are_on_the_host_which_waits_for_gradients(case, result):
    assert result["update_on"] == ["cpu"]
    assert result["waits"] == OFFLOAD_WAITS
    assert result["collectives"] == OFFLOADED[case]
    assert result["peak_gib"] <= result["formula_gib"]


@pytest.mark.parametrize("case", slow(PUBLISHED_STEPS))
def test_the_formula_of_memory_is_at_most_15_percent_above_the_peak(case, result):
    assert 0.85 <= result["peak_gib"] / result["formula_gib"] <= 1.0


@pytest.mark.parametrize("case", slow(["between-steps", "between-steps reshard=True"]))
def test_evaluation_and_gathering_between_steps(case, result):
    assert result["held_out"]["waits"] == TRAINING_WAITS
    assert result["completed"] == 3
    assert set(result["generate"]["waits"]) == GENERATION_WAITS
    # Weights are gathered once, before the first token: ranks may generate for different times.
    assert result["generate"]["collectives"] == {"allgather_base": LAYERS + 1}
    assert result["step"]["waits"] == TRAINING_WAITS
    assert result["gather"]["waits"] == GATHERING_WAITS
    assert set(result["gathered"]) == {"cpu torch.bfloat16"}


@pytest.mark.parametrize("case", slow(["between-steps offload=True"]))
def test_offloaded_weights_answer_on_the_gpu_and_are_gathered_without_it(case, result):
    assert result["held_out"]["waits"] == TRAINING_WAITS
    assert result["completed"] == 3
    assert set(result["generate"]["waits"]) == GENERATION_WAITS
    assert result["generate"]["collectives"] == {"allgather_base": LAYERS + 1}
    assert result["step"]["waits"] == OFFLOAD_WAITS
    assert result["gather"]["waits"] == {}
    assert set(result["gathered"]) == {"cpu torch.bfloat16"}


@pytest.mark.parametrize("case", ["generate"])
def test_a_captured_decode_step_never_waits_for_the_device(case, result):
    assert result["completed"] == 3
    assert [capture["waits"] for capture in result["captures"]] == [[], []]  # of 2 rows and of 1
    # of attention two, of rotary positions two, of SwiGLU one
    assert all(capture["launches"] == 5 * LAYERS for capture in result["captures"])
    assert set(result["waits"]) == GENERATION_WAITS


@pytest.mark.parametrize("case", ["compile capability=90", *slow(KERNELS)])
def test_kernels_fit_the_gpu_spill_nothing_and_load_16_bytes_at_a_time(case, result):
    kernels, capability = result["kernels"], case.split()[1].partition("=")[2]
    assert [kernel["name"] for kernel in kernels] == LAUNCHED
    assert max(kernel["shared_bytes"] for kernel in kernels) <= SHARED_MEMORY[capability]
    assert [kernel["wide_loads"] for kernel in kernels[:2]] == WIDE_LOADS
    assert all(kernel["wide_loads"] for kernel in kernels[4:])
    if "float32" not in case:  # fp32 is for checks, and its attention may spill
        assert not any(kernel["spilled_bytes"] for kernel in kernels)
