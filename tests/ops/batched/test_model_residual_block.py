"""model_residual_block: the reference against its formula, every backend against it, bits in CUDA, arguments."""

import pytest
import torch
from backends import on_backends
from batched_cases import BLOCK_CASES, HALVES, close_to_block, on
from batched_cases import residual_block as by_hand
from batched_cases import residual_block_inputs as draw
from cuda_on_host import device, machine, same_bits, size

from kr_fast.backends import registry
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.ops.batched.model_residual_block import model_residual_block


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("pre", [False, True])
def test_reference_is_the_formula(pre, relu):
    inputs, more = draw(3, 5, 4, 2, torch.float64)
    more = more if pre else {}
    got = model_residual_block(*inputs, **more, relu=relu)
    torch.testing.assert_close(got, by_hand(*inputs, **more, relu=relu), rtol=0, atol=1e-12)
    x, weight1, _, weight2, _ = inputs
    bare = model_residual_block(x, weight1, None, weight2, None, relu=relu)
    torch.testing.assert_close(bare, by_hand(x, weight1, None, weight2, None, relu=relu), rtol=0, atol=1e-12)


@on_backends("model_residual_block")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_values(backend, case, dtype):
    channels, height, width, images = case
    backend.require("model_residual_block", ResidualBlockCall(backend.device.type, dtype, channels, height, width))
    models = 1 if height > 16 else 2
    if backend.id == "cuda-gpu":
        models, images = 5, 150  # several rounds a block
    inputs, more = draw(channels, height, width, images, dtype, models=models)
    there, numbers = on(backend.device, *inputs), dict(zip(more, on(backend.device, *more.values()), strict=True))
    before = [each.clone() for each in there]
    with torch.inference_mode():
        close_to_block(model_residual_block(*there).cpu(), inputs, {}, dtype)
        got = model_residual_block(*there, **numbers, relu=False)
    close_to_block(got.cpu(), inputs, {**more, "relu": False}, dtype)
    assert all(torch.equal(a, b) for a, b in zip(there, before, strict=True))


# ---------------------------------------------------------------- the CUDA kernel, threads as fibers of the CPU

on_host = on_backends("model_residual_block", "cuda-host")


def run(*inputs, **more):
    with torch.inference_mode():
        return model_residual_block(*inputs, **more)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", [(32, 7, 23, 1), (64, 7, 5, 3)], ids=str)
@on_host
def test_accesses_of_more_channels(backend, case):
    """Small, for the sanitizers: pixels past the image's end, and fewer images than a block takes."""
    inputs, more = draw(*case, torch.float16)
    close_to_block(run(*inputs), inputs, {}, torch.float16)
    close_to_block(run(*inputs, **more, relu=False), inputs, {**more, "relu": False}, torch.float16)


# With what goes before the block, which is the same at any number of channels, and once without.
@pytest.mark.parametrize(
    ("channels", "pre"), [pytest.param(16, False, marks=pytest.mark.sanitize), (16, True), (32, True), (64, True)]
)
@on_host
def test_bits_follow_nothing_else(backend, channels, pre):
    """Neither the images and models beside, nor how they are spread over blocks, nor the order in which threads run."""
    inputs, more = draw(channels, 8, 8, 5, torch.float16)
    more = {**more, "relu": False} if pre else {}
    plain = run(*inputs, **more)
    close_to_block(plain, inputs, more, torch.float16)
    with machine(backend.module, descending=True):
        assert same_bits(run(*inputs, **more), plain)
    with size(backend.module, processors=1):  # a block takes all images of a model, in rounds, the last of fewer
        assert same_bits(run(*inputs, **more), plain)
        with machine(backend.module, descending=True):
            assert same_bits(run(*inputs, **more), plain)
    with size(backend.module, processors=1000, shared_at_most=163 << 10):  # and one image, of compute capability 8.0
        assert same_bits(run(*inputs, **more), plain)
    models, images = [1, 0], [4, 2]
    part = [inputs[0][models][:, images].contiguous(), *(each[models] for each in inputs[1:])]
    result = run(*part, **{name: each[models] if name != "relu" else each for name, each in more.items()})
    assert same_bits(result, plain[models][:, images].contiguous())


