"""The 2x2 ablation: class labels or the run's own, one fixed synthetic set or a new one each period.

The run's Student is one of the four. The other three differ from it in these two alone: first weights, shuffles,
augmentation, mixtures, schedule, sampling and the Teacher's filter are the same. The period of each is chosen on the
validation split; nothing is chosen on the test split. Runs on rank 0.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from kr_fast.ensemble import accuracy
from kr_fast.ensemble.training.evaluation import logits_of
from kr_fast.metrics import evaluate
from kr_fast.recycling.config import OF_SOFT_LABELS, RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.sampling import student_sampling, tuned_sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files

ATTACKS = ("lira", "lira_offline", "rmia")  # on Students that have shadow Students


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a Student learns: ``labels`` as the option of that name; ``regenerated``: a new set each period."""

    labels: str
    regenerated: bool

    @classmethod
    def of_run(cls, config: RecycleConfig) -> "Variant":
        """That of the run's own Student."""
        return cls(config.labels, not config.fixed_images)

    def file(self, folder: Path) -> Path:
        """Its weights."""
        return folder / f"model-{self.labels}-{'regenerated' if self.regenerated else 'fixed'}.safetensors"

    def context(self, context: Context) -> Context:
        """The run as if it were of this kind."""
        c, options = context.config, {"labels": self.labels, "fixed_images": not self.regenerated, "ablation": False}
        if self.labels == "class":
            options |= {name: c.__dataclass_fields__[name].default for name in OF_SOFT_LABELS}
        return dataclasses.replace(context, config=dataclasses.replace(c, **options))


def variants(config: RecycleConfig) -> list[Variant]:
    """All four, the run's own among them."""
    return [Variant(labels, regenerated) for labels in ("class", config.labels) for regenerated in (False, True)]


def other_images(config: RecycleConfig) -> Variant:
    """The one with the labels of the run's Student and the other images: it has shadow Students too."""
    return Variant(config.labels, config.fixed_images)


def run(context: Context) -> dict[str, Any]:
    """Train what is missing of the three further Students; figures of all four on validation and test.

    Returns: {"rows": [{"labels", "regenerated", "of_run", "val_accuracy", "test_accuracy", "test_auc" (of the
        test: macro, one class against the others)}]}.
    """
    c, folder, test, rows = context.config, context.folder.ablation, context.data.test, []
    gkd.discard_outdated(context, folder, "teacher", "model-*.pt")
    gkd.shared_sets(context, student_sampling(context)).discard_outdated()
    for variant in variants(c):
        of_run = variant == Variant.of_run(c)
        if not of_run and not variant.file(folder).exists():
            _train(context, variant)
        model = gkd.load(context) if of_run else load(context, variant)
        row = {**dataclasses.asdict(variant), "of_run": of_run, "val_accuracy": accuracy(model, context.data.val)}
        tested = evaluate(logits_of(model, test), test.labels, seed=0, replicates=1).values
        rows.append({**row, "test_accuracy": tested["accuracy"], "test_auc": tested["auc"]})
    return {"rows": rows}


def figures(context: Context) -> list[dict[str, Any]]:
    """The rows of :func:`run`, with what each Student's recipe leaks where there are shadow Students.

    ``leakage``: attack -> {"mean", "sd", "interval"} of the AUC over shadow Students, each attacked from the others;
    None for class labels, with the reason in ``not_attacked``.
    """
    c, rows = context.config, context.result("ablation")["rows"]
    if not c.num_students:
        return rows
    why = "no shadow Students of this kind were trained"
    if c.audit_generator == "shared":
        why = "labels and images of every shadow Student would be the same, whichever half its Teacher was trained on"
        why += "; only its Teacher's filter would differ" if tuned_sampling(context).confidence else ""
    measured, keys = context.result("audit")["ablation"], {Variant.of_run(c): "own", other_images(c): "other_images"}
    of_rows = [measured.get(keys.get(Variant(row["labels"], row["regenerated"]))) for row in rows]
    return [
        {**row, "leakage": leakage, "not_attacked": why if leakage is None else ""}
        for row, leakage in zip(rows, of_rows, strict=True)
    ]


def load(context: Context, variant: Variant) -> nn.Module:
    """A finished Student of the ablation, in eval mode."""
    return gkd.load(context, variant.file(context.folder.ablation))


def _train(context: Context, variant: Variant) -> None:
    """Train and save the Student of ``variant``, on the sets that the run's Student saw where it needs these."""
    c, changed, file = context.config, variant.context(context), variant.file(context.folder.ablation)
    sampling, schedule = student_sampling(context), gkd.student_schedule(context)
    student = context.seeded(c.student_arch, c.student_width, "student")
    kept = gkd.shared_sets(context, sampling)
    gkd.distil(
        changed,
        teacher.load(context),
        student,
        gkd.drawn(changed, sampling, schedule.images, kept=kept),
        schedule,
        confidence=sampling.confidence,
        seed=seeds.derive(c.seed, "student"),
        description=f"student with {variant.labels} labels, {'new' if variant.regenerated else 'fixed'} images",
        state_path=context.folder.state / f"{file.stem}.pt",
    )
    files.save_tensors(file, student.state_dict(), teacher.metadata(context, c.student_arch))
