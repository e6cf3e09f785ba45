"""An AUC of 0.5 that shows nothing is told as such; and no figure that may leave is the score of a record."""

import json

import pytest
import torch
from audit_cases import MODELS, data, logits_of

from kr_fast.membership import Choices, audit_signals, from_logits
from kr_fast.report import sentences


def test_models_that_answer_by_chance_are_told():
    logits, keep, labels, members = logits_of()
    words = "answers no better than chance"
    logits[:, torch.arange(80), labels] += 6
    right = from_logits(logits[:MODELS], keep, labels, target=logits[MODELS], members=members)
    assert not any("chance: " in line for line in audit_signals(right, Choices(attacks=["loss"])).warnings)
    # A loader that shuffled gives the target's rows in another order.
    other = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    shuffled = from_logits(logits[:MODELS], keep, labels, target=logits[MODELS][other], members=members)
    assert (
        sum(line.startswith(f"target {words}") for line in audit_signals(shuffled, Choices(attacks=["loss"])).warnings)
        == 1
    )
    logits[3] = logits[3, other]
    one = from_logits(logits[:MODELS], keep, labels, target=logits[MODELS], members=members)
    assert any(line.startswith(f"1 of {MODELS} shadows answer no") for line in audit_signals(one).warnings)
    single = from_logits(logits[:MODELS], keep, 0 * labels, target=logits[MODELS], members=members)
    assert not any("chance: " in line for line in audit_signals(single, Choices(attacks=["loss"])).warnings)


def test_chance_is_two_deviations_wide_where_a_class_is_rare():
    """58 of 100 and 450 of 900 right: a mean recall of 0.54, whose deviation is 0.026 by the sizes of both classes."""
    labels = (torch.arange(1000) >= 900).long()
    for rare, told in ((58, True), (66, False)):
        right = torch.cat([torch.arange(900) < 450, torch.arange(100) < rare]).double()
        logits = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).abs() * (2 * right - 1)[:, None]
        logits = torch.cat([torch.where(labels == 0, 1, -1)[:, None] * logits, 0 * logits], 1)
        given = from_logits(None, None, labels, target=logits, members=torch.arange(1000) % 2 == 0)
        warnings = audit_signals(given, Choices(attacks=["loss"])).warnings
        assert any(line.startswith("target answers no better than chance") for line in warnings) == told


@pytest.mark.parametrize("keep_like", ["ties", "members"])
def test_scores_that_are_all_the_same_are_no_evidence(keep_like):
    """An interval of [0.500, 0.500] must not read as if it were known that nothing leaks."""
    logits, keep, labels, members = logits_of()
    logits, keep = (0 * logits, keep) if keep_like == "ties" else (logits, members.repeat(MODELS, 1))
    report = audit_signals(from_logits(logits[:MODELS], keep, labels, target=logits[MODELS], members=members))
    verdict = sentences.verdict(report.to_dict())
    assert "LiRA online gives every example the same score and shows nothing either way on target" in verdict
    assert "from the others, LiRA online gives every example the same score and shows nothing either way (" in verdict
    assert any("gave every example of target the same score: no evidence" in line for line in report.warnings)


@pytest.mark.parametrize("scale", [1e38, 1e300])
def test_logits_beyond_float32_are_read(scale):
    logits, keep, labels, members = logits_of()
    read = from_logits(scale * logits[:MODELS].double(), keep, labels, target=logits[MODELS], members=members)
    assert not torch.isnan(read.shadows["shadows"].answers).any()


def test_a_level_below_one_half_is_refused():
    """0.05 is an error where it is meant, and would call every attack above chance."""
    with pytest.raises(ValueError, match=r"audit: level must be in \[0.5, 1\), got 0.05"):
        audit_signals(data(), Choices(level=0.05))


def test_no_figure_that_may_leave_is_the_score_of_a_record():
    report = audit_signals(data())
    scores = {repr(float(value)) for each in report.scores.values() for rows in each.values() for value in rows}
    scores |= {repr(float(value)) for value in data().shadows["shadows"].signals["phi"].flatten()}
    scores |= {
        repr(float(points["threshold"]))
        for each in report.figures["target"].values()
        for points in each["operating_points"].values()
    }
    result = []
    json.loads(json.dumps(report.to_dict()), parse_float=lambda text: result.append(text))
    assert len(result) > 100
    assert not (scores - {"0.0", "1.0", "0.5"}) & set(result)
