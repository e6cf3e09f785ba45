"""model_conv2d: the reference against a double loop in float64, every backend against it, arguments, torch.library."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from batched_cases import ACTIVATIONS, CONV_CASES, UNITS, ConvCase, conv_inputs, exact_conv, on

from kr_fast.backends import registry
from kr_fast.backends.arguments import View
from kr_fast.backends.calls import ConvCall
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d


def by_hand(x, weight, bias, residual, case):
    """The formula of the docstring, term by term."""
    models, n, outputs = len(weight), x.shape[1], case.outputs
    (s0, s1), (p0, p1), (d0, d1) = case.stride, case.padding, case.dilation
    height, width, channels = x.shape[2:]
    per_group, out_per_group = channels // case.groups, outputs // case.groups
    y = torch.zeros(models, n, *case.output_size(), outputs, dtype=torch.float64)
    for m, i, j, o, u, v in itertools.product(
        range(models), *map(range, (*case.output_size(), outputs)), *map(range, case.kernel)
    ):
        a, b = s0 * i + d0 * u - p0, s1 * j + d1 * v - p1
        if 0 <= a < height and 0 <= b < width:
            first = o // out_per_group * per_group
            y[m, :, i, j, o] += x[m % len(x), :, a, b, first : first + per_group] @ weight[m, o, u, v]
    y = y + bias[:, None, None, None]
    return y if residual is None else y + residual


@pytest.mark.parametrize("case", [case for case in CONV_CASES if case.small()], ids=str)
def test_reference_is_the_formula(case):
    x, weight, bias, residual = conv_inputs(case, torch.float64)
    got = model_conv2d(x, weight, bias, residual, **case.options())
    torch.testing.assert_close(got, by_hand(x, weight, bias, residual, case), rtol=0, atol=1e-12)
    assert got.is_contiguous()


@on_backends("model_conv2d")
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_values(backend, case, dtype):
    """One rounding of the dtype, and float32's sums of up to 576 products of order 1."""
    inputs = conv_inputs(case, dtype, backend.device)
    before = [None if each is None else each.clone() for each in inputs]
    got = model_conv2d(*inputs, **case.options())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact_conv(inputs, case), rtol=1.01 * UNITS[dtype], atol=1e-5)
    assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_are_torchs(activation):
    x, weight, bias, _ = conv_inputs(CONV_CASES[0], torch.float64)
    plain = model_conv2d(x, weight, bias)
    name, scalars, algorithm = (activation, (), "") if isinstance(activation, str) else activation
    function = F.silu if name == "swish" else getattr(F, name, None) or getattr(torch, name)
    want = function(plain, *scalars, **({"approximate": algorithm} if name == "gelu" else {}))
    assert torch.equal(model_conv2d(x, weight, bias, activation=activation), want)


@on_backends("model_conv2d", "triton")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("groups", [1, 8])
def test_activations(backend, activation, groups):
    case = ConvCase(channels=8, outputs=8, groups=groups, residual=True)
    x, weight, bias, residual = conv_inputs(case, torch.float32, backend.device)
    for scale in (1e-3, 1, 30):  # about 0, where quotients lose digits; and far away
        inputs = [x * scale, weight, bias * scale, residual * scale]
        got = model_conv2d(*inputs, **case.options(), activation=activation)
        want = exact_conv(inputs, case, activation=activation)
        torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=2e-6 * scale)
    bias[0, 0] = float("nan")
    got = model_conv2d(x, weight, bias, activation=activation, groups=groups)
    assert got[0, ..., 0].isnan().all()
    assert got.isnan().sum() == got[0, ..., 0].numel()


