"""The two kernels compared with float64 autograd: values, gradients, precision and memory.

    python -m pytest tests/test_logprobs.py

Oracle everywhere: log_softmax over the whole logits in float64, by torch's own autograd.
Letters: R rows, D hidden, V vocabulary, C rows of a chunk.
"""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from redi import logprobs
from redi.logprobs import (
    reference_token_logps,
    token_logps,
    token_logps_and_entropies,
    weighted_logp_sum,
)

D, V = 6, 37


def problem(rows: int, dtype=torch.float64, scale: float = 1.0, vocabulary: int = V, seed: int = 0):
    """hidden, weight, targets (both ends of the vocabulary among them), token weights."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=draw, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, D, generator=draw, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    targets[: min(rows, 1)] = 0
    targets[1:2] = vocabulary - 1
    token_weights = torch.randn(rows, generator=draw, dtype=torch.float64)
    token_weights[2:3] = 0.0
    return hidden.to(dtype), weight.to(dtype), targets, token_weights


def in_chunks_of(monkeypatch, rows: int, vocabulary: int = V, dtype=torch.float64) -> None:
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", rows * vocabulary * dtype.itemsize)


def oracle(hidden, weight, targets, upstream):
    """(sum, log-probs, d hidden, d weight) of sum upstream * log-prob, by autograd in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logps = F.log_softmax(F.linear(hidden, weight), dim=-1)[range(len(targets)), targets]
    total = (logps * upstream.double()).sum()
    return total.detach(), logps.detach(), *torch.autograd.grad(total, (hidden, weight))


def by_weighted_logp_sum(hidden, weight, targets, upstream):
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    result = weighted_logp_sum(hidden, weight, targets, upstream)
    assert not result.token_logps.requires_grad
    result.loss.backward()
    return result.loss.detach(), result.token_logps, hidden.grad, weight.grad


def by_token_logps(hidden, weight, targets, upstream, kernel=token_logps):
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    logps = kernel(hidden, weight, targets)
    logps.backward(upstream.to(logps.dtype))
    total = logps.detach() @ upstream.to(logps.dtype)
    return total, logps.detach(), hidden.grad, weight.grad


def by_reference(hidden, weight, targets, upstream):
    return by_token_logps(hidden, weight, targets, upstream, reference_token_logps)


def plain(hidden, weight, targets):
    """What a trainer without a fused head does: logits in the inputs' dtype."""
    return F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def by_plain(hidden, weight, targets, upstream):
    return by_token_logps(hidden, weight, targets, upstream, plain)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


KERNELS = {"one pass": by_weighted_logp_sum, "two passes": by_token_logps}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


# ---------------------------------------------------------------- values and gradients


def test_worked_example_of_the_module():
    # z = [0, ln 3], target 0: softmax [1/4, 3/4]; d log-prob / dz = [3/4, -3/4].
    # h = [1], W = [0, ln 3]: dh = 3/4 * 0 - 3/4 ln 3, dW = [3/4, -3/4]
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    for kernel in KERNELS.values():
        total, logps, d_hidden, d_weight = kernel(
            hidden, weight, torch.tensor([0]), torch.ones(1).double()
        )
        assert total.item() == pytest.approx(math.log(1 / 4))
        assert logps.tolist() == [pytest.approx(math.log(1 / 4))]
        assert d_hidden.item() == pytest.approx(-0.75 * math.log(3))
        assert d_weight[:, 0].tolist() == [pytest.approx(0.75), pytest.approx(-0.75)]


