"""batch_norm_act: values and gradients against float64, running statistics, special values, threads, arguments."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from torch import nn

import kr_fast

LAST = torch.channels_last
# (N, C, H, W) by regime. C++: one channel, 2 numbers, fewer than a line; 5 channels, where a line is 16 rows and 21
# rows are left over; 16: four rows a line of AVX-512, one chunk; 64: chunks for several threads, with a shorter last
# one; 192: lines of 12 vectors, the last of 2 in AVX2; 1030: a line is a row, its last vector a part of one. GPUs: as
# many channels as a tile has and more than two tiles; one chunk of rows and several with a shorter last one.
CASES = [(2, 1, 1, 1), (3, 5, 9, 9), (4, 16, 8, 8), (2, 64, 31, 29), (3, 192, 5, 7), (2, 1030, 3, 3)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [(activation, residual) for activation in ("relu", None) for residual in (False, True)]


def draw(shape, residual=True, offset=0.0, dtype=torch.float32):
    """x, weight, bias, residual and a gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, more, grad = (
        (2 * normal(*shape) + offset).to(dtype).contiguous(memory_format=LAST) for offset in (offset, 0, 0)
    )
    return x, normal(shape[1]), normal(shape[1]), more if residual else None, grad


def torchs(x, weight, bias, residual=None, activation="relu", eps=1e-5):
    """The layers one after the other, in the inputs' dtype."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y = y if residual is None else y + residual
    return y.relu() if activation else y


def ours(x, weight, bias, residual=None, activation="relu", **options):
    return kr_fast.batch_norm_act(x, weight, bias, residual=residual, activation=activation, **options)


def everything(function, inputs, grad, activation, dtype=None, device=None):
    """y and the gradients of all inputs."""
    inputs = [None if each is None else each.detach().to(device, dtype).requires_grad_() for each in inputs]
    y = function(*inputs, activation=activation)
    gradients = torch.autograd.grad(y, [each for each in inputs if each is not None], grad.to(device, dtype))
    return [y.detach(), *gradients]


def no_worse(got, torchs, exact, dtype=torch.float32, times=3):
    """The largest error of each is at most that many times torch's in this dtype, or its last place."""
    for mine, other, right in zip(got, torchs, exact, strict=True):
        error, limit = ((each.double().cpu() - right).abs().max() for each in (mine, other))
        last_place = 2 * torch.finfo(dtype).eps * right.abs().max()
        assert error <= times * max(limit, last_place), (error, limit)


@on_backends("batch_norm_act")
@pytest.mark.parametrize(("activation", "residual"), OPTIONS)
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, activation, residual):
    if backend.id == "triton-interpreter" and shape == (2, 64, 31, 29) and residual != (activation is not None):
        pytest.skip("several chunks, which take a second with everything and with nothing")
    *inputs, grad = draw(shape, residual, dtype=dtype)
    before = [None if each is None else each.clone() for each in (*inputs, grad)]
    got = everything(ours, inputs, grad, activation, device=backend.device)
    assert got[0].dtype == got[1].dtype == dtype
    assert all(each.is_contiguous(memory_format=LAST) for each in got[:2])
    exact = everything(torchs, inputs, grad, activation, torch.float64)
    no_worse(got, everything(torchs, inputs, grad, activation), exact, dtype)
    for each, was in zip((*inputs, grad), before, strict=True):
        assert was is None or torch.equal(each, was)


@on_backends("batch_norm_act")
def test_a_mean_far_from_zero(backend):
    """E[x^2] - E[x]^2 in float32 would leave no digit of the variance."""
    *inputs, grad = draw((4, 16, 20, 20), offset=3e3)
    got = everything(ours, inputs, grad, "relu", device=backend.device)
    exact = everything(torchs, inputs, grad, "relu", torch.float64)
    no_worse(got, everything(torchs, inputs, grad, "relu"), exact)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1])
