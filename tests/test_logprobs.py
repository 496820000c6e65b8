"""The two kernels compared with float64 autograd: values, gradients, precision and memory.

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
    """hidden, weight, targets (both ends of the vocabulary among them), token weights of both signs
    and, the third, zero."""
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


def right_entropies(hidden, weight) -> torch.Tensor:
    logps = F.linear(hidden.double(), weight.double()).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


# A kernel: hidden, weight, targets, upstream -> the sum to differentiate, log-probs, entropies.


def one_pass(hidden, weight, targets, upstream):
    return weighted_logp_sum(hidden, weight, targets, upstream)


def two_passes(hidden, weight, targets, upstream):
    logps, entropies = token_logps_and_entropies(hidden, weight, targets)
    return logps @ upstream.to(logps.dtype), logps.detach(), entropies


def without_entropies(kernel):
    def run(hidden, weight, targets, upstream):
        logps = kernel(hidden, weight, targets)
        return logps @ upstream.to(logps.dtype), logps.detach(), None

    return run


def low_precision_logps(hidden, weight, targets):
    """What a trainer without a fused head does: logits in the inputs' dtype."""
    return F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]


plain = without_entropies(low_precision_logps)
reference = without_entropies(reference_token_logps)


LOGPS, D_HIDDEN, D_WEIGHT = 1, 2, 3  # in what `oracle` and `results` return


def results(kernel, hidden, weight, targets, upstream, learned=("hidden", "weight")):
    """As `oracle`, and entropies, which are valid after backward."""
    hidden = hidden.detach().requires_grad_("hidden" in learned)
    weight = weight.detach().requires_grad_("weight" in learned)
    total, logps, entropies = kernel(hidden, weight, targets, upstream)
    total.backward()
    assert not logps.requires_grad
    assert entropies is None or not entropies.requires_grad
    return total.detach(), logps, hidden.grad, weight.grad, entropies


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


KERNELS = {"one pass": one_pass, "two passes": two_passes}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


# ---------------------------------------------------------------- values and gradients


@kernels
def test_worked_example_of_the_module(kernel):
    # z = [0, ln 3], target 0: softmax [1/4, 3/4]; d log-prob / dz = [3/4, -3/4].
    # h = [1], W = [0, ln 3]: dh = 3/4 * 0 - 3/4 ln 3, dW = [3/4, -3/4]
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    upstream = torch.ones(1, dtype=torch.float64)
    total, logps, d_hidden, d_weight, entropies = results(
        kernel, hidden, weight, torch.tensor([0]), upstream
    )
    assert total.item() == pytest.approx(math.log(1 / 4))
    assert logps.tolist() == [pytest.approx(math.log(1 / 4))]
    assert d_hidden.item() == pytest.approx(-0.75 * math.log(3))
    assert d_weight[:, 0].tolist() == [pytest.approx(0.75), pytest.approx(-0.75)]
    # 1/4 ln 4 + 3/4 ln 4/3
    assert entropies.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-14)


@pytest.mark.parametrize("kernel", [one_pass, two_passes, reference])
@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(10, 100), (10, 5), (10, 4), (10, 3), (10, 1), (1, 100), (1, 1), (4, 4), (5, 4), (3, 4),
     (3, 0), (0, 4)],  # 0: not a single row fits the budget
)  # fmt: skip
def test_value_and_gradients_equal_float64_autograd_for_any_chunks(
    kernel, rows, chunk, monkeypatch
):
    in_chunks_of(monkeypatch, chunk)
    inputs = problem(rows)
    copies = [tensor.clone() for tensor in inputs]
    *found, entropies = results(kernel, *inputs)
    for actual, expected in zip(found, oracle(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if entropies is not None:  # a token with weight 0 has an entropy too
        right = right_entropies(*inputs[:2])
        torch.testing.assert_close(entropies, right, rtol=1e-12, atol=1e-12)
    assert (found[2][2:3] == 0).all()  # exactly: the token weight is 0
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


@kernels
def test_float32_is_right_to_float32(kernel, monkeypatch):
    in_chunks_of(monkeypatch, 7, dtype=torch.float32)
    inputs = problem(20, torch.float32)
    for actual, expected in zip(results(kernel, *inputs), oracle(*inputs)):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        token_logps,
        # A factor after the kernel: the scalar upstream gradient must be honored.
        lambda h, w, t: -3.5 * weighted_logp_sum(h, w, t, problem(5)[3]).loss,
    ],
    ids=["token_logps", "weighted_logp_sum"],
)
def test_gradcheck(function):
    hidden, weight, targets, _ = problem(5)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: function(h, w, targets), leaves)


def test_backward_may_run_again_and_gives_the_same():
    hidden, weight, targets, upstream = problem(3)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    total = weighted_logp_sum(*leaves, targets, upstream).loss
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(2.0 * total, leaves)
    for once, twice in zip(first, second):
        torch.testing.assert_close(twice, 2.0 * once, rtol=1e-14, atol=0)


