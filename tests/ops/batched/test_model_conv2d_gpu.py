"""model_conv2d on a GPU: float64's numbers, no worse than the library's; bits of every tile shape; large tensors."""

import pytest
import torch
import torch.nn.functional as F
from batched_cases import ACTIVATIONS, CONV_CASES, ConvCase, conv_inputs, exact_conv

from kr_fast.backends import registry
from kr_fast.backends.arguments import View
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d

pytestmark = pytest.mark.gpu
LARGE = [
    ConvCase("a stage of ResNet-20", (32, 32), 16, 16, models=3, images=5, residual=True),
    ConvCase("wide, strided", (16, 16), 64, 128, images=3, stride=(2, 2)),
    ConvCase("wider, of few pixels", (8, 8), 256, 256, residual=True),
]


def on_gpu(case, dtype):
    return [None if each is None else each.cuda() for each in conv_inputs(case, dtype)]


def library(x, weight, bias, residual, case):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = [
            F.conv2d(x[m % len(x)].permute(0, 3, 1, 2), each.permute(0, 3, 1, 2), None, **case.options())
            for m, each in enumerate(weight)
        ]
    y = torch.stack(found).permute(0, 1, 3, 4, 2) + bias[:, None, None, None].to(weight.dtype)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_against_float64_and_the_library(case, dtype):
    inputs = on_gpu(case, dtype)
    want = exact_conv(inputs, case)
    with registry.forced("triton"):
        got = model_conv2d(*inputs, **case.options())
    unit = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=1.01 * unit, atol=2e-5)
    theirs = float((library(*inputs, case).double() - want).abs().max())
    assert float((got.double() - want).abs().max()) <= 1.01 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_tile_shapes_and_company_change_no_bit(case, dtype):
    x, weight, bias, residual = on_gpu(case, dtype)
    with registry.forced("triton"):
        want = model_conv2d(x, weight, bias, residual, **case.options())
        for config in range(1, configs(weight, case.groups, case.shared)):
            assert torch.equal(model_conv2d(x, weight, bias, residual, **case.options(), config=config), want)
        last = None if residual is None else residual[-1:, :1].contiguous()
        alone = model_conv2d(x[-1:, :1].contiguous(), weight[-1:], bias[-1:], last, **case.options())
    assert torch.equal(alone, want[-1:, :1])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation):
    case = ConvCase(channels=8, outputs=8)
    inputs = on_gpu(case, torch.float32)
    with registry.forced("triton"):
        got = model_conv2d(*inputs, **case.options(), activation=activation)
    torch.testing.assert_close(got.double(), exact_conv(inputs, case, activation=activation), rtol=4e-6, atol=2e-6)


def test_views_read_bytes():
    images = torch.randint(0, 256, (1, 40, 32, 32, 3), dtype=torch.uint8, device="cuda")
    rows = torch.arange(32, dtype=torch.int32, device="cuda").flip(0).contiguous()
    view = View(rows, rows, torch.full((3,), 2 / 255, device="cuda"), torch.full((3,), -1.0, device="cuda"))
    weight = torch.randn(5, 16, 3, 3, 3, device="cuda").half()
    with registry.forced("reference"):
        want = model_conv2d(images, weight, view=view, padding=1)
    with registry.forced("triton"):
        got = model_conv2d(images, weight, view=view, padding=1)
    torch.testing.assert_close(got, want, rtol=2**-10, atol=1e-3)


def test_more_than_two_to_the_31_elements():
    """The last model's last image lies beyond 2^31 elements of the input and of the output."""
    models, images, size = 3, 700, 256
    if torch.cuda.mem_get_info()[0] < 4 * models * images * size * size * 16 + 2**30:
        pytest.skip("needs 12 GB")
    x = torch.zeros(models, images, size, size, 16, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    x[-1, -1].normal_()
    weight = torch.randn(models, 16, 3, 3, 16, dtype=torch.float16, device="cuda") / 12
    with registry.forced("triton"):
        y = model_conv2d(x, weight, padding=1)
        want = model_conv2d(x[-1:, -1:].contiguous(), weight[-1:], padding=1)
    assert torch.equal(y[-1:, -1:], want)
    assert not y[0].any()
