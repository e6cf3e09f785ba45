"""group_norm_grad_samples against autograd in float64, record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.group_norm_grad_norms import group_norm_grad_norms
from kr_fast.ops.privacy.group_norm_grad_samples import group_norm_grad_samples

OP = "group_norm_grad_samples"
# Shape, groups, multiplicity: several chunks or tiles of pixels with a tail, in the sums of which a mean moves; fewer
# channels than a vector; a group of more than a tile; several rows of a record.
CASES = [((2, 24, 13, 17), 4, 1), ((3, 5, 2, 2), 5, 1), ((2, 160, 3, 3), 1, 1), ((4, 12, 50), 3, 2)]


def draw(case):
    generator = torch.Generator().manual_seed(case[1])
    x = torch.randn(case[0], generator=generator) + torch.linspace(0, 9, case[0][-1])
    return x, torch.randn(case[0], generator=generator) + 0.2


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    def layer(x, weight, bias):
        return F.group_norm(x, case[1], weight, bias)

    channels = torch.zeros(case[0][1])
    tensors = draw(case)
    wanted = per_record.gradients(layer, [channels, channels], *tensors, case[2])
    for layout in [torch.contiguous_format, torch.channels_last][: tensors[0].ndim - 2]:
        x, grad_output = (each.to(backend.device).contiguous(memory_format=layout) for each in tensors)
        found = group_norm_grad_samples(x, grad_output, case[1], multiplicity=case[2])
        for each, want in zip(found, wanted, strict=True):
            assert each.dtype == torch.float32
            torch.testing.assert_close(each.double().cpu(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    norms = group_norm_grad_norms(x, grad_output, case[1], multiplicity=case[2])
    torch.testing.assert_close(torch.cat(found, 1).norm(dim=1), norms, rtol=1e-5, atol=0)


@on_backends(OP)
def test_empty(backend):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x = torch.ones(shape, device=backend.device)
        for found in group_norm_grad_samples(x, x, 2):
            assert torch.equal(found.cpu(), torch.zeros(shape[0], 4))


def test_bits_do_not_depend_on_threads_or_neighbours(by_threads):
    x, grad_output = draw(((5, 24, 9, 9), 4, 1))
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [each.contiguous(memory_format=layout) for each in (x, grad_output)]
        one, *others = by_threads(lambda tensors=tensors: torch.stack(group_norm_grad_samples(*tensors, 4)))
        assert all(torch.equal(one, each) for each in others)
        alone = group_norm_grad_samples(*(each[3:4] for each in tensors), 4)
        assert torch.equal(torch.stack(alone), one[:, 3:4])


def test_opcheck_and_compile():
    x, grad_output = draw(CASES[3])
    torch.library.opcheck(torch.ops.kr_fast.group_norm_grad_samples, (x, grad_output, 3, 1e-5, 2))
    compiled = torch.compile(group_norm_grad_samples, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x, grad_output, 3), group_norm_grad_samples(x, grad_output, 3)))


def test_bad_arguments():
    with pytest.raises(ValueError, match=f"^{OP}: groups must divide the 6 channels of x, got 4"):
        group_norm_grad_samples(torch.zeros(2, 6, 3), torch.zeros(2, 6, 3), 4)
