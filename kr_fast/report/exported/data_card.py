"""The data card of a set of synthetic images: where they come from, what is attacked, and how they are opened."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import render, run_audit, sentences
from kr_fast.report.exported import guaranteed
from kr_fast.report.exported.model_card import front_matter, protection
from kr_fast.report.render import Block
from kr_fast.report.sections import calibrated, quality

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
PATTERNS = {"parquet": "data/train-*.parquet", "webdataset": "data/train-*.tar"}
OPEN = {
    "parquet": 'import datasets\n\nimages = datasets.load_dataset("FOLDER", split="train")',
    "webdataset": 'import webdataset\n\nimages = webdataset.WebDataset("FOLDER/data/{file}", shardshuffle=False)'
    '.decode("pil")',
    "npz": 'import numpy as np\n\nwith np.load("FOLDER/train.npz") as arrays:\n    images = arrays["images"]',
}
NOT_ATTACKED = "The Teacher {known}, and no attack was run on its answers to these images by themselves."
COVERED = "The Teacher was trained with differential privacy, so the guarantee covers its answers."


def title(summary: Mapping[str, Any]) -> str:
    """What the set is called."""
    return f"Synthetic images of Knowledge Recycling on {summary['dataset']['name']}"


def text(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card.

    Args:
        summary: the dictionary of metrics.json.
        facts: of the set: format, count, counts (by class), shape, column and files.
    """
    size = next((words for limit, words in SIZES.items() if facts["count"] < limit), "n>10M")
    covered = summary.get("guarantee")
    protected = guaranteed.tag(covered) if covered else "membership-inference-audit"
    header = {
        "task_categories": ["image-classification"],
        "tags": ["synthetic-data", "knowledge-distillation", protected],
        "size_categories": [size],
    }
    if pattern := PATTERNS.get(facts["format"]):
        header["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}]
    of_set = guaranteed.images(summary, facts, columns(summary, facts)) if covered else blocks(summary, facts)
    return front_matter(header) + render.markdown(title(summary), of_set)


def blocks(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Block]:
    """The sections of the card."""
    yield "text", description(summary, facts)
    yield "heading", "What is known of leaks"
    yield "text", leaks(summary)
    if run_audit.RELEASED in (summary.get("audit") or {}):
        yield "table", run_audit.released(summary)
    yield "text", protection(summary)
    yield "heading", "What the Teacher says of the images"
    yield "text", answers(summary["config"], facts["column"])
    yield "heading", "Use"
    yield "code", OPEN[facts["format"]].format(file=facts["files"][0]["path"].split("/")[-1])
    yield "table", [["column", "what it is"], *map(list, columns(summary, facts).items())]
    names = zip(summary["dataset"]["class_names"], facts["counts"], strict=True)
    yield "table", [["label", "class", "images"], *([at, name, count] for at, (name, count) in enumerate(names))]
    if summary.get("synthetic"):
        yield "heading", "Quality of the synthetic images"
        yield from quality.generated(summary)
    yield "heading", "What these figures do not say"
    yield "note", run_audit.caveats(summary)
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]


def description(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The set in a few sentences."""
    if summary.get("guarantee"):
        return guaranteed.description(summary, facts)
    data, (height, width, channels) = summary["dataset"], facts["shape"]
    source = f"a class-conditional diffusion model that was trained on {data['train']:,} private images. None is real"
    if summary["config"].get("generator"):
        source = "a generator that the run was given, of which it knows no more"
    which = "every period" if summary["config"].get("fixed_images") else "its last period"
    return (
        f"{facts['count']:,} synthetic images of {data['num_classes']} classes, {height} x {width} x {channels}, drawn "
        f"by {source}. They are the images that the Student of the run learned from in {which}."
    )


def leaks(summary: Mapping[str, Any]) -> str:
    """What the attacks on the images found, or what is guaranteed."""
    if summary.get("guarantee"):
        return " ".join(guaranteed.sentences(summary["guarantee"]))
    audit = summary.get("audit") or {}
    known = "The images were not attacked, so what they leak is not known."
    if run_audit.RELEASED in audit:
        known = sentences.of_images(audit, run_audit.RELEASED, sentences.OF_RUN)
    if figures := audit.get("released_calibrated"):
        own = f"{known} " if run_audit.RELEASED in audit else ""
        known = f"{own}Attacked by the images of other pipelines: {calibrated.result(figures)}"
    if not summary.get("verdict"):
        return known
    return f"{known} The verdict of the run, “{summary['verdict']['decision']}”, is about its Student."


def answers(config: Mapping[str, Any], column: str | None, guarantee: Mapping[str, Any] | None = None) -> str:
    """What the set says of the Teacher's answers, and why not more; ``guarantee``: the entry of that name."""
    if column is None:
        return (
            "The Student was taught the classes that the images were drawn for, without the Teacher (labels: class), "
            "so the set holds no answer of it."
        )
    known = "was given to the run" if config.get("teacher") else "was trained on the private images"
    told = COVERED if guarantee and guarantee["private"] else NOT_ATTACKED.format(known=known)
    if column == "teacher_label":
        return (
            "teacher_label is the class that the Teacher gives most. The Student was taught these classes alone "
            "(labels: top1, as the preset private has it), which tell less of the private images than probabilities; "
            f"so the set holds no probabilities. {told}"
        )
    temperature = config["temperature"]
    standardised = ", less their mean, by their standard deviation and" if config.get("standardize_logits") else ""
    flat = f" Raised to the power {temperature:g} and divided by their sum, they are those at temperature 1."
    return (
        f"soft_label holds the Teacher's probabilities at temperature {temperature:g}: the softmax of its "
        f"logits divided{standardised} by {temperature:g}.{'' if standardised else flat} The Student was taught such "
        f"probabilities of augmented views of the images. {told}"
    )


def columns(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Column, array or member -> what it is."""
    classes = summary["dataset"]["num_classes"]
    label = "the class that the image was drawn for, from 0"
    if facts["format"] == "npy":
        return {"images.npy": f"uint8 {[facts['count'], *facts['shape']]}", "labels.npy": f"int64; {label}"}
    further = {
        "soft_label": f"the Teacher's probabilities, {classes} float32 numbers",
        "teacher_label": "the class that the Teacher gives most",
    }
    if facts["format"] == "npz":
        named = {"images": f"uint8 {[facts['count'], *facts['shape']]}", "labels": f"int64; {label}"}
        ending = "s"
    elif facts["format"] == "webdataset":
        named = {"png": "the image", "cls": label}
        ending = ".npy" if facts["column"] == "soft_label" else ".cls"
    else:
        named, ending = {"image": "PNG", "label": label, "id": "the position in the set, from 0"}, ""
    if facts["column"]:
        named[f"{facts['column']}{ending}"] = further[facts["column"]]
    return named
