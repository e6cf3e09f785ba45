"""What distillation_loss refuses, each with its message, and what it takes."""

import math

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_topk
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics
from kr_fast.ops.distillation.dkd_loss import dkd_loss
from kr_fast.ops.membership.membership_signals import membership_signals

Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.zeros(3)}, "input must have 2 dimensions"),
        ({"target": torch.zeros(3, 5)}, r"target must have input's shape \[3, 4\]"),
        ({"input": torch.zeros(3, 1), "target": torch.zeros(3, 1)}, "at least 2 classes"),
        ({"target": torch.zeros(3, 4, requires_grad=True)}, "target must not require a gradient"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
        ({"temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
        ({"labels": torch.tensor([0, 1, 4]), "hard_weight": 1.0}, "labels must be in .0, 4."),
        (
            {"labels": torch.tensor([0, -1, 2]), "hard_weight": 1.0},
            "labels must be in .0, 4. or ignore_index -100, got -1",
        ),
        ({"target": torch.zeros(3, 4, device="meta")}, "target must be on input's device cpu"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, r"labels must be \[3\] on cpu"),
        ({"sample_weight": torch.ones(3, device="meta")}, r"sample_weight must be \[3\] on cpu"),
        ({"sample_weight": torch.ones(3, 1)}, "sample_weight must have 1 dimensions"),
        ({"labels": torch.tensor([0, 1]), "hard_weight": 1.0}, r"labels must be \[3\]"),
        ({"sample_weight": torch.ones(2)}, r"sample_weight must be \[3\]"),
        ({"target_type": "odds"}, "target_type must be one of logits, probs, log_probs, got 'odds'"),
        ({"reduction": "batch"}, "reduction must be one of none, mean, sum"),
        ({"soft_weight": -1.0}, "soft_weight must be at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"input": Z, "target": Z, **arguments})


def test_values_are_checked_on_request():
    p = torch.full((3, 4), 0.25)
    negative, nan, short = p.clone(), p.clone(), p.clone()
    negative[1, 1:3] = torch.tensor([0.75, -0.25])
    nan[0, 2] = math.nan
    short[2] = 0.2
    for target, kind, message in [
        (negative, "probs", r"target must hold probabilities, at least 0, got '-0.25 at \[1, 2\]'"),
        (nan, "probs", r"target must hold probabilities, at least 0, got 'nan at \[0, 2\]'"),
        (short, "probs", "target must have rows that sum to 1, got '0.8 in row 2'"),
        (nan.log(), "log_probs", "target must hold log-probabilities, not NaN"),
        (nan, "logits", r"target must not hold NaN, got 'NaN at \[0, 2\]'"),
    ]:
        distillation_loss(Z, target, target_type=kind)  # not by itself: it would be one more read
        with pytest.raises(ValueError, match=message):
            distillation_loss(Z, target, target_type=kind, validate_args=True)
    with pytest.raises(ValueError, match="sample_weight must be at least 0, got '-1.0 in row 1'"):
        distillation_loss(Z, Z, sample_weight=torch.tensor([1.0, -1, 1]), validate_args=True)
    fine = distillation_loss(Z, p.bfloat16(), target_type="probs", sample_weight=torch.ones(3), validate_args=True)
    assert fine.item() == 0


def test_bad_types():
    for name in ("temperature", "soft_weight", "label_smoothing"):
        for value in ("4", torch.tensor(0.5)):
            with pytest.raises(TypeError, match=f"{name} must be a number"):
                distillation_loss(Z, Z, **{name: value})
    with pytest.raises(TypeError, match="ignore_index must be an int, got -100.0"):
        distillation_loss(Z, Z, Y, ignore_index=-100.0)
    with pytest.raises(ValueError, match="input and target must be dense"):
        distillation_loss(Z.to_sparse(), Z)
    with pytest.raises(TypeError, match="input must be float32 or"):
        distillation_loss(Z.long(), Z)
    with pytest.raises(TypeError, match="labels must be given"):
        distillation_loss(Z, Z, hard_weight=1.0)
    for labels in (Y.float(), Y.bool()):
        with pytest.raises(TypeError, match="labels must be int64 or another integer dtype, got"):
            distillation_loss(Z, Z, labels, hard_weight=1.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_labels_of_any_integer_dtype(dtype):
    torch.manual_seed(0)
    z, t, y = torch.randn(3, 4), torch.randn(3, 4), Y.to(dtype)
    wanted = distillation_loss(z, t, Y, hard_weight=0.5)
    for labels in (y, y[:, None], Y[:, None], torch.stack([y, y], 1)[:, 0]):
        assert torch.equal(distillation_loss(z, t, labels, hard_weight=0.5), wanted)
    assert torch.equal(dkd_loss(z, t, y), dkd_loss(z, t, Y))
    found = distillation_metrics(z, t, y[:, None]).cross_entropy
    assert torch.equal(found, distillation_metrics(z, t, Y).cross_entropy)
    p, indices = t.softmax(1).topk(2)
    assert torch.equal(distillation_loss_topk(z, p, indices.to(dtype)), distillation_loss_topk(z, p, indices))
    if dtype.is_signed:  # ignore_index
        ignored = torch.tensor([0, -100, 3])
        losses = [distillation_loss(z, t, each, hard_weight=0.5) for each in (ignored, ignored.to(dtype))]
        assert torch.equal(*losses)
    signals = membership_signals(z, y[:, None])["phi"]
    assert torch.equal(signals, membership_signals(z, Y)["phi"])


def test_order_of_backends():
    assert registry.preference("distillation_loss", "cuda") == ("cuda", "triton", "reference")
    assert registry.preference("distillation_loss", "cpu") == ("cpu", "reference")
