"""The head's two kernels compared with float64 autograd: values, gradients, precision and memory.

Oracle everywhere: log_softmax over the whole logits in float64, by torch's own autograd.
Letters: R rows, D hidden, V vocabulary, C rows of a chunk.
"""

import gc
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from redi import logprobs
from redi.logprobs import reference_token_logps, token_logps_and_entropies, weighted_logp_sum

D, V = 6, 37
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Results(NamedTuple):
    """Of the loss sum upstream * log-prob."""

    loss: Tensor
    logps: Tensor  # (R,)
    d_hidden: Tensor  # (R, D)
    d_weight: Tensor  # (V, D)
    entropies: Tensor | None  # (R,)


def oracle(hidden, weight, targets, upstream) -> Results:
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    every = F.log_softmax(F.linear(hidden, weight), dim=-1)
    logps = every[range(len(targets)), targets]
    loss = (logps * upstream.double()).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    entropies = -(every.exp() * every).sum(-1)
    return Results(loss.detach(), logps.detach(), *gradients, entropies.detach())


# A kernel: hidden, weight, targets, upstream -> loss, log-probs, entropies.


def weighted(function):
    """The kernel of a function: hidden, weight, targets -> log-probs, entropies."""

    def kernel(hidden, weight, targets, upstream):
        logps, entropies = function(hidden, weight, targets)
        return logps @ upstream.to(logps.dtype), logps.detach(), entropies

    return kernel


@weighted
def plain(hidden, weight, targets):
    """What a trainer without a fused head does: logits in the inputs' dtype."""
    return F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0], None


two_passes = weighted(token_logps_and_entropies)
reference = weighted(lambda *given: (reference_token_logps(*given), None))
KERNELS = {"one pass": weighted_logp_sum, "two passes": two_passes}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def results(kernel, hidden, weight, targets, upstream) -> Results:
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    loss, logps, entropies = kernel(hidden, weight, targets, upstream)
    loss.backward()  # after it, entropies are valid
    assert not logps.requires_grad
    assert entropies is None or not entropies.requires_grad
    return Results(loss.detach(), logps, hidden.grad, weight.grad, entropies)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def in_chunks_of(monkeypatch, rows: int, weight: Tensor) -> None:
    row_bytes = len(weight) * logprobs.accumulation_dtype(weight).itemsize
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", rows * row_bytes)


# ---------------------------------------------------------------- inputs


