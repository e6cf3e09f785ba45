"""winograd_conv2d of a plain weight: gradients against float64, error, bits, layouts, compile, refusals."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

import kr_fast
from kr_fast.backends.cpu.nn import winograd_trains_faster

OP = "winograd_conv2d"
LAST = torch.channels_last
# N, inputs, outputs, H, W: one pixel; sides of 4 k + 1 to 3 and part groups of channels; blocks of 16 and of 32 of
# either side of the convolution, as inputs and outputs change places; more than one block of tiles.
CASES = [(1, 1, 1, 1, 1), (2, 3, 33, 5, 6), (1, 40, 16, 7, 9), (2, 16, 70, 8, 8), (45, 20, 16, 3, 2)]


def draw(case, dtype=torch.float32):
    n, inputs, outputs, height, width = case
    generator = torch.Generator().manual_seed(sum(case))
    shapes = (n, inputs, height, width), (outputs, inputs, 3, 3), (outputs,), (n, outputs, height, width)
    x, weight, bias, upstream = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    weight = weight / (9 * inputs) ** 0.5
    return [x.contiguous(memory_format=LAST), weight, bias], upstream


def gradients(function, tensors, upstream):
    leaves = [each.detach().requires_grad_() for each in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def ours(x, weight, bias):
    return kr_fast.winograd_conv2d(x, weight, bias=bias)


def definition(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    tensors, upstream = draw(case)
    found = gradients(ours, tensors, upstream)
    want = gradients(definition, [each.double() for each in tensors], upstream.double())
    pixels = case[0] * case[3] * case[4]
    # Of variance 1 and O / I, and sums over all pixels, with the error of a tile that is mostly empty.
    atols = 1e-5, 1e-5 * max(1, case[2] / case[1]) ** 0.5, 1e-5 * pixels**0.5, 1e-6 * pixels**0.5
    for got, exact, atol in zip(found, want, atols, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=atol)
    assert found[0].is_contiguous(memory_format=LAST)


# The stages of a small ResNet and of a UNet.
@pytest.mark.parametrize("case", [(8, 16, 16, 28, 28), (16, 64, 64, 7, 7), (8, 128, 64, 14, 14)], ids=str)
def test_error_beside_the_definition(case):
    """Root mean square error of the result and of the input's gradient at most three times that of torch's own."""
    tensors, upstream = draw(case)
    want = gradients(definition, [each.double() for each in tensors], upstream.double())[:2]
    for exact, our, their in zip(
        want, gradients(ours, tensors, upstream)[:2], gradients(definition, tensors, upstream)[:2], strict=True
    ):
        assert (our - exact).square().mean() <= 9 * (their - exact).square().mean()


@on_backends(OP, "cpu")
def test_bits_do_not_depend_on_threads_or_layouts(backend):
    tensors, upstream = draw((45, 20, 40, 5, 6))
    want, before = gradients(ours, tensors, upstream), torch.get_num_threads()
    x, weight, bias = tensors
    weights = weight.contiguous(memory_format=LAST), weight.transpose(2, 3).contiguous().transpose(2, 3)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, gradients(ours, tensors, upstream), want))
    finally:
        torch.set_num_threads(before)
    for other in weights:
        assert all(map(torch.equal, gradients(ours, [x, other, bias], upstream), want))
    for other in (upstream.contiguous(memory_format=LAST), upstream.repeat(2, 1, 1, 2)[45:, :, :, 6:]):
        assert all(map(torch.equal, gradients(ours, tensors, other), want))


def test_expanded_upstream_gradient():
    tensors, _ = draw((2, 3, 20, 5, 6))
    for function in (lambda y: y.mean(), lambda y: y.sum((1, 3)).square().sum()):
        found = gradients(lambda *leaves, f=function: f(ours(*leaves)), tensors, None)
        want = gradients(lambda *leaves, f=function: f(definition(*leaves)), tensors, None)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_that_are_needed(needed):
    tensors, upstream = draw((2, 3, 20, 5, 6))
    want = gradients(ours, tensors, upstream)[1:]
    leaves = [each.requires_grad_(which in needed) for which, each in enumerate(tensors)]
    ours(*leaves).backward(upstream)
    for which, (leaf, expected) in enumerate(zip(leaves, want, strict=True)):
        if which in needed:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None


def test_the_gradient_has_the_layout_of_the_weight():
    """So that autograd keeps it as it is."""
    (x, weight, _), _ = draw((2, 16, 20, 5, 6))
    for layout in (torch.contiguous_format, LAST):
        leaf = weight.detach().contiguous(memory_format=layout).requires_grad_()
        kr_fast.winograd_conv2d(x, leaf).sum().backward()
        assert leaf.grad.stride() == leaf.stride()


def test_batched_upstream_gradients_are_refused():
    leaves, upstream = draw((2, 3, 20, 5, 6))
    y = ours(*(each.requires_grad_() for each in leaves))
    with pytest.raises(RuntimeError, match="winograd_conv2d: upstream gradients must not be batched"):
        torch.autograd.grad(y, leaves, torch.stack([upstream, upstream]), is_grads_batched=True)


def test_packed_weight_gives_the_same_result():
    (x, weight, bias), _ = draw((2, 16, 20, 9, 6))
    packed = kr_fast.winograd_pack(weight)
    torch.testing.assert_close(ours(x, weight, bias), kr_fast.winograd_conv2d(x, packed, 20, bias=bias))


@on_backends(OP)
def test_empty_batch(backend):
    (x, *others), upstream = draw((2, 3, 20, 5, 6))
    y, grad_x, *zeros = gradients(ours, [x[:0], *others], upstream[:0])
    assert y.shape == (0, 20, 5, 6)
    assert grad_x.shape == (0, 3, 5, 6)
    assert all(torch.equal(each, torch.zeros_like(other)) for each, other in zip(zeros, others, strict=True))


def test_opcheck():
    (x, weight, bias), upstream = draw((2, 16, 20, 6, 6))
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    torch.library.opcheck(torch.ops.kr_fast.winograd_conv2d, (*leaves[:2], None, None, bias, None, None, False))
    grad_output = upstream.contiguous(memory_format=LAST)
    torch.library.opcheck(torch.ops.kr_fast.winograd_conv2d_grad_input, (grad_output, weight.detach()))


def test_compile():
    tensors, upstream = draw((2, 16, 20, 6, 6))
    compiled = torch.compile(lambda *leaves: ours(*leaves).relu(), fullgraph=True, backend="aot_eager")
    want = gradients(lambda *leaves: ours(*leaves).relu(), tensors, upstream)
    assert all(map(torch.equal, gradients(compiled, tensors, upstream), want))


X, WEIGHT = torch.zeros(1, 16, 4, 4).contiguous(memory_format=LAST), torch.zeros(20, 16, 3, 3)
BAD = {
    "x must be float32 or float64": {"x": X.bfloat16()},
    "x must be channels_last": {"x": torch.zeros(1, 16, 4, 4)},
    "weight must be float32": {"weight": WEIGHT.half()},
    "weight must be \\[O, 16, 3, 3\\]": {"weight": torch.zeros(20, 16, 5, 5)},
    "weight must have 4 dimensions": {"weight": WEIGHT[0]},
    "bias must be contiguous": {"bias": torch.zeros(19)},
    "scale must be left out where outputs is": {"scale": torch.zeros(20)},
    "residual must be left out where outputs is": {"residual": torch.zeros(1, 20, 4, 4)},
    "activation must be left out where outputs is": {"activation": "relu"},
    "pool must be left out where outputs is": {"pool": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=f"{OP}: {message}.*, got"):
        kr_fast.winograd_conv2d(**{"x": X, "weight": WEIGHT, **BAD[message]})


@pytest.mark.parametrize(
    ("shape", "outputs", "gains"),
    [
        ((64, 16, 28, 28), 16, True),
        ((64, 64, 7, 7), 64, True),
        ((64, 3, 28, 28), 16, False),  # few inputs; few outputs, which are the inputs of backward
        ((64, 16, 28, 28), 3, False),
        ((64, 64, 2, 2), 64, False),  # tiles that are mostly empty
        ((64, 64, 5, 5), 64, False),
        ((2, 64, 8, 8), 64, False),  # few tiles for so many filters
        ((8, 256, 8, 8), 256, False),
    ],
    ids=str,
)
def test_where_it_gains(isa, shape, outputs, gains):
    assert winograd_trains_faster(shape, outputs) == (gains and isa != "scalar")
