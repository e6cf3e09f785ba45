"""linear_grad_norms against autograd in float64 record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.linear_grad_norms import linear_grad_norms

OP = "linear_grad_norms"
# Leading shape, I, O, bias, multiplicity: one position, where the norm is a product of two norms; few positions
# (the Gram form is cheaper); many (the gradient is); sizes that no vector or tile divides; several rows of a record.
CASES = [
    ((3,), 1, 1, False, 1),
    ((5,), 70, 33, True, 1),
    ((2, 4), 64, 48, True, 1),
    ((2, 50), 16, 19, False, 1),
    ((2, 3, 30), 7, 40, True, 1),
    ((6,), 40, 10, True, 3),
    ((6, 20), 17, 8, True, 2),
]


def draw(case):
    shape, inputs, outputs, _, _ = case
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(*shape, inputs, generator=generator) + 0.5, torch.randn(*shape, outputs, generator=generator)


def parameters(case):
    return [torch.zeros(case[2], case[1]), torch.zeros(case[2])][: 1 + case[3]]


@on_backends(OP)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        x, grad_output = (each.to(dtype) for each, dtype in zip(draw(case), dtypes, strict=True))
        wanted = per_record.norms(F.linear, parameters(case), x, grad_output, case[4])
        options = {"bias": case[3], "multiplicity": case[4]}
        found = linear_grad_norms(x.to(backend.device), grad_output.to(backend.device), **options)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=0)
        if x.ndim > 2:  # positions that do not follow one another
            x, grad_output = (each.transpose(0, 1).clone().transpose(0, 1) for each in (x, grad_output))
            assert torch.equal(
                linear_grad_norms(x.to(backend.device), grad_output.to(backend.device), **options), found
            )


def test_float64_is_kept():
    x, grad_output = (each.double() for each in draw(CASES[4]))
    found = linear_grad_norms(x, grad_output, bias=True)
    wanted = per_record.norms(F.linear, parameters(CASES[4]), x, grad_output)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


@on_backends(OP)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=str)
def test_extremes(backend, case):
    """Gradients whose squares float32 does not hold, and NaN that stays in its record."""
    x, grad_output = (each.to(backend.device) for each in draw(case))
    wanted = linear_grad_norms(x, grad_output, bias=case[3])
    for scale in (1e-24, 1e20):
        torch.testing.assert_close(
            linear_grad_norms(x, scale * grad_output, bias=case[3]) / scale, wanted, rtol=2e-5, atol=0
        )
    x = x.clone()
    x[0].view(-1)[0] = float("nan")
    found = linear_grad_norms(x, grad_output, bias=case[3])
    assert found[0].isnan()
    assert torch.equal(found[1:], wanted[1:])


@on_backends(OP)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(backend, shape):
    x, grad_output = torch.ones(shape, device=backend.device), torch.ones(*shape[:2], 5, device=backend.device)
    found = linear_grad_norms(x, grad_output)
    assert found.shape == shape[:1]
    assert not found.any()


def test_opcheck_and_compile():
    x, grad_output = draw(CASES[6])
    torch.library.opcheck(torch.ops.kr_fast.linear_grad_norms, (x, grad_output, True, 2))
    compiled = torch.compile(linear_grad_norms, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, grad_output, bias=True), linear_grad_norms(x, grad_output, bias=True))


X, G = torch.zeros(4, 3, 6), torch.zeros(4, 3, 2)
BAD = [
    ("x must be float32 or", {"x": X.long()}),
    ("x must have at least 2 dimensions", {"x": X[0, 0]}),
    ("grad_output must have 3 dimensions", {"grad_output": G[0]}),
    (r"grad_output must be \[4, 3, O\]", {"grad_output": G[:, :2]}),
    ("bias must be a bool", {"bias": 1}),
    ("multiplicity must divide", {"multiplicity": 3}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_arguments(message, change):
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: {message}.*, got"):
        linear_grad_norms(**{"x": X, "grad_output": G, **change})