# ---------------------------------------------------------------- hard numbers


@kernels
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_are_finite_and_right(kernel, size):
    # Logits of +-size exactly: hidden picks one column of the weight.
    weight = torch.zeros(4, D)
    weight[:, 0] = torch.tensor([size, -size, size / 2, 0.0])
    hidden = torch.zeros(4, D)
    hidden[:, 0] = 1.0
    inputs = hidden, weight, torch.arange(4), torch.tensor([1.0, -1.0, 0.5, -2.0])
    total, logps, *gradients, _ = results(kernel, *inputs)
    # The largest logit holds all the mass: log-probs are z_t - size.
    torch.testing.assert_close(logps, torch.tensor([0.0, -2 * size, -size / 2, -size]))
    expected = oracle(*inputs)
    for actual, right in zip((total, *gradients), (expected[0], *expected[2:])):
        assert actual.isfinite().all()
        assert relative_error(actual, right) < 1e-6


@kernels
@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
def test_gradients_survive_an_offset_common_to_all_logits(kernel, offset):
    # softmax - onehot must sum to zero over the vocabulary, or the offset leaks into d hidden.
    hidden, weight, targets, upstream = problem(8, torch.float32)
    hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + offset
    inputs = hidden, weight, targets, upstream
    expected, ours, theirs = oracle(*inputs), results(kernel, *inputs), results(plain, *inputs)
    for i in (D_HIDDEN, D_WEIGHT):
        plain_error = relative_error(theirs[i], expected[i])
        assert relative_error(ours[i], expected[i]) < 2.0 * plain_error + 1e-6


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
    assert 0 < misses.min() <= misses.max() < 1e-8
    return hidden, weight, targets, upstream


@kernels
def test_gradient_of_nearly_sure_tokens_keeps_its_digits_where_the_plain_one_loses_them(kernel):
    # 1 - p < 1e-8 is under fp32's resolution at 1 (6e-8): p - 1 formed from p is lost.
    inputs = sure_tokens()
    expected, ours, theirs = oracle(*inputs), results(kernel, *inputs), results(plain, *inputs)
    for i in (LOGPS, D_HIDDEN, D_WEIGHT):  # log p itself too, though p rounds to 1
        assert relative_error(ours[i], expected[i]) < 0.01
    for i in (D_HIDDEN, D_WEIGHT):
        assert relative_error(theirs[i], expected[i]) > 0.1
    assert ours[1].max() <= 0


class Recorder(TorchDispatchMode):
    """The outputs of products and exponentials, the size of the largest tensor that any operation
    returns, and the number of matrix products."""

    def __init__(self, keep: bool = False):
        super().__init__()
        self.largest, self.products, self.keep, self.kept = 0, 0, keep, []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        name = function._schema.name
        product = name in ("aten::mm", "aten::addmm", "aten::addmm_")
        self.products += product
        if self.keep and (product or name in ("aten::exp_", "aten::mul_")):
            self.kept.append(out.clone())
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@kernels
def test_wide_logits_leave_no_denormal_number_anywhere(kernel):
    # At a standard deviation of 20 a quarter of exp(z - max) is under 1e-38 without the clamp.
    hidden, weight, targets, upstream = problem(40, torch.float32, 8.0, vocabulary=2000)
    logits = hidden @ weight.T
    assert logits.std() > 15
    assert (logits - logits.amax(1, keepdim=True) < -87.4).float().mean() > 0.1
    inputs = hidden, weight, targets, upstream * 1e-6  # the weight of a token in a million
    with Recorder(keep=True) as recorder:
        found = results(kernel, *inputs)
    assert recorder.kept
    for tensor in recorder.kept:
        assert ((tensor == 0) | (tensor.abs() >= torch.finfo(torch.float32).tiny)).all()
    for actual, right in zip(found, oracle(*inputs)):
        assert actual.isfinite().all()
        assert relative_error(actual, right) < 1e-5


# ---------------------------------------------------------------- low precision


@kernels
def test_bf16_log_probs_are_fp32_and_log_probs_and_gradients_beat_the_plain_ones(
    kernel, monkeypatch
):
    # Inputs as a trained model gives: most tokens likely, some not.
    draw = torch.Generator().manual_seed(6)
    rows, size, vocabulary = 512, 128, 2048
    weight = torch.randn(vocabulary, size, generator=draw)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    sharpness = 12 * torch.rand(rows, 1, generator=draw) / size
    hidden = sharpness * weight[targets] + 0.1 * torch.randn(rows, size, generator=draw)
    upstream = torch.randn(rows, generator=draw) / rows
    inputs = hidden.bfloat16(), weight.bfloat16(), targets, upstream
    in_chunks_of(monkeypatch, 100, vocabulary, torch.float32)  # several chunks: sums across them
    _, logps, d_hidden, d_weight = oracle(*inputs)
    _, our_logps, our_hidden, our_weight, _ = results(kernel, *inputs)
    _, plain_logps, plain_hidden, plain_weight, _ = results(plain, *inputs)
    error = (our_logps.double() - logps).abs().max()
    assert our_logps.dtype == torch.float32
    assert error <= (plain_logps.double() - logps).abs().max()
    assert error <= 1e-4
    assert our_hidden.dtype == our_weight.dtype == torch.bfloat16
    assert relative_error(our_weight, d_weight) < 0.7 * relative_error(plain_weight, d_weight)
    assert relative_error(our_hidden, d_hidden) <= relative_error(plain_hidden, d_hidden)
    # What rounding the result to bf16 costs (2^-9 at most), and hardly more.
    assert relative_error(our_weight, d_weight) < 2**-9


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entropy_in_low_precision_is_right_to_a_ten_thousandth_of_a_nat(kernel, dtype, scale):
    inputs = problem(200, dtype, scale, vocabulary=3000)
    errors = (results(kernel, *inputs)[4].double() - right_entropies(*inputs[:2])).abs()
    assert errors.max() < 1e-4
    assert errors.mean() < 1e-5


