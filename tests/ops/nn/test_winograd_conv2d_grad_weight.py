"""winograd_conv2d_grad_weight: values against float64, error beside torch's, bits, special values, arguments."""

import pytest
import torch
from backends import on_backends
from torch.nn.grad import conv2d_weight

from kr_fast.ops.nn.winograd_conv2d_grad_weight import winograd_conv2d_grad_weight

OP = "winograd_conv2d_grad_weight"
LAST = torch.channels_last
# N, inputs, outputs, H, W by regime: one pixel; one whole tile; sides of 4 k + 1, 2, 3; channels of less than a vector,
# of one group of 16, of a part of a second and of three (the last alone); more than a part of 64 of either; as many
# tiles as a block has (42), one more, and two and four chunks (128 and 256 tiles).
CASES = [
    (1, 1, 1, 1, 1),
    (1, 3, 16, 4, 4),
    (2, 16, 5, 5, 6),
    (1, 17, 48, 7, 9),
    (2, 70, 33, 8, 8),
    (1, 8, 130, 12, 3),
    (42, 16, 16, 3, 2),
    (43, 5, 16, 3, 2),
    (32, 16, 20, 6, 7),
    (64, 20, 16, 8, 8),
]


def draw(case, seed=0):
    n, inputs, outputs, height, width = case
    generator = torch.Generator().manual_seed(sum(case) + seed)
    shapes = (n, inputs, height, width), (n, outputs, height, width)
    return [torch.randn(shape, generator=generator).contiguous(memory_format=LAST) for shape in shapes]


def exact(x, grad_output):
    shape = grad_output.shape[1], x.shape[1], 3, 3
    return conv2d_weight(x.double(), shape, grad_output.double(), padding=1), grad_output.double().sum((0, 2, 3))


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    x, grad_output = draw(case)
    before = x.clone(), grad_output.clone()
    weight, bias = exact(x, grad_output)
    size = (case[0] * case[3] * case[4]) ** 0.5  # of sums over so many pixels
    for channels_last in (False, True):
        found = winograd_conv2d_grad_weight(x, grad_output, bias=True, channels_last=channels_last)
        torch.testing.assert_close(found[0].double(), weight, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(found[1].double(), bias, rtol=0, atol=1e-6 * size)
        assert found[0].is_contiguous(memory_format=LAST if channels_last else torch.contiguous_format)
        assert torch.equal(winograd_conv2d_grad_weight(x, grad_output, channels_last=channels_last), found[0])
    assert torch.equal(x, before[0])
    assert torch.equal(grad_output, before[1])


# Stages of a ResNet and of a UNet. Torch's sums over many pixels lose more than the transforms do.
@on_backends(OP, "cpu")
@pytest.mark.parametrize("case", [(16, 16, 16, 28, 28), (32, 32, 32, 14, 14), (32, 64, 64, 8, 8)], ids=str)
def test_error_beside_the_definition(backend, case):
    """Root mean square error at most three times that of torch's own gradient."""
    if backend.isa == "scalar":
        pytest.skip("the sums are those of the other instruction sets, and slow")
    x, grad_output = draw(case)
    x = x.relu()
    weight, bias = exact(x, grad_output)
    arguments = [case[2]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True]
    torchs = torch.ops.aten.convolution_backward(grad_output, x, weight.float(), *arguments)[1:]
    ours = winograd_conv2d_grad_weight(x, grad_output, bias=True)
    for want, our, their in zip((weight, bias), ours, torchs, strict=True):
        assert (our - want).square().mean() <= 9 * (their - want).square().mean()


@on_backends(OP, "cpu")
@pytest.mark.parametrize("case", CASES[-4:], ids=str)
def test_bits_do_not_depend_on_threads(backend, case):
    tensors, before = draw(case), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = winograd_conv2d_grad_weight(*tensors, bias=True)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, winograd_conv2d_grad_weight(*tensors, bias=True), want))
    finally:
        torch.set_num_threads(before)


@on_backends(OP)
def test_nan_and_inf_reach_the_filters_that_read_them(backend):
    x, grad_output = draw((2, 20, 18, 9, 9))
    want = winograd_conv2d_grad_weight(x, grad_output, bias=True)
    for value in (float("nan"), float("inf")):
        bad_x, bad_grad = x.clone(), grad_output.clone()
        bad_x[1, 3, 4, 4], bad_grad[0, 17, 8, 8] = value, value
        weight, bias = winograd_conv2d_grad_weight(bad_x, bad_grad, bias=True)
        touched = torch.zeros(18, 20, dtype=torch.bool)
        touched[17], touched[:, 3] = True, True
        assert not weight[touched][..., 1, 1].isfinite().any()
        assert torch.equal(weight[~touched], want[0][~touched])
        assert not bias[17].isfinite()
        assert torch.equal(bias[:17], want[1][:17])


@on_backends(OP)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=str)
def test_empty(backend, shape):
    n, height, width = shape
    found = winograd_conv2d_grad_weight(*draw((n, 3, 6, height, width)), bias=True)
    assert torch.equal(found[0], torch.zeros(6, 3, 3, 3))
    assert torch.equal(found[1], torch.zeros(6))


def test_opcheck_and_compile():
    x, grad_output = draw((2, 16, 20, 6, 6))
    for bias, channels_last in ((True, False), (False, True)):
        torch.library.opcheck(torch.ops.kr_fast.winograd_conv2d_grad_weight, (x, grad_output, bias, channels_last))
    compiled = torch.compile(winograd_conv2d_grad_weight, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, grad_output), winograd_conv2d_grad_weight(x, grad_output))


X = torch.zeros(1, 16, 4, 4).contiguous(memory_format=LAST)
BAD = {
    "x must be float32 or float64": {"x": X.bfloat16()},
    "x must be channels_last": {"x": torch.zeros(1, 16, 4, 4)},
    "x must not require grad": {"x": X.clone().requires_grad_()},
    "grad_output must be float32": {"grad_output": X.double()},
    "grad_output must be channels_last": {"grad_output": torch.zeros(1, 16, 4, 4)},
    "grad_output must be \\[1, O, 4, 4\\]": {"grad_output": X[:, :, :2].contiguous(memory_format=LAST)},
    "bias must be a bool": {"bias": torch.zeros(16)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=f"{OP}: {message}.*, got"):
        winograd_conv2d_grad_weight(**{"x": X, "grad_output": X, **BAD[message]})
