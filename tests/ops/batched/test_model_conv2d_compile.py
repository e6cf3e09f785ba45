"""The Triton kernels of model_conv2d compiled for GPUs that are not there: no spills, the right instructions."""

import os
import re

import pytest
from triton_compile import build, spilled_bytes

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
LAYERS = {  # C, O, kernel, shared by models, view
    "stem": (3, 16, 3, 64, True),
    "shared": (3, 64, 3, 16, False),
    "c16": (16, 16, 3, 0, False),
    "c32": (32, 32, 3, 0, False),
    "c64": (64, 64, 3, 0, False),
    "c24": (24, 64, 3, 0, False),
    "c256": (256, 256, 3, 0, False),
    "linear": (64, 10, 1, 0, False),
}
BUILDS = [
    *[("fp16", 90, layer) for layer in LAYERS],
    *[("fp16", capability, layer) for capability in (80, 100) for layer in ("stem", "c16", "c64", "c256")],
    *[("fp32", 90, layer) for layer in ("c16", "c64", "linear")],
    ("fp32", 80, "stem"),
    ("fp32", 100, "c64"),
]
POINTERS = ("weight", "bias", "residual", "y")
NUMBERS = ("images", "height", "width", "in_height", "in_width", "out_height", "out_width", "tiles")


def compiled(function, dtype, capability, channels, outputs, kernel, shared, view, shape, **more):
    signature = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(NUMBERS, "i32") | {"low": "fp32", "high": "fp32"}
    signature |= {"x": "*u8" if view else f"*{dtype}", "bias": "*fp32", "rows": "*i32", "columns": "*i32"}
    signature |= {"scale": "*fp32", "shift": "*fp32"}
    constants = {"C": channels, "OUT": outputs, "KH": kernel, "KW": kernel, "SH": 1, "SW": 1, "DH": 1, "DW": 1}
    constants |= {"PH": kernel // 2, "PW": kernel // 2, "SHARED": bool(shared), "ACT": "relu", "INTERPRET": False}
    constants |= {key: value for key, value in shape.items() if key != "num_warps"} | more
    for name in ("residual",) if shared else ():
        constants[name] = None
    for name in ("rows", "columns", "scale", "shift") if not view else ():
        constants[name] = None
    return build(function, signature, constants, capability=capability, warps=shape["num_warps"])


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize(("dtype", "capability", "layer"), BUILDS)
def test_compiles_for_gpus_without_spills(capability, layer, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.batched import model_conv2d as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    channels, outputs, kernel, shared, _ = LAYERS[layer]
    precision = "ieee" if dtype == "fp32" else "tf32"
    size = 4 if dtype == "fp32" else 2
    for shape in kernels.tiles(channels, (outputs, kernel, kernel), size, bool(shared), shared or 1):
        more = {"models": shared or 1, "PRECISION": precision}
        built = compiled(kernels.dense, dtype, capability, *LAYERS[layer], shape, **more)
        assert spilled_bytes(built) <= (32 if layer == "linear" else 0), shape
        assert built.metadata.shared <= 99 * 1024, shape  # what the smallest of these GPUs (8.6, 8.9) has for a block
        text = built.asm["ptx"]
        if dtype == "fp16":
            assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability] in text, shape
            if channels % 8 == 0:
                wide = re.search(r"cp\.async\.ca\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
                assert wide or kernel == 1, shape  # 16 bytes at a time, through L1
        else:
            assert "tf32" not in text


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("channels", "kernel"), [(96, 3), (96, 5), (10, 1)])
def test_depthwise_compiles_without_spills(capability, channels, kernel, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.batched import model_conv2d as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = kernels.depthwise_tile(channels)
    built = compiled(kernels.depthwise, "fp16", capability, channels, channels, kernel, 0, False, shape)
    assert spilled_bytes(built) == 0
