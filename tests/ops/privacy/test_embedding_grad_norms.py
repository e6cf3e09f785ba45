"""embedding_grad_norms against autograd in float64, record by record."""

import per_record
import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.ops.privacy.embedding_grad_norms import embedding_grad_norms

OP = "embedding_grad_norms"
# Shape of the indices, D, rows of the table, multiplicity: a label of each row, as a class-conditional network has;
# sequences with few and with many repeats; several rows of a record, which share indices.
CASES = [((7,), 33, 5, 1), ((3, 20), 8, 4, 1), ((2, 3, 6), 17, 1000, 1), ((6, 9), 16, 6, 3), ((6,), 5, 2, 2)]


def draw(case):
    shape, width, rows, _ = case
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, rows, shape, generator=generator), torch.randn(*shape, width, generator=generator) + 0.2


@on_backends(OP)
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case, padding_idx):
    indices, grad_output = draw(case)
    table = torch.zeros(case[2], case[1])

    def layer(indices, weight):
        return F.embedding(indices, weight, padding_idx)

    for dtype in (torch.float32, torch.bfloat16):
        values = grad_output.to(dtype)
        wanted = per_record.norms(layer, [table], indices, values, case[3])
        for integers in (torch.int64, torch.int32):
            on_device = indices.to(backend.device, integers), values.to(backend.device)
            found = embedding_grad_norms(*on_device, padding_idx=padding_idx, multiplicity=case[3])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=0)


def test_float64_is_kept():
    indices, grad_output = draw(CASES[1])
    wanted = per_record.norms(F.embedding, [torch.zeros(4, 8)], indices, grad_output)
    torch.testing.assert_close(embedding_grad_norms(indices, grad_output.double()), wanted, rtol=1e-13, atol=0)


@on_backends(OP)
def test_extremes(backend):
    """Gradients whose squares float32 does not hold, and NaN that stays in its record."""
    indices, grad_output = (each.to(backend.device) for each in draw(CASES[1]))
    wanted = embedding_grad_norms(indices, grad_output)
    for scale in (1e-24, 1e20):
        torch.testing.assert_close(
            embedding_grad_norms(indices, scale * grad_output) / scale, wanted, rtol=2e-5, atol=0
        )
    grad_output[0, 0, 0] = float("nan")
    found = embedding_grad_norms(indices, grad_output)
    assert found[0].isnan()
    assert torch.equal(found[1:], wanted[1:])


@on_backends(OP)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_empty(backend, shape):
    indices = torch.zeros(shape, dtype=torch.int64, device=backend.device)
    found = embedding_grad_norms(indices, torch.ones(*shape, 5, device=backend.device), padding_idx=0)
    assert found.shape == shape[:1]
    assert not found.any()


def test_opcheck_and_compile():
    indices, grad_output = draw(CASES[3])
    torch.library.opcheck(torch.ops.kr_fast.embedding_grad_norms, (indices, grad_output, None, 3))
    compiled = torch.compile(embedding_grad_norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices, grad_output), embedding_grad_norms(indices, grad_output))


INDICES, G = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, 2)
BAD = [
    ("indices must be int64 or", {"indices": INDICES.float()}),
    ("indices must have at least 1", {"indices": INDICES[0, 0]}),
    ("grad_output must be float32 or", {"grad_output": G.long()}),
    (r"grad_output must be \[4, 3, D\]", {"grad_output": G[:, :2]}),
    (r"padding_idx must be in \[0, ", {"padding_idx": -1}),
    ("multiplicity must divide", {"multiplicity": 3}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_arguments(message, change):
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: {message}.*, got"):
        embedding_grad_norms(**{"indices": INDICES, "grad_output": G, **change})
