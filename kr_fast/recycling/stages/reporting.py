"""The report: pages and figures of run and audit, with the verdict, from what the stages recorded. Runs on rank 0."""

from pathlib import Path
from typing import Any

import numpy as np

from kr_fast import report
from kr_fast.membership.audit.files import write_pages
from kr_fast.membership.verdict.limits import MOVABLE
from kr_fast.recycling import verdict
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import cards, ledger
from kr_fast.recycling.exporting import student_folder
from kr_fast.recycling.stages import shadows
from kr_fast.recycling.stages.distillation import ablation
from kr_fast.report.run_audit import RELEASED
from kr_fast.report.sentences import OF_RUN
from kr_fast.runtime.storage import files
from kr_fast.runtime.versions import versions

PACKAGES = ("torch", "diffusers", "accelerate", "numpy", "scipy", "scikit-learn")  # that the figures depend on
HIDDEN = ("curves", "kept", "notes", "throughput")  # of a stage's results, which are elsewhere in the summary
EXAMPLES = 8  # images of each class in the grid
# Of the ROC; audit.html shows all. The loss attack on the Student is the same with any shadows.
CURVES = ("teacher/lira", "teacher/loss", "student/lira", "student/loss", "student_full/lira", "control/lira")
CURVES += ("released/nearest_synthetic", "released/generated_density")


def summary(context: Context) -> dict[str, Any]:
    """Everything about the run in plain values."""
    data, journal = context.data, context.journal
    height, width, channels = data.image_shape
    audited, tested = context.result("audit"), context.result("student")
    models = {}
    for name, stage in (("teacher", "teacher"), ("student", "gkd")):
        models[name] = {key: value for key, value in context.result(stage).items() if key not in HIDDEN}
        models[name] |= tested[name]
    facts = {
        "title": f"Knowledge Recycling on {data.name}",
        "command": command(context),
        "config": report.without_folders(context.config.record()),
        "seed": context.config.seed,
        "versions": versions(*PACKAGES),
        "stages": journal.seconds(),
        "dataset": {
            "name": data.name,
            "num_classes": data.num_classes,
            "class_names": list(data.class_names),
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
            "height": height,
            "width": width,
            "channels": channels,
            "notes": list(data.notes),
            "duplicates": context.result("data").get("duplicates"),
        },
        **models,
        "throughput": {
            "generator": context.result("generator").get("images_per_second"),  # of an older version: None
            **dict.fromkeys(("synthesis", "distillation", "hidden")),
            **context.result("gkd").get("throughput", {}),
        },
        "cas_gap": models["teacher"]["test_accuracy"] - models["student"]["test_accuracy"],
        "student_minus_teacher": tested["student_minus_teacher"],
        "synthetic": tested["synthetic"],
        "audit": audited["audit"],
        "aop": audited["aop"],
        "checkpoints": context.result("checkpoints")["rows"],
        "tuning": [
            {"sigma" if key == "noise_scale" else key: value for key, value in row.items() if key != "checkpoint"}
            for row in context.result("tuning")["rows"]
        ],
        **({"memorisation": memorised} if (memorised := context.result("generator").get("memorisation")) else {}),
        **({"few_step": _few_step(context)} if context.config.few_steps else {}),
        **({"ablation": ablation.figures(context)} if context.config.ablation else {}),
        "notes": _notes(context, audited["audit"]),
        **({"guarantee": ledger.guarantee(context)} if context.config.epsilon else {}),
        **({"tuning_decision": decision} if (decision := context.result("tuning").get("decision")) else {}),
        **({} if context.ledger is None else {"budget": context.ledger.summary(models["teacher"]["val_accuracy"])}),
    }
    return {"verdict": verdict.of_run(context.config, report.metrics(facts)), **facts}


def _few_step(context: Context) -> dict[str, Any]:
    return {key: value for key, value in context.result("few_step").items() if key not in HIDDEN}


