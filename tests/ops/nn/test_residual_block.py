"""residual_block: values and gradients against float64, running statistics, bits, special values, arguments."""

import pytest
import torch
from backends import on_backends
from torch import nn

import kr_fast
from kr_fast import ResidualLayer
from kr_fast.models.resnet import Block

LAST = torch.channels_last
# (N, I, O, H, W, stride) by regime. Groups of images: all in one; several of 3 with a shorter last one, whose sums of
# filters are made in chunks. Convolutions: Winograd's of 16 and of 32 outputs in a block, tiles partly empty; by the
# definition with stride 2, and both where 2x2 pixels leave tiles empty; more channels than a part of the sums has.
CASES = [
    (3, 16, 16, 9, 7, 1),
    (7, 16, 16, 28, 28, 1),
    (5, 32, 32, 12, 12, 1),
    (6, 16, 32, 13, 12, 2),
    (9, 64, 64, 2, 2, 1),
    (2, 96, 80, 8, 9, 1),
]


def draw(case, running=True):
    """x, layers and a gradient of y."""
    batch, inputs, outputs, height, width, stride = case
    generator = torch.Generator().manual_seed(sum(case))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = normal(batch, inputs, height, width).relu().contiguous(memory_format=LAST)
    shapes = [(outputs, inputs, 3, 3), (outputs, outputs, 3, 3), (outputs, inputs, 1, 1)]
    layers = [
        ResidualLayer(
            (normal(*shape) / shape[1] ** 0.5).contiguous(memory_format=LAST if index else torch.contiguous_format),
            1 + 0.3 * normal(outputs),
            normal(outputs),
            *((normal(outputs), normal(outputs).abs()) if running else ()),
            momentum=0.1 + 0.2 * index,
            eps=1e-5 * (index + 1),
        )
        for index, shape in enumerate(shapes if inputs != outputs or stride > 1 else shapes[:2])
    ]
    grad = normal(batch, outputs, -(-height // stride), -(-width // stride)).contiguous(memory_format=LAST)
    return x, layers, grad


def torchs(x, layers, stride):
    """The layers one after the other, in the inputs' dtype."""

    def layer(of, x, stride):
        y = nn.functional.conv2d(x, of.weight, stride=stride, padding=of.weight.shape[2] // 2)
        running, affine = (of.running_mean, of.running_var), (of.norm_weight, of.norm_bias)
        return nn.functional.batch_norm(y, *running, *affine, True, of.momentum, of.eps)

    y = layer(layers[1], layer(layers[0], x, stride).relu(), 1)
    return (y + (layer(layers[2], x, stride) if len(layers) == 3 else x)).relu()


def ours(x, layers, stride):
    return kr_fast.residual_block(x, *layers, stride=stride)


def everything(function, x, layers, stride, grad, dtype=torch.float32):
    """y, running statistics, and the gradients of x and of weights and norms."""
    x = x.detach().to(dtype).requires_grad_()
    layers = [
        layer._replace(
            **{
                name: value.detach().to(dtype, copy=True).requires_grad_(not name.startswith("running"))
                for name, value in layer._asdict().items()
                if isinstance(value, torch.Tensor)
            }
        )
        for layer in layers
    ]
    y = function(x, layers, stride)
    learned = [each for layer in layers for each in layer[:3] if each is not None]
    running = [each for layer in layers for each in layer[3:5] if each is not None]
    return [y.detach(), *running, *torch.autograd.grad(y, [x, *learned], grad.to(dtype))]


@on_backends("residual_block")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case):
    """Errors are at most three times that of torch's layers in float32, both as root mean squares."""
    x, layers, grad = draw(case)
    before = x.clone(), grad.clone()
    found = [everything(f, x, layers, case[5], grad) for f in (ours, torchs)]
    exact = everything(torchs, x, layers, case[5], grad, torch.float64)
    assert found[0][0].is_contiguous(memory_format=LAST)
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])
    for index, (mine, other, right) in enumerate(zip(*found, exact, strict=True)):
        error, limit = ((each.double() - right).norm() / right.norm() for each in (mine, other))
        assert mine.stride() == other.stride() or mine.ndim == 4
        assert error <= 3 * max(limit, 2 * torch.finfo(torch.float32).eps), (index, error, limit)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_bits_do_not_depend_on_threads(isa, case):
    x, layers, grad = draw(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(ours, x, layers, case[5], grad)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(everything(ours, x, layers, case[5], grad), want, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "running_mean"])
def test_what_may_be_left_out(isa, missing):
    x, layers, _ = draw(CASES[3])
    names = ("running_mean", "running_var") if missing == "running_mean" else (missing,)
    without = [layer._replace(**dict.fromkeys(names)) for layer in layers]
    default = torch.ones(32) if missing == "norm_weight" else torch.zeros(32)
    given = layers if missing == "running_mean" else [layer._replace(**{missing: default}) for layer in layers]
    assert torch.equal(ours(x, without, 2), ours(x, given, 2))


def test_only_what_is_asked_for_has_a_gradient(isa):
    for case in (CASES[0], CASES[3]):
        x, layers, grad = draw(case, running=False)
        full = everything(ours, x, layers, case[5], grad)
        weight = layers[1].weight.clone().requires_grad_()
        y = ours(x, [layers[0], layers[1]._replace(weight=weight), *layers[2:]], case[5])
        assert torch.equal(torch.autograd.grad(y, weight, grad)[0], full[5])
        x = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(ours(x, layers, case[5]), x, grad)[0], full[1])


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_nan_and_layouts_of_the_gradient(isa, case):
    x, layers, grad = draw(case, running=False)
    want = everything(ours, x, layers, case[5], grad)
    for a, b in zip(everything(ours, x, layers, case[5], grad.contiguous()), want, strict=True):
        assert torch.equal(a, b)
    x[0, 3, 1, 1] = float("nan")
    got = everything(ours, x, layers, case[5], grad)
    assert all(each.isnan().any() for each in (got[0], *got[2:6]))


