"""The Triton kernel of group_norm_silu: numbers in Triton's interpreter, and compilation for GPUs without one.

Cases by regime: one element; 5 channels in 5 groups: spans of 1; 3 channels a group: a span of 4 with a dead lane, and
more groups than fit a program; whole samples in registers; several tiles with a tail of pixels; one wide group.
"""

import os

import pytest
import torch
from triton_compile import build, spilled_bytes, widest_load

import kr_fast
from kr_fast.backends import registry

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
LAST = torch.channels_last
CASES = [
    ((2, 1, 1, 1), 1),
    ((2, 5, 3, 5), 5),
    ((2, 96, 4, 5), 32),
    ((2, 64, 7, 7), 32),
    ((1, 32, 20, 23), 8),
    ((1, 160, 9, 9), 1),
]


def both(x, groups, weight, bias, **more):
    """What the reference makes in float64, and Triton in the dtype of ``x``."""
    double = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    with registry.forced("reference"):
        want = kr_fast.group_norm_silu(x.double(), groups, weight.double(), bias.double(), **double)
    with registry.forced("triton"):
        return want, kr_fast.group_norm_silu(x, groups, weight, bias, **more).double()


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
def test_interpreter_agrees_with_reference(shape, groups, dtype, activation):
    torch.manual_seed(sum(shape))
    x = (2 * torch.randn(shape) + 3).to(dtype).contiguous(memory_format=LAST)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    shift = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 2:-1]  # rows apart
    for more in ({}, {"shift": shift}):
        want, got = both(x, groups, weight, bias, activation=activation, **more)
        # One unit of the dtype: the interpreter cuts bfloat16 off where a GPU rounds to nearest.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("channels", [(32, 32, 8), (64, 32, 32), (17, 7, 6)], ids=str)
@pytest.mark.parametrize("side", [4, 24])
def test_interpreter_agrees_on_the_second_source(channels, side):
    first, second, groups = channels
    torch.manual_seed(first)
    x, skip = (torch.randn(2, c, side, side).contiguous(memory_format=LAST) for c in (first, second))
    weight, bias, shift = torch.randn(first + second), torch.randn(first + second), torch.randn(2, first + second)
    want, got = both(x, groups, weight, bias, skip=skip, shift=shift)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_interpreter_edge_cases():
    x = torch.randn(2, 8, 30, 30).contiguous(memory_format=LAST)
    with registry.forced("triton"):
        assert kr_fast.group_norm_silu(x[:0], 2, None, None).shape == (0, 8, 30, 30)
        far = kr_fast.group_norm_silu(x + 1e4, 2, None, None, activation=None)
        plain = kr_fast.group_norm_silu(x[:, :, :5, :5].contiguous(memory_format=LAST), 2, None, None)
    assert (far.double() - both(x + 1e4, 2, torch.ones(8), torch.zeros(8), activation=None)[0]).abs().max() < 0.02
    want = both(x[:, :, :5, :5].contiguous(memory_format=LAST), 2, torch.ones(8), torch.zeros(8))[0]
    torch.testing.assert_close(plain.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
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
