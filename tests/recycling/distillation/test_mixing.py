"""MixUp and CutMix: pixels against loops, shares against counted areas, the law of the draws."""

import numpy as np
import pytest
import torch
from scipy import stats

from kr_fast.recycling.stages.distillation.mixing import Mixture, draw_mixtures

SIZE = (7, 5)  # odd and unequal sides: rows and columns cannot be swapped unseen
STEPS = 2000  # a fair coin leaves 900 to 1100 with a chance of 1 - 7e-6


@pytest.mark.parametrize(
    "mixture", [Mixture(0.3), Mixture(1.0), Mixture(0.6, (1, 4, 2, 5)), Mixture(1.0, (3, 3, 0, 2))]
)
def test_images_against_loops(mixture):
    x = torch.randn(5, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    before, expected = x.clone(), np.empty(x.shape)
    for i, _, row, column in np.ndindex(*x.shape):
        own, other = x[i, :, row, column].double().numpy(), x[4 - i, :, row, column].double().numpy()
        if mixture.box is None:
            expected[i, :, row, column] = mixture.share * own + (1 - mixture.share) * other
        else:
            top, bottom, left, right = mixture.box
            inside = top <= row < bottom and left <= column < right
            expected[i, :, row, column] = other if inside else own
    np.testing.assert_allclose(mixture.images(x).numpy(), expected, rtol=0, atol=1e-6)
    assert torch.equal(x, before)


def test_share_of_a_cut_is_its_area():
    boxes = [each for each in draw_mixtures(0, 1.0, STEPS, SIZE, 0) if each is not None]
    assert len(boxes) == STEPS
    for each in boxes:
        top, bottom, left, right = each.box
        assert 0 <= top <= bottom <= SIZE[0]
        assert 0 <= left <= right <= SIZE[1]
        inside = sum(top <= row < bottom and left <= column < right for row, column in np.ndindex(*SIZE))
        assert each.share == pytest.approx(1 - inside / (SIZE[0] * SIZE[1]), abs=1e-12)
    # Beta(100, 100) is 0.5 within 0.035; boxes that nothing was cut off are squares here, and a little smaller.
    whole = [each for each in draw_mixtures(0, 100.0, STEPS, (101, 101), 0) if 0 < min(each.box) < max(each.box) < 101]
    assert all(each.box[1] - each.box[0] == each.box[3] - each.box[2] for each in whole)
    assert np.mean([each.share for each in whole]) == pytest.approx(0.51, abs=0.02)


def test_law_of_the_draws():
    shares = [each.share for each in draw_mixtures(0.4, 0, STEPS, SIZE, 1)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    both = draw_mixtures(0.4, 1.0, STEPS, SIZE, 2)
    assert 900 < sum(each.box is None for each in both) < 1100
    assert stats.kstest([each.share for each in both if each.box is None], stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert draw_mixtures(0, 0, 3, SIZE, 0) == [None] * 3


def test_draws_are_a_function_of_seed_and_names():
    drawn = draw_mixtures(1.0, 1.0, 20, SIZE, 3, "gkd", 1, 0)
    assert drawn == draw_mixtures(1.0, 1.0, 20, SIZE, 3, "gkd", 1, 0)
    assert drawn[:7] == draw_mixtures(1.0, 1.0, 7, SIZE, 3, "gkd", 1, 0)
    others = [draw_mixtures(1.0, 1.0, 20, SIZE, *seed) for seed in ((4, "gkd", 1, 0), (3, "gkd", 1, 1))]
    assert drawn not in others
