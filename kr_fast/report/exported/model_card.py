"""The model card of a Student: use, figures, audit and verdict, from the dictionary of ``metrics.json``."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kr_fast.report import render, run_audit
from kr_fast.report.exported import guaranteed
from kr_fast.report.render import Block
from kr_fast.report.sections import quality, verdict

USE = """import kr_fast

student = kr_fast.load_student("{folder}")
probabilities = student.predict(images)  # uint8 {shape} -> float32 [N, {classes}]"""


def text(summary: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The card.

    Args:
        summary: the dictionary of metrics.json.
        files: name -> what it is, of the files beside the card.
    """
    title = f"Student of Knowledge Recycling on {summary['dataset']['name']}"
    if guarantee := summary.get("guarantee"):
        tags = ["knowledge-distillation", "synthetic-data", guaranteed.tag(guarantee)]
        header = {"library_name": "kr-fast", "pipeline_tag": "image-classification", "tags": tags}
        return front_matter(header) + render.markdown(title, guaranteed.student(summary, files, _use(summary)))
    return front_matter(_facts(summary)) + render.markdown(title, blocks(summary, files))


def front_matter(facts: Mapping[str, Any]) -> str:
    """The YAML header of a card."""
    return f"---\n{yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)}---\n\n"


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    student, names = summary["student"], {"test_accuracy": "accuracy", "test_auc": "roc_auc"}
    figures = [{"type": kind, "value": student[key]} for key, kind in names.items() if student.get(key) is not None]
    data = {"name": summary["dataset"]["name"], "type": "private"}
    result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": figures}
    return {
        "library_name": "kr-fast",
        "pipeline_tag": "image-classification",
        "tags": ["knowledge-distillation", "synthetic-data", "membership-inference-audit"],
        "model-index": [{"name": "Student", "results": [result]}],
    }


def blocks(summary: Mapping[str, Any], files: Mapping[str, str]) -> Iterator[Block]:
    """The sections of the card."""
    data, config, audit = summary["dataset"], summary["config"], summary.get("audit")
    shape = [data["height"], data["width"], data["channels"]]
    yield (
        "text",
        f"A {config['student_arch']} of {summary['student']['parameters']:,} weights that was trained on synthetic "
        f"images and {run_audit.LABELS[config.get('labels', 'soft')]}. {_origin(summary)} Test "
        f"accuracy {quality.accuracy(summary['student'], data['test'])}; the Teacher's "
        f"{quality.accuracy(summary['teacher'], data['test'])}.",
    )
    yield "heading", "May it be shared?"
    yield verdict.block(summary.get("verdict"), run_audit.verdict(summary))
    yield "text", protection(summary)
    yield "heading", "Use"
    yield "code", _use(summary)
    yield (
        "text",
        f"Images are {shape[0]} x {shape[1]} pixels with {shape[2]} channel{'s' * (shape[2] > 1)}, uint8 in [0, 255], "
        "prepared as the training images were. The network itself reads x / 127.5 - 1, channels first.",
    )
    yield "table", [["output", "class"], *([str(at), name] for at, name in enumerate(data["class_names"]))]
    yield "table", [["file", "what it is"], *([name, words] for name, words in files.items())]
    yield "heading", "Figures"
    yield "table", run_audit.headline(summary)
    yield (
        "text",
        f"On {data['test']:,} real test images, by which nothing was chosen. {run_audit.intervals(summary)}",
    )
    yield from quality.blocks(summary)
    yield "heading", "Audit"
    yield "text", run_audit.verdict(summary)
    if audit:
        yield "table", run_audit.what_was_run(summary)
        yield from verdict.rules(summary.get("verdict"))
    yield "heading", "What these figures do not say"
    yield "note", run_audit.caveats(summary)
    yield (
        "text",
        "The figures hold for images such as the test images of this data set. Nothing was measured on images of other "
        "places, devices or people, and the Student is no medical device.",
    )
    yield "heading", "How it was made"
    yield "table", [["option", "value"], *([name, str(value)] for name, value in made_by(summary).items())]
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]


def _use(summary: Mapping[str, Any]) -> str:
    data = summary["dataset"]
    shape = f"[N, {data['height']}, {data['width']}, {data['channels']}]"
    return USE.format(folder="FOLDER", shape=shape, classes=data["num_classes"])


def _origin(summary: Mapping[str, Any]) -> str:
    data, config = summary["dataset"], summary["config"]
    if config.get("teacher"):
        return f"The Teacher was given to the run, which has {data['train']:,} private training images."
    if config.get("generator"):
        trained = f"the Teacher was trained on {data['train']:,} private images"
        return f"The images are of a generator that the run was given; {trained}."
    return (
        "It saw no real image. The Teacher, and the generator that drew its images, were trained on "
        f"{data['train']:,} private images."
    )


def protection(summary: Mapping[str, Any]) -> str:
    """What kind of protection the verdict is about."""
    if summary.get("guarantee"):
        return " ".join(guaranteed.sentences(summary["guarantee"])[:2])
    measured = "were measured by membership attacks" if summary.get("audit") else "were not measured"
    return (
        f"The protection of the private images is empirical: leaks {measured}. The training was not differentially "
        "private, so nothing is guaranteed against a stronger attack."
    )


def made_by(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a reader of a card asks for first; ``metrics.json`` holds all."""
    config, names = summary["config"], ["student_arch", "student_width", "labels", "periods", "images"]
    if config.get("labels", "soft") == "soft":
        names += ["temperature", "loss"]
    names += ["student_epochs", "num_shadows", "audit_generator", "image_size", "resize", "seed"]
    return {name: config[name] for name in names if name in config}
