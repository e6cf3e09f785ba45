"""Accounting against closed forms, published figures and Opacus; calibration; refusals."""

import logging
import math
import re
import sys

import pytest

from kr_fast.membership import epsilon_of_mu
from kr_fast.privacy import Gaussian, Laplace, PureDP, calibrate, check_target, epsilon_of
from kr_fast.runtime.errors import UserError

DELTA = 1e-5


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (4.0, 100), (20.0, 100)])
def test_gaussian_mechanism_has_its_closed_form(noise, steps):
    """Balle and Wang 2018, theorem 8: ``steps`` Gaussians are one of ``mu = sqrt(steps) / noise``."""
    exact = epsilon_of_mu(math.sqrt(steps) / noise, DELTA)
    assert exact <= epsilon_of([Gaussian(noise, steps=steps)], DELTA) <= exact * 1.001


def test_different_gaussians_compose_to_one():
    both = epsilon_of([Gaussian(2.0), Gaussian(5.0, steps=3)], DELTA)
    assert both == pytest.approx(epsilon_of_mu(math.sqrt(1 / 4 + 3 / 25), DELTA), rel=1e-3)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (2.0, 0.3)])
def test_one_sampled_step_has_its_closed_form(noise, rate):
    """Amplification by sampling: ``delta(epsilon) = q delta_Gauss(log((e^epsilon - 1 + q) / q))``."""
    inner = epsilon_of_mu(1 / noise, DELTA / rate)
    exact = math.log1p(rate * math.expm1(inner))
    assert epsilon_of([Gaussian(noise, rate)], DELTA) == pytest.approx(exact, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_published_figures_of_mnist(noise, epochs, published):
    """TensorFlow Privacy's tutorial: 60,000 images, batches of 256, delta 1e-5.

    Published by Renyi orders and the first conversion (Mironov 2017, proposition 3), which is computed here too; losses
    as distributions are tighter, by 18 to 28 % here.
    """
    rate, steps = 256 / 60_000, epochs * 60_000 // 256
    orders = [*range(2, 64), 128, 256, 512]
    renyi = min(steps * renyi_divergence(rate, noise, order) + math.log(1 / DELTA) / (order - 1) for order in orders)
    assert renyi == pytest.approx(published, rel=0.02)
    assert 0.7 * published < epsilon_of([Gaussian(noise, rate, steps)], DELTA) < 0.85 * published


def renyi_divergence(rate: float, noise: float, order: int) -> float:
    """Of the sampled Gaussian at a whole order: Mironov, Talwar and Zhang 2019, section 3.3."""
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    most = max(terms)
    return (most + math.log(sum(math.exp(term - most) for term in terms))) / (order - 1)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.5, 0.05, 500), (6.5, 0.05, 1000)])
def test_opacus_finds_the_same(noise, rate, steps):
    """Its accountant of privacy random variables states an error of 1 %, its Renyi orders an upper bound."""
    pytest.importorskip("opacus", reason="needs opacus to compare with")
    from opacus.accountants import PRVAccountant, RDPAccountant

    own = epsilon_of([Gaussian(noise, rate, steps)], DELTA)
    found = {}
    for accountant in (PRVAccountant(), RDPAccountant()):
        accountant.history = [(noise, rate, steps)]
        found[type(accountant).__name__] = accountant.get_epsilon(delta=DELTA)
    assert own == pytest.approx(found["PRVAccountant"], rel=0.01, abs=0.02)
    assert own < found["RDPAccountant"] < 1.3 * own


def test_laplace_and_pure_mechanisms_have_their_closed_forms():
    assert epsilon_of([Laplace(2.0)], 0.01) == pytest.approx(0.5 + 2 * math.log1p(-0.01), abs=2e-4)
    pure = math.log(math.exp(0.5) - 0.01 * (1 + math.exp(0.5)))
    assert epsilon_of([PureDP(0.5)], 0.01) == pytest.approx(pure, abs=2e-4)
    assert epsilon_of([], DELTA) == epsilon_of([Gaussian(1.0, 0.1, 0)], DELTA) == 0.0
    alone = epsilon_of([Gaussian(4.0, 0.2, 50)], DELTA)
    together = epsilon_of([Gaussian(4.0, 0.2, 50), PureDP(0.1), Laplace(10.0)], DELTA)
    assert alone < together <= alone + 0.2


