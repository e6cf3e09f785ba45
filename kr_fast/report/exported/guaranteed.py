"""Cards of what a run under differential privacy releases: the guarantee, and no figure of real images.

They are made of the keys below alone, none of which was computed from a private image without noise that is paid for.
A test accuracy is no such figure, so a card has none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.run_audit import LABELS
from kr_fast.report.tables import private_to

OPTIONS = ("student_arch", "student_width", "labels", "periods", "images", "student_epochs", "image_size", "resize")
COUNTS = {
    "noised": "The class counts, by which classes are drawn, were noised, which is paid for in epsilon.",
    "public": "The class counts of the training images are public, as the owner of the images has declared.",
    "unused": "All classes are drawn equally often, so no class count was used.",
}


def sentences(guarantee: Mapping[str, Any]) -> list[str]:
    """What is guaranteed, and what is not, in plain words.

    Args:
        guarantee: the entry of that name in ``metrics.json``.
    """
    if not guarantee["private"]:
        why = guarantee["not_private"]
        return [f"NOT PRIVATE: {why}. Nothing is guaranteed, and nothing of this may be handed on."]
    return [
        f"Student and synthetic images are {private_to(guarantee)} for every training image "
        f"(neighbouring sets: {guarantee['neighbouring']}).",
        "They were made of a Teacher and a generator that were trained with noise, and of nothing else, so the "
        "guarantee holds against every attack, and for whatever is made of them. It is for one image: of a person with "
        "several, more may be told. It is for one release: those of other runs on the same images add up.",
        COUNTS[guarantee["class_counts"]],
        "Taken as public: the number of training images, which of all images are training images, the names of the "
        "classes, size and format of the images.",
        "No figure of real images is told here, as none was noised. ledger.json holds every use of the images.",
    ]


def tag(guarantee: Mapping[str, Any]) -> str:
    """Of a card's header."""
    return "differential-privacy" if guarantee["private"] else "not-private"


def _trained(summary: Mapping[str, Any]) -> str:
    return f"trained {'with' if summary['guarantee']['private'] else 'without'} differential privacy"


def student(summary: Mapping[str, Any], files: Mapping[str, str], use: str) -> Iterator[Block]:
    """The sections of a Student's model card.

    Args:
        summary: the dictionary of metrics.json.
        files: name -> what it is, of the files beside the card.
        use: the code that opens it.
    """
    data, config = summary["dataset"], summary["config"]
    yield (
        "text",
        f"A {config['student_arch']} of {summary['student']['parameters']:,} weights, trained on synthetic images and "
        f"{LABELS[config.get('labels', 'soft')]}. Generator and Teacher were {_trained(summary)}. It saw no "
        "real image.",
    )
    yield from _guarantee(summary)
    yield "heading", "Use"
    yield "code", use
    yield "table", [["output", "class"], *([str(at), name] for at, name in enumerate(data["class_names"]))]
    yield "table", [["file", "what it is"], *([name, words] for name, words in files.items())]
    yield from _made_by(summary)


def images(summary: Mapping[str, Any], facts: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[Block]:
    """The sections of a data card; ``facts``: as of :func:`kr_fast.report.exported.data_card.text`."""
    yield "text", description(summary, facts)
    yield from _guarantee(summary)
    yield "table", [["column", "what it is"], *map(list, columns.items())]
    names = zip(summary["dataset"]["class_names"], facts["counts"], strict=True)
    yield "table", [["label", "class", "images"], *([at, name, count] for at, (name, count) in enumerate(names))]
    yield from _made_by(summary)


def description(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A set of synthetic images in a sentence."""
    height, width, channels = facts["shape"]
    return (
        f"{facts['count']:,} synthetic images of {len(summary['dataset']['class_names'])} classes, {height} x {width} "
        f"x {channels}, drawn by a class-conditional diffusion model that was {_trained(summary)}. None is real."
    )


def _guarantee(summary: Mapping[str, Any]) -> Iterator[Block]:
    first, *rest = sentences(summary["guarantee"])
    yield "heading", "The guarantee"
    yield "text", first
    if rest:
        yield "note", rest


def _made_by(summary: Mapping[str, Any]) -> Iterator[Block]:
    config = summary["config"]
    yield "heading", "How it was made"
    yield "table", [["option", "value"], *([name, str(config[name])] for name in OPTIONS if name in config)]
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]
