"""Stage 8, audit: Teacher and Student attacked with the statistics of the same shadows of the Teacher's training.

The pool is the training split (members) and the test split (non-members). The validation split is left out: choices
were made on it, so it is neither. Shadows are shared out over the ranks; the attack runs on rank 0.
"""

from typing import Any

import numpy as np
import torch

from kr_fast.ensemble import train_shadows
from kr_fast.membership import aop, audit
from kr_fast.recycling import gkd, teacher
from kr_fast.recycling.context import Context
from kr_fast.runtime import files, seeds


def run(context: Context) -> dict[str, Any]:
    """The audit, unless it was turned off, and the accuracy over privacy (AOP) that follows from it."""
    c, data = context.config, context.data
    result: dict[str, Any] = {"audit": None, "aop": None}
    if c.num_shadows == 0:
        return result
    images = torch.cat([data.train.images, data.test.images])
    labels = torch.cat([data.train.labels, data.test.labels])
    members = torch.arange(len(labels)) < len(data.train)

    # Small networks gain nothing from a second thread; a second shadow beside the first gains all of it.
    workers = torch.get_num_threads() if context.runtime.device.type == "cpu" else 1
    shadows = train_shadows(
        context.make_network(c.teacher_arch, c.teacher_width), images, labels,
        num_models=c.num_shadows, config=teacher.recipe(context),
        seed=seeds.derive(c.seed, "shadows"), out=context.out / "shadows", workers=workers,
    )  # fmt: skip
    if not context.runtime.is_main:
        return result
    models = {"teacher": teacher.load(context), "student": gkd.load(context)}
    attacks = ("lira", "lira_offline", "loss")
    report = audit(models, shadows, images, labels, members, attacks=attacks, augment=c.audit_augment)
    arrays = {"keep": shadows.keep.numpy(), "members": members.numpy(), "labels": labels.numpy()}
    for name, curves in report.curves.items():
        for attack, curve in curves.items():
            arrays |= {f"{name}/{attack}/tp": curve.tp, f"{name}/{attack}/fp": curve.fp}
            arrays[f"{name}/{attack}/scores"] = report.scores[name][attack].numpy()
    with files.atomic_path(context.out / "audit.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    result["audit"], tested = report.to_dict(), context.result("student")["test_accuracy"]
    result["aop"] = {name: aop(tested[name], result["audit"][name]["lira"]["auc"]) for name in models}
    return result
