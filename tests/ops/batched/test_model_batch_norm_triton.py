"""The Triton kernels of model_batch_norm: numbers in Triton's interpreter, and compilation for GPUs without one.

Shapes by regime (N, H, W, C): fewer rows than a tile; channels that fill no power of two; more channels than a program
takes; several tiles with a tail; more rows than 64 tiles, so that a chunk is longer than a tile.
"""

import os

import pytest
import torch
from batched_cases import batch_norm_inputs as draw
from triton_compile import build, spilled_bytes

from kr_fast.backends import registry
from kr_fast.ops.batched.model_batch_norm import model_batch_norm

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(2, 2, 2, 3), (2, 3, 5, 6), (1, 3, 4, 80), (3, 9, 7, 33), (3, 25, 28, 64)]
UNITS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run(inputs, upstream, how, relu):
    with registry.forced(how):
        own = [None if each is None else each.clone().requires_grad_() for each in inputs]
        y, mean, var = model_batch_norm(*own, relu=relu)
        needed = [each for each in own if each is not None]
        return [y, mean, var], list(torch.autograd.grad(y, needed, upstream))


def clear_of_the_bend(inputs):
    """Inputs whose sum before the ReLU is nowhere near 0, where a rounding decides the gradient."""
    with registry.forced("reference"):
        double = [None if each is None else each.double() for each in inputs]
        y = model_batch_norm(*double)[0]
    inputs[3] = (inputs[3].double() + 0.2 * y.sign()).to(inputs[3].dtype)
    return inputs


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "affine", "residual"])
def test_interpreter_agrees_with_float64(shape, dtype, kind):
    models = 1 if shape[1] == 25 else 2
    if models == 1 and (dtype == torch.float16 or kind == "affine"):
        pytest.skip("the longest shape once")
    inputs = list(draw((models, *shape), dtype, residual=kind == "residual", affine=kind != "plain"))
    relu = kind == "residual"
    if relu:
        inputs = clear_of_the_bend(inputs)
    upstream = torch.randn((models, *shape), generator=torch.Generator().manual_seed(3)).to(dtype)
    double = [None if each is None else each.double() for each in inputs]
    values, gradients = run(inputs, upstream, "triton", relu)
    want_values, want_gradients = run(double, upstream.double(), "reference", relu)
    rows = inputs[0][0].numel() // shape[-1]
    for a, b in zip(values, want_values, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.01 * UNITS[dtype], atol=4e-6)
    for a, b in zip(gradients, want_gradients, strict=True):
        # float32 sums of ``rows`` numbers of order 1 in weight and bias; the residual's gradient is rounded once.
        room = 1e-6 * (rows**0.5 if a.shape[1:] == (shape[-1],) else 8)
        torch.testing.assert_close(a.double(), b, rtol=1.01 * UNITS[dtype], atol=max(room, UNITS[dtype] * 1e-2))


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_far_from_0_and_company():
    """A mean of 1000 deviations costs no digits of the variance; a model alone has the same bits as among others."""
    inputs = list(draw((3, 2, 5, 7, 6), torch.float32))
    inputs[0] += 1000
    upstream = torch.ones_like(inputs[0])
    values, gradients = run(inputs, upstream, "triton", False)
    torch.testing.assert_close(values[2].double(), inputs[0].double().var((1, 2, 3), correction=0), rtol=1e-5, atol=0)
    alone = run([each[1:2] for each in inputs], upstream[1:2], "triton", False)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone[0] + alone[1], values + gradients, strict=True))


POINTERS = ("x", "residual", "y", "grad", "passed", "out")
VECTORS = ("weight", "bias", "mean", "var", "means", "squares", "plain", "centred", "grad_weight", "grad_bias")


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [16, 64, 80])
def test_compiles_for_gpus_without_spills(capability, dtype, channels, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.batched import model_batch_norm as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, tile, warps = kernels.shape(65536, channels)
    signature = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(VECTORS, "*fp32")
    signature |= {"rows": "i32", "span": "i32", "parts": "i32", "eps": "fp32"}
    for name in ("moments", "merge_moments", "normalize", "sums", "merge_sums", "input_gradient"):
        kernel = getattr(kernels, name)
        constants = {"C": channels, "RELU": True, "ROUND": False, **tile}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        own = {key: value for key, value in signature.items() if key in kernel.arg_names}
        built = build(kernel, own, constants, capability=capability, warps=1 if "merge" in name else warps)
        assert spilled_bytes(built) == 0, name
