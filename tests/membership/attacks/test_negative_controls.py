"""The blind attack and the controls of an audit: they succeed where the sides differ, and by chance only elsewhere."""

import dataclasses

import numpy as np
import pytest
import torch
from audit_cases import data

from kr_fast.membership import Choices, audit_signals, blind, negative_controls, roc
from kr_fast.membership.attacks.blind import MOST
from kr_fast.report import sentences
from kr_fast.runtime.errors import UserError


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    return torch.from_numpy((load_digits().images * (255 / 16)).astype(np.uint8))[..., None]


def brightened(images, members):
    changed = images.clone()
    changed[members] = (images[members] * 1.1).round().clamp(max=255).to(torch.uint8)
    return changed


def test_the_blind_attack_needs_two_groups():
    images, inside = torch.zeros(40, 8, 8, 1, dtype=torch.uint8), torch.arange(40) < 20
    with pytest.raises(ValueError, match="^blind: groups must hold at least two groups, got 1"):
        blind(images, inside, groups=[0] * 40)


def test_the_blind_attack_finds_a_brighter_side_and_nothing_in_a_random_cut(digits):
    members = torch.rand(len(digits), generator=torch.Generator().manual_seed(0)) < 0.5
    assert roc(blind(brightened(digits, members), members), members).auc >= 0.9
    low, high = roc(blind(digits, members), members).auc_interval()
    assert low <= 0.5 <= high


def test_few_members_beside_many_others_are_all_taken(digits, monkeypatch):
    """A sample without any of them has no AUC: one of 40 images has none of 10 beside 290 in a quarter of cases."""
    monkeypatch.setattr("kr_fast.membership.attacks.blind.MOST", 40)
    members = torch.arange(300) < 10
    for seed in range(4):
        taken = ~blind(digits[:300], members, seed=seed).isnan()
        assert taken[members].all()
        assert int(taken.sum()) == 40
    assert negative_controls(digits[:300], ~members, {}, seed=3)["blind"]["passed"] in (True, False)


def test_negative_controls_pass_on_null_data(digits):
    """All pass in 95 % of audits of three targets: of 60 cuts more than 8 fail with a probability of 0.2 %.

    Tested each at 95 % by itself, the seven controls would fail in 18 of them.
    """
    generator, failed = torch.Generator().manual_seed(1), 0
    for seed in range(60):
        members = torch.rand(200, generator=generator) < 0.5
        scores = {name: torch.randn(200, generator=generator) for name in "abc"}
        controls = negative_controls(digits[:200], members, scores, seed=seed)
        rows = [controls["blind"], *(row for sides in controls["targets"].values() for row in sides.values())]
        failed += not all(row["passed"] for row in rows)
    assert failed <= 8


def test_an_audit_says_first_that_a_control_failed(digits, tmp_path):
    whole = data(effect=0.0)
    images = digits[:600]
    report = audit_signals(dataclasses.replace(whole, images=images), Choices(attacks=("lira",)))
    controls = report.setting["negative_controls"]
    assert controls["blind"]["passed"]
    assert list(controls["targets"]) == ["target"]
    assert "negative control failed" not in sentences.verdict(report.to_dict())
    other = dataclasses.replace(whole, images=brightened(images, whole.members))
    report = audit_signals(other, Choices(attacks=("lira",)))
    assert not report.setting["negative_controls"]["blind"]["passed"]
    assert sentences.verdict(report.to_dict()).startswith("A negative control failed, so what follows is not decided")
    assert report.warnings[0].startswith("an attack that sees no model tells members from the others")
    page = report.write(tmp_path).read_text()
    assert "members against the others by the images alone" in page
    assert audit_signals(whole, Choices(attacks=("lira",))).setting["negative_controls"]["blind"] is None


def test_more_than_it_takes_are_drawn_from(digits):
    images = digits[:, ::4, ::4][torch.arange(MOST + 40) % len(digits)]
    scores = blind(images, torch.arange(len(images)) % 2 == 0, folds=2)
    assert int(scores.isnan().sum()) == 40


def test_equal_images_score_the_same():
    images, members = torch.zeros(40, 4, 4, 1, dtype=torch.uint8), torch.arange(40) < 20
    assert bool((blind(images, members) == 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"members": torch.arange(40) < 9},
            "blind: members must hold at least 10 members and as many others, got 9 and 31",
        ),
        ({"members": torch.arange(39) < 20}, "blind: members must have shape [40], got [39]"),
        ({"folds": 1}, "blind: folds must be an integer, at least 2, got 1"),
        ({"images": torch.zeros(40, 4, 4, 1)}, "blind: images must be uint8 [N, H, W, C], got float32 [40, 4, 4, 1]"),
    ],
)
def test_arguments(changes, message):
    given = {"images": torch.zeros(40, 4, 4, 1, dtype=torch.uint8), "members": torch.arange(40) < 20, **changes}
    with pytest.raises(UserError) as error:
        blind(given.pop("images"), given.pop("members"), **given)
    assert str(error.value).startswith(message)
