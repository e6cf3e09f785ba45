"""What the Triton kernel of solver_step compiles to, without a GPU."""

import pytest

POINTERS = dict.fromkeys(("x", "limits", "h0", "h1", "h2", "h3", "y", "kept"), "*fp32") | {"ids": "*i64"}
WORDS = dict.fromkeys(("batch", "numel", "pixels", "blocks"), "i32") | dict.fromkeys(("seed", "stream"), "i64")


@pytest.mark.compile
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "last", "dtype", "absent"),
    [
        ("clip", False, "fp32", "uncond ids limits h0 h1 h2 h3 kept input image"),
        ("guided clip, bf16 network", True, "bf16", "ids limits h0 h1 h2 h3 kept image"),
        ("everything", True, "fp16", ""),
    ],
)
def test_compiles_to_exactly_rounded_arithmetic(capability, name, last, dtype, absent, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.sampling import solver_step as kernels
    from triton_compile import build, inexact_instructions, spilled_bytes, widest_load

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    network = dict.fromkeys(("cond", "uncond", "input"), f"*{dtype}") | {"image": "*u8"}
    signature = dict.fromkeys(kernels.step.arg_names, "fp32") | POINTERS | network | WORDS
    constants = dict.fromkeys(absent.split()) | kernels.tile(256, 3072)
    constants |= {"CHANNELS": 3, "LAST": last, "CLEAN": True, "NOISY": name == "everything", "COPIES": 2}
    options = {"capability": capability, "warps": kernels.WARPS, "aligned": ("numel", "pixels"), "fusion": False}
    built = build(kernels.step, signature, constants, **options)
    assert inexact_instructions(built) == set()
    assert spilled_bytes(built) == 0
    assert widest_load(built) == 16
