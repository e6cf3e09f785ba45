"""model_batch_norm: the reference is torch's own BatchNorm in float64, every backend is the reference; arguments."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from batched_cases import batch_norm_inputs as draw
from batched_cases import on

from kr_fast.backends import registry
from kr_fast.ops.batched.model_batch_norm import model_batch_norm, update_running

UNITS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def torchs(x, weight, bias, residual, relu, eps=1e-5):
    """torch's BatchNorm a model, in float64."""
    double = [None if each is None else each.double() for each in (x, weight, bias, residual)]
    result = []
    for m in range(len(x)):
        own = [None if each is None else each[m] for each in double]
        y = F.batch_norm(own[0].movedim(-1, 1), None, None, own[1], own[2], True, 0.0, eps).movedim(1, -1)
        y = y if own[3] is None else y + own[3]
        result.append(y.relu() if relu else y)
    return torch.stack(result)


CASES = [(relu, residual, affine) for relu in (False, True) for residual in (False, True) for affine in (False, True)]


@pytest.mark.parametrize(("relu", "residual", "affine"), CASES)
def test_values_are_torchs(relu, residual, affine):
    inputs = draw(residual=residual, affine=affine)
    y, mean, var = model_batch_norm(*inputs, relu=relu)
    torch.testing.assert_close(y, torchs(*inputs, relu), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, inputs[0].mean((1, 2, 3)))
    torch.testing.assert_close(var, inputs[0].var((1, 2, 3), correction=0))
    assert not mean.requires_grad


