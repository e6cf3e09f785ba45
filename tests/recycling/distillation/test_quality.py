"""The figures on test images of a run: with and without near-duplicates, and of synthetic images."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from toy_runs import new_context

from kr_fast.data import Split, to_float
from kr_fast.ensemble import accuracy
from kr_fast.ensemble.training.evaluation import logits_of
from kr_fast.metrics import evaluate, frechet_distance, neighbourhood_figures
from kr_fast.recycling.stages.distillation import quality
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_near_duplicates_of_other_splits_are_left_out_of_some_figures(tmp_path):
    run = new_context(tmp_path, (60, 20, 40), classes=3)
    test, data = run.data.test, run.data
    images = test.images.clone()
    images[3] = data.train.images[7]
    images[10] = (data.val.images[5].int() + 1).clamp(0, 255).byte()
    run.data = dataclasses.replace(data, test=Split(images, test.labels))
    teacher, student = network(0), network(1)
    result = quality.classification(run, teacher, student)
    apart = torch.ones(40, dtype=torch.bool)
    apart[[3, 10]] = False
    for name, model in (("teacher", teacher), ("student", student)):
        row, few = result[name], result[name]["test_without_duplicates"]
        assert row["test_accuracy"] == accuracy(model, run.data.test)
        assert few["images"] == 38
        assert few["accuracy"] == accuracy(model, Split(images[apart], test.labels[apart]))
        assert 0 < few["auc"] < 1
        assert row["test_auc_ci"][0] <= row["test_auc"] <= row["test_auc_ci"][1]
    gap = result["student"]["test_auc"] - result["teacher"]["test_auc"]
    assert result["student_minus_teacher"]["auc"]["difference"] == gap
    assert "test_kappa" not in result["student"]
    assert sum(map(sum, result["student"]["test_confusion"])) == 40
    run.data = data  # random images, of which none is near another
    assert quality.classification(run, teacher, student)["student"]["test_without_duplicates"] is None


def test_grades_have_kappa_and_groups_are_resampled_whole(tmp_path):
    """Rows of the groups of at least 10 test images, the largest first, without their number."""
    run = new_context(tmp_path, (60, 20, 60), classes=3, ordinal=True)
    teacher, student = network(0), network(1)
    by_image = quality.classification(run, teacher, student)
    groups = torch.tensor([0] * 12 + [1] * 30 + [2] * 9 + [3] * 9)
    run.data = dataclasses.replace(run.data, test=dataclasses.replace(run.data.test, groups=groups))
    result = quality.classification(run, teacher, student)
    logits = logits_of(student, run.data.test)
    seed = seeds.derive(run.config.seed, "test figures")
    expected = evaluate(logits, run.data.test.labels, seed=seed, ordinal=True, groups=groups)
    assert result["student"]["test_kappa"] == by_image["student"]["test_kappa"] == expected.values["kappa"]
    assert result["student"]["test_kappa_ci"] == expected.interval("kappa") != by_image["student"]["test_kappa_ci"]
    assert by_image["student"]["test_groups"] is None
    facts = result["student"]["test_groups"]
    assert (facts["groups"], facts["resampled"], [row["images"] for row in facts["rows"]]) == (4, True, [30, 12])
    second = evaluate(logits[:12], run.data.test.labels[:12], seed=seed, ordinal=True)
    assert facts["rows"][1]["accuracy"] == second.values["accuracy"]
    assert facts["rows"][1]["kappa_ci"] == second.interval("kappa")
    one = dataclasses.replace(run.data.test, groups=torch.full((60,), 7))
    run.data = dataclasses.replace(run.data, test=one)
    alone = quality.classification(run, teacher, student)["student"]
    assert alone["test_kappa_ci"] == by_image["student"]["test_kappa_ci"]
    assert (alone["test_groups"]["groups"], alone["test_groups"]["resampled"]) == (1, False)


def test_synthetic_images_are_compared_in_the_features_of_the_teacher(tmp_path):
    """As many of them as training images, all here, and all test images: in whatever order, so figures are the same."""
    run, teacher = new_context(tmp_path, (60, 20, 40), classes=3), network(0)
    synthetic = torch.randint(0, 200, (60, 8, 8, 1), generator=torch.Generator().manual_seed(1)).byte()
    labels = torch.tensor([0] * 30 + [1] * 26 + [2] * 4)
    for path, values in ((run.folder.images, synthetic), (run.folder.labels, labels)):
        files.save_array(path, values.numpy())
    result = quality.synthetic(run, teacher)
    assert (result["images"], result["test_images"], result["features"]) == (60, 40, 8)
    with torch.no_grad():
        test, made, real = (
            teacher[:3](to_float(each)) for each in (run.data.test.images, synthetic, run.data.train.images)
        )
    for row, features in ((result, made), (result["real"], real)):
        expected = neighbourhood_figures(test, features)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["kid"]["subset_size"] == 20
        assert row["fid"] == pytest.approx(frechet_distance(test, features))
        assert row["kid"]["all_ci"][0] < row["kid"]["all"] < row["kid"]["all_ci"][1]
    assert [(row["images"], row["test_images"]) for row in result["classes"]] == [(20, 14), (20, 13), (4, 13)]
    assert "fid" not in result["classes"][2]  # fewer than six images
    second, own = result["classes"][1], run.data.train.labels == 1
    expected = neighbourhood_figures(test[run.data.test.labels == 1], real[own])
    assert {name: second["real"][name] for name in expected} == pytest.approx(expected)
    assert result["kid"]["mean"] > result["real"]["kid"]["mean"]
    assert quality.synthetic(run, nn.Sequential(teacher, nn.Identity())) is not None
    assert quality.synthetic(run, nn.Sequential(teacher, nn.Softmax(1))) is None
    files.save_array(run.folder.images, np.zeros((5, 8, 8, 1), np.uint8))
    files.save_array(run.folder.labels, np.zeros(5, np.int64))
    assert quality.synthetic(run, teacher) is None
