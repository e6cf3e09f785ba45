"""Equal images are found exactly, against a comparison of all pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.data import shared_images
from kr_fast.runtime.errors import UserError


@settings(deadline=None, max_examples=50)
@given(
    counts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    channels=st.sampled_from([1, 3]),
    values=st.integers(1, 3),
    seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_shared_images_are_those_of_a_comparison_of_all_pairs(counts, channels, values, seed, strided):
    draw = np.random.default_rng(seed)
    images, others = (draw.integers(0, values, (count, 2, 2, channels), dtype=np.uint8) for count in counts)
    expected = [any(np.array_equal(each, other) for other in others) for each in images]
    given = torch.from_numpy(images)
    if strided:
        given = given.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    result = shared_images(given, others)
    assert result.dtype == torch.bool
    assert result.tolist() == expected


def test_shared_images_refuses_what_cannot_be_compared():
    images = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"^shared_images: others must be uint8 \[N, 8, 8, 1\], got uint8 \[4, 9, 8, 1"):
        shared_images(images, torch.zeros(4, 9, 8, 1, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"^shared_images: images must be uint8"):
        shared_images(images.float(), images)
