"""The attack on a diffusion model's weights: errors against float64, scores by hand, what is found and what is not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kr_fast import optimize, philox_normal
from kr_fast.membership import denoising_attack, denoising_errors, lira, roc
from kr_fast.membership.attacks.denoising import shadow_phi
from kr_fast.models import unet
from kr_fast.runtime.errors import UserError

ALPHAS = torch.linspace(0.999, 0.01, 50)


def tiny():
    """A UNet of two resolutions and three classes with weights that do something."""
    torch.manual_seed(0)
    network = unet(8, 8, 1, 3, widths=(8, 8))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def images_of(count, seed=0, side=8):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def oracle(network, x, labels, objective, levels, draws, seed):
    """The definition in float64, image by image."""
    network, rows = copy.deepcopy(network).double().eval(), []
    for i in range(len(x)):
        row = []
        for k, s in enumerate(levels):
            values = []
            for d in range(draws):
                n = philox_normal(torch.tensor([i]), x.shape[1:], seed=seed, stream=k * draws + d).double()
                clean = x[i : i + 1].double()
                if objective == "flow":
                    z, target, t = (1 - s) * clean + s * n, n - clean, torch.tensor([1000.0 * s])
                else:
                    t = torch.tensor([int(s * 50)])
                    a = ALPHAS[t].double()
                    z = a.sqrt() * clean + (1 - a).sqrt() * n
                    target = n if objective == "epsilon" else a.sqrt() * n - (1 - a).sqrt() * clean
                with torch.no_grad():
                    out = network(z, t, class_labels=labels[i : i + 1]).sample
                values.append(float((out - target).square().mean()))
            row.append(np.mean(values))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v_prediction"])
def test_errors_are_those_of_the_definition(objective):
    """Five images in calls of two: whole ones and a rest. Two levels of two draws: every stream is used."""
    network, x, labels = tiny(), images_of(5), torch.tensor([0, 2, 1, 1, 0])
    options = {"levels": (0.1, 0.62), "draws": 2, "seed": 9}
    expected = oracle(network, x, labels, objective, **options)
    alphas = None if objective == "flow" else ALPHAS
    options |= {"objective": objective, "alphas_cumprod": alphas}
    plain = denoising_errors(network.train(), x, labels, micro_batch=2, **options)
    assert plain.dtype == torch.float64
    assert network.training
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    optimize(network)
    for size in (2, 5):
        fast = denoising_errors(network, x, labels, micro_batch=size, **options)
        np.testing.assert_allclose(fast, expected, rtol=1e-5)


class Memory(nn.Module):
    """A denoiser of flow that a test can train in a second: what it knows of an image is in its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, z, t, class_labels=None):
        s = (t.float() / 1000).reshape(-1, 1).expand(len(z), 1)
        return self.layers(torch.cat([z.flatten(1), s], 1)).view_as(z)