@on_backends("residual_block")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_takes_the_running_statistics(backend, case):
    x, layers, _ = draw(case)
    kept = [each.clone() for layer in layers for each in layer[3:5]]

    def exactly(x, layers):
        def layer(of, x, stride):
            y = nn.functional.conv2d(x, of.weight, stride=stride, padding=of.weight.shape[2] // 2)
            return nn.functional.batch_norm(y, of.running_mean, of.running_var, *of[1:3], False, 0.0, of.eps)

        y = layer(layers[1], layer(layers[0], x, case[5]).relu(), 1)
        return (y + (layer(layers[2], x, case[5]) if len(layers) == 3 else x)).relu()

    y = kr_fast.residual_block(x, *layers, stride=case[5], training=False)
    double = [
        of._replace(**{n: v.double() for n, v in of._asdict().items() if isinstance(v, torch.Tensor)}) for of in layers
    ]
    right = exactly(x.double(), double)
    error, limit = ((each.double() - right).norm() / right.norm() for each in (y, exactly(x, layers)))
    assert error <= 3 * max(limit, 2 * torch.finfo(torch.float32).eps)
    assert all(torch.equal(a, b) for a, b in zip(kept, (e for of in layers for e in of[3:5]), strict=True))


def test_the_reference_is_torchs(reference):
    for case in (CASES[0], CASES[3]):
        x, layers, grad = draw(case)
        pair = [everything(f, x, layers, case[5], grad, torch.float64) for f in (ours, torchs)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def arguments(**change):
    x, layers, _ = draw((2, 16, 32, 5, 5, 2))
    values = dict(zip(("first", "second", "shortcut"), layers, strict=True)) | {"x": x, "stride": 2}
    for name, value in change.items():
        layer, _, field = name.partition("__")
        values[layer] = values[layer]._replace(**{field: value}) if field else value
    return values


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 16, 5, 5)}, ValueError, "x must be channels_last"),
        ({"x": torch.zeros(2, 16, 5, 5).half()}, TypeError, "x must be float32 or float64, got float16"),
        ({"x": torch.zeros(2, 8, 5, 5).to(memory_format=LAST)}, ValueError, "x must have a multiple of 16 channels"),
        ({"x": torch.zeros(0, 16, 5, 5).to(memory_format=LAST)}, ValueError, "x must leave at least 2 numbers of each"),
        ({"x": torch.zeros(1, 16, 2, 2).to(memory_format=LAST)}, ValueError, "x must leave at least 2 numbers of each"),
        ({"training": 0}, TypeError, "training must be a bool, got 0"),
        (
            {"training": False, "first__running_mean": None, "first__running_var": None},
            ValueError,
            "first.running_mean",
        ),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ({"shortcut": None}, ValueError, "shortcut must be a layer where the shape changes, got None"),
        ({"first__weight": torch.zeros(24, 16, 3, 3)}, ValueError, "first.weight must have a multiple of 16 outputs"),
        ({"first__weight": torch.zeros(32, 16, 1, 1)}, ValueError, r"first.weight must be \[32, 16, 3, 3\] on cpu"),
        ({"second__weight": torch.zeros(32, 32, 3, 3).double()}, TypeError, "second.weight must be float32"),
        ({"shortcut__norm_bias": torch.zeros(31)}, ValueError, r"shortcut.norm_bias must be contiguous \[32\] on cpu"),
        ({"first__running_var": None}, ValueError, "first.running_var must be given where the other"),
        ({"first__running_mean": torch.zeros(32, requires_grad=True)}, ValueError, "first.running_mean must not requ"),
        ({"second__momentum": 2}, ValueError, r"second.momentum must be a number in \[0, 1\], got 2"),
        ({"second__eps": -1.0}, ValueError, "second.eps must be at least 0"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match="^residual_block: " + text):
        kr_fast.residual_block(**arguments(**change))


def test_a_second_derivative_is_refused():
    x, layers, grad = draw(CASES[0], running=False)
    x.requires_grad_()
    (first,) = torch.autograd.grad(ours(x, layers, 1), x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_block_backward: there is no derivative"):
        first.sum().backward()


def test_opcheck_and_compile():
    case = (2, 16, 32, 5, 5, 2)
    x, layers, grad = draw(case)
    x.requires_grad_()
    weights = [layer.weight.clone().requires_grad_() for layer in layers]
    norms = [each.clone().requires_grad_() for layer in layers for each in layer[1:3]]
    torch.library.opcheck(torch.ops.kr_fast.residual_block, (x, weights, norms, 2, [1e-5] * 3))

    def network(x, layers, stride):
        return ours(2 * x, layers, stride)

    layers = [layers[0]._replace(norm_weight=None), *layers[1:]]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    pair = [everything(function, x, layers, 2, grad) for function in (network, compiled)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients():
    x, layers, _ = draw(CASES[0])
    layers[0].weight.requires_grad_()
    with torch.no_grad():
        assert not ours(x, layers, 1).requires_grad
    with torch.inference_mode():
        assert not ours(x, layers, 1).requires_grad


def test_blocks_of_networks_are_this_op():
    block = Block(16, 32, 2).train()
    x = torch.randn(4, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
        layers = [
            ResidualLayer(conv.weight, norm.weight, norm.bias)
            for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2), tuple(block.shortcut))
        ]
        got = ours(x.contiguous(memory_format=LAST), layers, 2)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
