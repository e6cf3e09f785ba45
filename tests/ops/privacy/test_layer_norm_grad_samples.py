"""layer_norm_grad_samples against autograd in float64, record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.layer_norm_grad_norms import layer_norm_grad_norms
from kr_fast.ops.privacy.layer_norm_grad_samples import layer_norm_grad_samples

OP = "layer_norm_grad_samples"
# Shape, normalized_shape, multiplicity: one position; several, by fours and a rest; two dimensions; rows of a record.
CASES = [((3, 33), (33,), 1), ((2, 11, 40), (40,), 1), ((2, 4, 3, 6), (3, 6), 1), ((6, 3, 24), (24,), 3)]


def draw(case):
    generator = torch.Generator().manual_seed(len(case[0]))
    return 2 * torch.randn(case[0], generator=generator) + 1, torch.randn(case[0], generator=generator) + 0.2


@on_backends(OP)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case, bias):
    def layer(x, weight, bias=None):
        return F.layer_norm(x, case[1], weight, bias)

    tensors = draw(case)
    wanted = per_record.gradients(layer, [torch.zeros(case[1])] * (1 + bias), *tensors, case[2])
    x, grad_output = (each.to(backend.device) for each in tensors)
    found = layer_norm_grad_samples(x, grad_output, case[1], bias=bias, multiplicity=case[2])
    assert (found[1] is None) == (not bias)
    for each, want in zip(found, wanted, strict=False):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each.double().cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    norms = layer_norm_grad_norms(x, grad_output, case[1], bias=bias, multiplicity=case[2])
    both = torch.cat([each.flatten(1) for each in found[: 1 + bias]], 1)
    torch.testing.assert_close(both.norm(dim=1), norms, rtol=1e-5, atol=0)


@on_backends(OP)
def test_empty(backend):
    for shape in ((0, 4, 3), (2, 0, 3)):
        x = torch.ones(shape, device=backend.device)
        for found in layer_norm_grad_samples(x, x, 3):
            assert torch.equal(found.cpu(), torch.zeros(shape[0], 3))


def test_bits_do_not_depend_on_threads_or_neighbours(by_threads):
    x, grad_output = draw(((5, 7, 40), (40,), 1))
    one, *others = by_threads(lambda: torch.stack(layer_norm_grad_samples(x, grad_output, 40)))
    assert all(torch.equal(one, each) for each in others)
    assert torch.equal(torch.stack(layer_norm_grad_samples(x[3:4], grad_output[3:4], 40)), one[:, 3:4])


def test_opcheck_and_compile():
    x, grad_output = draw(CASES[3])
    for bias in (False, True):
        torch.library.opcheck(torch.ops.kr_fast.layer_norm_grad_samples, (x, grad_output, 1e-5, bias, 3))
    compiled = torch.compile(layer_norm_grad_samples, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x, grad_output, 24), layer_norm_grad_samples(x, grad_output, 24)))


def test_bad_arguments():
    with pytest.raises(ValueError, match=f"^{OP}: normalized_shape must be the last dimensions of x.*, got 6"):
        layer_norm_grad_samples(torch.zeros(2, 6, 3), torch.zeros(2, 6, 3), 6)
