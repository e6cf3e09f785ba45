"""conv2d_grad_norms against autograd in float64 record by record: geometries, dtypes, layouts, extremes, arguments."""

import numpy as np
import per_record
import pytest
import torch
from backends import on_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from per_record import CONVOLUTIONS as CASES

from kr_fast.ops.privacy.conv2d_grad_norms import conv2d_grad_norms

OP = "conv2d_grad_norms"
LAST = torch.channels_last


def exact(case, x, grad_output):
    return per_record.norms(case.layer, case.parameters(), x, grad_output, case.multiplicity)


def float32_norm(case, x, grad_output):
    """By torch, of one row."""
    leaves = [each.requires_grad_() for each in case.parameters()]
    gradients = torch.autograd.grad(case.layer(x[None], *leaves), leaves, grad_output[None])
    return sum(each.double().square().sum() for each in gradients).sqrt()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@on_backends(OP)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(backend, name):
    per_record.skip_slow(backend, name)
    case = CASES[name]
    x, grad_output = case.draw()
    wanted = exact(case, x, grad_output)
    layouts = [(x, grad_output), (x.contiguous(memory_format=LAST), grad_output.contiguous(memory_format=LAST))]
    layouts += [(x.flip(3).to(backend.device).flip(3), grad_output.transpose(2, 3).clone().transpose(2, 3))]
    if backend.id == "triton-interpreter":  # a second for a few programs
        layouts = [layouts[len(name) % 3]]
    for tensors in layouts:
        tensors = [each.to(backend.device) for each in tensors]
        before = [each.clone() for each in tensors]
        found = conv2d_grad_norms(*tensors, case.kernel, **case.options())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=0)
        assert all(map(torch.equal, tensors, before))


@on_backends(OP)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["stage", "few pixels", "unequal", "multiplicity, groups"])
def test_half_precision_is_summed_in_float32(backend, name, dtypes):
    case = CASES[name]
    tensors = [each.to(dtype) for each, dtype in zip(case.draw(), dtypes, strict=True)]
    found = conv2d_grad_norms(*(each.to(backend.device) for each in tensors), case.kernel, **case.options())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), exact(case, *tensors), rtol=1e-5, atol=0)


def test_float64_is_kept():
    case = CASES["unequal"]
    x, grad_output = (each.double() for each in case.draw())
    for tensors in ((x, grad_output), (x.float(), grad_output)):
        found = conv2d_grad_norms(*tensors, case.kernel, **case.options())
        torch.testing.assert_close(found, exact(case, *tensors), rtol=1e-13, atol=0)


@settings(max_examples=40)
@given(st.data())
def test_any_geometry(data):
    """On the kernel that the registry chooses, whatever divides nothing."""
    small = st.integers(1, 3)
    groups, kernel, stride, padding, dilation = (data.draw(st.tuples(small, small)) for _ in range(5))
    size = [data.draw(st.integers(d * (k - 1) + 1, 9)) for d, k in zip(dilation, kernel, strict=True)]
    rows, multiplicity = data.draw(small) * groups[1], groups[1]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups[0]}
    weight = torch.zeros(groups[0] * data.draw(small), data.draw(st.integers(1, 20)), *kernel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1] * groups[0], *size, generator=generator)

    def layer(x, weight):
        return torch.nn.functional.conv2d(x, weight, **geometry)

    grad_output = torch.randn(layer(x, weight).shape, generator=generator)
    found = conv2d_grad_norms(x, grad_output, kernel, **geometry, multiplicity=multiplicity)
    wanted = per_record.norms(layer, [weight], x, grad_output, multiplicity)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@on_backends(OP)
@pytest.mark.parametrize("name", ["stage", "many pixels", "few pixels", "one pixel", "groups", "depthwise"])
def test_extremes(backend, name):
    """Gradients whose squares float32 does not hold; NaN and inf stay in their record; zeros have norm 0."""
    per_record.skip_slow(backend, name)
    case = CASES[name]
    tensors = case.draw()
    wanted = exact(case, *tensors)
    x, grad_output = (each.to(backend.device) for each in tensors)
    for scale in (1e-24, 1e20):
        found = conv2d_grad_norms(x, scale * grad_output, case.kernel, **case.options())
        torch.testing.assert_close(found.double().cpu() / scale, wanted, rtol=2e-5, atol=0)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[0, 0, 0, 0] = value
        found = conv2d_grad_norms(bad, grad_output, case.kernel, **case.options())
        assert not found[0].isfinite()
        torch.testing.assert_close(found[1:].double().cpu(), wanted[1:], rtol=1e-5, atol=0)
    assert not conv2d_grad_norms(x, 0 * grad_output, case.kernel, **case.options()).any()