@on_backends("batch_norm_act", "reference", "cpu")
def test_running_statistics_are_torchs(backend, momentum, offset):
    x, weight, bias, _, _ = draw((4, 16, 20, 20), offset=offset)
    running = torch.zeros(16), torch.ones(16)
    layers = [nn.BatchNorm2d(16, momentum=momentum, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for step in range(2):
        ours(x + step, weight, bias, running_mean=running[0], running_var=running[1], momentum=momentum)
        for layer in layers:
            layer((x + step).to(layer.weight.dtype))
    plain, exact = ([layer.running_mean, layer.running_var] for layer in layers)
    no_worse(running, plain, exact)


def test_weights_and_statistics_may_be_left_out(isa):
    x, weight, bias, residual, grad = draw((3, 5, 4, 4))
    one, zero = torch.ones(5), torch.zeros(5)
    assert torch.equal(ours(x, None, None, residual), ours(x, one, zero, residual))
    assert torch.equal(ours(x, weight, None), ours(x, weight, zero))
    x.requires_grad_()
    frozen = torch.autograd.grad(ours(x, weight, bias, residual), x, grad)[0]  # nothing else learns
    full = [each.detach().requires_grad_() for each in (x, weight, bias, residual)]
    assert torch.equal(frozen, torch.autograd.grad(ours(*full), full[0], grad)[0])
    (passed,) = torch.autograd.grad(ours(x.detach(), weight, bias, full[3]), full[3], grad)
    assert torch.equal(passed, torch.autograd.grad(ours(*full), full[3], grad)[0])


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_bits_do_not_depend_on_threads_or_alignment(isa, shape, residual):
    *inputs, grad = draw(shape, residual)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(ours, inputs, grad, "relu")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(everything(ours, inputs, grad, "relu"), want, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    x = inputs[0]
    inputs[0] = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
    for a, b in zip(everything(ours, inputs, grad, "relu"), want, strict=True):
        assert torch.equal(a, b)


@on_backends("batch_norm_act")
def test_nan_and_inf_stay_in_their_channel(backend):
    *inputs, grad = (each.to(backend.device) for each in draw((3, 7, 5, 5)))
    want = everything(ours, inputs, grad, "relu")
    inputs[0][0, 2, 1, 1], inputs[0][2, 5, 0, 0] = float("nan"), float("inf")
    inputs[3][1, 3, 0, 0] = float("nan")
    grad[1, 6, 4, 4], inputs[3][1, 6, 4, 4] = float("inf"), 100.0  # the ReLU lets it pass
    got = everything(ours, inputs, grad, "relu")
    y, dx = got[:2]
    assert y[:, [2, 5]].isnan().all()
    assert y[1, 3, 0, 0].isnan()
    assert dx[:, [2, 5]].isnan().all()
    assert not dx[:, 6].isfinite().any()
    clean = [0, 1, 4]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(*(each[:, clean] if each.ndim == 4 else each[clean] for each in (a, b)))


@pytest.mark.parametrize("residual", [False, True])
def test_any_layout_of_the_gradient(isa, residual):
    *inputs, grad = draw((4, 16, 8, 8), residual)
    want = everything(ours, inputs, grad, "relu")
    for other in (grad.contiguous(), grad.repeat(1, 1, 2, 2)[:, :, :8, :8]):
        for a, b in zip(everything(ours, inputs, other, "relu"), want, strict=True):
            assert torch.equal(a, b)
    shared = torch.ones(()).expand(grad.shape)
    for a, b in zip(*(everything(ours, inputs, g, "relu") for g in (shared, torch.ones_like(grad))), strict=True):
        assert torch.equal(a, b)


def test_the_reference_is_torchs(reference):
    for activation, residual in OPTIONS:
        *inputs, grad = draw((3, 5, 4, 4), residual)
        got, want = (everything(function, inputs, grad, activation, torch.float64) for function in (ours, torchs))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def arguments(**change):
    x, weight, bias, residual, _ = draw((2, 8, 3, 3))
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, **change}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 8, 3)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(2, 8, 3, 3)}, ValueError, r"x must be channels_last, got .*strides \(72, 9, 3, 1\)"),
        ({"x": torch.zeros(2, 8, 3, 3).int()}, TypeError, "x must be float32 or bfloat16 or float16 or float64"),
        ({"x": torch.zeros(1, 8, 1, 1)}, ValueError, r"x must hold at least 2 numbers of each channel, got .*\[1, 8"),
        ({"x": torch.zeros(0, 8, 3, 3).to(memory_format=LAST)}, ValueError, r"x must hold at least 2 .*\[0, 8, 3, 3\]"),
        ({"x": torch.zeros(2, 0, 3, 3).to(memory_format=LAST)}, ValueError, r"x must hold at least 2 .*\[2, 0, 3, 3\]"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must be contiguous \[8\] on cpu, got float32 \[7\]"),
        ({"bias": torch.zeros(8).double()}, TypeError, "bias must be float32, got float64"),
        ({"bias": torch.zeros(16)[::2]}, ValueError, "bias must be contiguous"),
        ({"running_mean": torch.zeros(8)}, ValueError, "running_var must be given where the other .* got None"),
        ({"running_var": torch.zeros(8)}, ValueError, "running_mean must be given where the other .* got None"),
        (
            {"running_mean": torch.zeros(8, requires_grad=True), "running_var": torch.zeros(8)},
            ValueError,
            "running_mean must not require grad",
        ),
        ({"residual": torch.zeros(2, 8, 3, 3)}, ValueError, "residual must be channels_last"),
        ({"residual": torch.zeros(2, 8, 1, 1)}, ValueError, r"residual must match x \(float32 \[2, 8, 3, 3\] on cpu\)"),
        ({"residual": torch.zeros(2, 8, 3, 3).double()}, TypeError, "residual must be float32, got float64"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"eps": -1e-5}, ValueError, "eps must be at least 0"),
        ({"activation": "silu"}, ValueError, "activation must be 'relu' or None, got 'silu'"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match="batch_norm_act: " + text):
        kr_fast.batch_norm_act(**arguments(**change))


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck_and_compile(residual):
    *inputs, grad = draw((2, 8, 3, 3), residual)
    for activation in (True, False):
        learning = [None if each is None else each.clone().requires_grad_() for each in inputs]
        torch.library.opcheck(torch.ops.kr_fast.batch_norm_act, (*learning, activation, 1e-5))

    def layer(x, weight, bias, residual, mean, var):
        return kr_fast.batch_norm_act(2 * x, weight, bias, mean, var, residual=residual)

    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        learning = [None if each is None else each.clone().requires_grad_() for each in inputs]
        running = torch.zeros(8), torch.ones(8)
        y = function(*learning, *running)
        found.append((y, *torch.autograd.grad(y, [each for each in learning if each is not None], grad), *running))
    (*eager, eager_var), (*compiled, compiled_var) = found
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    # Equal on torch 2.13; on 2.7 and 2.11 the last bit of the running variance differs.
    torch.testing.assert_close(compiled_var, eager_var, rtol=1e-6, atol=0)
    assert running[0].abs().max() > 0


def test_without_gradients():
    x, weight, bias, residual, _ = draw((2, 8, 3, 3))
    weight.requires_grad_()
    with torch.no_grad():
        assert not ours(x, weight, bias, residual).requires_grad
    with torch.inference_mode():
        running = torch.zeros(8), torch.ones(8)
        assert not ours(x, weight, bias, running_mean=running[0], running_var=running[1]).requires_grad
        assert running[0].abs().max() > 0
