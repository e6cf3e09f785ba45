"""What is the CUDA kernel's own in model_residual_block, threads as fibers of the CPU: bits, accesses, refusals."""

import pytest
import torch
from batched_cases import HALVES, close_to_block
from batched_cases import residual_block as by_hand
from batched_cases import residual_block_inputs as draw
from cuda_on_host import device, in_use, machine, same_bits, size

from kr_fast.backends import registry
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.ops.batched.model_residual_block import model_residual_block


def run(host_cuda, *inputs, **more):
    with in_use(host_cuda), torch.inference_mode():
        return model_residual_block(*inputs, **more)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", [(32, 7, 23, 1), (64, 7, 5, 3)], ids=str)
def test_accesses_of_more_channels(host_cuda, case):
    """Small, for the sanitizers: pixels past the image's end, and fewer images than a block takes."""
    inputs, more = draw(*case, torch.float16)
    close_to_block(run(host_cuda, *inputs), inputs, {}, torch.float16)
    close_to_block(run(host_cuda, *inputs, **more, relu=False), inputs, {**more, "relu": False}, torch.float16)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("channels", [pytest.param(16, marks=pytest.mark.sanitize), 32, 64])
def test_bits_follow_nothing_else(host_cuda, channels, pre):
    """Neither the images and models beside, nor how they are spread over blocks, nor the order in which threads run."""
    inputs, more = draw(channels, 8, 8, 5, torch.float16)
    more = {**more, "relu": False} if pre else {}
    plain = run(host_cuda, *inputs, **more)
    close_to_block(plain, inputs, more, torch.float16)
    with machine(host_cuda, descending=True):
        assert same_bits(run(host_cuda, *inputs, **more), plain)
    with size(host_cuda, processors=1):  # a block takes all images of a model, in rounds, the last of fewer
        assert same_bits(run(host_cuda, *inputs, **more), plain)
        with machine(host_cuda, descending=True):
            assert same_bits(run(host_cuda, *inputs, **more), plain)
    with size(host_cuda, processors=1000, shared_at_most=163 << 10):  # and one image, of compute capability 8.0
        assert same_bits(run(host_cuda, *inputs, **more), plain)
    models, images = [1, 0], [4, 2]
    part = [inputs[0][models][:, images].contiguous(), *(each[models] for each in inputs[1:])]
    result = run(host_cuda, *part, **{name: each[models] if name != "relu" else each for name, each in more.items()})
    assert same_bits(result, plain[models][:, images].contiguous())


@pytest.mark.sanitize
def test_absent_biases_and_odd_addresses(host_cuda):
    (x, weight1, _, weight2, bias2), _ = draw(16, 6, 8, 3, torch.float16)
    want = run(host_cuda, x, weight1, None, weight2, bias2)
    close_to_block(want, (x, weight1, None, weight2, bias2), {}, torch.float16)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)  # not 16-byte aligned
    assert moved.data_ptr() % 16
    assert same_bits(run(host_cuda, moved, weight1, None, weight2, bias2), want)
    zeros = torch.zeros_like(bias2)
    assert same_bits(run(host_cuda, x, weight1, zeros, weight2, bias2), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_and_infinity_stay_where_the_formula_has_them(host_cuda, dtype):
    (x, weight1, bias1, weight2, bias2), _ = draw(16, 12, 11, 2, dtype)
    for value in (float("nan"), float("inf")):
        touched = x.clone()
        touched[1, 0, 4, 5, 3] = value
        got = run(host_cuda, touched, weight1, bias1, weight2, bias2)
        want = by_hand(touched, weight1, bias1, weight2, bias2, between=lambda h: h.to(dtype).double())
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.to(dtype).isinf())
        plain, same = run(host_cuda, x, weight1, bias1, weight2, bias2), want.isfinite()
        same[1, 0, 2:7, 3:8] = False
        assert same_bits(got[same], plain[same])
    beyond = model_residual_block(x[:, :0], weight1, bias1, weight2, bias2)
    assert beyond.shape == (2, 0, 12, 11, 16)


def refusal(case, dtype=torch.float16):
    return registry.refusal("model_residual_block", "cuda", ResidualBlockCall("cpu", dtype, *case))


def test_what_the_kernel_takes(host_cuda):
    with in_use(host_cuda):
        takes = [(16, 32, 32), (16, 28, 28), (32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8), (64, 7, 7)]
        assert [refusal(case) for case in takes] == [None] * len(takes)
        for case in [(16, 64, 64), (64, 32, 32), (24, 8, 8), (128, 4, 4)]:
            assert f"got {case[0]} channels of {case[1]} x {case[2]}" in refusal(case)
        assert "float16, bfloat16, got float32" in refusal((16, 8, 8), torch.float32)
        assert dict(registry.table())["model_residual_block"]["cuda"] == "available in half precision"
        inputs, _ = draw(24, 4, 4, 1, torch.float16)
        with pytest.raises(RuntimeError, match="channels must be 16, 32 or 64"):
            model_residual_block(*inputs)
        with device(host_cuda, compute_capability=75):
            assert "compute capability 8.0" in refusal((16, 8, 8))
        with size(host_cuda, shared_at_most=99 << 10):  # of compute capability 8.6 and 8.9
            assert [refusal(case) is None for case in takes] == [True, True, False, True, False, False, False]
