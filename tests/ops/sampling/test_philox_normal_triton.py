"""The Triton kernel of philox_normal: the CPU's bits in the interpreter, and what it compiles to without a GPU.

Element counts: 1, 3: less than one counter of four; 4: one; 75: no whole number of counters, several images a
program; 3072: an image of several programs.
"""

import os
import re

import pytest
import torch

import kr_fast
from kr_fast.backends import registry

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
IDS = torch.tensor([0, 5, 2**32 - 1, 2**32 + 1, 2**63 - 1])


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("numel", [1, 3, 4, 75, 3072])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (7, 1), (2**32 + 5, 2**31), (2**63 - 1, 2**32 - 1)])
def test_interpreter_makes_the_bits_of_the_cpu(numel, seed, stream):
    wanted = kr_fast.philox_normal(IDS, (numel,), seed=seed, stream=stream)
    with registry.forced("triton"):
        got = kr_fast.philox_normal(IDS, (numel,), seed=seed, stream=stream)
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("batch", [0, 1, 37, 300])
def test_interpreter_takes_any_number_of_images(batch):
    """None; one; a last program with few images; more than a program's."""
    ids = torch.arange(batch) * (2**31 + 3)
    wanted = kr_fast.philox_normal(ids, (6,), seed=1)
    with registry.forced("triton"):
        assert torch.equal(kr_fast.philox_normal(ids, (6,), seed=1), wanted)
        assert kr_fast.philox_normal(ids, (0,), seed=1).shape == (batch, 0)


SIGNATURE = dict.fromkeys(("batch", "numel", "blocks"), "i32") | dict.fromkeys(("seed", "stream"), "i64")
SIGNATURE |= {"ids": "*i64", "out": "*fp32"}


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("numel", [64, 75, 3072])
def test_compiles_to_exactly_rounded_arithmetic(capability, numel, tmp_path, monkeypatch):
    """Equal bits on a GPU follow from equal operations: none is approximate, none flushes subnormals, none is fused
    that is not written as a fused multiply-add, so the interpreter's bits are the GPU's."""
    pytest.importorskip("triton")
    from kr_fast.kernels.sampling import philox_normal as kernels
    from triton_compile import build, inexact_instructions, spilled_bytes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aligned = ("numel",) if numel % 16 == 0 else ()
    built = build(
        kernels.normals, SIGNATURE, kernels.tile(256, numel), capability=capability, warps=kernels.WARPS,
        aligned=aligned, fusion=False,
    )  # fmt: skip
    ptx = built.asm["ptx"]
    assert inexact_instructions(built) == set()
    # A pair of normals takes 12 fused multiply-adds and a square root for its radius, 7 for its angle. Blackwell's
    # instructions do two of them at once.
    fused = len(re.findall(r"\bfma\.rn\.f32\s", ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\s", ptx))
    assert fused == 19 * len(re.findall(r"\bsqrt\.rn\.f32\s", ptx)) > 0
    assert ("st.global.v4" in ptx) == (numel % 16 == 0)
    assert spilled_bytes(built) == 0
