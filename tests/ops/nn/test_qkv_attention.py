"""qkv_attention: values against float64, large scores, special values, threads, arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast

_cpu = pytest.importorskip("kr_fast._cpu", reason="kr_fast._cpu is not built")
# N, T, heads, d by regime: one token; fewer tokens than lanes; 16 = one vector of AVX-512; 33: a tile of keys and one,
# a tail of queries; 49 and 196: 7 and 14 px; each compiled head size.
CASES = [(2, 1, 2, 8), (3, 5, 1, 16), (2, 16, 4, 16), (2, 33, 2, 8), (2, 49, 8, 8), (1, 196, 2, 32), (2, 64, 1, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(case, dtype=torch.float32, scale=1.0):
    n, t, heads, d = case
    generator = torch.Generator().manual_seed(sum(case))
    return (torch.randn(n, t, 3 * heads * d, generator=generator) * scale).to(dtype)


def exact(qkv, heads):
    q, k, v = qkv.double().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def close(got, want, dtype):
    # A convex combination of values up to 4: rounded once to the dtype, after float32 sums.
    relative = {torch.float32: 0, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=4e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_against_float64(isa, case, dtype):
    qkv = draw(case, dtype)
    before = qkv.clone()
    got = kr_fast.qkv_attention(qkv, case[2])
    assert got.dtype == dtype
    assert got.is_contiguous()
    close(got, exact(qkv, case[2]), dtype)
    assert torch.equal(qkv, before)


def test_scores_of_any_size(isa):
    """Scores of a thousand: the exponentials of all but a few keys are 0, and none overflows."""
    qkv = draw((2, 70, 2, 8))
    qkv[:, :, :32] *= 20  # q and k
    torch.testing.assert_close(kr_fast.qkv_attention(qkv, 2).double(), exact(qkv, 2), rtol=0, atol=2e-4)
    # The largest score comes in the last tile, so every sum before it is scaled to nothing.
    qkv[:, :, :32] = 0
    qkv[:, :, 0] = 1.0
    qkv[:, 69, 16] = 1e4
    assert torch.equal(kr_fast.qkv_attention(qkv, 2)[:, :, :8], qkv[:, 69:, 32:40].expand(-1, 70, -1))


def test_nan_and_inf_stay_in_their_image_and_head(isa):
    qkv = draw((2, 40, 2, 8))
    want = kr_fast.qkv_attention(qkv, 2)
    qkv[0, 3, 16 + 9] = float("nan")  # a key of the second head
    got = kr_fast.qkv_attention(qkv, 2)
    assert got[0, :, 8:].isnan().all()
    assert torch.equal(got[0, :, :8], want[0, :, :8])
    assert torch.equal(got[1], want[1])
    qkv = draw((2, 40, 2, 8))
    qkv[1, 7, 2] = float("nan")  # a query: its row alone
    got = kr_fast.qkv_attention(qkv, 2)
    assert got[1, 7, :8].isnan().all()
    assert got.isnan().sum() == 8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_threads_neighbours_or_alignment(isa, case):
    t, heads, d = case[1:]
    qkv = draw((5, t, heads, d))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = kr_fast.qkv_attention(qkv, heads)
        torch.set_num_threads(3)
        assert torch.equal(kr_fast.qkv_attention(qkv, heads), want)
    finally:
        torch.set_num_threads(before)
    moved = torch.empty(qkv.numel() + 1)[1:].view_as(qkv).copy_(qkv)
    assert torch.equal(kr_fast.qkv_attention(moved, heads), want)
    assert torch.equal(kr_fast.qkv_attention(qkv[2:4], heads), want[2:4])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 70), st.integers(1, 3), st.sampled_from([8, 16, 32, 64]), st.sampled_from(TYPES)
)
def test_any_shape(batch, tokens, heads, d, dtype):
    qkv = draw((batch, tokens, heads, d), dtype)
    got = kr_fast.qkv_attention(qkv, heads)
    assert got.shape == (batch, tokens, heads * d)
    close(got, exact(qkv, heads), dtype)


@pytest.mark.parametrize(("d", "dtype"), [(5, torch.float32), (8, torch.float64)], ids=str)
def test_other_heads_and_float64_take_the_reference(d, dtype):
    qkv = draw((2, 7, 3, d), dtype)
    torch.testing.assert_close(kr_fast.qkv_attention(qkv, 3).double(), exact(qkv, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_reference_agrees_in_each_dtype(reference, dtype):
    qkv = draw((2, 33, 2, 8), dtype)
    close(kr_fast.qkv_attention(qkv, 2), exact(qkv, 2), dtype)


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
    qkv = draw((2, 9, 2, 8))
    torch.library.opcheck(torch.ops.kr_fast.qkv_attention, (qkv, 2))
    compiled = torch.compile(lambda x: kr_fast.qkv_attention(x, 2), fullgraph=True, backend="eager")
    assert torch.equal(compiled(qkv), kr_fast.qkv_attention(qkv, 2))
