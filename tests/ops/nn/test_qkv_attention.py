"""qkv_attention and its gradient on every backend: float64, large scores, special values, threads, arguments."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast


class Case(NamedTuple):
    """Images, tokens, heads and channels of a head, and the regime of a kernel that they reach."""

    n: int
    t: int
    heads: int
    d: int
    why: str
    on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.n}x{self.t}x{self.heads}x{self.d}"


# Each compiled head size, and one that is not.
CASES = [
    Case(2, 1, 2, 8, "one token"),
    Case(3, 5, 1, 16, "fewer tokens than lanes", ("cpu",)),
    Case(2, 16, 2, 16, "one vector of queries", ("cpu",)),
    Case(2, 17, 2, 8, "one and a query: an odd number, where two share a vector", ("cpu",)),
    Case(2, 33, 2, 32, "two vectors, a tile of keys and one more", ("cpu",)),
    Case(2, 49, 3, 8, "7 px"),
    Case(2, 64, 1, 64, "8 px", ("cpu",)),
    Case(1, 196, 2, 16, "14 px: a last block of four queries and a last tile of four keys", ("cpu",)),
    Case(2, 7, 2, 12, "no such kernel", ("reference",)),
]
HALF = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALF)
everywhere = on_backends("qkv_attention", cases=CASES)


def draw(case, dtype=torch.float32):
    n, t, heads, d, *_ = case
    generator = torch.Generator().manual_seed(n + t + heads + d)
    qkv, grad = (torch.randn(n, t, parts * heads * d, generator=generator).to(dtype) for parts in (3, 1))
    return qkv, grad


def library(qkv, heads):
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def gradient(qkv, grad, heads, attention=kr_fast.qkv_attention):
    leaf = qkv.detach().requires_grad_()
    (result,) = torch.autograd.grad(attention(leaf, heads), leaf, grad)
    return result


def exact_gradient(qkv, grad, heads):
    return gradient(qkv.double(), grad.double(), heads, library)


def close(result, expected):
    # A convex combination of values up to 4: rounded once to the dtype, after float32 sums.
    relative = {torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}.get(result.dtype, 0)
    torch.testing.assert_close(result.double(), expected, rtol=relative, atol=4e-6)


@everywhere
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values(backend, case, dtype):
    qkv, _ = draw(case, dtype)
    before = qkv.clone()
    result = kr_fast.qkv_attention(qkv, case.heads)
    assert result.dtype == dtype
    assert result.is_contiguous()
    close(result, library(qkv.double(), case.heads))
    assert torch.equal(qkv, before)


@everywhere
def test_gradients(backend, case):
    qkv, grad = draw(case)
    before = qkv.clone()
    result, expected = gradient(qkv, grad, case.heads), exact_gradient(qkv, grad, case.heads)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    torchs = gradient(qkv, grad, case.heads, library).double()
    for name, ours, definition, theirs in zip(
        "qkv", *(each.chunk(3, 2) for each in (result.double(), expected, torchs)), strict=True
    ):
        # Two roundings of the largest number where the library is exact, as for one token.
        allowed = 3 * (theirs - definition).abs().max() + 2**-22 * expected.abs().max()
        assert (ours - definition).abs().max() <= allowed, name
    assert torch.equal(qkv, before)


@on_backends("qkv_attention", cases=[CASES[3]._replace(on=()), CASES[6]])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_in_half_precision(backend, case, dtype):
    qkv, grad = draw(case, dtype)
    result, expected = gradient(qkv, grad, case.heads), exact_gradient(qkv, grad, case.heads)
    assert result.dtype == dtype
    # The output, of which the row sums of dO . O are made, and the gradient are rounded.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps, atol=4 * eps)


@on_backends("qkv_attention")
def test_scores_of_any_size(backend):
    """Scores of a thousand: the exponentials of all but a few keys are 0, and none overflows."""
    qkv, grad = draw((2, 70, 2, 8))
    qkv[:, :, :32] *= 20  # q and k
    torch.testing.assert_close(kr_fast.qkv_attention(qkv, 2).double(), library(qkv.double(), 2), rtol=0, atol=2e-4)
    expected = exact_gradient(qkv, grad, 2)
    torchs = (gradient(qkv, grad, 2, library).double() - expected).abs().max()
    assert (gradient(qkv, grad, 2).double() - expected).abs().max() <= 3 * torchs
    # The largest score comes in the last tile, so every sum before it is scaled to nothing.
    qkv[:, :, :32] = 0
    qkv[:, :, 0] = 1.0
    qkv[:, 69, 16] = 1e4
    assert torch.equal(kr_fast.qkv_attention(qkv, 2)[:, :, :8], qkv[:, 69:, 32:40].expand(-1, 70, -1))


@on_backends("qkv_attention")
def test_nan_and_inf_stay_in_their_image_and_head(backend):
    qkv, grad = draw((2, 40, 2, 8))
    expected, slopes = kr_fast.qkv_attention(qkv, 2), gradient(qkv, grad, 2).unflatten(2, (3, 2, 8))
    for value in (float("nan"), float("inf")):
        for where in ("key", "upstream gradient"):
            touched, upstream = qkv.clone(), grad.clone()
            if where == "key":
                touched[0, 3, 16 + 9] = value  # of the second head
                result = kr_fast.qkv_attention(touched, 2)
                assert result[0, :, 8:].isnan().all() or value == float("inf")
                assert torch.equal(result[0, :, :8], expected[0, :, :8])
                assert torch.equal(result[1], expected[1])
            else:
                upstream[0, 3, 9] = value
            result = gradient(touched, upstream, 2).unflatten(2, (3, 2, 8))
            assert torch.equal(result[0, :, :, 0], slopes[0, :, :, 0])
            assert torch.equal(result[1], slopes[1])
            assert not result[0, :, 1:, 1].isfinite().any(2).all()
            # Every query sees the key; of a query's upstream gradient, its own row alone learns.
            assert result[0, :, 0, 1].isfinite().all(1).sum() == (0 if where == "key" else 39)
    qkv[1, 7, 2] = float("nan")  # a query: its row alone
    result = kr_fast.qkv_attention(qkv, 2)
    assert result[1, 7, :8].isnan().all()
    assert result.isnan().sum() == 8


@on_backends("qkv_attention")
def test_the_logsumexp_is_that_of_the_scores(backend):
    qkv, _ = draw((2, 49, 3, 8))
    out, logsumexp = torch.ops.kr_fast.qkv_attention_forward(qkv, 3)
    assert torch.equal(out, kr_fast.qkv_attention(qkv, 3))
    q, k, _ = qkv.double().unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 8**0.5).logsumexp(3)
    torch.testing.assert_close(logsumexp.double(), expected, rtol=1e-6, atol=1e-6)


@on_backends("qkv_attention", "cpu", cases=CASES[:-1])
def test_bits_do_not_depend_on_threads_neighbours_or_alignment(backend, by_threads, case):
    qkv, grad = draw((5, *case[1:]))

    def both(qkv, grad):
        return torch.stack([kr_fast.qkv_attention(qkv, case.heads), *gradient(qkv, grad, case.heads).chunk(3, 2)])

    expected, *others = by_threads(lambda: both(qkv, grad))
    assert all(torch.equal(each, expected) for each in others)
    moved = torch.empty(qkv.numel() + 1)[1:].view_as(qkv).copy_(qkv)
    assert torch.equal(both(moved, grad), expected)
    assert torch.equal(both(qkv[2:4], grad[2:4]), expected[:, 2:4])


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


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 70), st.integers(1, 3), st.sampled_from([8, 16, 32, 64]), st.sampled_from(TYPES)
)
def test_any_shape(batch, tokens, heads, d, dtype):
    qkv, _ = draw((batch, tokens, heads, d), dtype)
    result = kr_fast.qkv_attention(qkv, heads)
    assert result.shape == (batch, tokens, heads * d)
    close(result, library(qkv.double(), heads))


@pytest.mark.parametrize(("d", "dtype"), [(5, torch.float32), (8, torch.float64)], ids=str)
def test_other_heads_and_float64_take_the_reference(d, dtype):
    qkv, grad = draw((2, 7, 3, d), dtype)
    close(kr_fast.qkv_attention(qkv, 3), library(qkv.double(), 3))
    torch.testing.assert_close(gradient(qkv, grad, 3).double(), exact_gradient(qkv, grad, 3), rtol=1e-5, atol=1e-6)


def test_a_graph_recorded_without_gradient_computes_the_logsumexp_again():
    qkv, grad = draw((2, 9, 2, 8))
    assert torch.equal(gradient(qkv, grad, 2, torch.ops.kr_fast.qkv_attention), gradient(qkv, grad, 2))


@pytest.mark.parametrize(
    ("qkv", "heads", "error", "text"),
    [
        (torch.zeros(2, 24), 1, ValueError, "qkv must have 3 dimensions"),
        (torch.zeros(2, 4, 24).int(), 1, TypeError, "qkv must be float32 or bfloat16"),
        (torch.zeros(2, 4, 24), 3, ValueError, r"qkv must have 3 \* 3 heads \* d channels, got float32 \[2, 4, 24\]"),
        (torch.zeros(2, 4, 24), 0, ValueError, "heads must be in"),
        (torch.zeros(2, 4, 24), 1.0, TypeError, "heads must be an int"),
        (torch.zeros(2, 24, 4).transpose(1, 2), 1, ValueError, "qkv must be contiguous, got .* with strides"),
    ],
)
def test_bad_arguments_are_named(qkv, heads, error, text):
    with pytest.raises(error, match="qkv_attention: " + text):
        kr_fast.qkv_attention(qkv, heads)


def test_opcheck_and_compile():
    qkv, grad = draw((2, 9, 2, 8))
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention, (qkv, 2))
    qkv.requires_grad_()
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention_forward, (qkv, 2))
    out, logsumexp = torch.ops.kr_fast.qkv_attention_forward(qkv.detach(), 2)
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention_backward, (grad, qkv.detach(), out, logsumexp, 2))
    compiled = torch.compile(lambda x: kr_fast.qkv_attention(2 * x, 2) * grad, fullgraph=True, backend="aot_eager")
    result = compiled(qkv)
    assert torch.equal(result, kr_fast.qkv_attention(2 * qkv, 2) * grad)
    (slopes,) = torch.autograd.grad(result.sum(), qkv)
    torch.testing.assert_close(slopes, 2 * gradient(2 * qkv, grad, 2), rtol=0, atol=0)
