"""The noise's distribution, where it is put, and where its bits come from."""

import numpy as np
import torch
from scipy import stats

from kr_fast.privacy import noise


def test_values_are_standard_normal():
    values = noise.normal(100_001, 3, "test").numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    cells = np.histogram(values, stats.norm.ppf(np.linspace(0, 1, 65)))[0]
    assert stats.chisquare(cells).pvalue > 1e-3
    half = len(values) // 2
    assert abs(np.corrcoef(values[:half], values[half : 2 * half])[0, 1]) < 4 / half**0.5  # both values of a pair


def test_a_seed_repeats_and_names_differ():
    assert torch.equal(noise.normal(9, 3, "a", 0), noise.normal(9, 3, "a", 0))
    assert not torch.equal(noise.normal(9, 3, "a", 0), noise.normal(9, 3, "a", 1))


def test_without_a_seed_nothing_repeats(monkeypatch):
    torch.manual_seed(0)
    np.random.seed(0)
    first = noise.normal(9, None)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, noise.normal(9, None))
    monkeypatch.setattr("ssl.RAND_bytes", lambda count: b"\x07" * count)  # it is this generator that is asked
    assert torch.equal(noise.normal(9, None), noise.normal(9, None))


def test_extreme_words_give_finite_values(monkeypatch):
    for byte in (b"\x00", b"\xff", b"\x80", b"\x7f"):
        monkeypatch.setattr("ssl.RAND_bytes", lambda count, byte=byte: byte * count)
        assert torch.isfinite(noise.normal(4, None)).all()


def test_sums_with_noise_lie_on_one_grid():
    deviation = 0.37
    grid = 2.0**-22
    for start in (0.0, 1.2345678, -3e-9):
        total = torch.full((1000,), start)
        noise.add_noise(total, deviation, 5, "test")
        assert torch.equal((total.double() / grid).round() * grid, total.double())
        assert stats.kstest((total.double().numpy() - start) / deviation, "norm").pvalue > 1e-3


def test_parts_have_noise_of_their_own():
    total = torch.zeros((1 << 18) + 5)
    noise.add_noise(total, 1.0, 5, "test")
    assert len(torch.unique(total[: 1 << 10])) == 1 << 10
    assert not torch.equal(total[:5], total[-5:])
    assert abs(float(total.std()) - 1) < 0.01
