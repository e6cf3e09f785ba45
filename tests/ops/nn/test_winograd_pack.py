"""winograd_pack: every backend against the definition in float64, arguments."""

import pytest
import torch

import kr_fast
from kr_fast.ops.nn.reference import packed_shape, transforms


# A block that is not full, of 16 and of 32; inputs of less than a group, of one and of a part of a second; no scale.
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 5), (33, 40), (70, 17)])
@pytest.mark.parametrize("scaled", [False, True])
def test_packing_is_that_of_the_definition(isa, shape, scaled):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, 3, 3, generator=generator)
    scale = torch.randn(shape[0], generator=generator, dtype=torch.float64) if scaled else None
    exact = kr_fast.winograd_pack(weight.double(), scale, dtype=torch.float64)
    for each in (weight, weight.transpose(2, 3).contiguous().transpose(2, 3), weight.bfloat16()):
        packed = kr_fast.winograd_pack(each, scale)
        want = exact if each.dtype == weight.dtype else kr_fast.winograd_pack(each.double(), scale, dtype=exact.dtype)
        assert packed.shape == packed_shape(*shape)
        torch.testing.assert_close(packed.double(), want, rtol=1e-6, atol=1e-7)
    g = transforms()[1]
    first = (g @ (weight[0, 0].double() * (1 if scale is None else scale[0])) @ g.T).flatten()
    torch.testing.assert_close(exact[:, 0, 0, 0], first)


@pytest.mark.parametrize("shape", [(1, 1), (16, 17), (33, 40)])
def test_turned_filters(isa, shape):
    weight = torch.randn(*shape, 3, 3, generator=torch.Generator().manual_seed(0))
    want = kr_fast.winograd_pack(weight.double().flip(2, 3).transpose(0, 1), dtype=torch.float64)
    for each in (weight, weight.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(kr_fast.winograd_pack(each, turned=True).double(), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(kr_fast.winograd_pack(weight.double(), turned=True, dtype=torch.float64), want)


def test_opcheck():
    weight, scale = torch.randn(17, 5, 3, 3), torch.randn(17, dtype=torch.float64)
    for arguments in ((weight, scale, False, torch.float32), (weight.double(), None, True, torch.float64)):
        torch.library.opcheck(torch.ops.kr_fast.winograd_pack.default, arguments)


def test_bad_scales_to_pack():
    weight = torch.zeros(4, 4, 3, 3)
    with pytest.raises(TypeError, match="winograd_pack: scale must be float64, got"):
        kr_fast.winograd_pack(weight, torch.zeros(4))
    with pytest.raises(ValueError, match="winograd_pack: scale must be \\[4\\] on cpu, got"):
        kr_fast.winograd_pack(weight, torch.zeros(3, dtype=torch.float64))


def test_bad_weights_to_pack():
    with pytest.raises(ValueError, match="winograd_pack: weight must be floating point \\[O, I, 3, 3\\], got"):
        kr_fast.winograd_pack(torch.zeros(4, 4, 5, 5))
    with pytest.raises(TypeError, match="winograd_pack: dtype must be float32 or float64, got"):
        kr_fast.winograd_pack(torch.zeros(4, 4, 3, 3), dtype=torch.float16)
    with pytest.raises(TypeError, match="winograd_pack: turned must be a bool, got"):
        kr_fast.winograd_pack(torch.zeros(4, 4, 3, 3), turned=1)
    with pytest.raises(ValueError, match="winograd_pack: scale must be None with turned, got"):
        kr_fast.winograd_pack(torch.zeros(4, 4, 3, 3), torch.zeros(4, dtype=torch.float64), turned=True)
