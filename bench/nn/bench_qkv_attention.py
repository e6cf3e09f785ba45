"""qkv_attention against torch's fused attention on the same tensor: inference, and forward with backward.

``sdpa`` is F.scaled_dot_product_attention on views of q, k and v and a copy of its output to [N, T, C]; ``compile`` the
formula under torch.compile, and for the gradient ``sdpa`` under torch.compile.
"""

import pytest
import torch
import torch.nn.functional as F

import kr_fast

# N, T, heads, d: 14 and 7 px with diffusers' head size; the 8x8 digits UNet; 16 px with larger heads.
CASES = [(64, 196, 8, 8), (64, 49, 8, 8), (256, 16, 4, 16), (16, 256, 8, 32), (16, 256, 4, 64)]
# With heads of 16, and 8 px with them: what trains.
TRAINED = [(64, 196, 4, 16), *CASES[:2], (128, 64, 4, 16), *CASES[2:]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def split(qkv, heads):
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def sdpa(qkv, heads):
    return F.scaled_dot_product_attention(*split(qkv, heads)).transpose(1, 2).flatten(2)


def formula(qkv, heads):
    q, k, v = split(qkv, heads)
    return ((q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("provider", ["kr_fast", "sdpa", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qkv_attention(benchmark, threads, case, dtype, provider):
    benchmark.group = f"qkv_attention {case} {dtype} {threads} threads"
    n, t, heads, d = case
    qkv = torch.randn(n, t, 3 * heads * d, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    torch._dynamo.reset()
    compiled = torch.compile(formula, dynamic=False)
    run = {"kr_fast": kr_fast.qkv_attention, "sdpa": sdpa, "compile": compiled}[provider]
    error = float((run(qkv, heads).double() - sdpa(qkv.double(), heads)).abs().max())
    assert error < (1e-5 if dtype == "float32" else 0.02)
    benchmark.extra_info.update(error=error, flop=4 * n * heads * t * t * d)
    benchmark.pedantic(run, args=(qkv, heads), rounds=10, iterations=2, warmup_rounds=2)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gflop_per_second=4e-9 * n * heads * t * t * d / benchmark.stats.stats.min)


@pytest.mark.parametrize("provider", ["kr_fast", "sdpa", "compile"])
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_forward_backward(benchmark, threads, case, provider):
    benchmark.group = f"qkv_attention forward+backward {case} float32 {threads} threads"
    n, t, heads, d = case
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (torch.randn(n, t, parts * heads * d, generator=generator) for parts in (3, 1))
    torch._dynamo.reset()
    compiled = torch.compile(sdpa, dynamic=False)
    forward = {"kr_fast": kr_fast.qkv_attention, "sdpa": sdpa, "compile": compiled}[provider]

    def run(forward, qkv, grad):
        return torch.autograd.grad(forward(qkv, heads), qkv, grad)[0]

    qkv.requires_grad_()
    expected = run(sdpa, qkv.detach().double().requires_grad_(), grad.double())
    error = float((run(forward, qkv, grad).double() - expected).abs().max())
    assert error < 1e-4
    flop = 14 * n * heads * t * t * d  # two products forward, five backward
    benchmark.extra_info.update(error=error, flop=flop)
    benchmark.pedantic(run, args=(forward, qkv, grad), rounds=10, iterations=2, warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info.update(gflop_per_second=1e-9 * flop / benchmark.stats.stats.min)
