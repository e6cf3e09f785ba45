"""What the Triton kernel of group_norm_silu compiles to, without a GPU."""

import pytest
from triton_compile import build, spilled_bytes, widest_load


@pytest.mark.compile
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "skip"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize(
    ("pixels", "channels", "groups"), [(64, 32, 8), (784, 64, 32), (1024, 256, 32), (784, 96, 32), (4096, 128, 1)]
)
def test_compiles_for_gpus_without_spills(capability, dtype, skip, pixels, channels, groups, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.nn import group_norm_silu as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size = channels // groups
    span, together, rows, whole, warps = kernels.tile(pixels, size, groups, 4 if dtype == "fp32" else 2)
    pointers = dict.fromkeys(("x", "skip", "shift", "weight", "bias", "y"), f"*{dtype}")
    integers = dict.fromkeys(("pixels", "x_channels", "skip_channels", "shift_stride"), "i32")
    constants = {
        "SIZE": size, "SPAN": span, "GROUPS": together, "ALL": groups, "P": rows, "WHOLE": whole, "HAS_SKIP": skip,
        "HAS_SHIFT": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "SILU": True,
    }  # fmt: skip
    if not skip:
        constants["skip"] = None
    built = build(
        kernels.norm_kernel, {**pointers, **integers, "eps": "fp32"}, constants, capability=capability, warps=warps,
        aligned=("x_channels", "skip_channels", "shift_stride", "pixels"),
    )  # fmt: skip
    assert spilled_bytes(built) == 0
    if size == span and size * groups * (2 if dtype == "bf16" else 4) >= 64:
        assert widest_load(built) >= 8