@pytest.fixture(scope="module")
def overfitted():
    """Trained on 16 images, and a checkpoint of a quarter of the way."""
    network, x, draw = Memory(), images_of(16), torch.Generator().manual_seed(2)
    optimizer, early = torch.optim.Adam(network.parameters(), 2e-3), None
    for step in range(600):
        index = torch.randint(16, (64,), generator=draw)
        s, n = torch.rand(64, 1, 1, 1, generator=draw), torch.randn(64, 1, 8, 8, generator=draw)
        loss = (network((1 - s) * x[index] + s * n, 1000 * s.flatten()) - (n - x[index])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 149:
            early = copy.deepcopy(network)
    return network, early


def test_an_overfitted_generator_is_detected(overfitted):
    network, early = overfitted
    x, members = torch.cat([images_of(16), images_of(16, seed=5)]), torch.arange(32) < 16
    errors, before = (denoising_errors(each, x, None, objective="flow", seed=1) for each in (network, early))
    for scores in (denoising_attack(errors), denoising_attack(errors, early=before)):
        curve = roc(scores, members)
        assert curve.auc > 0.9
        assert curve.auc_interval()[0] > 0.7


def test_images_that_it_never_saw_are_not(overfitted):
    """Random halves of 200 fresh images, by every calibration without shadows."""
    network, early = overfitted
    x = images_of(200, seed=6)
    pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    members = torch.randperm(200, generator=torch.Generator().manual_seed(3)) < 100
    errors, before = (denoising_errors(each, x, None, objective="flow", seed=1) for each in (network, early))
    for options in ({}, {"early": before}, {"images": pixels}, {"early": before, "images": pixels}):
        low, high = roc(denoising_attack(errors, **options), members).auc_interval()
        assert low <= 0.5 <= high, options


def test_what_the_pixels_say_is_taken_off():
    """Errors that grow with the contrast of an image, tenfold over them, and are 20 % smaller for members."""
    draw = torch.Generator().manual_seed(0)
    contrast = torch.rand(400, 1, 1, 1, generator=draw)
    pixels = (128 + 120 * contrast * (2 * torch.rand(400, 8, 8, 1, generator=draw) - 1)).to(torch.uint8)
    members = torch.rand(400, generator=draw) < 0.5
    noise = 0.05 * torch.randn(400, 2, generator=draw)
    errors = torch.exp(2.3 * contrast.view(-1, 1) - 0.2 * members[:, None] + noise).double()
    scores = denoising_attack(errors, images=pixels, seed=4)
    assert roc(scores, members).auc > roc(denoising_attack(errors), members).auc + 0.15
    assert torch.equal(scores, denoising_attack(errors, images=pixels, seed=4))


def test_scores_against_shadows():
    """By hand in float64: one variance of each side over records and levels, once each level is of unit spread."""
    draw = np.random.default_rng(0)
    models, count, levels = 6, 30, 2
    keep = np.stack([draw.permutation(models) < 3 for _ in range(count)], 1)
    log = draw.normal(size=(1, count, 1)) + draw.normal(size=(models, count, levels)) * [0.1, 1.0] - keep[..., None]
    target = draw.normal(size=(count, levels))
    phi, own = -log, -target
    for k in range(levels):
        gap = [phi[m, i, k] - phi[keep[:, i] == keep[m, i], i, k].mean() for m in range(models) for i in range(count)]
        scale = np.sqrt(np.mean(np.square(gap)))
        phi[..., k] /= scale
        own[:, k] /= scale
    centre, spread = [], []
    for side in (keep, ~keep):
        middle = np.stack([np.median(phi[side[:, i], i], axis=0) for i in range(count)])
        centre.append(middle)
        spread.append(np.mean([(phi[m, i] - middle[i]) ** 2 for m, i in np.argwhere(side)]))
    z = [(own - middle) ** 2 / 2 / square for middle, square in zip(centre, spread, strict=True)]
    expected = (z[1] - z[0] + 0.5 * np.log(spread[1] / spread[0])).mean(1)
    scores = denoising_attack(np.exp(target), shadows=np.exp(log), keep=keep)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    # Each from the others: a shift of one spread is found.
    rows = lira(shadow_phi(np.exp(log), keep)[0], torch.from_numpy(keep), variance="fixed")
    assert np.mean([roc(row, torch.from_numpy(side)).auc for row, side in zip(rows, keep, strict=True)]) > 0.8


GOOD = {"network": lambda z, t, class_labels: z, "images": torch.zeros(2, 1, 4, 4), "labels": [0, 1]}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("network must be a module or a function", {"network": None}),
        ("network must return", {"network": lambda z, t, class_labels: z[:, :, 1:]}),
        ("network must return finite values", {"network": lambda z, t, class_labels: z * torch.inf}),
        ("objective must be one of flow", {"objective": "sample"}),
        (r"images must be float \[N, C, H, W\]", {"images": torch.zeros(2, 4, 4, 1, dtype=torch.uint8)}),
        ("images must be finite", {"images": torch.full((2, 1, 4, 4), torch.nan)}),
        (r"labels must be integers \[2\]", {"labels": [0]}),
        ("levels must lie between 0 and 1", {"levels": (0.5, 1.0)}),
        ("levels must hold at least one", {"levels": ()}),
        ("draws must be an integer", {"draws": 0}),
        ("micro_batch must be an integer", {"micro_batch": 0}),
        ("seed must be an integer", {"seed": -1}),
        ("alphas_cumprod must be None for flow", {"alphas_cumprod": ALPHAS}),
        ("alphas_cumprod must be given for epsilon", {"objective": "epsilon"}),
        ("alphas_cumprod must be numbers", {"objective": "v_prediction", "alphas_cumprod": [2.0]}),
    ],
)
def test_bad_input_of_the_errors_is_refused(words, changes):
    with pytest.raises(UserError, match=f"denoising_errors: {words}"):
        denoising_errors(**{**GOOD, "objective": "flow", **changes})


def test_labels_that_the_network_has_no_class_for_are_refused():
    with pytest.raises(UserError, match=r"denoising_errors: labels must lie in \[0, 4\)"):
        denoising_errors(tiny(), images_of(1), [4], objective="flow")


SHADOWS = torch.ones(4, 12, 2)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (r"errors must have shape \[N, L\]", {"errors": torch.ones(12)}),
        ("errors must be finite and at least 0", {"errors": -torch.ones(12, 2)}),
        (r"early must have shape \[12, 2\]", {"early": torch.ones(12, 1)}),
        ("keep must be given with shadows", {"shadows": SHADOWS}),
        ("keep must be left out without shadows", {"keep": torch.ones(4, 12) > 0}),
        (r"shadows must have shape \[4, 10, L\]", {"shadows": SHADOWS, "keep": torch.ones(4, 10) > 0}),
        (r"shadows must have shape \[M, 12, 2\]", {"shadows": SHADOWS[:, :, :1], "keep": torch.ones(4, 12) > 0}),
        ("images must be left out with shadows", {"shadows": SHADOWS, "images": torch.zeros(12, 4, 4, 1)}),
        ("images must be those of 12 records", {"images": torch.zeros(9, 4, 4, 1, dtype=torch.uint8)}),
        (
            "images must be at least 10, for regressions",
            {"errors": torch.ones(9, 2), "images": torch.zeros(9, 4, 4, 1, dtype=torch.uint8)},
        ),
    ],
)
def test_bad_input_of_the_attack_is_refused(words, options):
    with pytest.raises(UserError, match=f"denoising_attack: {words}"):
        denoising_attack(**{"errors": torch.ones(12, 2), **options})