def _notes(context: Context, audit: dict[str, Any] | None) -> list[str]:
    """Notes on this run, without those on how the images were read, which stand with the data."""
    notes = [note for stage in ("data", "teacher", "generator") for note in context.result(stage).get("notes", ())]
    notes = [note for note in notes if note not in context.data.notes]
    notes += context.result("few_step")["notes"] if context.config.few_steps else []
    if audit is None:
        return notes
    notes += audit["setting"]["warnings"]
    if context.config.epsilon:
        notes.append(
            "the shadows of the private Teacher were trained without noise: its figures are a transfer attack, and "
            "bound what it leaks from below; the ledger bounds it from above"
        )
    if context.config.teacher:
        notes.append(
            f"the Teacher was given, but its shadows are {context.config.teacher_arch} of this package's recipe on "
            "these splits: its figures are a transfer attack too, and assume that it was trained on the training split"
        )
    return notes


def command(context: Context) -> str:
    """The command that repeats or continues the run."""
    return report.repeated(context.config.command, context.folder.config)


def arrays(context: Context) -> dict[str, Any]:
    """Images and curves for the report."""
    images, labels = np.load(context.folder.images, mmap_mode="r"), np.load(context.folder.labels)
    curves = {
        "teacher": context.result("teacher")["curves"],
        "generator": context.result("generator")["curves"],
        "student": context.result("gkd")["curves"],
    }
    points = {}
    path = context.folder.audit_arrays
    if context.result("audit")["audit"] is not None:
        with np.load(path) as archive:
            for key in archive.files:
                name, _, what = key.rpartition("/")
                if what in ("tp", "fp") and name in CURVES:
                    counts = archive[key]
                    rate = np.concatenate([[0.0], counts / counts[-1]])
                    points.setdefault(name, {})[{"tp": "tpr", "fp": "fpr"}[what]] = rate
    real = None
    if context.config.show_real_images:
        train = context.data.train
        real = _grid(train.images, train.labels.numpy(), context.data.num_classes)
    return {
        "real_grid": real,
        "synthetic_grid": _grid(images, labels, context.data.num_classes),
        "curves": curves,
        "roc": points,
    }


def _grid(images: Any, labels: np.ndarray, classes: int) -> np.ndarray:
    """uint8 ``[K, n, H, W, C]``: the first images of each class; missing ones are black."""
    out = np.zeros((classes, EXAMPLES, *images.shape[1:]), dtype=np.uint8)
    for label in range(classes):
        examples = np.flatnonzero(labels == label)[:EXAMPLES]
        out[label, : len(examples)] = images[examples]
    return out


def pages(context: Context) -> Path:
    """Folder of report.html and report.md."""
    return context.folder.pages(context.config.show_real_images)


def left(context: Context) -> list[Path]:
    """The files of the report."""
    folder = pages(context)
    audit = (context.folder.audit_figures, _of_audit(context) / "audit.html")
    always = [context.folder.metrics, context.folder.student_folder]
    always += [context.folder.set_card, context.folder.privacy_ledger] if context.config.epsilon else []
    return [*always, *(folder / name for name in ("report.html", "report.md", "figures")), *audit]


def _of_audit(context: Context) -> Path:
    """Folder of audit.html."""
    return context.folder.pages(context.config.show_real_images or context.config.show_records)


def limits(context: Context) -> dict[str, Any]:
    """The options that the verdict follows from, beside the figures."""
    return {name: value for name, value in context.config.record().items() if name in MOVABLE}


def run(context: Context) -> dict[str, Any]:
    """Write the pages and the figures of run and audit; returns where they are, and by which limits the verdict is."""
    facts, c = summary(context), context.config
    metrics = report.metrics(facts)
    files.write_json(context.folder.metrics, metrics)
    if c.epsilon:
        cards.write(context, metrics)
    student_folder.write(context.folder.student_folder, metrics, context.folder.student)
    html, markdown = report.write(pages(context), facts, arrays(context))
    if facts["audit"] and c.audit_page:
        details = {
            "title": f"Membership audit of Knowledge Recycling on {context.data.name}",
            "labels": OF_RUN,
            **{name: facts[name] for name in ("command", "versions", "config")},
        }
        images = None
        if c.show_real_images:
            with np.load(context.folder.audit_arrays) as archive:
                images = shadows.pool(context)[0].rows(archive["index"])
        released = {RELEASED: np.load(context.folder.images, mmap_mode="r")} if c.audit_released else {}
        figures = {"verdict": facts["verdict"], **facts["audit"], "details": details}
        write_pages(context.folder, figures, images, c.show_records, released)
    return {"html": html.name, "markdown": markdown.name, "limits": limits(context)}
