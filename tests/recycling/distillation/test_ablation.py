"""The 2x2 ablation, of a run whose Student is of another width than its Teacher, with retrained generators."""

import dataclasses

import pytest
import torch
from toy_runs import context_of, metrics

from kr_fast.ensemble import accuracy
from kr_fast.membership import lira, roc
from kr_fast.membership.statistics.balanced import partners
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import shadows, teacher
from kr_fast.recycling.stages.distillation import ablation, gkd, shadow_students
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files

pytestmark = pytest.mark.pipeline
WAYS = [("class", False), ("class", True), ("soft", False), ("soft", True)]  # labels, and whether sets are drawn again


@pytest.fixture(autouse=True)
def one_thread():
    """As in the run: the number decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(context: Context, labels: str, regenerated: bool) -> Context:
    options = {"labels": labels, "fixed_images": not regenerated, "ablation": False}
    return dataclasses.replace(context, config=dataclasses.replace(context.config, **options))


def trained(run, teacher_model, draw, *names):
    c, sampling = run.config, gkd.student_sampling(run)
    model = run.seeded(c.student_arch, c.student_width, *names)
    options = {"confidence": sampling.confidence, "seed": seeds.derive(c.seed, *names)}
    return model, gkd.distil(run, teacher_model, model, draw, gkd.student_schedule(run), **options)


def assert_equal(model, path):
    for name, value in files.load_tensors(path).items():
        assert torch.equal(value, model.state_dict()[name]), (path.name, name)


def test_each_student_is_that_of_its_own_options(audited):
    """Trained here on sets that are drawn anew; the run's own is as without an ablation."""
    context, rows, losses = context_of(audited[0]), metrics(audited[0])["ablation"], []
    assert [(row["labels"], row["regenerated"]) for row in rows] == WAYS
    assert [row["of_run"] for row in rows] == [False, False, False, True]
    for row, way in zip(rows, WAYS, strict=True):
        run = changed(context, *way)
        draw = gkd.drawn(run, gkd.student_sampling(run), run.config.images)
        model, done = trained(run, teacher.load(context), draw, "student")
        file = ablation.Variant(*way).file(context.folder.ablation)
        assert_equal(model, context.folder.student if row["of_run"] else file)
        assert row["val_accuracy"] == accuracy(model, context.data.val)
        assert row["test_accuracy"] == accuracy(model, context.data.test)
        losses.append(done.loss)
    assert losses[0][0] == losses[1][0] != losses[2][0] == losses[3][0]  # the first period's set is the same
    assert len({loss[1] for loss in losses}) == 4


def test_shadow_students_with_fixed_images_and_what_they_leak(audited):
    context, rows = context_of(audited[0]), metrics(audited[0])["ablation"]
    run, result = changed(context, "soft", False), shadow_students.load(context, of_ablation=True)
    draw = shadow_students.Job(run, of_ablation=True).retrained(1)  # which leaves the files of the run as they are
    assert all(map(torch.equal, draw(0), draw(2)))
    model, _ = trained(run, shadows.load_one(context, context.folder.shadows, 1), draw, "shadow student", 1)
    assert_equal(model, shadows.file(context.folder.ablation_students, 1))

    images, labels, _ = shadows.pool(context)
    seed = seeds.derive(seeds.derive(context.config.seed, "audit"), "leave one out")
    teachers = shadows.load(context)  # the first set of the run's audit, which decides on partners
    for of_kind, first, row in ((result, result, rows[2]), (shadow_students.load(context), teachers, rows[3])):
        phi, keep = of_kind.array.signals(images, labels)["phi"], of_kind.keep
        partner = partners(keep, seed, first.array.signals(images, labels)["phi"])
        scores = lira(phi, keep, variance="fixed", partner=partner)
        aucs = [roc(of_model, members).auc for of_model, members in zip(scores, keep, strict=True)]
        assert row["leakage"]["lira"]["mean"] == pytest.approx(sum(aucs) / len(aucs), abs=1e-9)
        assert row["leakage"].keys() == {"lira", "lira_offline", "rmia"}
    assert [(row["leakage"], row["not_attacked"]) for row in rows[:2]] == [
        (None, "no shadow Students of this kind were trained")
    ] * 2


def test_what_the_report_says(audited):
    rows, text = metrics(audited[0])["ablation"], (audited[0] / "release" / "report.md").read_text()
    brought = 100 * (rows[3]["test_accuracy"] - rows[0]["test_accuracy"])
    assert rows[3]["test_auc"] == pytest.approx(metrics(audited[0])["student"]["test_auc"])
    assert f"both together bring {brought:+.2f}" in text
    assert f"| {rows[2]['leakage']['rmia']['mean']:.3f} [" in text
