"""linear_grad_samples against autograd in float64, record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.backends.cpu import privacy as kernels
from kr_fast.backends.privacy_arguments import LinearGradients
from kr_fast.ops.privacy.checks import positions
from kr_fast.ops.privacy.linear_grad_samples import linear_grad_samples

OP = "linear_grad_samples"
# Leading shape, I, O, multiplicity: one position and many, sizes that no vector divides, several rows of a record.
CASES = [((3,), 70, 33, 1), ((2, 30), 16, 16, 1), ((6, 5), 7, 19, 3)]


@on_backends(OP)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case, bias):
    shape, inputs, outputs, multiplicity = case
    generator = torch.Generator().manual_seed(inputs)
    x, grad_output = (torch.randn(*shape, n, generator=generator) for n in (inputs, outputs))
    parameters = [torch.zeros(outputs, inputs), torch.zeros(outputs)][: 1 + bias]
    wanted = per_record.gradients(F.linear, parameters, x, grad_output, multiplicity)
    on_device = x.to(backend.device), grad_output.to(backend.device)
    found = linear_grad_samples(*on_device, bias=bias, multiplicity=multiplicity)
    assert (found[1] is None) == (not bias)
    for each, want in zip(found, wanted, strict=False):
        torch.testing.assert_close(each.double().cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_of_what_is_kept(isa, case, bias):
    """Taken by the same kernel on its way."""
    shape, inputs, outputs, multiplicity = case
    x, grad_output = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    call = LinearGradients(positions(x), positions(grad_output), bias, multiplicity)
    norms = torch.empty(shape[0] // multiplicity)
    found = kernels.linear_grad_samples(call, norms)
    for each, other in zip(
        found, linear_grad_samples(x, grad_output, bias=bias, multiplicity=multiplicity), strict=True
    ):
        assert each is other is None or torch.equal(each, other)
    exact = sum(each.double().flatten(1).square().sum(1) for each in found if each is not None).sqrt()
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)


@on_backends(OP)
def test_empty(backend):
    for shape in ((0, 3, 4), (2, 0, 4)):
        x, grad_output = torch.ones(shape, device=backend.device), torch.ones(*shape[:2], 5, device=backend.device)
        weight, bias = linear_grad_samples(x, grad_output, bias=True)
        assert torch.equal(weight.cpu(), torch.zeros(shape[0], 5, 4))
        assert torch.equal(bias.cpu(), torch.zeros(shape[0], 5))


def test_opcheck_and_compile():
    x, grad_output = torch.randn(4, 3, 6), torch.randn(4, 3, 5)
    for bias in (False, True):
        torch.library.opcheck(torch.ops.kr_fast.linear_grad_samples, (x, grad_output, bias, 2))
    compiled = torch.compile(linear_grad_samples, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, grad_output)[0], linear_grad_samples(x, grad_output)[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match=rf"^{OP}: grad_output must be \[2, O\].*, got"):
        linear_grad_samples(torch.zeros(2, 3), torch.zeros(3, 3))
