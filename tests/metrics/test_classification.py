"""Figures of a classifier: against scikit-learn and direct computation, and their bootstrap against theory."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    precision_score,
    recall_score,
    roc_auc_score,
)

from kr_fast.metrics import evaluate, macro_auc
from kr_fast.runtime.errors import UserError


def answers(count, classes, seed=0, coarse=False, strength=1.0):
    """Logits that know something of the labels; ``coarse``: of few values, so that scores are tied."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    logits = 2 * torch.randn(count, classes, generator=draw)
    logits[torch.arange(count), labels] += strength
    return logits.round() if coarse else logits, labels


def medmnist_auc(scores, labels):
    """``medmnist.evaluator.getAUC`` of one label per image."""
    if scores.shape[1] == 2:
        return roc_auc_score(labels, scores[:, -1])
    return np.mean([roc_auc_score((labels == c).astype(float), scores[:, c]) for c in range(scores.shape[1])])


@pytest.mark.parametrize("classes", [2, 3, 7])  # binary, the fewest of several, more
@pytest.mark.parametrize("coarse", [False, True])
def test_auc_and_balanced_accuracy_are_those_of_scikit_learn(classes, coarse):
    logits, labels = answers(300, classes, coarse=coarse)
    p = logits.double().softmax(1)
    result = evaluate(logits, labels, seed=0, replicates=2)
    auc = medmnist_auc(p.numpy(), labels.numpy())
    assert result.values["auc"] == macro_auc(p, labels) == pytest.approx(auc, rel=1e-12)
    predicted = logits.argmax(1).numpy()
    assert result.values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert result.recall == pytest.approx(recall_score(labels, predicted, average=None), rel=1e-12)
    assert result.values["accuracy"] == pytest.approx(float((predicted == labels.numpy()).mean()), rel=1e-12)
    assert result.absent == []


@pytest.mark.parametrize("classes", [2, 5])
def test_figures_of_classes_and_kappa_are_those_of_scikit_learn(classes):
    """Of five classes one is never predicted, which has no precision, and one is absent."""
    logits, labels = answers(400, classes, coarse=True)
    if classes == 5:
        logits[:, 2], labels[labels == 4] = -10.0, 3
    result = evaluate(logits, labels, seed=0, replicates=2, ordinal=True)
    y, said, p = labels.numpy(), logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    every = {"labels": list(range(classes))}
    assert result.confusion.tolist() == confusion_matrix(y, said, **every).tolist()
    kappa = cohen_kappa_score(y, said, weights="quadratic", **every)
    assert result.values["kappa"] == pytest.approx(kappa, rel=1e-12)
    precisions = precision_score(y, said, average=None, zero_division=np.nan, **every)
    for c in range(classes):
        precision = None if np.isnan(precisions[c]) else pytest.approx(precisions[c], rel=1e-12)
        assert result.classes["precision"][c] == precision
        if c in result.absent:
            assert result.classes["auc"][c] is result.classes["ece"][c] is None
            continue
        assert result.classes["auc"][c] == pytest.approx(roc_auc_score(y == c, p[:, c]), rel=1e-12)
        share, mean = calibration_curve(y == c, p[:, c], n_bins=15)
        counts = np.histogram(-p[:, c], -np.linspace(1, 0, 16))[0][::-1]  # bins that are closed above
        error = (counts[counts > 0] / 400) @ abs(share - mean)
        assert result.classes["ece"][c] == pytest.approx(error, rel=1e-9)
    assert result.absent == ([4] if classes == 5 else [])
    assert (result.classes["precision"][2 % classes] is None) == (classes == 5)
    assert "kappa" not in evaluate(logits, labels, seed=0, replicates=1).values


def test_the_calibration_error_is_that_of_its_bins():
    """Bins are closed above: a confidence of exactly 1/2 of two classes, 7.5 fifteenths, lies in bin 8 of 15."""
    logits, labels = answers(500, 4)
    logits = torch.cat([logits, torch.zeros(4, 4), torch.eye(4) * 1e4])  # confidences 1/4 and 1
    labels = torch.cat([labels, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])])
    p = logits.double().softmax(1).numpy()
    confidence, right, error = p.max(1), p.argmax(1) == labels.numpy(), 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluate(logits, labels, seed=0, replicates=1).values["ece"] == pytest.approx(error, rel=1e-12)


def test_classes_without_images_are_named_and_left_out():
    logits, labels = answers(200, 5)
    labels[labels == 3] = 1
    result = evaluate(logits, labels, seed=0, replicates=2)
    p, others = logits.double().softmax(1).numpy(), [0, 1, 2, 4]
    assert result.absent == [3]
    assert result.recall[3] is None
    expected = np.mean([roc_auc_score(labels.numpy() == c, p[:, c]) for c in others])
    assert result.values["auc"] == pytest.approx(expected, rel=1e-12)
    alone = evaluate(logits, torch.ones(200, dtype=torch.int64), seed=0, replicates=2)
    assert alone.values["auc"] is None
    assert alone.interval("auc") is None
    assert "auc" not in alone.minus(result)


def same_as_drawn(result, b, logits, labels, images):
    """Replicate ``b`` is what the figures of those images are."""
    expected = evaluate(logits[images], labels[images], seed=0, replicates=1, ordinal=True)
    for name, value in expected.values.items():
        assert float(result.replicates[name][b]) == pytest.approx(value, rel=1e-12), name
    for name, values in expected.classes.items():
        actual = [None if value != value else value for value in result.class_replicates[name][b].tolist()]
        assert actual == pytest.approx(values, rel=1e-12), name
    shares = expected.confusion / expected.confusion.sum(1, keepdim=True)
    assert torch.allclose(result.confusion_replicates[b], shares.double(), equal_nan=True)


