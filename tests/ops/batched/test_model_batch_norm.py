"""model_batch_norm on the reference backend: torch's own BatchNorm in float64, gradients, neighbours, arguments."""

import pytest
import torch
import torch.nn.functional as F
from batched_cases import batch_norm_inputs as draw

from kr_fast.backends import registry
from kr_fast.ops.batched.model_batch_norm import model_batch_norm, update_running

pytestmark = pytest.mark.usefixtures("reference")


def torchs(x, weight, bias, residual, relu, eps=1e-5):
    """torch's BatchNorm a model, in float64."""
    double = [None if each is None else each.double() for each in (x, weight, bias, residual)]
    found = []
    for m in range(len(x)):
        own = [None if each is None else each[m] for each in double]
        y = F.batch_norm(own[0].movedim(-1, 1), None, None, own[1], own[2], True, 0.0, eps).movedim(1, -1)
        y = y if own[3] is None else y + own[3]
        found.append(y.relu() if relu else y)
    return torch.stack(found)


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


def test_a_models_bits_are_its_own():
    inputs = [each.float() for each in draw((5, 3, 7, 7, 6))]

    def run(rows):
        own = [each[rows].clone().requires_grad_() for each in inputs]
        y = model_batch_norm(*own, relu=True)[0]
        return [y, *torch.autograd.grad(y.square().sum(), own)]

    whole = run(slice(None))
    for rows in (slice(2, 3), torch.tensor([4, 1])):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), whole, strict=True))


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """Values and gradients of 3 models on the kernels against float64, and a model alone has the same bits."""
    shape = (3, 32, 16, 16, 32)
    inputs = draw(shape, dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(inputs, upstream, how, **options):
        with registry.forced(how):
            own = [each.clone().requires_grad_() for each in inputs]
            y, mean, var = model_batch_norm(*own, relu=True, **options)
            return [y, mean, var, *torch.autograd.grad(y, own, upstream)]

    want = run([each.double() for each in inputs], upstream.double(), "reference")
    got = run([each.cuda() for each in inputs], upstream.cuda(), "triton")
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
    for a, b in zip(got, want, strict=True):
        a = a.double().cpu()
        # A number so near the ReLU's bend that rounding decides has no one gradient: almost all must agree.
        far = (a - b).abs() > 4 * unit * (b.abs() + b.abs().mean())
        assert far.double().mean() < 1e-3
    alone = run([each[1:2].cuda() for each in inputs], upstream[1:2].cuda(), "triton")
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, got, strict=True))
