"""model_residual_block: the reference against its formula, every backend against it, arguments, torch.library."""

import pytest
import torch
from backends import on_backends
from batched_cases import BLOCK_CASES, HALVES, close_to_block, on
from batched_cases import residual_block as by_hand
from batched_cases import residual_block_inputs as draw

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


def test_library_and_compile():
    inputs, more = draw(4, 3, 3, 2, torch.float32)
    op = torch.ops.kr_fast.model_residual_block.default
    for scale, shift in ((None, None), more.values()):
        torch.library.opcheck(op, (*inputs, scale, shift, True))
    compiled = torch.compile(model_residual_block, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, **more), model_residual_block(*inputs, **more))