def test_an_epsilon_that_protects_nobody_is_computed_in_bounded_memory():
    """Opacus issue 602: the grid of so large losses would take gigabytes."""
    assert 1000 < epsilon_of([Gaussian(0.1, 0.1, 5000)], DELTA) < math.inf


def test_calibration_finds_the_published_noise():
    """Balle and Wang 2018: the analytic Gaussian mechanism at (1, 1e-5) takes 3.73063, the classical one 4.84."""
    assert calibrate(1.0, DELTA, sample_rate=1.0, steps=1) == pytest.approx(3.73063, abs=2e-3)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "beside"),
    [(1.0, 0.05, 1000, ()), (6.0, 0.2, 1000, (Gaussian(4.0, 0.2, 50), PureDP(0.1)))],
)
def test_calibration_spends_the_whole_target_and_no_more(epsilon, rate, steps, beside):
    noise = calibrate(epsilon, DELTA, sample_rate=rate, steps=steps, beside=beside)
    assert noise == round(noise, 4)
    assert 0.999 * epsilon < epsilon_of([*beside, Gaussian(noise, rate, steps)], DELTA) <= epsilon


def test_a_budget_that_takes_next_to_no_noise_gets_the_least_that_is_allowed():
    assert calibrate(150.0, 1e-3, sample_rate=1e-4, steps=1) == 0.1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epsilon": 0.0}, r"epsilon must be a finite number above 0, got 0.0"),
        ({"epsilon": math.nan}, r"epsilon must be a finite number above 0, got nan"),
        ({"delta": 0.0}, r"delta must be in \[1e-12, 1\), got 0.0"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"steps": 0}, r"steps must be an integer, at least 1, got 0"),
        (
            {"beside": [PureDP(2.0)]},
            r"epsilon must be above 2, which what is beside the training spends alone, got 1.0",
        ),
        (
            {"epsilon": 0.01, "sample_rate": 1.0, "steps": 2000},
            r"epsilon must be at least 0\.\d+ for 2000 steps at sample rate 1, or the steps at most \d+ "
            r"\(noise multiplier 1000\), got 0.01",
        ),
    ],
)
def test_targets_that_cannot_be_reached_are_refused(values, text):
    with pytest.raises(UserError, match=f"^calibrate: {text}"):
        calibrate(**{"epsilon": 1.0, "delta": DELTA, "sample_rate": 0.1, "steps": 10, **values})


def test_the_refusal_says_what_would_reach_the_target():
    with pytest.raises(UserError) as error:
        calibrate(0.01, DELTA, sample_rate=1.0, steps=2000)
    epsilon, steps = re.search(r"at least ([\d.]+) for .* at most (\d+) ", str(error.value)).groups()
    assert 0 <= float(epsilon) - epsilon_of([Gaussian(1000.0, steps=2000)], DELTA) < 1e-3
    assert 0.005 < epsilon_of([Gaussian(1000.0, steps=int(steps))], DELTA) <= 0.01


def test_mechanisms_are_checked():
    for make, text in (
        (lambda: Gaussian(0.01), r"Gaussian: noise_multiplier must be a number in \[0.1, 1000\], got 0.01"),
        (lambda: Gaussian(1.0, 0.0), r"Gaussian: sample_rate must be in \(0, 1\], got 0.0"),
        (lambda: Gaussian(1.0, steps=1.5), "Gaussian: steps must be an integer"),
        (lambda: Laplace(True), "Laplace: noise_multiplier must be a number"),
        (lambda: PureDP(-1.0), "PureDP: epsilon must be a number"),
    ):
        with pytest.raises(UserError, match=text):
            make()


def test_delta_above_one_over_records_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="kr_fast"):
        check_target("run", 8.0, 1e-4, 10_000)
        assert caplog.text == ""
        check_target("run", 8.0, 1e-3, 4708)
    assert "delta 0.001 is above 1 / records = 0.00021: publishing each record with chance delta" in caplog.text


def test_data_of_unknown_size_is_refused():
    with pytest.raises(UserError, match="run: the number of records must be known .* got data of unknown size"):
        check_target("run", 8.0, DELTA, None)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(UserError) as error:
        calibrate(1.0, DELTA, sample_rate=0.1, steps=10)
    mend = "pip install 'kr-fast[privacy]'"
    assert str(error.value) == f"privacy: accounting must have dp-accounting installed, got none; {mend}"
