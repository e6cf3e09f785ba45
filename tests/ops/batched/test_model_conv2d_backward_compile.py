"""The Triton kernels of model_conv2d_backward compile for GPUs without one, and spill no registers."""

import os

import pytest
from triton_compile import build, spilled_bytes

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
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
