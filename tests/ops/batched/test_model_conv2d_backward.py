"""Gradients of model_conv2d on the reference backend: torch's own in float64, gradcheck, neighbours, arguments."""

import pytest
import torch
import torch.nn.functional as F
from batched_cases import CONV_CASES, ConvCase, conv_inputs

from kr_fast.backends import registry
from kr_fast.ops.batched.model_conv2d import model_conv2d

pytestmark = pytest.mark.usefixtures("reference")
OWN = [case for case in CONV_CASES if not case.shared]  # a gradient is wanted where each model has its own batch


def gradients(case, x, weight, bias, upstream):
    own = [each.clone().requires_grad_() for each in (x, weight, bias)]
    return torch.autograd.grad(model_conv2d(*own, **case.options()), own, upstream)


def upstream_of(case, dtype):
    shape = (case.models, case.images, *case.output_size(), case.outputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_gradients_are_torchs(case):
    inputs, upstream = conv_inputs(case, torch.float64)[:3], upstream_of(case, torch.float64)
    found = gradients(case, *inputs, upstream)
    for m in range(case.models):
        x, weight, bias = (each[m].clone().requires_grad_() for each in inputs)
        y = F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), bias, *list(case.options().values()))
        want = torch.autograd.grad(y, (x, weight, bias), upstream[m].movedim(-1, 1))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a[m], b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [ConvCase(channels=2, outputs=2, stride=(2, 1), size=(4, 3))], ids=str)
def test_gradcheck(case):
    inputs = [
        each[:, :1].contiguous() if i == 0 else each for i, each in enumerate(conv_inputs(case, torch.float64)[:3])
    ]
    inputs = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(lambda *a: model_conv2d(*a, **case.options()), inputs)


def test_a_models_bits_are_its_own():
    case = ConvCase(models=5, channels=8, outputs=6, stride=(2, 2), size=(9, 7), images=3)
    x, weight, bias, _ = conv_inputs(case, torch.float32)
    upstream = upstream_of(case, torch.float32)
    whole = gradients(case, x, weight, bias, upstream)
    for rows in (slice(2, 3), torch.tensor([4, 1])):
        alone = gradients(case, x[rows], weight[rows], bias[rows], upstream[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, whole, strict=True))


def test_strided_1x1_of_few_channels():
    """Where oneDNN takes a wrong weight gradient in channels_last (its issue 6035)."""
    case = ConvCase(channels=4, outputs=8, kernel=(1, 1), padding=(0, 0), stride=(2, 2), size=(8, 8), images=8)
    x, weight, bias, _ = conv_inputs(case, torch.float32)
    upstream = upstream_of(case, torch.float32)
    want = gradients(case, x.double(), weight.double(), bias.double(), upstream.double())
    for a, b in zip(gradients(case, x, weight, bias, upstream), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_float32_weights_of_half_precision_products():
    """The weight is rounded for the products; its gradient is not."""
    case = ConvCase(channels=8, outputs=6)
    x, weight, bias, _ = conv_inputs(case, torch.float32)
    x, upstream = x.bfloat16(), upstream_of(case, torch.bfloat16)
    found = gradients(case, x, weight, bias, upstream)
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32, torch.float32]
    want = gradients(case, x.double(), weight.bfloat16().double(), bias.double(), upstream.double())
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        rounded = model_conv2d(x, weight.bfloat16(), bias, **case.options())
    assert torch.equal(model_conv2d(x, weight.clone().requires_grad_(), bias, **case.options()), rounded)


def test_only_what_is_wanted_is_taken():
    case = ConvCase(channels=4, outputs=4)
    x, weight, bias, _ = conv_inputs(case, torch.float64)
    whole = gradients(case, x, weight, bias, upstream_of(case, torch.float64))
    for k in range(3):
        own = [each.clone().requires_grad_(i == k) for i, each in enumerate((x, weight, bias))]
        found = torch.autograd.grad(model_conv2d(*own, **case.options()), own[k], upstream_of(case, torch.float64))
        assert torch.equal(found[0], whole[k])


def test_op_passes_torchs_checks():
    case = ConvCase(channels=8, outputs=6, stride=(2, 1))
    x, weight, _, _ = conv_inputs(case, torch.float32)
    options = list(case.options().values())
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = (upstream_of(case, torch.float32), x, weight, *options, wanted)
        torch.library.opcheck(torch.ops.kr_fast.model_conv2d_backward, arguments)


def test_arguments():
    x, weight, bias, residual = conv_inputs(ConvCase(residual=True), torch.float64)
    weight.requires_grad_()
    for options, words in [
        ({"activation": "relu"}, "activation must be None where a gradient is wanted"),
        ({"residual": residual}, "residual must be None where a gradient is wanted"),
    ]:
        with pytest.raises(ValueError, match=f"model_conv2d: {words}"):
            model_conv2d(x, weight, bias, padding=1, **options)
    with pytest.raises(ValueError, match="x must hold 2 models where a gradient is wanted"):
        model_conv2d(x[:1].contiguous(), weight, bias, padding=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "outputs", "stride"), [(3, 16, 1), (16, 16, 1), (32, 64, 2), (64, 64, 1)])
def test_on_a_gpu(dtype, channels, outputs, stride):
    """The kernels against float64, and a model alone has the same bits. Layers of ResNet-20."""
    case = ConvCase("", (32, 32), channels, outputs, models=3, images=32, stride=(stride, stride))
    inputs, upstream = conv_inputs(case, dtype)[:3], upstream_of(case, dtype)
    want = gradients(case, *(each.double() for each in inputs), upstream.double())
    with registry.forced("triton"):
        got = gradients(case, *(each.cuda() for each in inputs), upstream.cuda())
        alone = gradients(case, *(each[1:2].cuda() for each in inputs), upstream[1:2].cuda())
    for a, b in zip(got, want, strict=True):
        unit = 2**-8 if a.dtype == torch.bfloat16 else 2**-18
        torch.testing.assert_close(a.double().cpu(), b, rtol=1.01 * unit, atol=float(b.std()) * max(unit / 10, 1e-5))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, got, strict=True))
