"""direct_conv2d: values and gradients against float64, error, bits, layouts, compile, refusals."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from torch import nn

import kr_fast
from kr_fast.backends.cpu.nn import direct_trains_faster

OP = "direct_conv2d"
LAST = torch.channels_last


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1

    def draw(self, dtype=torch.float32):
        """x, weight, bias and the upstream gradient, of variance near 1 wherever they meet."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        inputs = self.shape[1]

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        x = normal(*self.shape).contiguous(memory_format=LAST)
        weight = normal(self.outputs, inputs, *self.kernel) / (inputs * self.kernel[0] * self.kernel[1]) ** 0.5
        tensors = [x, weight.contiguous(memory_format=LAST), normal(self.outputs)]
        return tensors, normal(*self.definition(*tensors).shape).contiguous(memory_format=LAST)

    def ours(self, x, weight, bias):
        return kr_fast.direct_conv2d(x, weight, bias=bias, stride=self.stride, padding=self.padding)

    def definition(self, x, weight, bias):
        # In NCHW: oneDNN's weight gradient of strided 1x1 convolutions is wrong in channels_last.
        return F.conv2d(x.contiguous(), weight.contiguous(), bias, self.stride, self.padding)


# A tile has up to 14 or 28 pixels and blocks of 16 or 32 outputs.
CASES = [
    Case((1, 1, 1, 1), 1, (1, 1), padding=0),  # one number
    Case((2, 1, 6, 7), 33),  # one input: sums of three lines at once; two blocks of outputs, the second with one
    Case((2, 3, 9, 5), 16, stride=2),  # three inputs likewise, of lines that are two apart
    Case((2, 5, 6, 7), 20, (5, 4), (2, 3), (3, 1)),  # few inputs line by line; sides that differ in everything
    Case((2, 7, 9, 9), 12, (2, 2), 3, 0),  # pixels that no tap reads
    Case((45, 20, 4, 4), 40, stride=2),  # residues with one and two taps; several tiles, the last one part full
    Case((9, 64, 2, 2), 64),  # each pixel has taps of its own
    Case((3, 16, 8, 8), 32, (1, 1), 2, 0),  # residues without a tap
    Case((2, 4, 3, 3), 8, (3, 3), 2, 4),  # taps that are always outside
    Case((3, 32, 7, 8), 1),  # one output: sums over vectors of inputs; with few inputs' gradient of the filters
    Case((2, 19, 6, 6), 3, (3, 3), 2),  # few outputs and a stride
    Case((9, 4, 16, 16), 24),  # chunks of the gradient of the filters
]


