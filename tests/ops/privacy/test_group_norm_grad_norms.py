"""group_norm_grad_norms against autograd in float64, record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.group_norm_grad_norms import group_norm_grad_norms

OP = "group_norm_grad_norms"
# Shape, groups, multiplicity: one group, groups of one channel, channels that no vector divides, no pixels.
CASES = [
    ((2, 16, 7, 7), 4, 1),
    ((2, 6, 5, 3), 1, 1),
    ((3, 5, 2, 2), 5, 1),
    ((2, 40, 9), 8, 1),
    ((3, 12), 3, 1),
    ((6, 24, 4, 4), 8, 3),
]


def draw(case):
    generator = torch.Generator().manual_seed(case[1])
    return 2 * torch.randn(case[0], generator=generator) + 1, torch.randn(case[0], generator=generator) + 0.2


def exact(case, x, grad_output, eps=1e-5):
    channels = torch.zeros(case[0][1])

    def layer(x, weight, bias):
        return F.group_norm(x, case[1], weight, bias, eps)

    return per_record.norms(layer, [channels, channels], x, grad_output, case[2])


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    for dtype, eps in ((torch.float32, 1e-5), (torch.float32, 0.3), (torch.bfloat16, 1e-5)):
        x, grad_output = (each.to(dtype) for each in draw(case))
        wanted = exact(case, x, grad_output, eps)
        layouts = [torch.contiguous_format, torch.channels_last] if x.ndim == 4 else [torch.contiguous_format]
        for layout in layouts:
            tensors = (each.to(backend.device).contiguous(memory_format=layout) for each in (x, grad_output))
            found = group_norm_grad_norms(*tensors, case[1], eps=eps, multiplicity=case[2])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=0)


def test_float64_is_kept():
    x, grad_output = (each.double() for each in draw(CASES[0]))
    found = group_norm_grad_norms(x, grad_output, 4)
    torch.testing.assert_close(found, exact(CASES[0], x, grad_output), rtol=1e-13, atol=0)


@on_backends(OP)
def test_a_mean_far_from_zero(backend):
    """The variance is that of the differences from the mean, not of squares less a square."""
    x, grad_output = draw(CASES[0])
    x = x + 300
    found = group_norm_grad_norms(x.to(backend.device), grad_output.to(backend.device), 4)
    torch.testing.assert_close(found.double().cpu(), exact(CASES[0], x, grad_output), rtol=1e-4, atol=0)


@on_backends(OP)
def test_extremes(backend):
    """Gradients whose squares float32 does not hold, and NaN that stays in its record."""
    x, grad_output = (each.to(backend.device) for each in draw(CASES[0]))
    wanted = group_norm_grad_norms(x, grad_output, 4)
    for scale in (1e-24, 1e20):
        torch.testing.assert_close(group_norm_grad_norms(x, scale * grad_output, 4) / scale, wanted, rtol=2e-5, atol=0)
    grad_output[0, 0, 0] = float("nan")
    found = group_norm_grad_norms(x, grad_output, 4)
    assert found[0].isnan()
    assert torch.equal(found[1:], wanted[1:])


@on_backends(OP)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty(backend, shape):
    x = torch.ones(shape, device=backend.device)
    found = group_norm_grad_norms(x, x, 2)
    assert found.shape == shape[:1]
    assert not found.any()


def test_opcheck_and_compile():
    x, grad_output = draw(CASES[5])
    torch.library.opcheck(torch.ops.kr_fast.group_norm_grad_norms, (x, grad_output, 8, 1e-5, 3))
    compiled = torch.compile(group_norm_grad_norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, grad_output, 8), group_norm_grad_norms(x, grad_output, 8))


X = torch.zeros(4, 6, 3)
BAD = [
    ("x must be float32 or", {"x": X.long()}),
    ("x must have at least 2 dimensions", {"x": X[0, 0]}),
    (r"grad_output must be \[4, 6, 3\]", {"grad_output": X[:, :, :2]}),
    ("groups must divide the 6 channels", {"groups": 4}),
    (r"groups must be in \[1, ", {"groups": 0}),
    ("eps must be a finite number", {"eps": -1.0}),
    ("eps must be a finite number", {"eps": float("nan")}),
    ("multiplicity must divide", {"multiplicity": 3}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_arguments(message, change):
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: {message}.*, got"):
        group_norm_grad_norms(**{"x": X, "grad_output": X, "groups": 2, **change})
