"""Distances to synthetic images that are kept as sets are drawn, and the attack that they calibrate, in a toy run."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_runs import context_of, metrics, new_context

from kr_fast.data.distances import Rows
from kr_fast.membership.attacks.calibrated import attack_nearest
from kr_fast.recycling.stages import shadows
from kr_fast.recycling.stages.distillation import gkd, nearest_images, shadow_students
from kr_fast.runtime.storage import files

pytestmark = pytest.mark.pipeline


def least(pool, images):
    return torch.cdist(pool[:].flatten(1).double(), images.flatten(1).double()).min(1).values


def test_distances_are_those_of_every_period(audited):
    """Of the run and of a shadow pipeline, whose sets are drawn once more."""
    run = context_of(audited[0])
    pool, sampling = shadows.pool(run)[0], gkd.student_sampling(run)
    job = shadow_students.Job(run)
    for draw, path in (
        (gkd.drawn(run, sampling, run.config.images), run.folder.nearest),
        (dataclasses.replace(job.retrained(1), seen=None), nearest_images.shadow_file(run, 1)),
    ):
        sets = [least(pool, draw(period)[2]) for period in range(run.config.periods)]
        expected = torch.stack([torch.stack(sets).min(0).values, sets[-1]])
        kept = np.load(path)
        assert kept.dtype == np.float32
        np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-6)
    assert np.array_equal(np.load(run.folder.images), draw_last(run, sampling))


def draw_last(run, sampling):
    return gkd.drawn(run, sampling, run.config.images)(run.config.periods - 1)[2].numpy()


def test_the_audit_holds_the_attack(audited):
    run, result = context_of(audited[0]), metrics(audited[0])
    figures, index = result["audit"]["released_calibrated"], np.load(audited[0] / "private" / "audit.npz")["index"]
    count = run.config.num_students
    paths = [run.folder.nearest, *(nearest_images.shadow_file(run, k) for k in range(count))]
    rows = torch.from_numpy(np.stack([np.load(path) for path in paths]))[:, :, index]
    keep, members = shadows.keep(run)[:count, index], shadows.pool(run)[2][index]
    for k, name in enumerate(("all_periods", "last_period")):
        expected = attack_nearest(rows[0, k], members, rows[1:, k], keep)
        for attack in ("offline", "online", "uncalibrated"):
            assert figures[name][attack]["auc"] == expected[attack]["auc"]
    text = (audited[0] / "release" / "report.md").read_text()
    assert "Synthetic images by those of other pipelines" in text
    assert f"(AUC {figures['all_periods']['offline']['auc']:.3f}" in text
    assert "released images, all periods" in audited[1]


def test_a_run_with_a_shared_generator_has_none(finished):
    assert not context_of(finished[0]).folder.nearest.exists()
    assert "released_calibrated" not in metrics(finished[0])["audit"]


def test_a_period_that_is_drawn_again_changes_nothing(tmp_path):
    pool, draw = torch.randint(0, 256, (9, 8, 8, 1), dtype=torch.uint8), torch.Generator().manual_seed(1)
    sets = [torch.randint(0, 256, (5, 8, 8, 1), generator=draw, dtype=torch.uint8) for _ in range(3)]
    seen = nearest_images.Nearest(tmp_path / "kept" / "nearest.npy", Rows(pool))
    seen.path.parent.mkdir()
    for period in (0, 1, 1, 2):
        seen(period, sets[period])
    expected = np.stack([least(pool, torch.cat(sets)), least(pool, sets[2])])
    np.testing.assert_allclose(np.load(seen.path), expected, rtol=1e-6)
    seen(0, sets[1])  # a Student that is trained anew begins anew
    np.testing.assert_allclose(np.load(seen.path)[0], least(pool, sets[1]).numpy(), rtol=1e-6)


def test_sets_of_an_older_version_are_not_mixed_with_newer_ones(tmp_path, caplog):
    """What drew the first periods kept no distances: none are kept of the rest, and the audit says so."""
    seen = nearest_images.Nearest(tmp_path / "nearest.npy", Rows(torch.zeros(3, 8, 8, 1, dtype=torch.uint8)))
    seen(1, torch.zeros(2, 8, 8, 1, dtype=torch.uint8))
    assert not seen.path.exists()
    context = new_context(tmp_path, audit_generator="retrained")
    files.save_array(context.folder.nearest, np.zeros((2, 30), np.float32))
    assert nearest_images.run(context, torch.arange(30)) is None
    assert "a version without it wrote no private/shadow_students/nearest-000.npy" in caplog.text
