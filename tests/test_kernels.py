"""The Triton kernels over logits compared with the same formulas in torch, in float64.

On a machine without CUDA they run under Triton's interpreter (see conftest.py), in fp32 and fp16:
it has no bf16 arithmetic. Letters: C rows of a chunk, V vocabulary, D hidden, R rows.
"""

import pytest
import torch

from redi import logprobs
from redi.logprobs import token_logps_and_entropies, weighted_logp_sum

kernels = pytest.importorskip("redi.kernels", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0, 10), (1, 1), (1, 2), (3, 1000), (7, 4096), (2, 4097), (5, 10007)]


def in_torch(logits, targets, weights):
    """float64: gradient of sum weights * log-prob by the logits, log-probs, entropies."""
    logps = logits.double().log_softmax(dim=1)
    onehot = torch.zeros_like(logps).scatter_(1, targets[:, None], 1.0)
    gradient = weights.double()[:, None] * (onehot - logps.exp())
    return gradient, (logps * onehot).sum(dim=1), -(logps.exp() * logps).sum(dim=1)


def problem(rows: int, vocabulary: int, scale: float = 1.0):
    """Logits, targets at both ends of the vocabulary, weights of both signs and zero."""
    draw = torch.Generator().manual_seed(rows * vocabulary)
    logits = scale * torch.randn(rows, vocabulary, generator=draw)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    targets[:1], targets[-1:] = 0, vocabulary - 1
    weights = torch.randn(rows, generator=draw)
    weights[1:2] = 0.0
    return logits.to(DEVICE), targets.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
def test_the_kernel_equals_the_formulas_in_float64(rows, vocabulary, dtype, scale):
    logits, targets, weights = problem(rows, vocabulary, scale)
    right, right_logps, right_entropies = in_torch(logits, targets, weights)
    before = logits.clone()
    _, logps_alone, _ = kernels.softmax_gradient_(logits, targets)
    assert torch.equal(logits, before)
    gradient, logps, entropies = kernels.softmax_gradient_(logits, targets, weights, dtype)
    assert gradient.dtype == dtype
    assert gradient.data_ptr() == logits.data_ptr()
    # weight * share, each share rounded to 2^-11 at 16 bits, and 6e-8 is fp16's smallest number
    rtol = 2e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(gradient.double(), right, rtol=rtol, atol=1e-6)
    for found in (logps_alone, logps):
        torch.testing.assert_close(found.double(), right_logps, rtol=1e-6, atol=1e-6)
        assert (found <= 0).all()
    torch.testing.assert_close(entropies.double(), right_entropies, rtol=1e-5, atol=1e-6)
    assert (entropies >= 0).all()


def test_a_sure_token_keeps_its_log_prob_and_gradient():
    # 999 others at exp(-20): 1 - p is 2.06e-6, which 1 - exp(log p) in fp32 gets right to 3 %.
    logits = torch.full((1, 1000), -20.0, device=DEVICE)
    logits[0, 5] = 0.0
    targets, weights = torch.tensor([5], device=DEVICE), torch.ones(1, device=DEVICE)
    expected = in_torch(logits, targets, weights)
    found = kernels.softmax_gradient_(logits, targets, weights, torch.float32)
    for ours, right in zip(found, expected):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=0)


def test_logits_without_contiguous_rows_are_refused():
    logits, targets, weights = problem(3, 50)
    columns = logits.T.contiguous().T
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.softmax_gradient_(columns, targets)
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.softmax_gradient_(columns, targets, weights, torch.float32)


@pytest.mark.parametrize("rows", [1, 8])
def test_logprobs_is_as_right_with_the_kernels_as_with_torch(rows, monkeypatch):
    """What logprobs.py does on CUDA."""
    kernel, with_gradient = kernels.softmax_gradient_, set()

    def noted(logits, targets, *weights):
        with_gradient.add(bool(weights))
        return kernel(logits, targets, *weights)

    monkeypatch.setattr(kernels, "softmax_gradient_", noted)
    monkeypatch.setattr(logprobs, "in_triton", lambda hidden: True)
    monkeypatch.setitem(logprobs.CHUNK_BYTES, DEVICE, 3 * 33 * 4)  # three rows
    hidden, targets, upstream = problem(rows, 5)
    weight, *_ = problem(33, 5)
    wide = hidden.double(), weight.double()
    gradient, right_logps, entropies = in_torch(wide[0] @ wide[1].T, targets, upstream)
    expected = gradient @ wide[1], gradient.T @ wide[0]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    one_pass = weighted_logp_sum(*leaves, targets, upstream)
    logps, two_pass_entropies = token_logps_and_entropies(*leaves, targets)
    for loss, ours in ((one_pass.loss, one_pass.entropies), (logps @ upstream, two_pass_entropies)):
        found = torch.autograd.grad(loss, leaves)
        for actual, right in zip((*found, logps, ours), (*expected, right_logps, entropies)):
            torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-6)
    assert with_gradient == {True, False}