@pytest.mark.parametrize(("relu", "residual", "affine"), CASES)
def test_gradients_are_torchs(relu, residual, affine):
    inputs = [each if each is None else each.requires_grad_() for each in draw(residual=residual, affine=affine)]
    needed = [each for each in inputs if each is not None]
    weight = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    want = torch.autograd.grad((torchs(*inputs, relu) * weight).sum(), needed)
    got = torch.autograd.grad((model_batch_norm(*inputs, relu=relu)[0] * weight).sum(), needed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs = [each.requires_grad_() for each in draw((2, 2, 2, 3, 2))]
    assert torch.autograd.gradcheck(lambda *a: model_batch_norm(*a, relu=False)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: model_batch_norm(*a, relu=True)[0], inputs)


def test_running_statistics_move_as_torchs_do():
    x = draw((2, 3, 4, 4, 5))[0].float()
    norms = [torch.nn.BatchNorm2d(5, momentum=0.3) for _ in x]
    running = [torch.stack([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")]
    for norm, own in zip(norms, x, strict=True):
        norm(own.movedim(-1, 1))
    _, mean, var = model_batch_norm(x)
    rows = x[0].numel() // 5
    update_running(running[0], mean, 0.3)
    update_running(running[1], var * (rows / (rows - 1)), torch.tensor([[0.3], [0.0]]))
    torch.testing.assert_close(running[0], torch.stack([norm.running_mean for norm in norms]))
    torch.testing.assert_close(running[1][0], norms[0].running_var)
    assert torch.equal(running[1][1], torch.ones(5))  # rate 0
    update_running(running[1], torch.full_like(running[1], torch.nan), torch.zeros(2, 1))
    assert torch.isfinite(running[1]).all()


def run(inputs, upstream, relu):
    """(y, mean, var) and the gradients."""
    own = [None if each is None else each.clone().requires_grad_() for each in inputs]
    y, mean, var = model_batch_norm(*own, relu=relu)
    needed = [each for each in own if each is not None]
    return [y, mean, var], list(torch.autograd.grad(y, needed, upstream))


def clear_of_the_bend(inputs):
    """Inputs whose sum before the ReLU is nowhere near 0, where a rounding decides the gradient."""
    with registry.forced("reference"):
        y = model_batch_norm(*(None if each is None else each.double() for each in inputs))[0]
    inputs[3] = (inputs[3].double() + 0.2 * y.sign()).to(inputs[3].dtype)
    return inputs


# N, H, W, C by the regime of the GPU's kernels.
SHAPES = {
    "fewer rows than a tile": (2, 2, 2, 3),
    "channels that fill no power of two": (2, 3, 5, 6),
    "more channels than a program takes": (1, 3, 4, 80),
    "several tiles with a tail": (3, 9, 7, 33),
    "more rows than 64 tiles, so that a chunk is longer than a tile": (3, 25, 28, 64),
}


@on_backends("model_batch_norm")
@pytest.mark.parametrize("regime", SHAPES)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "affine", "residual"])
def test_kernels(backend, regime, dtype, kind):
    """Values and gradients against float64, and those of a model alone bit by bit."""
    shape = SHAPES[regime]
    if shape[1] == 25 and (dtype, kind) not in ((torch.float32, "plain"), (torch.bfloat16, "residual")):
        pytest.skip("the longest shape once in each precision")
    models, relu = 1 if shape[1] == 25 else 2, kind == "residual"
    inputs = list(draw((models, *shape), dtype, residual=relu, affine=kind != "plain"))
    inputs = clear_of_the_bend(inputs) if relu else inputs
    upstream = torch.randn((models, *shape), generator=torch.Generator().manual_seed(3)).to(dtype)
    with registry.forced("reference"):
        double = [None if each is None else each.double() for each in inputs]
        want_values, want_gradients = run(double, upstream.double(), relu)
    *inputs, upstream = on(backend.device, *inputs, upstream)
    values, gradients = run(inputs, upstream, relu)
    rows = inputs[0][0].numel() // shape[-1]
    for a, b in zip(values, want_values, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1.01 * UNITS[dtype], atol=4e-6)
    for a, b in zip(gradients, want_gradients, strict=True):
        # float32 sums of ``rows`` numbers of order 1 in weight and bias; the residual's gradient is rounded once.
        tolerance = max(1e-6 * (rows**0.5 if a.shape[1:] == (shape[-1],) else 8), UNITS[dtype] * 1e-2)
        torch.testing.assert_close(a.double().cpu(), b, rtol=1.01 * UNITS[dtype], atol=tolerance)
    alone = run([None if each is None else each[-1:] for each in inputs], upstream[-1:], relu)
    assert all(torch.equal(a, b[-1:]) for a, b in zip(alone[0] + alone[1], values + gradients, strict=True))


@on_backends("model_batch_norm")
def test_far_from_0(backend):
    """A mean of 1000 deviations costs no digits of the variance."""
    x = on(backend.device, draw((3, 2, 5, 7, 6), torch.float32)[0] + 1000)[0]
    want = x.double().var((1, 2, 3), correction=0)
    torch.testing.assert_close(model_batch_norm(x)[2].double(), want, rtol=1e-5, atol=0)


def test_op_passes_torchs_checks():
    x, weight, bias, residual = draw(dtype=torch.float32)
    torch.library.opcheck(torch.ops.kr_fast.model_batch_norm, (x, weight, bias, residual, True, 1e-5))
    y, mean, var = model_batch_norm(x, weight, bias, residual, relu=True)
    arguments = (torch.ones_like(x), x, y, weight, mean, var, True, True, 1e-5)
    torch.library.opcheck(torch.ops.kr_fast.model_batch_norm_backward, arguments)


def test_arguments():
    x, weight, bias, residual = draw()
    for arguments, words in [
        ((x.float().half().int(),), "x must be"),
        ((x[0],), "x must have 5 dimensions"),
        ((x.transpose(1, 2),), "x must be contiguous"),
        ((x[:, :1, :1, :1].contiguous(),), "x must hold at least 2 numbers of each channel"),
        ((x[:, :0].contiguous(),), "x must hold at least 2 numbers"),
        ((x, weight.float()), "weight must be float64"),
        ((x, weight[:2].contiguous()), r"weight must be contiguous \[3, 6\]"),
        ((x, weight, bias[:, :3].contiguous()), r"bias must be contiguous \[3, 6\]"),
        ((x, weight, bias, residual[:2].contiguous()), "residual must be contiguous"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"model_batch_norm: {words}"):
            model_batch_norm(*arguments)
    with pytest.raises(ValueError, match="eps must be above 0, got 0"):
        model_batch_norm(x, eps=0)


def test_relu_lets_nan_through_and_has_no_slope_at_0():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1, 1)
    y = model_batch_norm(x.clone().requires_grad_(), residual=-torch.ones_like(x) / (1 + 1e-5) ** 0.5, relu=True)[0]
    assert y.abs().max() == 0  # exactly where ReLU bends
    assert torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable)[0].abs().max() == 0
    assert model_batch_norm(x * torch.nan, relu=True)[0].isnan().all()