@pytest.mark.sanitize
@on_host
def test_absent_biases_and_odd_addresses(backend):
    (x, weight1, _, weight2, bias2), _ = draw(16, 6, 8, 3, torch.float16)
    want = run(x, weight1, None, weight2, bias2)
    close_to_block(want, (x, weight1, None, weight2, bias2), {}, torch.float16)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)  # not 16-byte aligned
    assert moved.data_ptr() % 16
    assert same_bits(run(moved, weight1, None, weight2, bias2), want)
    zeros = torch.zeros_like(bias2)
    assert same_bits(run(x, weight1, zeros, weight2, bias2), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@on_host
def test_nan_and_infinity_stay_where_the_formula_has_them(backend, dtype):
    (x, weight1, bias1, weight2, bias2), _ = draw(16, 12, 11, 2, dtype)
    for value in (float("nan"), float("inf")):
        touched = x.clone()
        touched[1, 0, 4, 5, 3] = value
        got = run(touched, weight1, bias1, weight2, bias2)
        want = by_hand(touched, weight1, bias1, weight2, bias2, between=lambda h: h.to(dtype).double())
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.to(dtype).isinf())
        plain, same = run(x, weight1, bias1, weight2, bias2), want.isfinite()
        same[1, 0, 2:7, 3:8] = False
        assert same_bits(got[same], plain[same])
    beyond = model_residual_block(x[:, :0], weight1, bias1, weight2, bias2)
    assert beyond.shape == (2, 0, 12, 11, 16)


def refusal(case, dtype=torch.float16):
    return registry.refusal("model_residual_block", "cuda", ResidualBlockCall("cpu", dtype, *case))


@on_host
def test_what_the_kernel_takes(backend):
    takes = [(16, 32, 32), (16, 28, 28), (32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8), (64, 7, 7)]
    assert [refusal(case) for case in takes] == [None] * len(takes)
    for case in [(16, 64, 64), (64, 32, 32), (24, 8, 8), (128, 4, 4)]:
        assert f"got {case[0]} channels of {case[1]} x {case[2]}" in refusal(case)
    assert "float16, bfloat16, got float32" in refusal((16, 8, 8), torch.float32)
    assert dict(registry.table())["model_residual_block"]["cuda"] == "available in half precision"
    inputs, _ = draw(24, 4, 4, 1, torch.float16)
    with pytest.raises(RuntimeError, match="channels must be 16, 32 or 64"):
        model_residual_block(*inputs)
    with device(backend.module, compute_capability=75):
        assert "compute capability 8.0" in refusal((16, 8, 8))
    with size(backend.module, shared_at_most=99 << 10):  # of compute capability 8.6 and 8.9
        assert [refusal(case) is None for case in takes] == [True, True, False, True, False, False, False]


# ---------------------------------------------------------------- arguments, torch.library


def changed(position, value):
    inputs, more = draw(4, 3, 3, 2, torch.float32)
    if isinstance(position, str):
        return inputs, {**more, position: value(more[position])}
    inputs[position] = value(inputs[position])
    return inputs, more


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, lambda x: x[0], "x must have 5 dimensions, got float32 [2, 3, 3, 4]"),
        (0, lambda x: x.int(), "x must be float32 or bfloat16 or float16 or float64, got int32"),
        (0, lambda x: x.transpose(2, 3), "x must be contiguous"),
        (0, lambda x: x[..., :0], "x must have at least one channel"),
        (1, lambda x: x.half(), "weight1 must be float32, got float16"),
        (1, lambda x: x[:1], "weight1 must be contiguous [2, 4, 3, 3, 4] on cpu, got float32 [1, 4, 3, 3, 4]"),
        (3, lambda x: x.transpose(1, 4), "weight2 must be contiguous"),
        (3, lambda x: x[:, :, :1], "weight2 must be contiguous [2, 4, 3, 3, 4]"),
        (2, lambda x: x.double(), "bias1 must be float32, got float64"),
        (4, lambda x: x[:, :3], "bias2 must be contiguous [2, 4] on cpu"),
        (4, lambda x: 3.0, "bias2 must be a tensor, got 3.0"),
        ("scale", lambda x: None, "scale must be given with the other of scale and shift"),
        ("shift", lambda x: None, "shift must be given with the other of scale and shift"),
        ("shift", lambda x: x[0], "shift must have 2 dimensions"),
        (1, lambda x: x.requires_grad_(), "weight1 must not require grad"),
    ],
)
def test_bad_arguments(position, value, message):
    inputs, more = changed(position, value)
    with pytest.raises((TypeError, ValueError)) as caught:
        model_residual_block(*inputs, **more)
    assert str(caught.value).startswith("model_residual_block: " + message)


def test_opcheck():
    inputs, more = draw(4, 3, 3, 2, torch.float32)
    op = torch.ops.kr_fast.model_residual_block.default
    for scale, shift in ((None, None), more.values()):
        torch.library.opcheck(op, (*inputs, scale, shift, True))