def test_replicates_are_figures_of_resampled_images():
    """Each is what the figures of the drawn images are; the draws are numpy's, in blocks of 128 replicates."""
    logits, labels = answers(60, 3, coarse=True)
    result = evaluate(logits, labels, seed=11, replicates=130, ordinal=True)
    rng = np.random.default_rng(11)
    drawn = np.concatenate([rng.integers(60, size=(size, 60)) for size in (128, 2)])
    for b in (0, 127, 129):
        same_as_drawn(result, b, logits, labels, torch.from_numpy(drawn[b]))
    again = evaluate(logits, labels, seed=11, replicates=130, ordinal=True)
    assert all(torch.equal(again.replicates[name], result.replicates[name]) for name in result.values)
    low, high = result.interval("accuracy", 0.9)
    assert (low, high) == pytest.approx(np.quantile(result.replicates["accuracy"].numpy(), [0.05, 0.95]))


def test_with_groups_whole_groups_are_resampled():
    """Groups of 1 to 7 images, named by texts; 20 groups that repeat one image each are no more than 20 images."""
    logits, labels = answers(60, 3, coarse=True)
    groups = np.random.default_rng(0).integers(15, size=60)
    result = evaluate(logits, labels, seed=5, replicates=3, ordinal=True, groups=[f"patient {g:02}" for g in groups])
    of_group = [torch.from_numpy(np.flatnonzero(groups == g)) for g in np.unique(groups)]
    drawn = np.random.default_rng(5).integers(len(of_group), size=(3, len(of_group)))
    for b in range(3):
        same_as_drawn(result, b, logits, labels, torch.cat([of_group[g] for g in drawn[b]]))
    logits, labels = answers(20, 2)
    often = torch.arange(20).repeat_interleave(9)
    alone, whole = evaluate(logits, labels, seed=3), evaluate(logits[often], labels[often], seed=3, groups=often + 10)
    assert whole.interval("ece") == pytest.approx(alone.interval("ece"), rel=1e-12)
    with pytest.raises(UserError, match="^evaluate: groups must be of at least two groups, got 1$"):
        evaluate(logits, labels, seed=0, groups=[4] * 20)
    with pytest.raises(UserError, match=r"^evaluate: groups must be texts or integers \[20\]"):
        evaluate(logits, labels, seed=0, groups=[1, 2])


def test_intervals_of_classes_are_percentiles():
    """Of 21 classes the confusion matrix is counted, and not resampled."""
    logits, labels = answers(90, 3)
    labels[labels == 2] = 1
    result = evaluate(logits, labels, seed=2, replicates=50)
    replicates = result.class_replicates["precision"][:, 1].numpy()
    assert result.class_intervals("precision")[1] == pytest.approx(np.quantile(replicates, [0.025, 0.975]))
    assert result.class_intervals("recall", 0.5)[2] is result.confusion_intervals()[2] is None
    shares = result.confusion_replicates[:, 0, 1].numpy()
    assert result.confusion_intervals(0.8)[0][1] == pytest.approx(np.quantile(shares, [0.1, 0.9]))
    many = evaluate(*answers(90, 21), seed=0, replicates=1)
    assert many.confusion_intervals() is None
    assert int(many.confusion.sum()) == 90


def test_intervals_are_as_wide_as_theory_says_and_paired_ones_narrower():
    """1,000 images: sd sqrt(p (1 - p) / n) of an accuracy, within 10 % by 1,000 replicates (their sd errs by 2.2 %)."""
    logits, labels = answers(1000, 3, strength=2.0)
    one = evaluate(logits, labels, seed=1)
    other = evaluate(
        logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)), labels, seed=1
    )
    p = one.values["accuracy"]
    low, high = one.interval("accuracy")
    assert high - low == pytest.approx(2 * 1.96 * (p * (1 - p) / 1000) ** 0.5, rel=0.1)
    paired = one.minus(other)["accuracy"]
    assert paired["difference"] == one.values["accuracy"] - other.values["accuracy"]
    assert paired["interval"][1] - paired["interval"][0] < 0.7 * (high - low)
    same = one.minus(evaluate(logits, labels, seed=1))
    assert all(row == {"difference": 0.0, "interval": [0.0, 0.0]} for row in same.values())


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (
            torch.zeros(3),
            [0, 1, 0],
            r"scores must be float \[N, C\] of at least one image and two classes, got float32",
        ),
        (torch.zeros(3, 1), [0, 0, 0], r"scores must be float \[N, C\]"),
        (torch.full((2, 2), torch.nan), [0, 1], "scores must not hold NaN, got 4 NaN"),
        (torch.zeros(2, 2), [0, 2], r"labels must lie in \[0, 2\), got \[0, 2\]"),
        (torch.zeros(2, 2), [1, 1], "labels must be of at least two classes, got 1"),
    ],
)
def test_what_is_no_scores_and_labels_is_refused(scores, labels, message):
    with pytest.raises(UserError, match=f"^macro_auc: {message}"):
        macro_auc(scores, labels)
    with pytest.raises(UserError, match="^evaluate: logits must be finite, got 1 infinite"):
        evaluate(torch.tensor([[0.0, torch.inf], [0.0, 1.0]]), [0, 1], seed=0)
