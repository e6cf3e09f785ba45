"""Gradients of model_conv2d: the reference's are torch's own in float64, those of every backend the reference's."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from batched_cases import CONV_CASES, ConvCase, conv_inputs, on

from kr_fast.backends import registry
from kr_fast.ops.batched.model_conv2d import model_conv2d

OWN = [case for case in CONV_CASES if not case.shared]  # a gradient is requested where each model has its own batch
STRIDED = [
    ConvCase("six classes of pixels, of unequal size", (7, 8), 5, 4, stride=(3, 2)),
    ConvCase("stride and dilation", (8, 9), 5, 4, stride=(2, 2), dilation=(2, 3), padding=(2, 3)),
    ConvCase("three classes of four meet no tap", (5, 5), 5, 20, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    ConvCase("more than 2 * 2048 pixels a model: parts, tail", (29, 31), 1, 2, models=1, images=5),
]
DENSE = [case for case in OWN if case.groups == 1] + STRIDED
LAYERS = [  # of ResNet-20
    ConvCase("3 to 16", (32, 32), 3, 16, models=3, images=32),
    ConvCase("16 to 16", (32, 32), 16, 16, models=3, images=32),
    ConvCase("32 to 64, strided", (32, 32), 32, 64, models=3, images=32, stride=(2, 2)),
    ConvCase("64 to 64", (32, 32), 64, 64, models=3, images=32),
]
UNITS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def gradients(case, x, weight, bias, upstream):
    own = [each.clone().requires_grad_() for each in (x, weight, bias)]
    return torch.autograd.grad(model_conv2d(*own, **case.options()), own, upstream)


def upstream_of(case, dtype):
    shape = (case.models, case.images, *case.output_size(), case.outputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def check(case, dtype, backend):
    """Gradients against float64's, and those of one model alone bit by bit."""
    inputs, upstream = conv_inputs(case, dtype)[:3], upstream_of(case, dtype)
    with registry.forced("reference"):
        want = gradients(case, *(each.double() for each in inputs), upstream.double())
    *inputs, upstream = on(backend.device, *inputs, upstream)
    got = gradients(case, *inputs, upstream)
    rows = upstream[0].numel() // case.outputs
    for name, a, b in zip(("x", "weight", "bias"), got, want, strict=True):
        # One unit of the dtype, and float32's sums: of outputs times places, or of a model's pixels, one after the
        # other on the reference.
        tolerance = 1e-5 if name == "x" else 1e-6 * max(rows, 30) ** 0.5 * (4 if backend.name == "reference" else 1)
        torch.testing.assert_close(a.double().cpu(), b, rtol=1.01 * UNITS[a.dtype], atol=tolerance)
    last = slice(case.models - 1, case.models)
    alone = gradients(case, *(each[last] for each in inputs), upstream[last])
    assert all(torch.equal(a, b[last]) for a, b in zip(alone, got, strict=True))


@on_backends("model_conv2d_backward")
@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_values(backend, case, dtype):
    if case is STRIDED[-1] and dtype != torch.bfloat16:
        pytest.skip("pixels are dealt out to parts alike in every dtype")
    check(case, dtype, backend)


@on_backends("model_conv2d_backward", "triton-gpu")
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_networks(backend, case, dtype):
    check(case, dtype, backend)


@on_backends("model_conv2d_backward", "triton")
def test_groups_are_refused(backend):
    x, weight = on(backend.device, torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 4, 3, 3, 1))
    with pytest.raises(RuntimeError, match="groups must be 1"):
        model_conv2d(x, weight.requires_grad_(), padding=1, groups=4).sum().backward()


@pytest.mark.parametrize("case", OWN, ids=str)
def test_gradients_are_torchs(case):
    inputs, upstream = conv_inputs(case, torch.float64)[:3], upstream_of(case, torch.float64)
    got = gradients(case, *inputs, upstream)
    for m in range(case.models):
        x, weight, bias = (each[m].clone().requires_grad_() for each in inputs)
        y = F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), bias, *list(case.options().values()))
        want = torch.autograd.grad(y, (x, weight, bias), upstream[m].movedim(-1, 1))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[m], b, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    case = ConvCase(channels=2, outputs=2, stride=(2, 1), size=(4, 3), images=1)
    inputs = [each.requires_grad_() for each in conv_inputs(case, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: model_conv2d(*a, **case.options()), inputs)


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
    got = gradients(case, x, weight, bias, upstream)
    assert [each.dtype for each in got] == [torch.bfloat16, torch.float32, torch.float32]
    want = gradients(case, x.double(), weight.bfloat16().double(), bias.double(), upstream.double())
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        rounded = model_conv2d(x, weight.bfloat16(), bias, **case.options())
    assert torch.equal(model_conv2d(x, weight.clone().requires_grad_(), bias, **case.options()), rounded)


def test_only_what_is_needed_is_computed():
    case = ConvCase(channels=4, outputs=4)
    x, weight, bias, _ = conv_inputs(case, torch.float64)
    whole = gradients(case, x, weight, bias, upstream_of(case, torch.float64))
    for k in range(3):
        own = [each.clone().requires_grad_(i == k) for i, each in enumerate((x, weight, bias))]
        got = torch.autograd.grad(model_conv2d(*own, **case.options()), own[k], upstream_of(case, torch.float64))
        assert torch.equal(got[0], whole[k])


def test_op_passes_torchs_checks():
    case = ConvCase(channels=8, outputs=6, stride=(2, 1))
    x, weight, _, _ = conv_inputs(case, torch.float32)
    options = list(case.options().values())
    for needed in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = (upstream_of(case, torch.float32), x, weight, *options, needed)
        torch.library.opcheck(torch.ops.kr_fast.model_conv2d_backward, arguments)


def test_arguments():
    x, weight, bias, residual = conv_inputs(ConvCase(residual=True), torch.float64)
    weight.requires_grad_()
    for options, words in [
        ({"activation": "relu"}, "activation must be None where a gradient is requested"),
        ({"residual": residual}, "residual must be None where a gradient is requested"),
    ]:
        with pytest.raises(ValueError, match=f"model_conv2d: {words}"):
            model_conv2d(x, weight, bias, padding=1, **options)
    with pytest.raises(ValueError, match="x must hold 2 models where a gradient is requested"):
        model_conv2d(x[:1].contiguous(), weight, bias, padding=1)
