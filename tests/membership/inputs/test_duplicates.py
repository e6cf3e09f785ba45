"""Near-duplicates across the sides: exact ones, compressed ones, none; counted, told and left out."""

import dataclasses
import io

import audit_cases
import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast.data import load_uncut
from kr_fast.membership import Choices, audit_signals, duplicates_across
from kr_fast.report.sections import duplicates as section
from kr_fast.runtime.errors import UserError


def compressed(images, quality):
    """Each image as JPEG and back."""
    rows = []
    for image in images[..., 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        rows.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(rows))[..., None]


@pytest.fixture(scope="module")
def digits():
    return load_uncut("digits")[2]["all"].images


def test_digits_have_none_and_copies_are_found(digits):
    pool, members = digits[:600].clone(), torch.arange(600) < 400
    found = duplicates_across(pool, members)
    assert not bool(found.near.any())
    # The median distance of digits to their nearest neighbour, by all pairs of the larger side.
    rows = pool[:400].flatten(1).double()
    gaps = torch.cdist(rows, rows).fill_diagonal_(torch.inf).min(1).values / 8
    assert found.threshold == pytest.approx(float(gaps.median()) / 4, rel=1e-5)
    pool[400:405], pool[405:425] = pool[:5], compressed(pool[5:25], quality=90)
    found = duplicates_across(pool, members)
    expected = [*range(25), *range(400, 425)]
    assert found.near.nonzero()[:, 0].tolist() == expected
    assert found.exact.nonzero()[:, 0].tolist() == [*range(5), *range(400, 405)]


def with_images(digits, copies=12):
    """The simulated audit of 600 examples, the first non-members copies of the first members but for one grey level."""
    data = audit_cases.data()
    inside, outside = (side.nonzero()[:copies, 0] for side in (data.members, ~data.members))
    pool = digits[:600].clone()
    pool[outside] = pool[inside].clamp(1, 254) - 1
    return dataclasses.replace(data, images=pool), torch.cat([inside, outside]).sort().values


def test_an_audit_counts_tells_and_leaves_out(digits):
    data, both = with_images(digits)
    choices = Choices(attacks=("lira", "loss"))
    report = audit_signals(data, choices)
    facts = report.to_dict()["setting"]["duplicates"]
    assert facts["near"] == {"members": 12, "non_members": 12}
    assert facts["exact"] == {"members": 0, "non_members": 0}
    assert not facts["left_out"]
    assert any("12 members and 12 non-members are near-duplicates" in line for line in report.warnings)
    assert "12 members and 12 non-members are near-duplicates" in section.words(facts)
    without = audit_signals(data, dataclasses.replace(choices, leave_out_duplicates=True))
    assert without.setting["duplicates"] == {**facts, "left_out": True}
    assert "left out of this audit" in section.words(without.setting["duplicates"])
    assert not any("near-duplicates" in line for line in without.warnings)
    rest = torch.ones(600, dtype=torch.bool)
    rest[both] = False
    assert torch.equal(without.data.index, rest.nonzero()[:, 0])
    assert torch.equal(without.scores["target"]["loss"], report.scores["target"]["loss"][rest])
    assert torch.equal(without.data.shadows["shadows"].keep, data.shadows["shadows"].keep[:, rest])
    assert without.members + without.non_members == 576


def test_without_images_nothing_is_counted_and_nothing_left_out(digits):
    data = audit_cases.data()
    assert audit_signals(data, Choices(attacks=("loss",))).setting["duplicates"] is None
    choices = Choices(attacks=("loss",), leave_out_duplicates=True)
    with pytest.raises(UserError, match=r"^audit: leave_out_duplicates must be left out without images"):
        audit_signals(data, choices)
    with pytest.raises(UserError, match="be left out with random_members"):
        Choices(random_members=True, leave_out_duplicates=True)
    with pytest.raises(
        UserError, match=r"^duplicates_across: members must be bool \[9\] with members and others, got 9 of 9"
    ):
        duplicates_across(digits[:9], torch.ones(9, dtype=torch.bool))
    same = dataclasses.replace(data, images=digits[:1].expand(600, 8, 8, 1).clone())
    with pytest.raises(UserError, match="must leave some members"):
        audit_signals(same, choices)
