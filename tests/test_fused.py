"""The parts of a block in few passes (redi/fused.py) compared with float64 autograd.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest.py), in fp32 and fp16: it
has no bf16 arithmetic. Letters: T tokens, H heads, d head size, F intermediate size.
"""

import pytest
import torch
import torch.nn.functional as F

from redi import fused

kernels = pytest.importorskip("redi.kernels", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}
HEADS = [(0, 3, 8), (1, 1, 2), (1, 14, 128), (5, 3, 6), (9, 2, 80)]  # T, H, d
PRODUCTS = [(0, 5), (1, 1), (1, 1023), (3, 1024), (7, 1025)]  # T, F
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
both = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(DEVICE, dtype).requires_grad_()

    return normal


@pytest.fixture
def use(monkeypatch):
    """use(True): Triton does the work, also on a CPU."""
    return lambda triton: monkeypatch.setattr(fused, "in_triton", lambda tensor: triton)


def plain_rotate(x, cos, sin):
    """The definition, in complex numbers."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def assert_as_plain(found, plain, tensors, dtype):
    """Values and all gradients are those of `plain` in float64, for a random upstream gradient."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    ours, right = found(*tensors), plain(*wide)
    upstream = torch.randn(right.shape, dtype=torch.float64, device=right.device)
    pairs, within = [(ours, right)], TOLERANCE[dtype]
    pairs += zip(
        torch.autograd.grad(ours, tensors, upstream.to(dtype)),
        torch.autograd.grad(right, wide, upstream.to(dtype).double()),
    )
    for actual, expected in pairs:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=within, atol=within)


@dtypes
@both
@pytest.mark.parametrize(("tokens", "heads", "size"), HEADS)
def test_rotation_and_its_gradient(tokens, heads, size, dtype, triton, draw, use):
    use(triton)
    angles = draw(tokens, size // 2).detach()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def plain(x):
        return plain_rotate(x, cos.double(), sin.double())

    x = draw(tokens, heads, size, dtype=dtype)
    assert_as_plain(lambda x: fused.rotate(x, cos, sin), plain, [x], dtype)


@dtypes
@both
@pytest.mark.parametrize(("tokens", "size"), PRODUCTS)
def test_swiglu_and_its_gradients(tokens, size, dtype, triton, draw, use):
    use(triton)
    gate, up = draw(tokens, size, dtype=dtype), draw(tokens, size, dtype=dtype)
    with torch.no_grad():
        gate.view(-1)[:2] = torch.tensor([200.0, -200.0])[: gate.numel()]  # exp(200) is infinite
    assert_as_plain(fused.swiglu, lambda gate, up: F.silu(gate) * up, [gate, up], dtype)


def test_the_kernels_take_tensors_and_gradients_that_are_not_contiguous(draw, use):
    use(True)
    dtype = torch.float32
    gate, up, x = (draw(*shape, dtype=dtype) for shape in ((6, 4), (6, 4), (2, 4, 6)))
    cos, sin = draw(4, 3, dtype=dtype).detach(), draw(4, 3, dtype=dtype).detach()

    def turned(rotate, *angles):
        return lambda x: rotate(x.transpose(0, 1), *angles).transpose(0, 1)

    exact = turned(plain_rotate, cos.double(), sin.double())
    assert_as_plain(turned(fused.rotate, cos, sin), exact, [x], dtype)

    def product(gate, up):
        return (F.silu(gate.T) * up.T).T

    assert_as_plain(lambda gate, up: fused.swiglu(gate.T, up.T).T, product, [gate, up], dtype)


def test_the_kernels_save_gate_up_and_angles_only(draw, use):
    use(True)
    gate, up, x = draw(4, 6), draw(4, 6), draw(4, 2, 6)
    cos, sin = draw(4, 3).detach(), draw(4, 3).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.swiglu(gate, up)
        fused.rotate(x, cos, sin)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (gate, up, cos, sin)]


def test_one_switch_turns_all_kernels_of_training_off(monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True

    on_gpu = torch.zeros(1).as_subclass(OnCuda)
    assert fused.in_triton(on_gpu)
    assert not fused.in_triton(torch.zeros(1))
    assert not fused.in_triton(on_gpu.double())
    monkeypatch.setenv("REDI_KERNELS", "torch")
    assert not fused.in_triton(on_gpu)
