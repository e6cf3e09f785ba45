"""conv2d_grad_samples against autograd in float64, record by record."""

import per_record
import pytest
import torch
from backends import on_backends
from per_record import CONVOLUTIONS as CASES

from kr_fast.backends.cpu import privacy as kernels
from kr_fast.backends.privacy_arguments import ConvGradients
from kr_fast.ops.privacy import checks
from kr_fast.ops.privacy.conv2d_grad_samples import conv2d_grad_samples

OP = "conv2d_grad_samples"
LAST = torch.channels_last


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@on_backends(OP)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(backend, name):
    per_record.skip_slow(backend, name)
    case = CASES[name]
    tensors = case.draw()
    wanted = per_record.gradients(case.layer, case.parameters(), *tensors, case.multiplicity)
    layouts = [torch.contiguous_format, LAST]
    if backend.id == "triton-interpreter":  # a second for a few programs
        layouts = [layouts[len(name) % 2]]
    for layout in layouts:
        x, grad_output = (each.to(backend.device).contiguous(memory_format=layout) for each in tensors)
        found = conv2d_grad_samples(x, grad_output, case.kernel, **case.options())
        assert (found[1] is None) == (not case.bias)
        for each, want in zip(found, wanted, strict=False):
            assert each.dtype == torch.float32
            torch.testing.assert_close(each.double().cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_norms_of_what_is_kept(isa, name):
    """Taken by the same kernel on its way."""
    case = CASES[name]
    x, grad_output = (each.contiguous(memory_format=LAST) for each in case.draw())
    values = checks.convolution(OP, x, grad_output, case.kernel, **case.options())
    norms = torch.empty(len(x) // case.multiplicity)
    found = kernels.conv2d_grad_samples(ConvGradients(*values), norms)
    for each, other in zip(found, conv2d_grad_samples(x, grad_output, case.kernel, **case.options()), strict=True):
        assert each is other is None or torch.equal(each, other)
    exact = sum(each.double().flatten(1).square().sum(1) for each in found if each is not None).sqrt()
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)


def test_clipped_sum_is_a_product():
    """What it is for: the sum over records, each with its factor, is the gradient of the weighted loss."""
    case = CASES["stage"]
    x, grad_output = (each.double() for each in case.draw())
    weight = case.parameters()[0].double().requires_grad_()
    factors = torch.tensor([0.25, 0.5], dtype=torch.float64)
    scaled = grad_output * factors[:, None, None, None]
    wanted = torch.autograd.grad(case.layer(x, weight), weight, scaled)[0]
    samples, none = conv2d_grad_samples(x, grad_output, case.kernel, **case.options())
    torch.testing.assert_close(torch.tensordot(factors, samples, 1), wanted)
    assert none is None


@on_backends(OP)
def test_empty_batch(backend):
    x, grad_output = (torch.zeros(0, n, 5, 5, device=backend.device) for n in (4, 6))
    weight, bias = conv2d_grad_samples(x, grad_output, 3, padding=1, groups=2, bias=True)
    assert weight.shape == (0, 6, 2, 3, 3)
    assert bias.shape == (0, 6)


def test_opcheck_and_compile():
    case = CASES["multiplicity"]
    x, grad_output = case.draw()
    for bias in (False, True):
        arguments = x, grad_output, [3, 3], [1, 1], [1, 1], [1, 1], 1, bias, 3
        torch.library.opcheck(torch.ops.kr_fast.conv2d_grad_samples, arguments)
    compiled = torch.compile(conv2d_grad_samples, fullgraph=True, backend="aot_eager")
    found, wanted = (run(x, grad_output, 3, **case.options()) for run in (compiled, conv2d_grad_samples))
    assert all(map(torch.equal, found, wanted))


def test_bad_arguments():
    with pytest.raises(ValueError, match=f"^{OP}: grad_output must be .*, got"):
        conv2d_grad_samples(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), 3)