def gradients(function, tensors, upstream):
    leaves = [each.detach().requires_grad_() for each in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def exact(case, tensors, upstream):
    return gradients(case.definition, [each.double() for each in tensors], upstream.double())


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    tensors, upstream = case.draw()
    found = gradients(case.ours, tensors, upstream)
    pixels = upstream.numel() / upstream.shape[1]
    # Result and gradient by x have about variance 1 and O / I, the others are sums over all pixels.
    atols = 4e-6, 4e-6 * max(1, case.outputs / case.shape[1]) ** 0.5, 1e-5 * pixels**0.5, 1e-5 * pixels**0.5
    for got, want, atol in zip(found, exact(case, tensors, upstream), atols, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    assert found[0].is_contiguous(memory_format=LAST)


# The stem, a strided convolution and the last stage of a small ResNet at 8 px; the first and last of a UNet.
STEPS = [
    Case((64, 1, 8, 8), 16),
    Case((64, 16, 8, 8), 32, stride=2),
    Case((64, 64, 2, 2), 64),
    Case((4, 3, 28, 28), 32),
    Case((4, 32, 28, 28), 1),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_error_beside_the_definition(case):
    """Root mean square error of the result and of each gradient at most three times that of torch's float32."""
    tensors, upstream = case.draw()
    results = (gradients(each, tensors, upstream) for each in (case.ours, case.definition))
    for want, our, their in zip(exact(case, tensors, upstream), *results, strict=True):
        assert (our - want).square().mean() <= 9 * (their - want).square().mean()


@on_backends(OP, "cpu")
@pytest.mark.parametrize("case", [CASES[5], CASES[1], CASES[9], CASES[11]], ids=str)
def test_bits_do_not_depend_on_threads_or_layouts(backend, case):
    tensors, upstream = case.draw()
    want, before = gradients(case.ours, tensors, upstream), torch.get_num_threads()
    x, weight, bias = tensors
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, gradients(case.ours, tensors, upstream), want))
    finally:
        torch.set_num_threads(before)
    for other in (weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert all(map(torch.equal, gradients(case.ours, [x, other, bias], upstream), want))
    assert all(map(torch.equal, gradients(case.ours, tensors, upstream.contiguous()), want))


@on_backends(OP, "cpu")
def test_bits_do_not_depend_on_neighbours(backend):
    for case in (CASES[5], CASES[9]):
        (x, *others), upstream = case.draw()
        y, grad_x, *_ = gradients(case.ours, [x, *others], upstream)
        found = gradients(case.ours, [x[1:2], *others], upstream[1:2])
        assert torch.equal(found[0], y[1:2])
        assert torch.equal(found[1], grad_x[1:2])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_that_are_needed(needed):
    case = CASES[5]
    tensors, upstream = case.draw()
    want = gradients(case.ours, tensors, upstream)[1:]
    leaves = [each.requires_grad_(which in needed) for which, each in enumerate(tensors)]
    case.ours(*leaves).backward(upstream)
    for which, (leaf, expected) in enumerate(zip(leaves, want, strict=True)):
        if which in needed:
            assert torch.equal(leaf.grad, expected)
        else:
            assert leaf.grad is None


def test_the_gradient_has_the_layout_of_the_weight():
    """So that autograd keeps it as it is."""
    x, weight, _ = CASES[5].draw()[0]
    for layout in (torch.contiguous_format, LAST):
        leaf = weight.detach().contiguous(memory_format=layout).requires_grad_()
        kr_fast.direct_conv2d(x, leaf).sum().backward()
        assert leaf.grad.stride() == leaf.stride()


@on_backends(OP)
def test_empty_batch(backend):
    case = CASES[5]
    (x, *others), upstream = case.draw()
    y, grad_x, *zeros = gradients(case.ours, [x[:0], *others], upstream[:0])
    assert y.shape == (0, 40, 2, 2)
    assert grad_x.shape == (0, 20, 4, 4)
    assert all(torch.equal(each, torch.zeros_like(other)) for each, other in zip(zeros, others, strict=True))


def test_integers_of_numpy():
    assert kr_fast.direct_conv2d(X, WEIGHT, stride=np.int64(2), padding=np.int32(1)).shape == (1, 20, 2, 2)


def test_opcheck():
    tensors, upstream = CASES[5].draw()
    x, weight, bias = (each.requires_grad_() for each in tensors)
    torch.library.opcheck(torch.ops.kr_fast.direct_conv2d, (x, weight, bias, (2, 2), (1, 1)))
    backward = (upstream, x.detach(), weight.detach(), (2, 2), (1, 1), True, True, False)
    torch.library.opcheck(torch.ops.kr_fast.direct_conv2d_backward, backward)


def test_compile():
    case = CASES[5]
    tensors, upstream = case.draw()
    compiled = torch.compile(lambda *leaves: case.ours(*leaves).relu(), fullgraph=True, backend="aot_eager")
    want = gradients(lambda *leaves: case.ours(*leaves).relu(), tensors, upstream)
    assert all(map(torch.equal, gradients(compiled, tensors, upstream), want))


X, WEIGHT = torch.zeros(1, 16, 4, 4).contiguous(memory_format=LAST), torch.zeros(20, 16, 3, 3)
BAD = {
    "x must be float32 or float64": {"x": X.bfloat16()},
    "x must be channels_last": {"x": torch.zeros(1, 16, 4, 4)},
    "weight must be float32": {"weight": WEIGHT.half()},
    "weight must have 4 dimensions": {"weight": WEIGHT[0]},
    "weight must be \\[O, 16, K, L\\]": {"weight": torch.zeros(20, 8, 3, 3)},
    "weight must be \\[O, 16, K, L\\] on cpu with at least 1 and at most": {"weight": torch.zeros(20, 16, 5, 3)},
    "bias must be contiguous": {"bias": torch.zeros(19)},
    "stride must be in \\[1": {"stride": 0},
    "stride must be an int or a pair": {"stride": (1, 1, 1)},
    "padding must be in \\[0": {"padding": (0, -1)},
    "padding must be an int": {"padding": (0, 0.5)},
    "padding must be an int or a pair": {"padding": "same"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=f"{OP}: {message}.*, got"):
        kr_fast.direct_conv2d(**{"x": X, "weight": WEIGHT, **BAD[message]})


@pytest.mark.parametrize(
    ("conv", "shape", "gains"),
    [
        (nn.Conv2d(1, 16, 3, padding=1), (64, 1, 28, 28), True),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 64, 2, 2), True),
        (nn.Conv2d(16, 32, 1), (64, 16, 14, 14), True),
        (nn.Conv2d(128, 64, 1, 2), (64, 128, 14, 14), True),
        (nn.Conv2d(512, 2048, 1), (64, 512, 4, 4), False),  # a large product of matrices
        (nn.Conv2d(16, 32, 3, 2, 1), (4, 16, 28, 28), False),  # images for a few threads only
        (nn.Conv2d(3, 16, 7, 2, 3), (64, 3, 28, 28), False),  # not measured
        (nn.Conv2d(16, 32, 3, padding="same"), (64, 16, 28, 28), False),  # what the op does not compute
        (nn.Conv2d(16, 32, 3, padding_mode="reflect", padding=1), (64, 16, 28, 28), False),
        (nn.Conv2d(16, 32, 3, dilation=2), (64, 16, 28, 28), False),
        (nn.Conv2d(16, 32, 3, groups=2), (64, 16, 28, 28), False),
    ],
    ids=str,
)
def test_where_it_gains(isa, conv, shape, gains):
    assert direct_trains_faster(conv, shape) == (gains and isa != "scalar")
