"""model_conv2d on a GPU at networks' widths: no worse than the library; bits of every tile shape; large tensors."""

import pytest
import torch
import torch.nn.functional as F
from batched_cases import CONV_CASES, UNITS, ConvCase, conv_inputs, exact_conv

from kr_fast.backends import registry
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d

pytestmark = pytest.mark.gpu
LARGE = [
    ConvCase("a stage of ResNet-20", (32, 32), 16, 16, models=3, images=5, residual=True),
    ConvCase("wide, strided", (16, 16), 64, 128, images=3, stride=(2, 2)),
    ConvCase("wider, of few pixels", (8, 8), 256, 256, residual=True),
]


def library(x, weight, bias, residual, case):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = [
            F.conv2d(x[m % len(x)].permute(0, 3, 1, 2), each.permute(0, 3, 1, 2), None, **case.options())
            for m, each in enumerate(weight)
        ]
    y = torch.stack(y).permute(0, 1, 3, 4, 2) + bias[:, None, None, None].to(weight.dtype)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_against_float64_and_the_library(case, dtype):
    inputs = conv_inputs(case, dtype, "cuda")
    want = exact_conv(inputs, case)
    with registry.forced("triton"):
        got = model_conv2d(*inputs, **case.options())
    torch.testing.assert_close(got.double(), want, rtol=1.01 * UNITS[dtype], atol=2e-5)
    theirs = float((library(*inputs, case).double() - want).abs().max())
    assert float((got.double() - want).abs().max()) <= 1.01 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_tile_shapes_and_company_change_no_bit(case, dtype):
    x, weight, bias, residual = conv_inputs(case, dtype, "cuda")
    with registry.forced("triton"):
        want = model_conv2d(x, weight, bias, residual, **case.options())
        for config in range(1, configs(weight, case.groups, case.shared)):
            assert torch.equal(model_conv2d(x, weight, bias, residual, **case.options(), config=config), want)
        last = None if residual is None else residual[-1:, :1].contiguous()
        alone = model_conv2d(x[-1:, :1].contiguous(), weight[-1:], bias[-1:], last, **case.options())
    assert torch.equal(alone, want[-1:, :1])


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
