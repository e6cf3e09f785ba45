"""What pages say of the tests of released images and of near-duplicates, beside the JSON that it comes from."""

import dataclasses
import html
import json
import re

import pytest
import torch
from audit_cases import data

from kr_fast.data import load_uncut
from kr_fast.membership import Choices, audit_signals
from kr_fast.membership.attacks.released_tests import TESTS
from kr_fast.report.sections import duplicates, released


@pytest.fixture(scope="module")
def report():
    """The simulated audit with pictures: of 80 released ones 40 are members, but for one grey level."""
    whole, images = data(), load_uncut("digits")[2]["all"].images
    pool = images[:600]
    made = images[600:680].clone()
    made[:40] = pool[whole.members][:40].clamp(1, 254) - 1
    whole = dataclasses.replace(whole, images=pool, labels=torch.arange(600) % 3, synthetic={"<i>made": made})
    features = {"features": pool.flatten(1).float(), "synthetic_features": {"<i>made": made.flatten(1).float()}}
    return audit_signals(dataclasses.replace(whole, **features), Choices(attacks=("loss", "nearest_synthetic")))


def test_every_statement_is_a_figure_of_the_json(report, tmp_path):
    path = report.write(tmp_path)
    text = " ".join(html.unescape(re.sub("<[^<>]*>", " ", path.read_text())).split())
    values = json.loads((tmp_path / "release" / "audit.json").read_text())
    row = values["released_tests"]["<i>made"]
    assert list(row) == ["pixels", "features", "p", "by_group"]
    tests = [row[space][test] for space in ("pixels", "features") for test in TESTS]
    assert row["p"] == min(each["p_corrected"] for each in tests) < 1e-6
    # Holm's correction of eight tests.
    assert sorted(each["p"] for each in tests)[0] * 8 == pytest.approx(row["p"])
    pixels, memorised = row["pixels"], row["pixels"]["memorised"]
    assert pixels["members"] + pixels["held_out"] == 600
    low, high = pixels["nearer"]["interval"]
    for words in (
        "Tests of released images: <i>made",
        f"Beside {pixels['held_out']} held-out images, which are non-members, the {pixels['members']} members are ",
        "members are nearer",
        f"to the 80 released images (smallest corrected p = {row['p']:.2g}).",
        f"{pixels['nearer']['auc']:.3f} [{low:.3f}, {high:.3f}]",
        f"{100 * pixels['dcr']['share']:.2f} %",
        f"{100 * pixels['dcr']['expected']:.2f} %",
        f"than to held-out images pixels {memorised['count']} at most {memorised['expected']:.1f}",
        f"{pixels['dcr']['members']['median']:.1f}",
        f"{row['features']['nndr']['held_out']['low']:.3f}",
        f"{pixels['matched']} were drawn on each side",
        f"{100 * pixels['medoids']['coverage']:.2f} % of the members in pixels",
        "Features are those of a shadow model",
        "Near-duplicates on both sides",
        duplicates.words(values["setting"]["duplicates"]),
    ):
        assert words in text, words
    # Nothing of it points to a record.
    assert "closest_pairs" not in values
    assert "share of the distance to a held-out image" not in text


def test_pairs_are_shown_where_that_was_asked_for(report, tmp_path):
    pairs = report.closest_pairs()["<i>made"]
    assert len(pairs) == 16
    members = report.data.members.nonzero()[:40, 0].tolist()
    assert all(members[row["synthetic"]] == row["position"] == row["index"] for row in pairs)
    for show_records, show_real_images in ((True, False), (False, True)):
        out = tmp_path / f"{show_records} {show_real_images}"
        text = report.write(out, show_records=show_records, show_real_images=show_real_images).read_text()
        assert json.loads((out / "private" / "closest_pairs.json").read_text()) == {"<i>made": pairs}
        assert (out / "private" / "audit.html").exists()
        assert not (out / "release" / "audit.html").exists()
        assert ("share of the distance to a held-out image" in text) == show_records
        assert ("beside the members nearest to them" in text) == show_real_images
        assert f"#{pairs[0]['index']}" not in text  # in a picture, if anywhere


def test_words_where_nothing_is_seen():
    pixels = {
        "members": 1200,
        "held_out": 300,
        "synthetic": 1024,
        "memorised": {"copies": {"members": 0, "held_out": 0}},
    }
    text = released.words({"pixels": pixels, "p": 0.31}, 0.95)
    assert (
        "the 1,200 members are not seen to be nearer to the 1,024 released images (smallest corrected p = 0.31)."
        in text
    )
    assert "pixel for pixel" not in text
    pixels["memorised"]["copies"]["members"] = 2
    assert "2 released images are members, pixel for pixel" in released.words({"pixels": pixels, "p": 0.31}, 0.95)
    none = {"members": 0, "non_members": 0}
    values = {"near": none, "exact": none, "threshold": 8.67, "spacing": 34.7, "left_out": False}
    assert duplicates.words(values).startswith("No member is a near-duplicate of a non-member (a root mean square")
    assert "at most 8.7 grey levels" in duplicates.words(values)


def test_older_files_have_no_such_sections():
    assert list(released.blocks({"setting": {"level": 0.95}}, {})) == []
    assert list(duplicates.blocks({"setting": {}})) == []
