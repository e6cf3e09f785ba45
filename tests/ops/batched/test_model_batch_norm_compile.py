"""The Triton kernels of model_batch_norm compile for GPUs without one, and spill no registers."""

import os

import pytest
from triton_compile import build, spilled_bytes

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
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