def problem(rows: int, dtype=torch.float64, scale: float = 1.0, vocabulary: int = V):
    """hidden, weight, targets (both ends of the vocabulary among them), token weights of both signs
    and, the third, zero."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=draw, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, D, generator=draw, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    targets[: min(rows, 1)] = 0
    targets[1:2] = vocabulary - 1
    token_weights = torch.randn(rows, generator=draw, dtype=torch.float64)
    token_weights[2:3] = 0.0
    return hidden.to(dtype), weight.to(dtype), targets, token_weights


def logits_of(size: float):
    """Logits of +-size exactly: hidden picks one column of the weight."""
    hidden, weight = torch.zeros(2, 4, D)
    hidden[:, 0], weight[:, 0] = 1.0, torch.tensor([size, -size, size / 2, 0.0])
    return hidden, weight, torch.arange(4), torch.tensor([1.0, -1.0, 0.5, -2.0])


def wide_logits():
    """Without the clamp, a quarter of exp(z - max) would be under 1e-38: denormal."""
    hidden, weight, targets, upstream = problem(40, torch.float32, 8.0, vocabulary=2000)
    logits = hidden @ weight.T
    assert (logits - logits.amax(1, keepdim=True) < -87.4).float().mean() > 0.1
    return hidden, weight, targets, upstream * 1e-6  # the weight of a token in a million


class Recorder(TorchDispatchMode):
    """The number of matrix products, the size of the largest tensor that any operation returns,
    and with `keep` the outputs of products and exponentials."""

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
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


# ---------------------------------------------------------------- values and gradients


@kernels
def test_worked_example_of_the_module(kernel):
    # z = [0, ln 3], target 0: softmax [1/4, 3/4]; d log-prob / dz = [3/4, -3/4].
    # h = [1], W = [0, ln 3]: dh = 3/4 * 0 - 3/4 ln 3, dW = [3/4, -3/4]
    ones = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    found = results(kernel, ones, weight, torch.tensor([0]), ones[0])
    assert found.loss.item() == found.logps.item() == pytest.approx(math.log(1 / 4))
    assert found.d_hidden.item() == pytest.approx(-0.75 * math.log(3))
    assert found.d_weight[:, 0].tolist() == [pytest.approx(0.75), pytest.approx(-0.75)]
    # 1/4 ln 4 + 3/4 ln 4/3
    assert found.entropies.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-14)


@pytest.mark.parametrize("kernel", [*KERNELS.values(), reference])
@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(10, 100), (10, 5), (10, 4), (10, 3), (10, 1), (1, 100), (1, 1), (4, 4), (5, 4), (3, 4),
     (3, 0), (0, 4)],  # 0: not a single row fits the budget
)  # fmt: skip
def test_value_and_gradients_equal_float64_autograd_for_any_chunks(
    kernel, rows, chunk, monkeypatch
):
    inputs = problem(rows)
    in_chunks_of(monkeypatch, chunk, inputs[1])
    copies = [tensor.clone() for tensor in inputs]
    found, expected = results(kernel, *inputs), oracle(*inputs)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-10, atol=1e-10)
    if found.entropies is not None:  # a token with weight 0 has an entropy too
        torch.testing.assert_close(found.entropies, expected.entropies, rtol=1e-12, atol=1e-12)
    assert (found.d_hidden[2:3] == 0).all()  # exactly: the token weight is 0
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


def test_backward_scales_with_the_upstream_gradient_and_may_run_again():
    hidden, weight, targets, upstream = problem(3)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = weighted_logp_sum(*leaves, targets, upstream).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2.0 * loss, leaves)
    for once, twice in zip(first, second):
        torch.testing.assert_close(twice, 2.0 * once, rtol=1e-14, atol=0)


# ---------------------------------------------------------------- hard numbers


HARD = {  # inputs, and the error allowed in loss and gradients
    "ordinary": (lambda: problem(20, torch.float32), 1e-6),
    "logits of 10000": (lambda: logits_of(1e4), 1e-6),
    "wide logits": (wide_logits, 1e-5),
}


@kernels
@pytest.mark.parametrize("case", HARD)
def test_float32_is_right_to_float32_without_a_denormal_number(case, kernel, monkeypatch):
    make, tolerance = HARD[case]
    inputs = make()
    in_chunks_of(monkeypatch, 7, inputs[1])
    with Recorder(keep=True) as recorder:
        found = results(kernel, *inputs)
    expected = oracle(*inputs)
    torch.testing.assert_close(found.logps, expected.logps.float())
    for actual, right in zip(found[:4], expected):
        assert actual.dtype == torch.float32
        assert relative_error(actual, right) < tolerance  # nan and inf are not
    assert recorder.kept
    for tensor in recorder.kept:
        assert ((tensor == 0) | (tensor.abs() >= torch.finfo(torch.float32).tiny)).all()


@kernels
@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
def test_gradients_survive_an_offset_common_to_all_logits(kernel, offset):
    # softmax - onehot must sum to zero over the vocabulary, or the offset leaks into d hidden.
    inputs = problem(8, torch.float32)
    inputs[0][:, 0], inputs[1][:, 0] = 1.0, inputs[1][:, 0] + offset
    gradients = [each[2:4] for each in (results(kernel, *inputs), results(plain, *inputs))]
    for ours, theirs, right in zip(*gradients, oracle(*inputs)[2:4]):
        assert relative_error(ours, right) < 2.0 * relative_error(theirs, right) + 1e-6


@kernels
def test_gradient_of_nearly_sure_tokens_keeps_its_digits_where_the_plain_one_loses_them(kernel):
    draw = torch.Generator().manual_seed(5)
    targets = torch.randint(128, (64,), generator=draw)
    weight = torch.randn(128, 128, generator=draw) * 0.3 / 128**0.5 + torch.eye(128)
    hidden = 27.0 * F.one_hot(targets, 128) + 0.3 * torch.randn(64, 128, generator=draw)
    inputs = hidden, weight, targets, torch.randn(64, generator=draw)
    expected, ours, theirs = oracle(*inputs), results(kernel, *inputs), results(plain, *inputs)
    # 1 - p < 1e-8 is under fp32's resolution at 1 (6e-8): p - 1 formed from p is lost.
    misses = -torch.expm1(expected.logps)
    assert 0 < misses.min() <= misses.max() < 1e-8
    assert relative_error(ours.logps, expected.logps) < 0.01  # though p rounds to 1
    for i in (2, 3):  # gradients
        assert relative_error(ours[i], expected[i]) < 0.01
        assert relative_error(theirs[i], expected[i]) > 0.1
    assert ours.logps.max() <= 0


# ---------------------------------------------------------------- low precision


@kernels
def test_bf16_log_probs_are_fp32_and_log_probs_and_gradients_beat_the_plain_ones(
    kernel, monkeypatch
):
    # Inputs as a trained model gives: most tokens likely, some not.
    draw = torch.Generator().manual_seed(6)
    weight = torch.randn(2048, 128, generator=draw)
    targets = torch.randint(2048, (512,), generator=draw)
    sharpness = 12 * torch.rand(512, 1, generator=draw) / 128
    hidden = sharpness * weight[targets] + 0.1 * torch.randn(512, 128, generator=draw)
    upstream = torch.randn(512, generator=draw) / 512
    inputs = hidden.bfloat16(), weight.bfloat16(), targets, upstream
    in_chunks_of(monkeypatch, 100, inputs[1])  # several chunks: sums across them
    expected, ours, theirs = oracle(*inputs), results(kernel, *inputs), results(plain, *inputs)
    error = (ours.logps.double() - expected.logps).abs().max()
    assert ours.logps.dtype == torch.float32
    assert error <= (theirs.logps.double() - expected.logps).abs().max()
    assert error <= 1e-4
    assert ours.d_hidden.dtype == ours.d_weight.dtype == torch.bfloat16
    hidden_errors, weight_errors = (
        [relative_error(each[i], expected[i]) for each in (ours, theirs)] for i in (2, 3)
    )
    assert hidden_errors[0] <= hidden_errors[1]
    assert weight_errors[0] < 0.7 * weight_errors[1]
    # What rounding the result to bf16 costs (2^-9 at most), and hardly more.
    assert weight_errors[0] < 2**-9


@kernels
@LOW_PRECISION
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entropy_in_low_precision_is_right_to_a_ten_thousandth_of_a_nat(kernel, dtype, scale):
    inputs = problem(200, dtype, scale, vocabulary=3000)
    errors = (results(kernel, *inputs).entropies.double() - oracle(*inputs).entropies).abs()
    assert errors.max() < 1e-4
    assert errors.mean() < 1e-5


@kernels
def test_entropy_of_a_certain_prediction_is_0_and_never_below_and_log_probs_never_above(kernel):
    hidden, weight, _, upstream = problem(50, torch.float32, scale=100.0)  # logits of a thousand
    inputs = hidden, weight, F.linear(hidden, weight).argmax(1), upstream
    found, right = results(kernel, *inputs), oracle(*inputs).entropies
    assert (right < 1e-6).any()
    assert (found.entropies >= 0).all()
    assert (found.logps <= 0).all()
    torch.testing.assert_close(found.entropies.double(), right, rtol=0, atol=5e-4)


# ---------------------------------------------------------------- memory and work


@kernels
@LOW_PRECISION
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(kernel, dtype, monkeypatch):
    assert logprobs.CHUNK_BYTES["cpu"] == 32 << 20  # by default

    def largest(kernel, rows: int) -> int:
        inputs = problem(rows, dtype, vocabulary=300)
        in_chunks_of(monkeypatch, 16, inputs[1])
        with Recorder() as recorder:
            results(kernel, *inputs)
        return recorder.largest

    # A chunk's logits, however many rows there are.
    assert largest(kernel, 64) == largest(kernel, 256) == 16 * 300
    assert largest(plain, 64) == 64 * 300


@LOW_PRECISION
def test_nothing_the_size_of_a_chunk_is_alive_between_forward_and_backward(dtype, monkeypatch):
    hidden, weight, *rest = problem(64, dtype, vocabulary=4000)
    in_chunks_of(monkeypatch, 16, weight)
    result = weighted_logp_sum(hidden.requires_grad_(), weight.requires_grad_(), *rest)
    gc.collect()
    # The weight (V, D), its gradient, and nothing larger: no logits of a chunk (C > D).
    alive = [o for o in gc.get_objects() if type(o) is Tensor and o.ndim == 2]
    assert not [tuple(t.shape) for t in alive if t.shape[1] == 4000 and len(t) > D]
    result.loss.backward()


@kernels
def test_matrix_products_with_gradients_and_without(kernel):
    inputs = problem(8)
    with Recorder() as recorder:
        results(kernel, *inputs)
    # The two-pass kernel computes the logits again in backward.
    assert recorder.products == 3 + (kernel is two_passes)
    with torch.no_grad(), Recorder() as recorder:
        found = kernel(inputs[0].requires_grad_(), *inputs[1:])
    assert recorder.products == 1
    assert found[2] is None  # no entropies
    torch.testing.assert_close(found[1], oracle(*inputs).logps, rtol=1e-12, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@LOW_PRECISION
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
    assert (actual.logps.cpu().double() - expected.logps).abs().max() < 1e-4
    for ours, right in zip(actual[2:4], expected[2:4]):
        assert relative_error(ours.cpu(), right) < tolerance