@on_backends("model_conv2d")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_views_read_bytes(backend, dtype, kernel, groups):
    """Zeros surround the numbers, not the bytes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 9, 8, 3), generator=generator, dtype=torch.uint8)
    weight = torch.randn(3, 6, kernel, kernel, 3 // groups, generator=generator).to(dtype)
    rows, columns = (torch.tensor(each, dtype=torch.int32) for each in ([1, 1, 0, 5, 8], [7, 6, 5, 4, 3, 2, 2]))
    view = View(rows, columns, torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, 2.0, 0.5]))
    x = images[:, :, rows.long()[:, None], columns.long()].float() * view.scale + view.shift
    options = {"padding": kernel // 2, "stride": (2, 1), "groups": groups}
    images, weight, x, *numbers = on(backend.device, images, weight, x.to(dtype).contiguous(), *view)
    want = model_conv2d(x, weight, **options)
    got = model_conv2d(images, weight, view=View(*numbers), **options)
    torch.testing.assert_close(got, want, rtol=UNITS[dtype], atol=1e-5)


@on_backends("model_conv2d", "triton")
@pytest.mark.parametrize("case", [CONV_CASES[1], CONV_CASES[4], CONV_CASES[11]], ids=str)
def test_a_models_bits_are_its_own(backend, case):
    """Images and models in another order and number, and every tile shape: other tiles, other neighbours."""
    case = dataclasses.replace(case, models=3, images=5)
    x, weight, bias, residual = conv_inputs(case, torch.float16, backend.device)
    want = model_conv2d(x, weight, bias, residual, **case.options())
    order = torch.tensor([2, 0])
    mine = None if residual is None else residual[order][:, 1:4].contiguous()
    few = x[:, 1:4].contiguous() if case.shared else x[order][:, 1:4].contiguous()
    got = model_conv2d(few, weight[order], bias[order], mine, **case.options())
    assert torch.equal(got, want[order][:, 1:4])
    for config in (1, 2):
        assert torch.equal(model_conv2d(x, weight, bias, residual, **case.options(), config=config), want)


@on_backends("model_conv2d")
def test_no_images(backend):
    x, weight = on(backend.device, torch.zeros(2, 0, 6, 6, 5), torch.zeros(2, 4, 3, 3, 5))
    assert model_conv2d(x, weight, padding=1).shape == (2, 0, 6, 6, 4)
    assert configs(weight, groups=5) == 1


def test_other_groups_are_refused_by_triton():
    for kind, why in (("dense", None), ("depthwise", None), ("grouped", "groups must be 1")):
        refusal = registry.refusal("model_conv2d", "triton", ConvCall("cuda", torch.float32, kind))
        assert (refusal is None) == (why is None) or "triton is not installed" in refusal
        assert why is None or why in refusal


x, w = torch.zeros(2, 3, 5, 5, 4), torch.zeros(2, 6, 3, 3, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((x[0], w), {}, ValueError, "x must have 5 dimensions"),
        ((x.half(), w), {}, TypeError, "x must be float32, got float16"),
        ((x.int(), w.int()), {}, TypeError, "weight must be float32 or"),
        ((x.transpose(2, 3), w), {}, ValueError, "x must be contiguous, got .* with strides"),
        ((x[..., :3].contiguous(), w), {}, ValueError, r"weight must be \[M, O, kh, kw, 3 / groups\]"),
        ((x, w), {"groups": 2}, ValueError, r"weight must be .* multiple of 2 groups"),
        ((x.expand(3, 2, 3, 5, 5, 4)[:, 0].contiguous(), w), {}, ValueError, "x must hold 1 or 2 models"),
        ((x[:, :, :2].contiguous(), w), {}, ValueError, "weight must have a kernel that fits the 2 x 5 input"),
        ((x, w, torch.zeros(2, 6).half()), {}, TypeError, "bias must be float32"),
        ((x, w, torch.zeros(6)), {}, ValueError, "bias must have 2 dimensions"),
        ((x, w, None, x), {}, ValueError, r"residual must be contiguous \[2, 3, 3, 3, 6\]"),
        ((x, w), {"stride": 0}, ValueError, r"stride must be in \[1"),
        ((x, w), {"padding": (1, 1, 1)}, ValueError, "padding must be a number or two"),
        ((x, w), {"padding": 1.0}, TypeError, "padding must be"),
        ((x, w), {"activation": "softmax"}, ValueError, "activation must be one of relu"),
        ((x, w), {"activation": ("hardtanh", (1.0,), "")}, ValueError, "activation must give 2 scalars for hardtanh"),
        ((x, w), {"config": -1}, ValueError, "config must be in"),
        (
            (x, w.clone().requires_grad_()),
            {"activation": "relu"},
            ValueError,
            "activation must be None where a gradient",
        ),
    ],
)
def test_bad_arguments_are_named(args, options, error, text):
    with pytest.raises(error, match="model_conv2d: " + text):
        model_conv2d(*args, **options)


def test_bad_views_are_named():
    images, weight = torch.zeros(1, 2, 5, 5, 3, dtype=torch.uint8), torch.zeros(2, 4, 3, 3, 3)
    rows, ones = torch.arange(5, dtype=torch.int32), torch.ones(3)
    for view, text in (
        (View(rows.long(), rows, ones, ones), "view.rows must be int32"),
        (View(rows, rows + 1, ones, ones), r"view.columns must lie in \[0, 5\), got \[1, 5\]"),
        (View(rows, rows, ones[:2], ones), r"view.scale must be contiguous \[3\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            model_conv2d(images, weight, view=view)
    with pytest.raises(TypeError, match="x must be uint8"):
        model_conv2d(images.float(), weight, view=View(rows, rows, ones, ones))


def test_opcheck_and_compile():
    case = ConvCase(stride=(2, 1), padding=(1, 0), residual=True)
    inputs = conv_inputs(case, torch.float32)
    options = case.options()
    rest = [list(options["stride"]), list(options["padding"]), list(options["dilation"]), 1, "relu", [], "", 0]
    torch.library.opcheck(torch.ops.kr_fast.model_conv2d, (*inputs, None, None, None, None, *rest))
    call = lambda *tensors: model_conv2d(*tensors, **options, activation="relu")  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(*inputs), call(*inputs))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of torch 2.9")
def test_the_reference_is_float32_whatever_a_user_allows(monkeypatch, reference):
    case = CONV_CASES[0]
    inputs, seen, convolve = conv_inputs(case, torch.float32), [], F.conv2d
    want = model_conv2d(*inputs, **case.options())

    def noted(*arguments):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return convolve(*arguments)

    monkeypatch.setattr(F, "conv2d", noted)
    for where, value in ((torch.backends, "tf32"), (torch.backends.cudnn.conv, "ieee")):  # cudnn.flags takes neither
        before, where.fp32_precision = where.fp32_precision, value
        try:
            assert torch.equal(model_conv2d(*inputs, **case.options()), want)
            assert where.fp32_precision == value
        finally:
            where.fp32_precision = before
    assert set(seen) == {"ieee"}


# ---------------------------------------------------------------- networks' widths, on a GPU

on_gpu = on_backends("model_conv2d", "triton-gpu")
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


@on_gpu
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_against_float64_and_the_library(backend, case, dtype):
    inputs = conv_inputs(case, dtype, "cuda")
    want = exact_conv(inputs, case)
    got = model_conv2d(*inputs, **case.options())
    torch.testing.assert_close(got.double(), want, rtol=1.01 * UNITS[dtype], atol=2e-5)
    theirs = float((library(*inputs, case).double() - want).abs().max())
    assert float((got.double() - want).abs().max()) <= 1.01 * theirs + 1e-6


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES + LARGE, ids=str)
def test_tile_shapes_and_co_batched_models_change_no_bit_on_a_gpu(backend, case, dtype):
    x, weight, bias, residual = conv_inputs(case, dtype, "cuda")
    want = model_conv2d(x, weight, bias, residual, **case.options())
    for config in range(1, configs(weight, case.groups, case.shared)):
        assert torch.equal(model_conv2d(x, weight, bias, residual, **case.options(), config=config), want)
    last = None if residual is None else residual[-1:, :1].contiguous()
    alone = model_conv2d(x[-1:, :1].contiguous(), weight[-1:], bias[-1:], last, **case.options())
    assert torch.equal(alone, want[-1:, :1])


@on_gpu
def test_more_than_two_to_the_31_elements(backend):
    """The last model's last image lies beyond 2^31 elements of the input and of the output."""
    models, images, size = 3, 700, 256
    if torch.cuda.mem_get_info()[0] < 4 * models * images * size * size * 16 + 2**30:
        pytest.skip("needs 12 GB")
    x = torch.zeros(models, images, size, size, 16, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    x[-1, -1].normal_()
    weight = torch.randn(models, 16, 3, 3, 16, dtype=torch.float16, device="cuda") / 12
    y = model_conv2d(x, weight, padding=1)
    want = model_conv2d(x[-1:, -1:].contiguous(), weight[-1:], padding=1)
    assert torch.equal(y[-1:, -1:], want)
    assert not y[0].any()
