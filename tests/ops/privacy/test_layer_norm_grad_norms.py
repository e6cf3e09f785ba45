"""layer_norm_grad_norms against autograd in float64, record by record."""

import numpy as np
import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.layer_norm_grad_norms import layer_norm_grad_norms

OP = "layer_norm_grad_norms"
# Shape, normalized_shape, bias, multiplicity: vectors, sequences, images, sizes that no vector divides.
CASES = [
    ((3, 33), (33,), True, 1),
    ((2, 9, 64), (64,), True, 1),
    ((2, 3, 5, 17), (17,), False, 1),
    ((2, 4, 3, 6), (3, 6), True, 1),
    ((6, 10, 24), (24,), True, 3),
]


def draw(case):
    generator = torch.Generator().manual_seed(len(case[0]))
    return 2 * torch.randn(case[0], generator=generator) + 1, torch.randn(case[0], generator=generator) + 0.2


def exact(case, x, grad_output, eps=1e-5):
    def layer(x, weight, bias=None):
        return F.layer_norm(x, case[1], weight, bias, eps)

    return per_record.norms(layer, [torch.zeros(case[1])] * (1 + case[2]), x, grad_output, case[3])


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    for dtype, eps in ((torch.float32, 1e-5), (torch.float32, 0.3), (torch.bfloat16, 1e-5)):
        x, grad_output = (each.to(dtype) for each in draw(case))
        tensors = (each.to(backend.device) for each in (x, grad_output))
        found = layer_norm_grad_norms(*tensors, case[1], eps=eps, bias=case[2], multiplicity=case[3])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double().cpu(), exact(case, x, grad_output, eps), rtol=1e-5, atol=0)


def test_float64_is_kept():
    x, grad_output = (each.double() for each in draw(CASES[1]))
    found = layer_norm_grad_norms(x, grad_output, 64)
    torch.testing.assert_close(found, exact(CASES[1], x, grad_output), rtol=1e-13, atol=0)


@on_backends(OP)
def test_extremes(backend):
    """Gradients whose squares float32 does not hold, and NaN that stays in its record."""
    x, grad_output = (each.to(backend.device) for each in draw(CASES[1]))
    wanted = layer_norm_grad_norms(x, grad_output, 64)
    for scale in (1e-24, 1e20):
        torch.testing.assert_close(layer_norm_grad_norms(x, scale * grad_output, 64) / scale, wanted, rtol=2e-5, atol=0)
    grad_output[0, 0, 0] = float("nan")
    found = layer_norm_grad_norms(x, grad_output, 64)
    assert found[0].isnan()
    assert torch.equal(found[1:], wanted[1:])


@on_backends(OP)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)], ids=str)
def test_empty(backend, shape):
    x = torch.ones(shape, device=backend.device)
    found = layer_norm_grad_norms(x, x, 3)
    assert found.shape == shape[:1]
    assert not found.any()


def test_opcheck_and_compile():
    x, grad_output = draw(CASES[4])
    torch.library.opcheck(torch.ops.kr_fast.layer_norm_grad_norms, (x, grad_output, 1e-5, True, 3))
    compiled = torch.compile(layer_norm_grad_norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, grad_output, 24), layer_norm_grad_norms(x, grad_output, 24))


def test_numbers_of_numpy():
    x, grad_output = draw(CASES[4])
    found = layer_norm_grad_norms(x, grad_output, np.int64(24), eps=np.float32(1e-5), multiplicity=np.int64(1))
    assert torch.equal(found, layer_norm_grad_norms(x, grad_output, 24, eps=float(np.float32(1e-5))))


X = torch.zeros(4, 6, 3)
BAD = [
    ("x must be float32 or", {"x": X.long()}),
    (r"grad_output must be \[4, 6, 3\]", {"grad_output": X[:, :, :2]}),
    ("normalized_shape must be the last dimensions", {"normalized_shape": 6}),
    ("normalized_shape must be the last dimensions", {"normalized_shape": (4, 6, 3)}),
    ("normalized_shape must be the last dimensions", {"normalized_shape": ()}),
    ("normalized_shape must be an int or a sequence", {"normalized_shape": 3.0}),
    ("normalized_shape must be an int", {"normalized_shape": [3.0]}),
    ("eps must be a finite number", {"eps": "1"}),
    ("bias must be a bool", {"bias": None}),
    ("multiplicity must divide", {"multiplicity": 3}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_arguments(message, change):
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: {message}.*, got"):
        layer_norm_grad_norms(**{"x": X, "grad_output": X, "normalized_shape": 3, **change})
