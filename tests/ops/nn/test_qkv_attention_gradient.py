"""The gradient of qkv_attention: against float64 by regime, special values, upstream gradients, threads, compile."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

import kr_fast

# N, T, heads, d by regime: one token; fewer tokens than lanes; one vector of queries; one and a query (an odd number,
# where two queries share a vector); two vectors, a tile of keys and one more; 7 and 8 px; 14 px: a last block of four
# queries and a last tile of four keys. Each compiled head size, and one that is not.
CASES = [
    (2, 1, 2, 8),
    (3, 5, 1, 16),
    (2, 16, 2, 16),
    (2, 17, 2, 8),
    (2, 33, 2, 32),
    (2, 49, 3, 8),
    (2, 64, 1, 64),
    (1, 196, 2, 16),
    (2, 7, 2, 12),
]
HALF = [torch.bfloat16, torch.float16]


def draw(case, dtype=torch.float32):
    n, t, heads, d = case
    generator = torch.Generator().manual_seed(sum(case))
    qkv, grad = (torch.randn(n, t, parts * heads * d, generator=generator).to(dtype) for parts in (3, 1))
    return qkv.requires_grad_(), grad


def gradient(qkv, grad, heads):
    (found,) = torch.autograd.grad(kr_fast.qkv_attention(qkv, heads), qkv, grad)
    return found


def library(qkv, grad, heads):
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    (found,) = torch.autograd.grad(out, qkv, grad.to(out.dtype))
    return found


def exact(qkv, grad, heads):
    return library(qkv.detach().double().requires_grad_(), grad.double(), heads)


def supported(backend, case):
    if backend.name == "cpu" and case[3] == 12:
        pytest.skip("no such kernel")


@on_backends("qkv_attention")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case):
    supported(backend, case)
    qkv, grad = draw(case)
    before, heads = qkv.detach().clone(), case[2]
    found, expected = gradient(qkv, grad, heads), exact(qkv, grad, heads)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torchs = library(qkv, grad, heads).double()
    for name, *parts in zip("qkv", *(each.chunk(3, 2) for each in (found.double(), expected, torchs)), strict=True):
        ours, definition, theirs = parts
        # Two roundings of the largest number where the library is exact, as for one token.
        allowed = 3 * (theirs - definition).abs().max() + 2**-22 * expected.abs().max()
        assert (ours - definition).abs().max() <= allowed, name
    assert torch.equal(qkv.detach(), before)


@on_backends("qkv_attention")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
def test_half_precision(backend, case, dtype):
    qkv, grad = draw(case, dtype)
    found = gradient(qkv, grad, case[2])
    assert found.dtype == dtype
    # The output, of which the row sums of dO . O are made, and the gradient are rounded.
    torch.testing.assert_close(
        found.double(), exact(qkv, grad, case[2]), rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@on_backends("qkv_attention")
def test_scores_of_any_size(backend):
    """Scores of a thousand: most weights are 0, and none of the exponentials overflows."""
    qkv, grad = draw((2, 70, 2, 8))
    with torch.no_grad():
        qkv[:, :, :32] *= 20  # q and k
    found, expected = gradient(qkv, grad, 2), exact(qkv, grad, 2)
    torchs = (library(qkv, grad, 2).double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 3 * torchs


@on_backends("qkv_attention")
def test_the_logsumexp_is_that_of_the_scores(backend):
    qkv, _ = draw((2, 49, 3, 8))
    out, logsumexp = torch.ops.kr_fast.qkv_attention_forward(qkv.detach(), 3)
    assert torch.equal(out, kr_fast.qkv_attention(qkv.detach(), 3))
    q, k, _ = qkv.detach().double().unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 8**0.5).logsumexp(3)
    torch.testing.assert_close(logsumexp.double(), expected, rtol=1e-6, atol=1e-6)


@on_backends("qkv_attention")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["key", "upstream gradient"])
def test_nan_and_inf_stay_in_their_image_and_head(backend, where, value):
    qkv, grad = draw((2, 40, 2, 8))
    expected = gradient(qkv, grad, 2).unflatten(2, (3, 2, 8))
    with torch.no_grad():  # of the second head
        if where == "key":
            qkv[0, 3, 16 + 9] = value
        else:
            grad[0, 3, 9] = value
    found = gradient(qkv, grad, 2).unflatten(2, (3, 2, 8))
    assert torch.equal(found[0, :, :, 0], expected[0, :, :, 0])
    assert torch.equal(found[1], expected[1])
    assert not found[0, :, 1:, 1].isfinite().any(2).all()
    # Every query sees the key; of a query's upstream gradient, its own row alone learns.
    assert found[0, :, 0, 1].isfinite().all(1).sum() == (0 if where == "key" else 39)


@on_backends("qkv_attention", "cpu")
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_bits_do_not_depend_on_threads_neighbours_or_alignment(backend, by_threads, case):
    qkv, grad = draw((5, *case[1:]))
    expected, *others = by_threads(lambda: gradient(qkv, grad, case[2]))
    assert all(torch.equal(each, expected) for each in others)
    moved = torch.empty(qkv.numel() + 1)[1:].view_as(qkv).copy_(qkv.detach()).requires_grad_()
    assert torch.equal(gradient(moved, grad, case[2]), expected)
    assert torch.equal(gradient(qkv.detach()[2:4].requires_grad_(), grad[2:4], case[2]), expected[2:4])


@on_backends("qkv_attention")
def test_upstream_gradients_of_any_strides(backend):
    qkv, _ = draw((2, 9, 2, 8))
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for grad in (row.expand(2, 9, 16), row.repeat(2, 9, 1).transpose(0, 1).contiguous().transpose(0, 1)):
        assert not grad.is_contiguous()
        assert torch.equal(gradient(qkv, grad, 2), gradient(qkv, grad.contiguous(), 2))


@on_backends("qkv_attention")
@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48)], ids=str)
def test_empty(backend, shape):
    qkv = torch.zeros(shape, requires_grad=True)
    kr_fast.qkv_attention(qkv, 2).sum().backward()
    assert qkv.grad.shape == shape


def test_float64_takes_the_reference():
    qkv, grad = draw((2, 9, 2, 8), torch.float64)
    torch.testing.assert_close(gradient(qkv, grad, 2), exact(qkv, grad, 2))


def test_a_graph_recorded_without_gradient_computes_the_logsumexp_again():
    qkv, grad = draw((2, 9, 2, 8))
    (found,) = torch.autograd.grad(torch.ops.kr_fast.qkv_attention(qkv, 2), qkv, grad)
    assert torch.equal(found, gradient(qkv, grad, 2))


def test_opcheck_and_compile():
    qkv, grad = draw((2, 9, 2, 8))
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention_forward, (qkv, 2))
    out, logsumexp = torch.ops.kr_fast.qkv_attention_forward(qkv.detach(), 2)
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention_backward, (grad, qkv.detach(), out, logsumexp, 2))
    compiled = torch.compile(lambda x: kr_fast.qkv_attention(2 * x, 2) * grad, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
    torch.testing.assert_close(found, 2 * gradient((2 * qkv.detach()).requires_grad_(), grad, 2), rtol=0, atol=0)