@pytest.mark.parametrize("kernel", [*KERNELS.values(), by_reference])
@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(10, 100), (10, 5), (10, 4), (10, 3), (10, 1), (1, 100), (1, 1), (4, 4), (5, 4), (3, 4)],
)
def test_value_and_gradients_equal_float64_autograd_for_every_cut_into_chunks(
    kernel, rows, chunk, monkeypatch
):
    in_chunks_of(monkeypatch, chunk)
    inputs = problem(rows)
    for actual, expected in zip(kernel(*inputs), oracle(*inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@kernels
def test_a_vocabulary_larger_than_the_budget_still_has_one_row_per_chunk(kernel, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 1)
    inputs = problem(3)
    for actual, expected in zip(kernel(*inputs), oracle(*inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@kernels
def test_float32_is_right_to_float32(kernel, monkeypatch):
    in_chunks_of(monkeypatch, 7, dtype=torch.float32)
    inputs = problem(20, torch.float32)
    for actual, expected in zip(kernel(*inputs), oracle(*inputs)):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-6


@kernels
def test_no_rows_give_zero_and_zero_gradients(kernel):
    hidden, weight, targets, upstream = problem(0)
    total, logps, d_hidden, d_weight = kernel(hidden, weight, targets, upstream)
    assert total.item() == 0
    assert logps.shape == (0,)
    assert d_hidden.shape == (0, D)
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_gradcheck_of_token_logps():
    hidden, weight, targets, _ = problem(5)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets), inputs)


def test_gradcheck_of_weighted_logp_sum():
    hidden, weight, targets, token_weights = problem(5)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    # A factor after the kernel: the scalar upstream gradient must be honored.
    assert torch.autograd.gradcheck(
        lambda h, w: -3.5 * weighted_logp_sum(h, w, targets, token_weights).loss, inputs
    )


def test_token_logps_takes_an_upstream_gradient_that_depends_on_the_log_probs():
    hidden, weight, targets, _ = problem(8)

    def loss(kernel):
        h, w = (t.detach().requires_grad_() for t in (hidden, weight))
        logps = kernel(h, w, targets)
        value = -F.logsigmoid(0.7 * (logps[:3].sum() - logps[3:].mean()) - 1.0)
        return torch.autograd.grad(value, (h, w))

    for actual, expected in zip(loss(token_logps), loss(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("signs", [[1.0], [-1.0], [0.0], [1.0, -1.0, 0.0]])
@kernels
def test_weights_of_either_sign_and_zero(kernel, signs):
    hidden, weight, targets, _ = problem(6)
    upstream = torch.tensor(signs, dtype=torch.float64).repeat(6)[:6] / 7
    inputs = hidden, weight, targets, upstream
    for actual, expected in zip(kernel(*inputs), oracle(*inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_zero_weight_gives_no_gradient_but_its_log_prob():
    hidden, weight, targets, upstream = problem(6)
    _, logps, d_hidden, _ = by_weighted_logp_sum(hidden, weight, targets, upstream)
    assert upstream[2] == 0
    assert torch.equal(d_hidden[2], torch.zeros(D, dtype=torch.float64))
    assert logps[2].item() == pytest.approx(oracle(hidden, weight, targets, upstream)[1][2].item())


@kernels
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_a_right_one(kernel, frozen):
    inputs = dict(zip(("hidden", "weight"), problem(6)[:2]))
    _, _, targets, upstream = problem(6)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    if kernel is by_weighted_logp_sum:
        weighted_logp_sum(*inputs.values(), targets, upstream).loss.backward()
    else:
        token_logps(*inputs.values(), targets).backward(upstream)
    expected = dict(zip(("hidden", "weight"), oracle(*inputs.values(), targets, upstream)[2:]))
    learned = next(name for name in inputs if name != frozen)
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[learned].grad, expected[learned], rtol=1e-10, atol=1e-10)


def test_gradients_add_up_over_two_packs_that_share_a_weight():
    hidden, weight, targets, upstream = problem(9)
    shared = weight.clone().requires_grad_()
    for part in (slice(0, 4), slice(4, 9)):
        weighted_logp_sum(hidden[part], shared, targets[part], upstream[part]).loss.backward()
    expected = oracle(hidden, weight, targets, upstream)[3]
    torch.testing.assert_close(shared.grad, expected, rtol=1e-10, atol=1e-10)


def test_backward_may_run_again_and_gives_the_same():
    hidden, weight, targets, upstream = problem(3)
    total = weighted_logp_sum(
        hidden.requires_grad_(), weight.requires_grad_(), targets, upstream
    ).loss
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2.0 * total, (hidden, weight))
    for once, twice in zip(first, second):
        torch.testing.assert_close(twice, 2.0 * once, rtol=1e-14, atol=0)


def test_inputs_are_left_as_they_were():
    inputs = problem(6, torch.float32)
    copies = [tensor.clone() for tensor in inputs]
    for kernel in KERNELS.values():
        kernel(*inputs)
    for tensor, copy in zip(inputs, copies):
        assert torch.equal(tensor, copy)


# ---------------------------------------------------------------- hard numbers


@kernels
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_are_finite_and_right(kernel, size):
    # Logits of +-size exactly: hidden picks one column of the weight.
    weight = torch.zeros(4, D)
    weight[:, 0] = torch.tensor([size, -size, size / 2, 0.0])
    hidden = torch.zeros(4, D)
    hidden[:, 0] = 1.0
    targets = torch.arange(4)
    inputs = hidden, weight, targets, torch.tensor([1.0, -1.0, 0.5, -2.0])
    total, logps, d_hidden, d_weight = kernel(*inputs)
    # The largest logit holds all the mass: log-probs are z_t - size.
    torch.testing.assert_close(logps, torch.tensor([0.0, -2 * size, -size / 2, -size]))
    expected = oracle(*inputs)
    for actual, right in zip((total, d_hidden, d_weight), (expected[0], *expected[2:])):
        assert actual.isfinite().all()
        assert relative_error(actual, right) < 1e-6


@kernels
@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
def test_gradients_survive_an_offset_common_to_all_logits(kernel, offset):
    # softmax - onehot must sum to zero over the vocabulary, or the offset leaks into d hidden.
    hidden, weight, targets, upstream = problem(8, torch.float32)
    hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + offset
    inputs = hidden, weight, targets, upstream
    _, _, d_hidden, d_weight = oracle(*inputs)
    _, _, ours_hidden, ours_weight = kernel(*inputs)
    _, _, plain_hidden, plain_weight = by_plain(*inputs)
    slack = 2.0, 1e-6
    assert relative_error(ours_hidden, d_hidden) < (
        slack[0] * relative_error(plain_hidden, d_hidden) + slack[1]
    )
    assert relative_error(ours_weight, d_weight) < (
        slack[0] * relative_error(plain_weight, d_weight) + slack[1]
    )


def sure_tokens(rows: int = 64, vocabulary: int = 128):
    """Every target has p > 1 - 1e-8 but not p = 1."""
    draw = torch.Generator().manual_seed(5)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    weight = torch.randn(vocabulary, vocabulary, generator=draw) * 0.3 / vocabulary**0.5
    weight += torch.eye(vocabulary)
    hidden = 27.0 * F.one_hot(targets, vocabulary).float()
    hidden += 0.3 * torch.randn(rows, vocabulary, generator=draw)
    upstream = torch.randn(rows, generator=draw)
    misses = -torch.expm1(oracle(hidden, weight, targets, upstream)[1])
    assert misses.max() < 1e-8
    assert misses.min() > 0
    return hidden, weight, targets, upstream


@kernels
def test_gradient_of_nearly_sure_tokens_keeps_its_digits_where_the_plain_one_loses_them(kernel):
    # 1 - p < 1e-8 is under fp32's resolution at 1 (6e-8): p - 1 formed from p is lost.
    inputs = sure_tokens()
    _, logps, d_hidden, d_weight = oracle(*inputs)
    _, our_logps, our_hidden, our_weight = kernel(*inputs)
    _, _, plain_hidden, plain_weight = by_plain(*inputs)
    assert relative_error(our_hidden, d_hidden) < 0.01
    assert relative_error(our_weight, d_weight) < 0.01
    assert relative_error(our_logps, logps) < 0.01  # log p itself, though p rounds to 1
    assert relative_error(plain_hidden, d_hidden) > 0.1
    assert relative_error(plain_weight, d_weight) > 0.1


@kernels
def test_a_log_prob_is_never_above_zero(kernel):
    for inputs in (sure_tokens(), problem(50, torch.float32, scale=30.0)):
        assert kernel(*inputs)[1].max() <= 0


@kernels
def test_wide_logits_leave_no_denormal_number_anywhere(kernel, monkeypatch):
    # At a standard deviation of 20 a quarter of exp(z - max) is under 1e-38 without the clamp.
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            if function._schema.name in made:
                seen.append(out.clone())
            return out

    made = ("aten::exp_", "aten::mul_", "aten::mm", "aten::addmm")

    hidden, weight, targets, upstream = problem(40, torch.float32, 8.0, vocabulary=2000)
    logits = hidden @ weight.T
    assert logits.std() > 15
    shifted = logits - logits.amax(1, keepdim=True)
    assert (shifted < -87.4).float().mean() > 0.1
    upstream *= 1e-6  # the weight of a token in a million
    with Watch():
        results = kernel(hidden, weight, targets, upstream)
    tiny = torch.finfo(torch.float32).tiny
    assert seen
    for tensor in seen:
        assert ((tensor == 0) | (tensor.abs() >= tiny)).all()
    expected = oracle(hidden, weight, targets, upstream)
    for actual, right in zip(results, expected):
        assert actual.isfinite().all()
        assert relative_error(actual, right) < 1e-5


# ---------------------------------------------------------------- low precision


@pytest.fixture(scope="module")
def low_precision():
    """bf16 inputs as a trained model gives: most tokens likely, some not; V 2048, D 128."""
    draw = torch.Generator().manual_seed(6)
    rows, size, vocabulary = 512, 128, 2048
    weight = torch.randn(vocabulary, size, generator=draw)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    sharpness = 12 * torch.rand(rows, 1, generator=draw) / size
    hidden = sharpness * weight[targets] + 0.1 * torch.randn(rows, size, generator=draw)
    upstream = torch.randn(rows, generator=draw) / rows
    inputs = hidden.bfloat16(), weight.bfloat16(), targets, upstream
    return inputs, oracle(*inputs)


@kernels
def test_bf16_log_probs_are_fp32_and_no_worse_than_the_plain_ones(kernel, low_precision):
    inputs, (_, expected, _, _) = low_precision
    logps = kernel(*inputs)[1]
    error = (logps.double() - expected).abs().max()
    plain_error = (plain(*inputs[:3]).double() - expected).abs().max()
    assert logps.dtype == torch.float32
    assert error <= plain_error
    assert error <= 1e-4


@kernels
def test_bf16_gradients_come_in_bf16_and_are_better_than_the_plain_ones(
    kernel, low_precision, monkeypatch
):
    in_chunks_of(monkeypatch, 100, 2048, torch.float32)  # several chunks: sums across them
    inputs, (_, _, d_hidden, d_weight) = low_precision
    _, _, our_hidden, our_weight = kernel(*inputs)
    _, _, plain_hidden, plain_weight = by_plain(*inputs)
    assert our_hidden.dtype == our_weight.dtype == torch.bfloat16
    assert relative_error(our_weight, d_weight) < 0.7 * relative_error(plain_weight, d_weight)
    assert relative_error(our_hidden, d_hidden) <= relative_error(plain_hidden, d_hidden)
    # What rounding the result to bf16 costs (2^-9 at most), and hardly more.
    assert relative_error(our_weight, d_weight) < 2**-9


# ---------------------------------------------------------------- entropy


def entropies_of(kernel, hidden, weight, targets, upstream) -> torch.Tensor:
    """(R,) float64, read after backward."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    if kernel is by_weighted_logp_sum:
        loss, _, entropies = weighted_logp_sum(hidden, weight, targets, upstream)
        loss.backward()
    else:
        logps, entropies = token_logps_and_entropies(hidden, weight, targets)
        logps.backward(upstream.to(logps.dtype))
    assert not entropies.requires_grad
    return entropies.double()


def right_entropies(hidden, weight) -> torch.Tensor:
    logps = F.linear(hidden.double(), weight.double()).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@kernels
def test_entropy_of_the_worked_example(kernel):
    # softmax [1/4, 3/4]: 1/4 ln 4 + 3/4 ln 4/3 = ln 4 - 3/4 ln 3
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    [entropy] = entropies_of(kernel, hidden, weight, torch.tensor([0]), torch.ones(1).double())
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-14)


@kernels
@pytest.mark.parametrize("chunk", [100, 4, 1])
def test_entropy_equals_its_definition_whatever_the_tokens_weight(kernel, chunk, monkeypatch):
    in_chunks_of(monkeypatch, chunk)
    inputs = problem(10)
    assert inputs[3][2] == 0  # a token with weight 0 has an entropy too
    torch.testing.assert_close(
        entropies_of(kernel, *inputs), right_entropies(*inputs[:2]), rtol=1e-12, atol=1e-12
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entropy_in_low_precision_is_right_to_a_ten_thousandth_of_a_nat(kernel, dtype, scale):
    inputs = problem(200, dtype, scale, vocabulary=3000)
    errors = (entropies_of(kernel, *inputs) - right_entropies(*inputs[:2])).abs()
    assert errors.max() < 1e-4
    assert errors.mean() < 1e-5


@kernels
def test_entropy_of_a_certain_prediction_is_0_and_never_below(kernel):
    hidden, weight, _, upstream = problem(50, torch.float32, scale=100.0)
    entropies = entropies_of(kernel, hidden, weight, F.linear(hidden, weight).argmax(1), upstream)
    right = right_entropies(hidden, weight)
    assert (right < 1e-6).any()
    assert (entropies >= 0).all()
    torch.testing.assert_close(entropies, right, rtol=0, atol=5e-4)  # logits of about a thousand


def test_asking_for_entropy_changes_no_bit_of_the_rest():
    hidden, weight, targets, upstream = problem(20, torch.float32)
    results = []
    for kernel in (token_logps, lambda *inputs: token_logps_and_entropies(*inputs)[0]):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        logps = kernel(*leaves, targets)
        results.append([logps, *torch.autograd.grad(logps @ upstream.float(), leaves)])
    for without, with_entropies in zip(*results):
        assert torch.equal(without, with_entropies)


def test_without_a_gradient_by_hidden_there_are_no_entropies_and_the_same_log_probs():
    hidden, weight, targets, upstream = problem(5)
    expected = token_logps(hidden, weight, targets)
    for learned in ([], [weight]):  # the weight's gradient alone gives no entropies
        for tensor in learned:
            tensor.requires_grad_()
        loss, logps, entropies = weighted_logp_sum(hidden, weight, targets, upstream)
        assert entropies is None
        assert torch.equal(logps, expected)
        assert loss.item() == pytest.approx((logps @ upstream).item())
        assert token_logps_and_entropies(hidden, weight, targets)[1] is None


# ---------------------------------------------------------------- memory and work


class Recorder(TorchDispatchMode):
    """The largest tensor any operation returns, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        name = function._schema.name
        self.products += name in ("aten::mm", "aten::addmm", "aten::addmm_")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(kernel, dtype, monkeypatch):
    vocabulary, chunk = 300, 16
    in_chunks_of(monkeypatch, chunk, vocabulary, torch.float32)
    largest = {}
    for rows in (64, 256):
        inputs = problem(rows, dtype, vocabulary=vocabulary)
        with Recorder() as recorder:
            kernel(*inputs)
        largest[rows] = recorder.largest
    # A chunk's logits, however many rows there are.
    assert largest == {64: chunk * vocabulary, 256: chunk * vocabulary}


def test_the_recorder_sees_the_logits_of_the_plain_path():
    with Recorder() as recorder:
        by_plain(*problem(64, vocabulary=300))
    assert recorder.largest == 64 * 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_the_size_of_a_chunk_is_alive_between_forward_and_backward(dtype, monkeypatch):
    chunk, vocabulary = 16, 4000
    in_chunks_of(monkeypatch, chunk, vocabulary, torch.float32)
    hidden, weight, targets, upstream = problem(64, dtype, vocabulary=vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_()
    result = weighted_logp_sum(hidden, weight, targets, upstream)
    gc.collect()
    # The weight (V, D), its gradient, and nothing larger: no logits of a chunk (C > D).
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 2]
    assert not [tuple(t.shape) for t in alive if t.shape[1] == vocabulary and len(t) > D]
    result.loss.backward()


@pytest.mark.parametrize(
    ("learned", "one_pass", "two_passes"),
    [("both", 3, 4), ("hidden", 2, 3), ("weight", 2, 3), ("neither", 1, 1)],
)
def test_matrix_products_per_chunk(learned, one_pass, two_passes):
    # Forward 1, d hidden 1, d weight 1; the two-pass kernel computes the logits again in backward.
    def count(run) -> int:
        hidden, weight, targets, upstream = problem(8)
        hidden.requires_grad_(learned in ("both", "hidden"))
        weight.requires_grad_(learned in ("both", "weight"))
        with Recorder() as recorder:
            total = run(hidden, weight, targets, upstream)
            if learned != "neither":
                total.backward()
        return recorder.products

    assert count(lambda h, w, t, u: weighted_logp_sum(h, w, t, u).loss) == one_pass
    assert count(lambda h, w, t, u: (token_logps(h, w, t) * u).sum()) == two_passes


@pytest.mark.parametrize("run", [weighted_logp_sum, lambda h, w, t, u: token_logps(h, w, t)])
def test_without_grad_only_the_logits_are_computed(run):
    hidden, weight, targets, upstream = problem(8)
    with torch.no_grad(), Recorder() as recorder:
        run(hidden.requires_grad_(), weight.requires_grad_(), targets, upstream)
    assert recorder.products == 1


def test_the_default_chunk_is_32_mib_of_fp32_logits_on_a_cpu():
    # 32 MiB / (32768 * 4 bytes) = 256 rows
    head = logprobs._Head(torch.zeros(600, 2), torch.zeros(32_768, 2))
    assert [rows.stop - rows.start for rows in head.chunks] == [256, 256, 88]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kernels
def test_cuda_equals_float64_of_the_same_inputs(kernel, dtype, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cuda", 100 * 2048 * 4)
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(512, 128, generator=draw).to(dtype)
    weight = torch.randn(2048, 128, generator=draw).to(dtype) / 10
    targets = torch.randint(2048, (512,), generator=draw)
    upstream = torch.randn(512, generator=draw)
    expected = oracle(hidden, weight, targets, upstream)
    actual = kernel(*(t.cuda() for t in (hidden, weight, targets, upstream)))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert (actual[1].cpu().double() - expected[1]).abs().max() < 1e-4
    for ours, right in zip(actual[2:], expected[2:]):
        assert relative_error(ours.cpu(), right) < tolerance
