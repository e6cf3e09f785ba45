"""Figures on the real test images, which are read only here.

The Student's accuracy is the Classification Accuracy Score (CAS).
"""

from typing import Any

from kr_fast.ensemble import recipe_of
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd, quality
from kr_fast.recycling.stages.generation.sampling import student_sampling


def run(context: Context) -> dict[str, Any]:
    """Test figures of Teacher and Student, and of the synthetic images of the last period.

    Returns: {"test_accuracy": {"teacher", "student"}, "synthetic"} and what :func:`quality.classification` returns.
    """
    teacher_model = teacher.load(context)
    rows = quality.classification(context, teacher_model, gkd.load(context))
    tested = {name: rows[name]["test_accuracy"] for name in ("teacher", "student")}
    return {"test_accuracy": tested, **rows, "synthetic": quality.synthetic(context, teacher_model)}


def recipe(context: Context) -> dict[str, Any]:
    """What the Student, and every shadow of it, is made by."""
    c, schedule = context.config, gkd.student_schedule(context)
    further = {"labels": c.labels}
    if c.labels == "soft":
        weights = ("dkd_alpha", "dkd_beta", "hard_weight") if c.loss == "dkd" else ("soft_weight", "hard_weight")
        further |= {name: getattr(c, name) for name in ("temperature", *weights)}
    # Options that earlier versions did not have stand here where they are used, as recipes are compared.
    new = {"standardize_logits": c.standardize_logits, "cutmix": c.student_cutmix, "fixed_images": c.fixed_images}
    further |= {name: value for name, value in new.items() if value}
    loss = "decoupled distillation" if c.loss == "dkd" else "distillation"
    further["confidence"] = student_sampling(context).confidence
    further |= {"periods": list(schedule.cycles), "images": schedule.images, "passes": schedule.epochs}
    return recipe_of(context.network(c.student_arch, c.student_width), c.recipe("student"), loss, **further)
