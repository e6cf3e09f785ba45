"""preactivation_block: values and gradients against float64, bits, optional tensors, arguments."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

import kr_fast

LAST = torch.channels_last
# (N, C1, C2, O, H, W), groups of both norms by regime. One group of images; several, whose sums of filters are made in
# chunks; the skip connection joined for a 1x1 shortcut, with a norm's group across both sources and parts of vectors;
# the same without a convolution; tiles partly empty, and one image that is a group.
CASES = [
    ((3, 32, 0, 32, 4, 4), (8, 4)),
    ((40, 32, 16, 32, 8, 8), (8, 8)),
    ((2, 17, 7, 40, 6, 5), (6, 8)),
    ((3, 24, 16, 40, 5, 8), (8, 1)),
    ((2, 64, 0, 48, 30, 28), (4, 8)),
]


def draw(case, shifted=True, projected=None):
    """The block's tensors in the order of its schema, and a gradient of y."""
    n, first, second, outputs, *size = case
    channels = first + second
    generator = torch.Generator().manual_seed(sum(case))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    image = lambda c: normal(n, c, *size).contiguous(memory_format=LAST)  # noqa: E731
    skip = image(second) if second else None
    tensors = [image(first), skip, normal(n, outputs) if shifted else None]
    for inputs in (channels, outputs):
        filters = normal(outputs, inputs, 3, 3) / (3 * inputs**0.5)
        tensors += 1 + 0.3 * normal(inputs), normal(inputs), filters, normal(outputs)
    tensors[5] = tensors[5].contiguous(memory_format=LAST)
    projected = channels != outputs if projected is None else projected
    tensors += [normal(outputs, channels, 1, 1) / channels**0.5, normal(outputs)] if projected else [None, None]
    return tensors, image(outputs)


def ours(tensors, groups):
    x, skip, shift, w1, b1, f1, c1, w2, b2, f2, c2, shortcut, bias = tensors
    norms, shortcut = (
        [(groups[0], w1, b1, 1e-5), (groups[1], w2, b2, 1e-3)],
        shortcut if shortcut is None else (shortcut, bias),
    )
    return kr_fast.preactivation_block(x, norms, [(f1, c1), (f2, c2)], skip=skip, shift=shift, shortcut=shortcut)


def torchs(tensors, groups):
    """The layers one after the other, in the inputs' dtype."""
    x, skip, shift, w1, b1, f1, c1, w2, b2, f2, c2, shortcut, bias = tensors
    u = x if skip is None else torch.cat([x, skip], 1)
    h = F.conv2d(F.silu(F.group_norm(u, groups[0], w1, b1, 1e-5)), f1, c1, padding=1)
    h = h if shift is None else h + shift[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, groups[1], w2, b2, 1e-3)), f2, c2, padding=1)
    return h + (u if shortcut is None else F.conv2d(u, shortcut, bias))


def everything(function, tensors, groups, grad, dtype=torch.float32):
    """y and the gradients of all tensors."""
    tensors = [None if each is None else each.detach().to(dtype).requires_grad_() for each in tensors]
    y = function(tensors, groups)
    return [y.detach(), *torch.autograd.grad(y, [each for each in tensors if each is not None], grad.to(dtype))]


def check(tensors, groups, grad):
    """Errors are at most six times that of torch's layers in float32, as root mean squares.

    Over few tiles a convolution by Winograd's algorithm alone has up to five times their error.
    """
    mine, theirs = (everything(f, tensors, groups, grad) for f in (ours, torchs))
    exact = everything(torchs, tensors, groups, grad, torch.float64)
    assert mine[0].is_contiguous(memory_format=LAST)
    for index, (a, b, right) in enumerate(zip(mine, theirs, exact, strict=True)):
        error, limit = (float((each.double() - right).norm() / right.norm()) for each in (a, b))
        assert error <= 6 * max(limit, 2 * torch.finfo(torch.float32).eps), (index, error, limit)


@on_backends("preactivation_block")
@pytest.mark.parametrize(("case", "groups"), CASES, ids=str)
def test_values_and_gradients(backend, case, groups):
    tensors, grad = draw(case)
    before = [None if each is None else each.clone() for each in (*tensors, grad)]
    check(tensors, groups, grad)
    assert all(was is None or torch.equal(each, was) for each, was in zip((*tensors, grad), before, strict=True))


@pytest.mark.parametrize("missing", ["shift", "biases", "projection"])
def test_what_may_be_left_out(isa, missing):
    case, groups = CASES[0]
    tensors, grad = draw(case, shifted=missing != "shift", projected=missing != "projection")
    if missing == "biases":
        tensors[6] = tensors[10] = tensors[12] = None
    check(tensors, groups, grad)


@pytest.mark.parametrize(("case", "groups"), [CASES[1], CASES[4]], ids=str)
def test_bits_do_not_depend_on_threads(isa, case, groups):
    tensors, grad = draw(case)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(ours, tensors, groups, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_each_gradient_alone(isa):
    case, groups = CASES[2]
    tensors, grad = draw(case)
    every = everything(ours, tensors, groups, grad)[1:]
    for index, expected in enumerate(every):
        given = [each.detach().requires_grad_(number == index) for number, each in enumerate(tensors)]
        assert torch.equal(torch.autograd.grad(ours(given, groups), given[index], grad)[0], expected)


def test_no_image_and_compile(isa):
    (_, *rest), groups = CASES[1]
    tensors, grad = draw((0, *rest))
    assert all(not each.any() for each in everything(ours, tensors, groups, grad))
    tensors, grad = draw(CASES[0][0])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(everything(compiled, tensors, (8, 4), grad), everything(ours, tensors, (8, 4), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("index", "value", "match"),
    [
        (1, torch.zeros(3, 7, 5, 4), "skip must be channels_last"),
        (2, torch.zeros(3, 32), "shift must be"),
        (4, torch.zeros(9), "norm1 bias must be"),
        (5, torch.zeros(40, 24, 1, 1), r"conv1 weight must be \[40, 24, 3, 3\]"),
        (9, torch.zeros(80, 40, 3, 3)[::2], "conv2 weight must be .*contiguous"),
        (11, torch.zeros(40, 23, 1, 1), r"shortcut weight must be \[40, 24, 1, 1\]"),
        (11, None, "shortcut must be given for 24 channels and 40 outputs"),
    ],
)
def test_arguments_are_named(index, value, match):
    tensors, _ = draw(CASES[2][0])
    tensors[index] = value
    with pytest.raises((TypeError, ValueError), match=match):
        ours(tensors, (6, 8))