@on_backends(OP)
@pytest.mark.parametrize("name", ["stage", "many pixels", "few pixels", "few pixels, stride"])
def test_where_little_is_left_of_large_terms(backend, name):
    """Pixels that are nearly equal under a gradient that nearly sums to zero: against torch's own sums in float32."""
    per_record.skip_slow(backend, name)
    case = CASES[name]
    noise, grad_output = case.draw()
    x = 10 + 0.01 * noise
    grad_output = grad_output - grad_output.mean((2, 3), keepdim=True)
    wanted = exact(case, x, grad_output)
    found = conv2d_grad_norms(x.to(backend.device), grad_output.to(backend.device), case.kernel, **case.options())
    error, with_torch = (
        float((each.double().cpu() / wanted - 1).abs().max())
        for each in (found, torch.stack([float32_norm(case, *rows) for rows in zip(x, grad_output, strict=True)]))
    )
    assert error < max(1e-5, 20 * with_torch)


@on_backends(OP)
def test_empty_batch(backend):
    x, grad_output = (torch.zeros(0, n, 5, 5, device=backend.device) for n in (4, 6))
    assert conv2d_grad_norms(x, grad_output, 3, padding=1, multiplicity=3).shape == (0,)


def test_bits_do_not_depend_on_threads_or_neighbours(by_threads):
    case = CASES["wide"]._replace(rows=7)
    x, grad_output = case.draw()
    one, *others = by_threads(lambda: conv2d_grad_norms(x, grad_output, case.kernel, **case.options()))
    assert all(torch.equal(one, each) for each in others)
    assert torch.equal(conv2d_grad_norms(x[3:4], grad_output[3:4], case.kernel, **case.options()), one[3:4])


def test_opcheck_and_compile():
    case = CASES["unequal"]
    x, grad_output = case.draw()
    arguments = x, grad_output, [5, 2], [3, 1], [0, 2], [2, 3], 1, True, 2
    torch.library.opcheck(torch.ops.kr_fast.conv2d_grad_norms, arguments)
    compiled = torch.compile(conv2d_grad_norms, fullgraph=True, backend="aot_eager")
    found, wanted = (run(x, grad_output, case.kernel, **case.options()) for run in (compiled, conv2d_grad_norms))
    assert torch.equal(found, wanted)


X, G = torch.zeros(4, 6, 5, 5), torch.zeros(4, 4, 5, 5)
BAD = [
    ("x must be a tensor", {"x": 3}),
    ("x must be float32 or", {"x": X.long()}),
    ("x must have at least 4 dimensions", {"x": X[0]}),
    ("x must have 4 dimensions", {"x": X[None], "grad_output": G[None]}),
    ("grad_output must be float32 or", {"grad_output": G.bool()}),
    ("grad_output must have 4 dimensions on cpu", {"grad_output": G[None]}),
    (r"grad_output must be \[4, O, 5, 5\]", {"grad_output": G[:, :, :4]}),
    (r"grad_output must be \[4, O, 5, 5\]", {"grad_output": G[:2]}),
    (r"grad_output must be \[4, O, 3, 5\]", {"stride": (2, 1)}),
    ("kernel_size must be an int or a pair", {"kernel_size": "3"}),
    (r"kernel_size must be in \[1, ", {"kernel_size": 0}),
    ("kernel_size must fit into the padded image", {"kernel_size": 8}),
    ("kernel_size must be an int", {"kernel_size": 3.0}),
    ("stride must be an int or a pair", {"stride": (1, 1, 1)}),
    (r"dilation must be in \[1, ", {"dilation": 0}),
    (r"padding must be in \[0, ", {"padding": -1}),
    ('padding must be "same", "valid"', {"padding": "full"}),
    ('padding must not be "same" with a stride', {"padding": "same", "stride": 2}),
    ("groups must divide 6 channels of x and 4 of", {"groups": 3}),
    ("groups must be an int", {"groups": True}),
    ("bias must be a bool", {"bias": torch.zeros(4)}),
    ("multiplicity must divide the 4 rows", {"multiplicity": 3}),
    (r"multiplicity must be in \[1, ", {"multiplicity": 0}),
]


def test_integers_of_numpy():
    x, grad_output = torch.randn(X.shape), torch.randn(G.shape)
    found = conv2d_grad_norms(x, grad_output, np.int64(3), padding=(np.int32(1), 1), multiplicity=np.int64(2))
    assert torch.equal(found, conv2d_grad_norms(x, grad_output, 3, padding=1, multiplicity=2))


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_arguments(message, change):
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: {message}.*, got"):
        conv2d_grad_norms(**{"x": X, "grad_output": G, "kernel_size": 3, "padding": 1, **change})
