"""What the Triton kernels of group_norm_silu and its gradient compile to, without a GPU."""

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
    pointers |= {"means": "*fp32", "rstds": "*fp32"}
    integers = dict.fromkeys(("pixels", "x_channels", "skip_channels", "shift_stride"), "i32")
    constants = {
        "SIZE": size,
        "SPAN": span,
        "GROUPS": together,
        "ALL": groups,
        "P": rows,
        "WHOLE": whole,
        "HAS_SKIP": skip,
        "HAS_SHIFT": True,
        "HAS_WEIGHT": True,
        "HAS_BIAS": True,
        "SILU": True,
    }
    constants |= {"means": None, "rstds": None} if skip else {"skip": None}  # without skip as in training
    built = build(
        kernels.norm_kernel,
        {**pointers, **integers, "eps": "fp32"},
        constants,
        capability=capability,
        warps=warps,
        aligned=("x_channels", "skip_channels", "shift_stride", "pixels"),
    )
    assert spilled_bytes(built) == 0
    if size == span and size * groups * (2 if dtype == "bf16" else 4) >= 64:
        assert widest_load(built) >= 8


@pytest.mark.compile
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "skip"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(64, 32, 8), (784, 64, 32), (784, 96, 32), (4096, 128, 1)])
def test_gradient_compiles_without_spills(capability, dtype, skip, pixels, channels, groups, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.nn import group_norm_silu_backward as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size = channels // groups
    span, together, rows, whole, warps = kernels.tile(pixels, size, groups, 4 if dtype == "fp32" else 2)
    signature = dict.fromkeys(("grad", "x", "skip", "shift", "weight", "bias", "out", "skip_out"), f"*{dtype}")
    signature |= dict.fromkeys(("means", "rstds", "grad_shift", "partial"), "*fp32")
    integers = ("pixels", "x_channels", "skip_channels", "shift_stride")
    constants = {
        "SIZE": size,
        "SPAN": span,
        "GROUPS": together,
        "ALL": groups,
        "P": rows,
        "WHOLE": whole,
        "SILU": True,
        "ROUND": False,
    }
    constants |= {} if skip else {"skip": None, "skip_out": None}
    built = build(
        kernels.gradient_kernel,
        signature | dict.fromkeys(integers, "i32"),
        constants,
        capability=capability,
        warps=warps,
        aligned=integers,
    )
    assert spilled_bytes(built) == 0
