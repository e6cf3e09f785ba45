"""The Triton kernels of model_conv2d_backward: numbers in Triton's interpreter, compilation for GPUs without one.

The cases are those of batched_cases.py whose layers are dense, and of strides.
"""

import os

import pytest
import torch
from batched_cases import CONV_CASES, ConvCase, conv_inputs
from triton_compile import build, spilled_bytes

from kr_fast.backends import registry
from kr_fast.ops.batched.model_conv2d import model_conv2d

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
MORE = [
    ConvCase("six classes of pixels, of unequal size", (7, 8), 5, 4, stride=(3, 2)),
    ConvCase("stride and dilation", (8, 9), 5, 4, stride=(2, 2), dilation=(2, 3), padding=(2, 3)),
    ConvCase("three classes of four meet no tap", (5, 5), 5, 20, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    ConvCase("more than 2 * 2048 pixels a model: parts, tail", (29, 31), 1, 2, models=1, images=5),
]
OWN = [case for case in CONV_CASES if not case.shared and case.groups == 1] + MORE
UNITS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def gradients(case, inputs, upstream, how):
    with registry.forced(how):
        own = [each.clone().requires_grad_() for each in inputs]
        return torch.autograd.grad(model_conv2d(*own, **case.options()), own, upstream)


def upstream_of(case, dtype):
    shape = (case.models, case.images, *case.output_size(), case.outputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", OWN, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_interpreter_agrees_with_float64(case, dtype):
    inputs, upstream = conv_inputs(case, dtype)[:3], upstream_of(case, dtype)
    want = gradients(case, [each.double() for each in inputs], upstream.double(), "reference")
    got = gradients(case, inputs, upstream, "triton")
    rows = upstream[0].numel() // case.outputs
    for name, a, b in zip(("x", "weight", "bias"), got, want, strict=True):
        # One unit of the dtype, and float32's sums: of outputs times places, or of a model's pixels.
        room = 1e-5 if name == "x" else 1e-6 * max(rows, 30) ** 0.5
        torch.testing.assert_close(a.double(), b, rtol=1.01 * UNITS[a.dtype], atol=room)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", [OWN[2], MORE[0]], ids=str)
def test_a_models_bits_are_its_own(case):
    inputs, upstream = conv_inputs(case, torch.float32)[:3], upstream_of(case, torch.float32)
    whole = gradients(case, inputs, upstream, "triton")
    alone = gradients(case, [each[1:2] for each in inputs], upstream[1:2], "triton")
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_groups_are_refused():
    x, weight = torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 4, 3, 3, 1, requires_grad=True)
    with registry.forced("triton"), pytest.raises(RuntimeError, match="groups must be 1"):
        model_conv2d(x, weight, padding=1, groups=4).sum().backward()


LAYERS = {  # C, O, kernel, stride: ResNet-20's, and wider
    "stem": (3, 16, 3, 1),
    "c16": (16, 16, 3, 1),
    "down": (32, 64, 3, 2),
    "shortcut": (16, 32, 1, 2),
    "c64": (64, 64, 3, 1),
    "c256": (256, 256, 3, 1),
}
INTEGERS = ("images", "height", "width", "out_height", "out_width", "class_height", "class_width")
INTEGERS += ("tiles", "span", "parts")


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_for_gpus_without_spills(capability, layer, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.batched import model_conv2d_backward as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    channels, outputs, kernel, stride = LAYERS[layer]
    size = 4 if dtype == "fp32" else 2
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32", "INTERPRET": False}
    layer = {"C": channels, "OUT": outputs, "KH": kernel, "KW": kernel, "SH": stride, "SW": stride}
    signature = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("grad", "weight", "x"), f"*{dtype}")
    classes = kernels.classes(32, kernel, stride, kernel // 2, 1)
    shape = kernels.input_tile(channels, outputs, size)
    for a, _, first, step, origin, back, places in classes:
        constants = {"A": a, "B": a, "U0": first, "V0": first, "US": step, "VS": step, "I0": origin, "J0": origin}
        constants |= {"IS": back, "JS": back, "NU": places, "NV": places, "ROUND": False} | layer | precision | shape
        check(kernels.input_gradient, signature | {"out": f"*{dtype}"}, constants, capability, dtype)
    shape = kernels.weight_tile(kernel * kernel * channels + 1, outputs, size)
    constants = {"PH": kernel // 2, "PW": kernel // 2, "DH": 1, "DW": 1, "BIAS": True} | layer | precision | shape
    check(kernels.weight_gradient, signature | {"out": "*fp32"}, constants, capability, dtype)


def check(kernel, signature, constants, capability, dtype):
    own = {key: value for key, value in signature.items() if key in kernel.arg_names}
    warps = constants.pop("num_warps")
    built = build(kernel, own, constants, capability=capability, warps=warps)
    assert spilled_bytes(built) == 0
    assert built.metadata.shared <= 99 * 1024
    if dtype == "fp32":
        assert "tf32" not in built.asm["ptx"]
    elif constants.get("NU", 1):
        assert "mma" in built.asm["ptx"]