@kernels
def test_entropy_of_a_certain_prediction_is_0_and_never_below_and_log_probs_never_above(kernel):
    hidden, weight, _, upstream = problem(50, torch.float32, scale=100.0)
    best = F.linear(hidden, weight).argmax(1)
    _, logps, *_, entropies = results(kernel, hidden, weight, best, upstream)
    right = right_entropies(hidden, weight)
    assert (right < 1e-6).any()
    assert (entropies >= 0).all()
    assert (logps <= 0).all()
    # The logits are about a thousand.
    torch.testing.assert_close(entropies.double(), right, rtol=0, atol=5e-4)


def test_computing_the_entropy_changes_no_bit_of_the_rest():
    inputs = problem(20, torch.float32)
    without = results(without_entropies(token_logps), *inputs)
    for one, other in zip(without[:4], results(two_passes, *inputs)):
        assert torch.equal(one, other)


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


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(kernel, dtype, monkeypatch):
    vocabulary, chunk = 300, 16
    in_chunks_of(monkeypatch, chunk, vocabulary, torch.float32)

    def largest(kernel, rows: int) -> int:
        with Recorder() as recorder:
            results(kernel, *problem(rows, dtype, vocabulary=vocabulary))
        return recorder.largest

    # A chunk's logits, however many rows there are.
    assert largest(kernel, 64) == largest(kernel, 256) == chunk * vocabulary
    assert largest(plain, 64) == 64 * vocabulary


def test_the_default_chunk_is_32_mib_of_fp32_logits_on_a_cpu():
    with torch.no_grad(), Recorder() as recorder:
        token_logps(torch.zeros(600, 2), torch.zeros(32_768, 2), torch.zeros(600).long())
    assert recorder.largest == (32 << 20) / 4
    assert recorder.products == 3  # chunks of 256, 256 and 88 rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_the_size_of_a_chunk_is_alive_between_forward_and_backward(dtype, monkeypatch):
    chunk, vocabulary = 16, 4000
    in_chunks_of(monkeypatch, chunk, vocabulary, torch.float32)
    hidden, weight, *rest = problem(64, dtype, vocabulary=vocabulary)
    result = weighted_logp_sum(hidden.requires_grad_(), weight.requires_grad_(), *rest)
    gc.collect()
    # The weight (V, D), its gradient, and nothing larger: no logits of a chunk (C > D).
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 2]
    assert not [tuple(t.shape) for t in alive if t.shape[1] == vocabulary and len(t) > D]
    result.loss.backward()


@kernels
@pytest.mark.parametrize(
    ("learned", "forward_and_gradients"),
    [(["hidden", "weight"], 3), (["hidden"], 2), (["weight"], 2)],
)
def test_a_frozen_input_costs_no_matrix_product_and_gets_no_gradient(
    kernel, learned, forward_and_gradients
):
    inputs = problem(8)
    with Recorder() as recorder:
        _, _, *gradients, _ = results(kernel, *inputs, learned=learned)
    # The two-pass kernel computes the logits again in backward.
    assert recorder.products == forward_and_gradients + (kernel is two_passes)
    for name, ours, right in zip(("hidden", "weight"), gradients, oracle(*inputs)[2:]):
        if name in learned:
            torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)
        else:
            assert ours is None


@kernels
def test_without_gradients_only_the_logits_are_computed(kernel):
    hidden, *rest = problem(8)
    with Recorder() as recorder:
        kernel(hidden, *rest)
        with torch.no_grad():
            kernel(hidden.requires_grad_(), *rest)
    assert recorder.products == 2  # one per call


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
    inputs = hidden, weight, targets, torch.randn(512, generator=draw)
    expected = oracle(*inputs)
    actual = results(kernel, *(t.cuda() for t in inputs))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert (actual[1].cpu().double() - expected[1]).abs().max() < 1e-4
    for i in (D_HIDDEN, D_WEIGHT):
        assert relative_error(actual[i].cpu(), expected[i]) < tolerance
