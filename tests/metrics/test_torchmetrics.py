"""The figures of classifiers and of generated images against torchmetrics, given the same answers and features."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
)
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from kr_fast.metrics import evaluate, frechet_distance, kernel_distance


@pytest.mark.parametrize("classes", [2, 5, 10])  # binary, ordinal grades, digits
def test_figures_of_a_classifier(classes):
    draw = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (400,), generator=draw)
    logits = 2 * torch.randn(400, classes, generator=draw, dtype=torch.float64)
    logits[torch.arange(400), labels] += 1
    ours, p = evaluate(logits, labels, seed=0, replicates=2, ordinal=True), logits.softmax(1)
    theirs = {
        "ece": multiclass_calibration_error(p, labels, num_classes=classes, n_bins=15),
        "kappa": multiclass_cohen_kappa(p, labels, num_classes=classes, weights="quadratic"),
        "auc": multiclass_auroc(p, labels, num_classes=classes),
    }
    for name, value in theirs.items():  # torchmetrics computes some of them in float32
        assert ours.values[name] == pytest.approx(float(value), abs=1e-6), name
    assert ours.confusion.tolist() == multiclass_confusion_matrix(p, labels, num_classes=classes).tolist()


def test_distances_of_generated_images():
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(400, 32, generator=draw, dtype=torch.float64)
    made = 1.1 * torch.randn(500, 32, generator=draw, dtype=torch.float64) + 0.1
    subsets, size = np.random.default_rng(3), 200
    of_subsets = []
    for _ in range(4):
        chosen = (each[torch.from_numpy(subsets.choice(len(each), size, replace=False))] for each in (real, made))
        of_subsets.append(float(poly_mmd(*chosen)))
    ours = kernel_distance(real, made, seed=3, subsets=4, subset_size=size)
    assert ours["mean"] == pytest.approx(np.mean(of_subsets), abs=1e-12)
    moments = [moment for each in (real, made) for moment in (each.mean(0), torch.cov(each.T))]
    assert frechet_distance(real, made) == pytest.approx(float(_compute_fid(*moments)), abs=1e-9)
